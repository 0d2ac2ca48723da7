"""What a user waits for, and in how much memory, at Stable Diffusion 1.4's size, 512x512, through the pipeline with
random weights: a plain sample, the first edit of a picture, another edit of it, several at once.

    python -m benchmarks.latency --out bench_out/latency.md --dtype float16 bfloat16
    python -m benchmarks.latency --out bench_out/latency.md --dtype float16 --compile

`--compile` measures once more with the U-Net's residual and feed-forward blocks compiled, all that attention control
does not touch.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import PIL.Image
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from mde_edit import MDEEditPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.engine import FAST_STEPS, GIB, machine, sd14, sd_scheduler


SOURCE, PROMPT = "a cat wearing a straw hat", "a dog wearing a red hat"
OTHERS = ["a fox wearing a green hat", "a bear wearing a blue hat", "a pig wearing a black hat"]
EXAMPLE = Path(__file__).parents[1] / "examples" / "cat_straw_hat"
FILES = ("image", "dog", "red")
STEPS = 50
PER_PASS = (1, 2, 4)  # edits that share the passes of the U-Net
COMPILED = (ResnetBlock2D, FeedForward)


def make_pipe(unet, vae, tokenizer: str = "emoji_ldm") -> MDEEditPipeline:
    """A pipeline around two models with random weights, its text encoder of Stable Diffusion 1.4's shape."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer, subfolder="tokenizer")
    dim = unet.config.cross_attention_dim
    config = CLIPTextConfig(
        hidden_size=dim,
        intermediate_size=4 * dim,
        num_hidden_layers=12,
        num_attention_heads=max(1, dim // 64),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    text = CLIPTextModel(config).to(unet.device, unet.dtype).eval()
    pipe = MDEEditPipeline(vae, text, tokenizer, unet, sd_scheduler(), None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compile_regions(unet: torch.nn.Module) -> None:
    """Compile every block that holds no attention, in place."""
    torch._dynamo.config.recompile_limit = 128  # a graph per shape of the blocks, with and without gradients
    for module in unet.modules():
        if isinstance(module, COMPILED):
            module.compile(dynamic=True)


def waits(pipe: MDEEditPipeline, size: int) -> dict[str, Callable[[], object]]:
    """What is waited for, in this order: name -> its call."""
    image, animal, hat = (PIL.Image.open(EXAMPLE / f"{name}.png").resize((size, size)) for name in FILES)
    plain = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    inverted = {}

    def edit(steps: int, *prompts: str, first: bool = False, **settings):
        if first:
            inverted[steps] = pipe.invert(image, SOURCE, num_inference_steps=steps, method="direct")
        words = [prompt.split() for prompt in prompts]
        masks = {
            "object_masks": [{noun: animal} for _, noun, *_ in words],
            "attribute_masks": [{color: hat} for *_, color, _ in words],
        }
        pipe(list(prompts), inverted[steps], **masks, **settings)

    fast, prompts = pipe.presets["fast"], (PROMPT, *OTHERS)
    together = {
        f"{len(prompts)} edits of the picture, {n} per pass": partial(edit, STEPS, *prompts, edits_per_pass=n)
        for n in PER_PASS
    }
    return {
        f"plain sample, {STEPS} steps": lambda: plain(SOURCE, height=size, width=size, num_inference_steps=STEPS),
        f"first edit, defaults, {STEPS} steps": lambda: edit(STEPS, PROMPT, first=True),
        "another edit of the picture": lambda: edit(STEPS, OTHERS[0]),
        f"first edit, `fast`, {FAST_STEPS} steps": lambda: edit(FAST_STEPS, PROMPT, first=True, **fast),
        "another edit of it": lambda: edit(FAST_STEPS, OTHERS[0], **fast),
        **together,
    }


def measure(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and peak GiB on the GPU with the weights (NaN without one)."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / GIB if cuda else float("nan")


def rows(pipe: MDEEditPipeline, size: int, repeats: int) -> Iterator[str]:
    """Of Markdown: each wait for the first time and the shortest of `repeats` after it, with its memory."""
    for what, call in waits(pipe, size).items():
        first, *then = [measure(call) for _ in range(1 + max(1, repeats))]
        memory = "–" if math.isnan(then[-1][1]) else f"{then[-1][1]:.2f}"
        yield f"| {what} | {first[0]:.2f} | {min(seconds for seconds, _ in then):.2f} | {memory} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    parser.add_argument("--dtype", nargs="+", default=["float16"], choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args(argv)
    device, lines = "cuda" if torch.cuda.is_available() else "cpu", [f"{machine()}, torch {torch.__version__}"]
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def add(name: str, pipe: MDEEditPipeline) -> None:
        lines.extend(["", f"| {name} | the first time, s | then, s | memory, GiB |", "|---" * 4 + "|"])
        for row in rows(pipe, pipe.unet.config.sample_size * pipe.vae_scale_factor, args.repeats):
            lines.append(row)
            print(row, flush=True)
            args.out.write_text("\n".join(lines) + "\n")

    for dtype in args.dtype:
        with torch.device(device):
            unet, vae = (model.to(getattr(torch, dtype)) for model in sd14())
        pipe = make_pipe(unet, vae)
        add(dtype, pipe)
        if args.compile:
            compile_regions(pipe.unet)
            add(f"{dtype}, blocks compiled", pipe)


if __name__ == "__main__":
    main()
