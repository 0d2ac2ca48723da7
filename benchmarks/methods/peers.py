"""The editing methods that diffusers ships, each on the components of the pipeline that it is compared with.

All but LEDITS++ run the DDIM schedule that MDE-Edit runs; masks are MDE-Edit's M of Eq. 7. `steps` is the length of the
schedule, of which a method with a `strength` runs that share.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import (
    CycleDiffusionPipeline,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    LEditsPPPipelineStableDiffusion,
    StableDiffusionDiffEditPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPix2PixZeroPipeline,
)
from diffusers.utils import logging
from mde_edit import MDEEditPipeline
from mde_edit.masks import edit_mask
from PIL import Image

from benchmarks.cases import Case
from benchmarks.methods.base import Method


SHARED = ("vae", "text_encoder", "tokenizer", "unet", "feature_extractor")


@contextmanager
def peer(pipe: MDEEditPipeline, kind: type[DiffusionPipeline], **parts) -> Iterator[DiffusionPipeline]:
    """A `kind` pipeline of the components of `pipe` and `parts`; at the end the U-Net is as it was.

    Its attention processors and gradients are what the peers change. Their warnings (deprecated, no safety checker)
    would come once per edit and are held back.
    """
    processors, verbosity = pipe.unet.attn_processors, logging.get_verbosity()
    gradients = [(parameter, parameter.requires_grad, parameter.grad) for parameter in pipe.unet.parameters()]
    logging.set_verbosity_error()
    try:
        for parameter, _, _ in gradients:
            parameter.requires_grad_(False)
            parameter.grad = None  # where one is, Pix2PixZero's would be added to it
        components = {name: pipe.components[name] for name in SHARED}
        built = kind(**components, **parts, safety_checker=None, requires_safety_checker=False)
        built.set_progress_bar_config(disable=True)
        yield built
    finally:
        pipe.unet.set_attn_processor(processors)
        for parameter, required, gradient in gradients:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        logging.set_verbosity(verbosity)


def random_source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)  # on the CPU: the same numbers on every device


def latent_mask(pipe: MDEEditPipeline, mask: np.ndarray) -> torch.Tensor:
    """(1, 1, h, w) in {0, 1}: the latents that a mask of the picture touches, grown as MDE-Edit grows its own."""
    size = tuple(side // pipe.vae_scale_factor for side in mask.shape)
    return edit_mask([torch.from_numpy(mask)], size)[None, None].to(pipe.device, pipe.unet.dtype)


def sdedit(pipe: MDEEditPipeline, case: Case, steps: int, seed: int, **settings) -> Image.Image:
    """Noise the picture and denoise it with the target prompt."""
    with peer(pipe, StableDiffusionImg2ImgPipeline, scheduler=pipe.ddim_scheduler(steps)) as sd:
        run = {"num_inference_steps": steps, "generator": random_source(seed), **settings}
        return sd(case.target_prompt, case.image, **run).images[0]


def inpaint(pipe: MDEEditPipeline, case: Case, steps: int, seed: int, **settings) -> Image.Image:
    """SDEdit with the noised source put back outside the masks after every step."""
    width, height = case.image.size
    with peer(pipe, StableDiffusionInpaintPipeline, scheduler=pipe.ddim_scheduler(steps)) as sd:
        run = {"height": height, "width": width, "num_inference_steps": steps, "generator": random_source(seed)}
        return sd(case.target_prompt, case.image, latent_mask(pipe, case.union), **run, **settings).images[0]


def diffedit(
    pipe: MDEEditPipeline, case: Case, steps: int, seed: int, source_guidance_scale: float, **settings
) -> Image.Image:
    """DDIM inversion, then DDIM with the target prompt, the inverted latents put back outside the masks."""
    schedulers = {
        "scheduler": pipe.ddim_scheduler(steps),
        "inverse_scheduler": pipe.ddim_scheduler(steps, inverse=True),
    }
    with peer(pipe, StableDiffusionDiffEditPipeline, **schedulers) as sd:
        run = {"num_inference_steps": steps, "inpaint_strength": settings["inpaint_strength"]}
        run["generator"] = random_source(seed)
        inverted = sd.invert(case.source_prompt, case.image, guidance_scale=source_guidance_scale, **run).latents
        run["guidance_scale"] = settings["guidance_scale"]
        return sd(case.target_prompt, latent_mask(pipe, case.union), inverted, **run).images[0]


def ledits_pp(
    pipe: MDEEditPipeline,
    case: Case,
    steps: int,
    seed: int,
    skip: float,
    edit_guidance_scale: float,
    source_guidance_scale: float,
    **settings,
) -> Image.Image:
    """Edit-friendly inversion; then guidance towards every region's target and away from its source, in its mask."""
    scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.ddim_scheduler(steps).config, algorithm_type="sde-dpmsolver++", solver_order=2
    )
    regions = case.regions
    concepts = [region.target for region in regions] + [region.source for region in regions]
    masks = torch.cat([latent_mask(pipe, region.mask) for region in regions] * 2)  # (concepts, 1, h, w)

    def confine(unet, inputs, output):
        # What `user_mask` does, which is one mask for all concepts.
        empty, guided = output.sample[:1], output.sample[1:]
        output.sample = torch.cat([empty, empty + masks * (guided - empty)])

    with peer(pipe, LEditsPPPipelineStableDiffusion, scheduler=scheduler) as sd:
        sd.invert(case.image, num_inversion_steps=steps, skip=skip, generator=random_source(seed))
        with pipe.unet.register_forward_hook(confine):
            return sd(
                editing_prompt=[f"a {words}" for words in concepts],
                reverse_editing_direction=[False] * len(regions) + [True] * len(regions),
                edit_guidance_scale=[edit_guidance_scale] * len(regions) + [source_guidance_scale] * len(regions),
                **settings,
            ).images[0]


