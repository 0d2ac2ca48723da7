"""The example scenes on the embedded model: does the method do, on real attention, what it says?"""

import json
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import StableDiffusionPipeline
from mde_edit import MDEEditPipeline
from mde_edit.attention_processors import attention_layers, select_loss_layers
from mde_edit.masks import binarize_mask, dilate_mask, resize_mask
from mde_edit.prompts import align_tokens
from mde_edit.tools.measure import as_array, psnr

from .oracle import naive_edit


ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(p.parent.name for p in (ROOT / "examples").glob("*/edit.json"))


@pytest.fixture(scope="module")
def pipe():
    pipe = MDEEditPipeline.from_pretrained(ROOT / "emoji_ldm")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_example(name):
    folder = ROOT / "examples" / name
    case = json.loads((folder / "edit.json").read_text())
    for kind in ("object", "attribute"):
        case[kind] = {word: PIL.Image.open(folder / path) for word, path in case.get(kind, {}).items()}
    return {**case, "image": PIL.Image.open(folder / "image.png")}


def test_stable_diffusion_loads_the_embedded_model_without_our_code():
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "emoji_ldm")
    pipe.set_progress_bar_config(disable=True)
    shown = {}
    for color in ("red", "blue"):
        generator = torch.Generator().manual_seed(0)
        picture = pipe(f"a dog wearing a {color} hat", num_inference_steps=15, guidance_scale=4, generator=generator)
        red, _, blue = as_array(picture.images[0]).reshape(-1, 3).T
        shown[color] = {"red": (red - blue > 0.4).mean(), "blue": (blue - red > 0.4).mean()}
    for color, other in (("red", "blue"), ("blue", "red")):  # each hat has its own color, and enough of it to be a hat
        assert shown[color][color] > 0.02 and shown[color][color] > shown[other][color] + 0.01, shown


@pytest.mark.slow
@torch.no_grad()
def test_null_text_reconstructs_within_one_db_of_the_vae_and_direct_exactly(pipe):
    case = load_example("cat_straw_hat")
    source = as_array(case["image"])
    pixels = pipe.image_processor.preprocess(case["image"].convert("RGB"))
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    floor = psnr(source, as_array(pipe.decode(latents, "pil")[0][0]))
    # The default stops each step at 1e-5, which on this picture is where the decibel ends (33.4 of 34.5 dB).
    exact = {"guidance_scale": case["guidance_scale"], "early_stop_epsilon": 3e-6}
    null_text = pipe.invert(case["image"], case["source_prompt"], **exact)
    assert psnr(source, as_array(pipe.decode(null_text.latents[-1:], "pil")[0][0])) > floor - 1
    direct = pipe.invert(case["image"], case["source_prompt"], method="direct")
    assert torch.allclose(direct.latents[-1:], latents, atol=1e-6)


@pytest.mark.parametrize(
    "name", [name if name == "cat_straw_hat" else pytest.param(name, marks=pytest.mark.slow) for name in EXAMPLES]
)
def test_guidance_lowers_the_losses_and_pulls_attention_into_the_masks(pipe, name):
    """Against the same edit without guidance: over the guided steps, edited words attend more inside their masks."""
    case = load_example(name)
    inversion = pipe.invert(
        case["image"], case["source_prompt"], 25, method="direct", guidance_scale=case["guidance_scale"]
    )
    edit = {"object_masks": case["object"], "attribute_masks": case["attribute"], "output_attention_maps": True}
    guided = pipe(case["prompt"], inversion, optimization_threshold=1.0, **edit)
    free = pipe(case["prompt"], inversion, optimization_iterations=0, **edit)
    first, last = guided.losses[0][0], guided.losses[0][-1]
    assert all(last[loss] < first[loss] for loss in ("oal", "ccl") if loss in first)
    gains = {}
    for word, mask in {**case["object"], **case["attribute"]}.items():
        inside = resize_mask(torch.from_numpy(np.asarray(mask) > 127), guided.attention_maps[0][word].shape[-2:])
        shares = []
        for out in (free, guided):
            after = out.attention_maps[0][word][:, 1]  # (guided steps, h, w)
            shares.append(float(((after * inside).sum((-1, -2)) / after.sum((-1, -2))).mean()))
        gains[word] = shares[1] - shares[0]
    # A word that looks nowhere else by itself (0.85 of a mask's soft edge is all) has nothing to gain.
    assert np.mean(list(gains.values())) > 0 and min(gains.values()) > -0.01, gains


@pytest.mark.slow
def test_the_engine_is_faster_than_the_naive_algorithm(pipe, capsys):
    """The same edit by both, timed; prints what the README quotes."""
    case = load_example("cat_straw_hat")
    inversion = pipe.invert(
        case["image"], case["source_prompt"], method="direct", guidance_scale=case["guidance_scale"]
    )
    size = tuple(inversion.latents.shape[-2:])
    layers = attention_layers(pipe.unet, size)
    settings = {
        "guidance_scale": case["guidance_scale"],
        "cross_replace_steps": 0.8,
        "self_replace_steps": 0.5,
        "oal_weight": 1.0,
        "ccl_weight": 1.25,
        "ccl_form": "token_ratio",
        "optimization_steps": 0.4,
        "optimization_iterations": 15,
        "optimization_threshold": 1.0,
        "step_size": 1.0,
        "max_update": 0.05,
        "background_blend": 0.3,
    }
    masks = [("object", "dog", 2, case["object"]["dog"]), ("attribute", "red", 5, case["attribute"]["red"])]
    binary = [torch.from_numpy(np.asarray(m) > 127) for *_, m in masks]
    loss_layers = select_loss_layers(layers)
    soft = [resize_mask(m, loss_layers[0].size) for m in binary]
    covered = sum(resize_mask(m, size) for m in binary) > 0
    start = time.perf_counter()
    naive = naive_edit(
        pipe,
        inversion,
        pipe.embed(case["source_prompt"]).detach(),
        pipe.embed(case["prompt"]).detach(),
        align_tokens(pipe.tokenizer, case["source_prompt"], case["prompt"]),
        [(kind, (i,), s.flatten(), binarize_mask(s).flatten()) for (kind, _, i, _), s in zip(masks, soft)],
        dilate_mask(covered.float(), 1),
        [layer.name for layer in loss_layers],
        {layer.name for layer in layers if not layer.is_cross and layer.pixels <= size[0] * size[1] // 4},
        settings,
    )
    naive_seconds, start = time.perf_counter() - start, time.perf_counter()
    out = pipe(
        case["prompt"],
        inversion,
        object_masks=case["object"],
        attribute_masks=case["attribute"],
        mask_dilation=1,
        output_type="latent",
        **settings,
    )
    seconds = time.perf_counter() - start
    difference = float((out.images - naive).abs().max())
    with capsys.disabled():
        print(
            f"\nnaive {naive_seconds:.1f} s, engine {seconds:.1f} s, {naive_seconds / seconds:.2f}x;"
            f" max |dz| {difference:.1e}"
        )
    assert naive_seconds > 1.2 * seconds
