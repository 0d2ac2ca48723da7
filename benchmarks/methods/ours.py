"""MDE-Edit in its variants, the controls that share its parts, and the floors under every method."""

import numpy as np
import torch
from mde_edit import Inversion, MDEEditPipeline
from PIL import Image

from benchmarks.cases import Case
from benchmarks.methods.base import Method, encode


def invert(pipe: MDEEditPipeline, case: Case, steps: int, inversion: str, guidance_scale: float) -> Inversion:
    return pipe.invert(case.image, case.source_prompt, steps, method=inversion, guidance_scale=guidance_scale)


def mde(
    pipe: MDEEditPipeline, case: Case, steps: int, seed: int, inversion: str, guidance_scale: float, **settings
) -> Image.Image:
    """Invert, then edit with all masks. Deterministic: `seed` is not used."""
    inverted = invert(pipe, case, steps, inversion, guidance_scale)
    masks = {"object_masks": case.object_masks, "attribute_masks": case.attribute_masks}
    return pipe(case.target_prompt, inverted, **masks, **settings).images[0]


def prompt_to_prompt(
    pipe: MDEEditPipeline, case: Case, steps: int, seed: int, inversion: str, guidance_scale: float, **settings
) -> Image.Image:
    """Inversion and attention injection alone: no masks, hence no guidance and no blending."""
    return pipe(case.target_prompt, invert(pipe, case, steps, inversion, guidance_scale), **settings).images[0]


def reconstruction(
    pipe: MDEEditPipeline, case: Case, steps: int, seed: int, inversion: str, guidance_scale: float
) -> Image.Image:
    """The inversion played back with the source prompt: what an edit cannot do better in the background."""
    latents = invert(pipe, case, steps, inversion, guidance_scale).latents[-1:]
    with torch.no_grad():
        return pipe.decode(latents.to(pipe.device, pipe.vae.dtype), "pil")[0][0]


@torch.no_grad()
def roundtrip(pipe: MDEEditPipeline, case: Case, steps: int, seed: int) -> Image.Image:
    """The autoencoder alone."""
    return pipe.decode(encode(pipe, case.image), "pil")[0][0]


def copy(pipe: MDEEditPipeline, case: Case, steps: int, seed: int) -> Image.Image:
    """The source picture: what doing nothing scores."""
    return Image.fromarray(np.asarray(case.image))


DIRECT = {"inversion": "direct", "guidance_scale": 2.5}
SHARED = {**DIRECT, "oal_weight": 1.0, "ccl_weight": 0.3, "optimization_iterations": 5}
KNOBS = {
    "inversion": ("direct", "null_text"),
    "guidance_scale": (1.5, 2.5, 4.0),
    "cross_replace_steps": (0.6, 0.8),
    "self_replace_steps": (0.2, 0.5),
}
OPTIONS = {
    "cross_replace_steps": 0.8,
    "self_replace_steps": 0.5,
    "optimization_steps": 0.4,
    "ccl_form": "both",
    "step_size": 1.0,
    "max_update": 0.02,
    "mask_dilation": None,
    "background_blend": 0.3,
}

METHODS = {
    "source": Method(copy, "floor", "the picture unedited"),
    "vae": Method(roundtrip, "floor", "the autoencoder's round trip"),
    "reconstruction": Method(
        reconstruction,
        "floor",
        "null-text inversion (Mokady et al., CVPR 2023) played back",
        {"inversion": "null_text", "guidance_scale": 1.5},
    ),
    "mde": Method(
        mde,
        "masks",
        "this project's defaults, at the embedded model's guidance scale and iterations",
        {**SHARED, **OPTIONS},
        {
            "guidance_scale": (2.5, 4.0, 6.0),
            "cross_replace_steps": (0.6, 0.8),
            "self_replace_steps": (0.2, 0.5),
            "ccl_weight": (0.3, 1.25),
            "background_blend": (0.3, 0.6, 1.0),
        },
    ),
    "mde_paper": Method(
        mde,
        "masks",
        "the paper's text: null-text inversion, Eq. 6 alone, lambda_2 = 1.25, no cap",
        {
            "inversion": "null_text",
            "guidance_scale": 1.5,
            **OPTIONS,
            "oal_weight": 1.0,
            "optimization_iterations": 15,
            **MDEEditPipeline.presets["paper"],
        },
        {"guidance_scale": (1.5, 2.5, 4.0)},
    ),
    "mde_released": Method(
        mde,
        "masks",
        "what the official code computes: the spatial ratio at 1.5, an object loss without gradient",
        {
            "inversion": "null_text",
            "guidance_scale": 1.5,
            **OPTIONS,
            "optimization_iterations": 15,
            **MDEEditPipeline.presets["released"],
        },
        {"guidance_scale": (1.5, 2.5, 4.0)},
    ),
    **{
        name: Method(
            mde,
            "masks",
            f"Table 2: {text}, everything else as in `mde`",
            {**SHARED, **OPTIONS, "oal_weight": oal, "ccl_weight": ccl},
        )
        for name, text, oal, ccl in (
            ("none", "neither loss", 0.0, 0.0),
            ("oal", "the object loss", 1.0, 0.0),
            ("ccl", "the color loss", 0.0, 0.3),
            ("both", "both losses", 1.0, 0.3),
        )
    },
    "p2p_blend": Method(
        mde,
        "masks",
        "null-text inversion and prompt-to-prompt (Hertz et al., ICLR 2023) with our blending: the control",
        {
            "inversion": "null_text",
            "guidance_scale": 1.5,
            **OPTIONS,
            "oal_weight": 0.0,
            "ccl_weight": 0.0,
        },
        {**KNOBS, "background_blend": (0.3, 0.6, 1.0)},
    ),
    "p2p": Method(
        prompt_to_prompt,
        "prompt",
        "null-text inversion and prompt-to-prompt, word swap and refinement, without LocalBlend",
        {
            "inversion": "null_text",
            "guidance_scale": 1.5,
            "cross_replace_steps": 0.8,
            "self_replace_steps": 0.5,
        },
        KNOBS,
    ),
}