def cycle_diffusion(pipe: MDEEditPipeline, case: Case, steps: int, seed: int, **settings) -> Image.Image:
    """Denoise with the target prompt and the noise that, with the source prompt, gives the source."""
    with peer(pipe, CycleDiffusionPipeline, scheduler=pipe.ddim_scheduler(steps)) as sd:
        run = {"num_inference_steps": steps, "generator": random_source(seed), **settings}
        return sd(case.target_prompt, case.source_prompt, case.image, **run).images[0]


def pix2pix_zero(
    pipe: MDEEditPipeline, case: Case, steps: int, seed: int, num_reg_steps: int, **settings
) -> Image.Image:
    """Regularized DDIM inversion, then the prompts' difference added, held to the source's cross-attention."""
    parts = {"scheduler": pipe.ddim_scheduler(steps), "inverse_scheduler": pipe.ddim_scheduler(steps, inverse=True)}
    parts |= {"caption_generator": None, "caption_processor": None}
    with peer(pipe, StableDiffusionPix2PixZeroPipeline, **parts) as sd:
        run = {"num_inference_steps": steps, "generator": random_source(seed)}
        inverted = sd.invert(case.source_prompt, case.image, num_reg_steps=num_reg_steps, **run).latents
        ends = (sd.get_embeds([prompt]) for prompt in (case.source_prompt, case.target_prompt))
        return sd(case.source_prompt, *ends, latents=inverted, **run, **settings).images[0]


SCALES = (1.5, 2.5, 4.0, 7.5)

METHODS = {
    "sdedit": Method(
        sdedit,
        "prompt",
        "SDEdit (Meng et al., ICLR 2022) in latent space, with DDIM steps",
        {"strength": 0.7, "guidance_scale": 7.5},
        {"strength": (0.4, 0.5, 0.6, 0.7, 0.8), "guidance_scale": SCALES},
    ),
    "inpaint": Method(
        inpaint,
        "masks",
        "Blended Latent Diffusion (Avrahami et al., SIGGRAPH 2023) without its fine-tuned decoder, on the union mask",
        {"strength": 0.9, "guidance_scale": 7.5},
        {"strength": (0.6, 0.75, 0.9, 1.0), "guidance_scale": SCALES},
    ),
    "diffedit": Method(
        diffedit,
        "masks",
        "DiffEdit (Couairon et al., ICLR 2023) with the given union mask in place of its own",
        {"inpaint_strength": 0.7, "guidance_scale": 1.5, "source_guidance_scale": 1.5},
        {"inpaint_strength": (0.5, 0.7, 0.8, 1.0), "guidance_scale": SCALES, "source_guidance_scale": (1.0, 1.5, 2.5)},
    ),
    "ledits_pp": Method(
        ledits_pp,
        "masks",
        "LEDITS++ (Brack et al., CVPR 2024), every region's target and source a concept with the region's mask",
        {
            "skip": 0.5,
            "edit_guidance_scale": 2.5,
            "source_guidance_scale": 0.0,
            "edit_threshold": 0.75,
            "use_intersect_mask": True,
        },
        {
            "skip": (0.0, 0.15, 0.3, 0.5),
            "edit_guidance_scale": (1.5, 2.5, 4.0, 6.0, 10.0),
            "source_guidance_scale": (0.0, 1.5, 2.5, 3.5),
            "edit_threshold": (0.0, 0.25, 0.5, 0.75, 0.9),
            "use_intersect_mask": (True, False),
        },
    ),
    "cycle_diffusion": Method(
        cycle_diffusion,
        "prompt",
        "CycleDiffusion (Wu and De la Torre, ICCV 2023), as published",
        {"strength": 0.9, "guidance_scale": 2.5, "source_guidance_scale": 1.0, "eta": 0.5},
        {
            "strength": (0.6, 0.7, 0.8, 0.9),
            "guidance_scale": SCALES,
            "source_guidance_scale": (1.0, 1.5, 2.5),
            "eta": (0.1, 0.5, 1.0),
        },
    ),
    "pix2pix_zero": Method(
        pix2pix_zero,
        "prompt",
        "pix2pix-zero (Parmar et al., SIGGRAPH 2023) with the edit direction between the two prompts, not the mean of"
        " many sentences about two concepts",
        {"guidance_scale": 2.5, "cross_attention_guidance_amount": 0.1, "num_reg_steps": 1},
        {
            "guidance_scale": SCALES,
            "cross_attention_guidance_amount": (0.03, 0.1, 0.3),
            "num_reg_steps": (0, 1, 5),
        },
    ),
}
