"""Real tiny components: a Stable Diffusion 1.4-shaped pipeline (4 levels, 8 heads, 77 tokens, CLIP BPE) that runs in
milliseconds, with random weights and sharpened attention so that maps are not flat."""

import copy
import json
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from mde_edit import MDEEditPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


torch.set_num_threads(1)  # models this small only lose by sharing their work

SOURCE = "a cat wearing a straw hat"
TARGET = "a dog wearing a red hat"
HEIGHT, WIDTH = 64, 128  # non-square
LATENTS = 8, 16  # the VAE's factor is 8

WORDS = (
    "a an and cat dog tiger wearing straw red blue hat cap ball on grass the big old wooden table polar bear".split()
)


def _byte_symbols():
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def make_tokenizer(folder, words, tokens=77):
    """CLIP's tokenizer with merges that make each of `words` one token; other words split into pieces."""
    symbols, merges = _byte_symbols(), []
    vocab = symbols + [s + "</w>" for s in symbols]
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            known = [m for m in merges if m in zip(pieces, pieces[1:])]
            pair = known[0] if known else (pieces[0], pieces[1])
            if not known:
                merges.append(pair)
                vocab.append("".join(pair))
            i = list(zip(pieces, pieces[1:])).index(pair)
            pieces[i : i + 2] = ["".join(pair)]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(vocab))}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=tokens)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), WORDS)


def text_config(tokenizer, **sizes) -> CLIPTextConfig:
    """A small text encoder's, for a tokenizer's words."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        intermediate_size=32,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )


def make_vae(**config) -> AutoencoderKL:
    """A small one of Stable Diffusion's factor, with random weights."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        **config,
    )
    return vae.eval()


@torch.no_grad()
def steepen(unet) -> None:
    """Random projections give flat maps, on which injection would be invisible."""
    for name, parameter in unet.named_parameters():
        if ".to_q." in name or ".to_k." in name:
            parameter.mul_(3)


def short_edit(pipe, inversion, masks, **settings):
    """A call that edits with everything on; its keyword arguments change it."""
    base = {
        "inversion": inversion,
        "object_masks": {"dog": masks[0]},
        "attribute_masks": {"red": masks[1]},
        "output_type": "latent",
        **settings,
    }

    def run(prompt=TARGET, pipe=pipe, **changes):
        return pipe(prompt, **{**base, **changes})

    return run


@pytest.fixture(scope="session")
def components(tokenizer):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    steepen(unet)
    text_encoder = CLIPTextModel(text_config(tokenizer, hidden_size=16, num_hidden_layers=2))
    vae = make_vae(scaling_factor=1.0)
    return {"unet": unet.eval(), "text_encoder": text_encoder.eval(), "vae": vae, "tokenizer": tokenizer}


def make_pipe(components, **scheduler):
    """A pipeline with Stable Diffusion 1.4's scheduler (PNDM), or one of another prediction type or spacing."""
    base = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    kind = DDIMScheduler if scheduler else PNDMScheduler
    extra = {"clip_sample": False, **scheduler} if scheduler else {"skip_prk_steps": True}
    pipe = MDEEditPipeline(
        **components,
        scheduler=kind(**base, **extra),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(components):
    return make_pipe(components)


@pytest.fixture(scope="session")
def image():
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = [np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 9)]
    return (np.stack(waves, -1) * 100 + 127).astype(np.uint8)


@pytest.fixture(scope="session")
def masks():
    """Two overlapping regions, (object, attribute)."""
    animal, hat = np.zeros((HEIGHT, WIDTH), np.uint8), np.zeros((HEIGHT, WIDTH), np.uint8)
    animal[24:56, 16:48] = 255
    hat[12:32, 24:56] = 255
    return animal, hat


@pytest.fixture(scope="session")
def inversion(components, image):
    return make_pipe(components).invert(image, SOURCE, num_inference_steps=5, method="direct", guidance_scale=3.0)


@contextmanager
def count_unet_calls(unet):
    """Counts forwards by batch size, and how many of them ran to the end; the fingerprint's small ones apart."""
    calls = Counter()
    probe = 2 ** len(unet.config.block_out_channels)

    def before(module, args, kwargs):
        if args[0].shape[-2:] == (probe, probe):
            calls["probe"] += 1
            return
        calls["forward"] += 1
        calls[f"batch {len(args[0])}"] += 1

    def after(module, args, output):
        calls["complete"] += args[0].shape[-2:] != (probe, probe)

    hooks = [unet.register_forward_pre_hook(before, with_kwargs=True), unet.register_forward_hook(after)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def state_of(pipe):
    """All of a pipe that a call might leave changed, to be compared before and after."""
    return (
        {name: id(p) for name, p in pipe.unet.attn_processors.items()},
        [p.requires_grad for p in pipe.unet.parameters()],
        id(pipe.scheduler),
        copy.deepcopy(dict(pipe.scheduler.config)),
        copy.deepcopy({k: v for k, v in vars(pipe.scheduler).items() if isinstance(v, (int, float, list, type(None)))}),
        {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()},
        [p.grad for p in pipe.unet.parameters()],
        torch.is_grad_enabled(),
    )
