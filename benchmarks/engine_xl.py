"""What each pass of an edit costs with SDXL at 1024x1024, beside Stable Diffusion 1.4's at 512x512: FLOPs and peak of
activations, counted as benchmarks/engine.py counts them, on tensors without data.

    python -m benchmarks.engine_xl --out bench_out/engine_xl.md

On a GPU SDXL's programs run there, too, for their seconds and what the allocator held.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from mde_edit.denoise import PRESETS
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.engine import (
    FAST_STEPS,
    GIB,
    LATENT_SIZE,
    TERA,
    Figures,
    Pass,
    cost_of,
    machine,
    make_scene,
    make_vae,
    passes_of,
    run_whole,
    sd14,
    seconds_of,
    total,
)


LATENT_SIZE_XL = (128, 128)
NULL = Pass("null iteration")  # of the one inversion that an edit need not have


def sdxl() -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """SDXL's two large parts, with random weights."""
    unet = UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return unet.eval(), make_vae(scaling_factor=0.13025, sample_size=1024)


MODELS = {  # column: model, latents, dtype of the U-Net; the VAE's is float32
    "SD 1.4, float32": (sd14, LATENT_SIZE, torch.float32),
    "SDXL, float32": (sdxl, LATENT_SIZE_XL, torch.float32),
    "SDXL, float16": (sdxl, LATENT_SIZE_XL, torch.float16),
}
TIMED = "SDXL, float16"
PROGRAMS = {  # name: steps, settings
    "edit, defaults": (50, {}),
    f"edit, `fast`, {FAST_STEPS} steps": (FAST_STEPS, PRESETS["fast"]),
}


def column(model, latent_size: tuple[int, int], dtype: torch.dtype) -> tuple[dict[str, Figures], float]:
    """Of a model: its passes' and programs' costs by name, and its weights in bytes."""
    with FakeTensorMode():
        _, vae = model()
        unet, _ = in_dtype(dtype, model)
        scenes = {
            name: make_scene(unet, vae, latent_size, steps, **settings) for name, (steps, settings) in PROGRAMS.items()
        }
        scene = next(iter(scenes.values()))
        passes = {name: passes_of(one, "edit") + passes_of(one, "direct") for name, one in scenes.items()}
        kinds = {kind for counter in passes.values() for kind in counter} | {NULL}
        counted = {kind: cost_of(scene, kind) for kind in sorted(kinds)}
        costs = {kind: Figures(cost.flops, math.nan, cost.peak) for kind, cost in counted.items()}  # no seconds
        weights = sum(p.numel() * p.itemsize for part in (unet, vae) for p in part.parameters())
    programs = {f"**{name}, with its direct inversion**": total(counter, costs) for name, counter in passes.items()}
    return {**{str(kind): cost for kind, cost in costs.items()}, **programs}, weights


def measured(model, latent_size: tuple[int, int], dtype: torch.dtype) -> list[str]:
    """Markdown: seconds and peak, weights apart, of a model's programs, run once each on a GPU, and of the passes that
    an iteration of guidance and of null-text inversion are, the median of three."""
    with torch.device("cuda"):
        unet, vae = in_dtype(dtype, model)
    vae = vae.float()
    scenes = {
        name: make_scene(unet, vae, latent_size, steps, **settings) for name, (steps, settings) in PROGRAMS.items()
    }
    scene, lines = next(iter(scenes.values())), ["| program | seconds | peak, GiB |", "|---" * 3 + "|"]
    run_whole(list(scenes.values())[-1], "direct")  # to warm up
    runs = {f"**{name}**": (one, "edit") for name, one in scenes.items()}
    runs |= {f"direct inversion, {one.steps} steps": (one, "direct") for one in scenes.values()}
    for name, program in {f"plain sample, {scene.steps} steps": (scene, "sample"), **runs}.items():
        seconds, peak = run_whole(*program)
        lines.append(f"| {name} | {seconds:.1f} | {peak / GIB:.2f} |")
    for kind in (Pass("iteration", True, True), NULL):
        lines.append(f"| {kind}, one pass | {seconds_of(scene, kind):.3f} | |")
    return lines


def in_dtype(dtype: torch.dtype, make: Callable):
    """What `make` makes, in `dtype` from the start: parameters without data cannot be cast in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    args = parser.parse_args(argv)
    columns = {name: column(*model) for name, model in MODELS.items()}
    heads = " | ".join(f"{name}: TFLOP | peak, GiB" for name in columns)
    lines = [f"| pass | {heads} |", "|---" * (1 + 2 * len(columns)) + "|"]
    for row in next(iter(columns.values()))[0]:
        cells = [f"{costs[row].flops / TERA:.2f} | {costs[row].peak / GIB:.2f}" for costs, _ in columns.values()]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    weights = " | ".join(f"| {size / GIB:.2f}" for _, size in columns.values())
    lines += [f"| *weights, U-Net and VAE* | {weights} |", "", f"{machine()}, torch {torch.__version__}."]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")  # what is there, should the rest fail
    if torch.cuda.is_available():
        lines += ["", f"{TIMED}:", "", *measured(*MODELS[TIMED])]
        args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
