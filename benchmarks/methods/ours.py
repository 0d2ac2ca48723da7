"""MDE-Edit in its variants, the controls that share its parts, and the floors under every method."""

from dataclasses import asdict, replace

import numpy as np
from mde_edit import Inversion, MDEEditPipeline
from mde_edit.denoise import PRESETS, Settings
from PIL import Image

from benchmarks.cases import Case
from benchmarks.methods.base import Method, encode


def invert(pipe: MDEEditPipeline, case: Case, steps: int, inversion: str, guidance_scale: float) -> Inversion:
    return pipe.invert(case.image, case.source_prompt, steps, method=inversion, guidance_scale=guidance_scale)


def mde(
    pipe: MDEEditPipeline,
    case: Case,
    steps: int,
    seed: int,
    inversion: str,
    guidance_scale: float,
    masks: str = "drawn",
    **settings,
) -> Image.Image:
    """Invert, then edit with all masks, which are the case's or, "found", the model's own by the words of the source.
    Deterministic: `seed` is not used."""
    inverted = invert(pipe, case, steps, inversion, guidance_scale)
    case = case if masks == "drawn" else with_found_masks(pipe, case, inverted)
    given = {"object_masks": case.object_masks, "attribute_masks": case.attribute_masks}
    return pipe(case.target_prompt, inverted, **given, **settings).images[0]


def with_found_masks(pipe: MDEEditPipeline, case: Case, inversion: Inversion) -> Case:
    """`case` with each region where attention finds its source words; of twins, whose words do not say which one is
    meant, and of what is found nowhere, the region stays."""
    regions = []
    for region in case.regions:
        try:
            regions.append(replace(region, mask=pipe.generate_mask(inversion, region.source)))
        except ValueError:
            regions.append(region)
    return replace(case, regions=tuple(regions))


def prompt_to_prompt(
    pipe: MDEEditPipeline, case: Case, steps: int, seed: int, inversion: str, guidance_scale: float, **settings
) -> Image.Image:
    """Inversion and attention injection alone: no masks, hence no guidance and no blending."""
    return pipe(case.target_prompt, invert(pipe, case, steps, inversion, guidance_scale), **settings).images[0]


def reconstruction(
    pipe: MDEEditPipeline, case: Case, steps: int, seed: int, inversion: str, guidance_scale: float
) -> Image.Image:
    """The inversion played back with the source prompt: what an edit cannot do better in the background."""
    latents = invert(pipe, case, steps, inversion, guidance_scale).source_latents(steps)
    return pipe.decode(latents, "pil")[0][0]


def roundtrip(pipe: MDEEditPipeline, case: Case, steps: int, seed: int) -> Image.Image:
    """The autoencoder alone."""
    return pipe.decode(encode(pipe, case.image), "pil")[0][0]


def copy(pipe: MDEEditPipeline, case: Case, steps: int, seed: int) -> Image.Image:
    """The source picture: what doing nothing scores."""
    return Image.fromarray(np.asarray(case.image))


def ideal(pipe: MDEEditPipeline, case: Case, steps: int, seed: int) -> Image.Image:
    """The picture that a perfect edit gives: what the figures can reach."""
    return Image.fromarray(np.asarray(case.ideal))


def ideal_roundtrip(pipe: MDEEditPipeline, case: Case, steps: int, seed: int) -> Image.Image:
    """The same through the autoencoder: what an edit of latents can reach."""
    return pipe.decode(encode(pipe, case.ideal), "pil")[0][0]


CEILING = "ideal_vae"  # the best that an edit of latents can do
DIRECT = {"inversion": "direct", "guidance_scale": 2.5}
NULL_TEXT = {"inversion": "null_text", "guidance_scale": 1.5}
DEFAULTS = asdict(Settings())
MDE = {**DIRECT, **DEFAULTS, "masks": "drawn"}
KNOBS = {
    "inversion": ("direct", "null_text"),
    "guidance_scale": (1.5, 2.5, 4.0),
    "cross_replace_steps": (0.6, 0.8),
    "self_replace_steps": (0.2, 0.5),
}

METHODS = {
    "source": Method(copy, "floor", "the picture unedited"),
    "vae": Method(roundtrip, "floor", "the autoencoder's round trip"),
    "reconstruction": Method(
        reconstruction,
        "floor",
        "null-text inversion (Mokady et al., CVPR 2023) played back",
        NULL_TEXT,
    ),
    "ideal": Method(ideal, "floor", "the ideal picture: a perfect edit", needs_ideal=True),
    CEILING: Method(ideal_roundtrip, "floor", "the ideal picture after the autoencoder", needs_ideal=True),
    "mde": Method(
        mde,
        "masks",
        "this project's defaults, at the embedded model's guidance scale",
        MDE,
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
        {**NULL_TEXT, **DEFAULTS, **PRESETS["paper"]},
        {"guidance_scale": (1.5, 2.5, 4.0)},
    ),
    "mde_released": Method(
        mde,
        "masks",
        "what the official code computes: the spatial ratio at 1.5, an object loss without gradient",
        {**NULL_TEXT, **DEFAULTS, **PRESETS["released"]},
        {"guidance_scale": (1.5, 2.5, 4.0)},
    ),
    **{
        name: Method(
            mde,
            "masks",
            f"Table 2: {text}, everything else as in `mde`",
            {**MDE, **dict.fromkeys(without, 0.0)},
        )
        for name, text, without in (
            ("none", "neither loss", ("oal_weight", "ccl_weight")),
            ("oal", "the object loss", ("ccl_weight",)),
            ("ccl", "the color loss", ("oal_weight",)),
            ("both", "both losses", ()),
        )
    },
    "p2p_blend": Method(
        mde,
        "masks",
        "null-text inversion and prompt-to-prompt (Hertz et al., ICLR 2023) with our blending: the control",
        {**NULL_TEXT, **DEFAULTS, "oal_weight": 0.0, "ccl_weight": 0.0},
        {**KNOBS, "background_blend": (0.3, 0.6, 1.0)},
    ),
    "p2p": Method(
        prompt_to_prompt,
        "prompt",
        "null-text inversion and prompt-to-prompt, word swap and refinement, without LocalBlend",
        {**NULL_TEXT, **{name: DEFAULTS[name] for name in ("cross_replace_steps", "self_replace_steps")}},
        KNOBS,
    ),
}
