# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""One edit, from settings to figures: read, check, invert, edit, measure. `mde-edit edit` does one, `batch` many."""

import argparse
import os
import platform
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers
from diffusers.utils import load_image
from safetensors import SafetensorError

from ..denoise import Settings
from ..inversion import Inversion
from ..masks import as_binary_mask, edit_mask, resize_mask, source_words, with_regions
from ..mde_pipeline import MDEEditPipeline
from ..pictures import on_white, read_pixels
from .measure import as_array, measured, psnr
from .options import mask_key, parse_region


# ---------------------------------------------------------------------------------------------------------------------
# What is read, each refused by the name of its setting
# ---------------------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """What was asked rightly and did not work; its text says what."""


@contextmanager
def reading(setting: str, value: str):
    """Say which setting it was when what it names cannot be read."""
    refused = (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError, RuntimeError, AssertionError)
    try:
        yield
    except (*refused, NotImplementedError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"`{setting}` {value!r}: {error}") from error


def read_picture(setting: str, file: str) -> PIL.Image.Image:
    """A file or URL, upright, with all of its channels."""
    with reading(setting, file):
        return load_image(file, convert_method=lambda image: image.copy())


class Regions:
    """The masks of a command. Files are looked at before anything is computed, words go to the pipeline as they are;
    points, boxes and what is to be found wait for the picture.

    Args:
        args: its settings.
        load_segmenter: `segment.load_segmenter`, called when there is something to segment. None: everything is in
            the place of what a segmenter would draw, as good as any mask to check the rest of an edit with.
        files: what is in the files that need not be read, by their names; boolean arrays (height, width) will do.
    """

    def __init__(self, args: argparse.Namespace, load_segmenter: Callable | None, files: dict[str, Any] | None = None):
        self.args, self.load_segmenter, self.segmenter = args, load_segmenter, None
        self.files: dict[str, Any] = dict(files or {})
        for setting in ("object", "attribute"):
            for masks in self.told(setting):
                for word, texts in masks.items():
                    for text in texts:
                        self.check(f"{setting}` `{word}", text)

    def told(self, setting: str) -> list[dict[str, list[str]]]:
        """{word: regions as text}, once for all target prompts or for each."""
        masks = getattr(self.args, setting, None) or {}
        return masks if isinstance(masks, list) else [masks]

    def check(self, setting: str, text: str) -> None:
        kind, value = parse_region(setting, text)
        if kind == "file":
            if value not in self.files:
                self.files[value] = read_picture(setting, value)
        elif kind != "word" and not self.args.segmenter:
            raise ValueError(f"`{setting}` {text!r} needs --segmenter, as in --segmenter facebook/sam-vit-base.")

    def draw(self, setting: str, text: str, image: PIL.Image.Image):
        """What the pipeline takes for a region: a picture, a boolean array (height, width), or a source word.

        Args:
            image: the picture, upright and in its own size.
        """
        kind, value = parse_region(setting, text)
        if kind == "file":
            return self.files[value]
        if kind == "word":
            return value
        if self.load_segmenter is None:
            return np.ones(image.size[::-1], bool)
        if self.segmenter is None:
            with reading("segmenter", self.args.segmenter):
                self.segmenter = self.load_segmenter(self.args.segmenter, self.args.detector, self.args.device)
        with reading(setting, text):
            return self.segmenter(image, **{"word" if kind == "find" else kind: value})

    def draw_all(self, setting: str, image: PIL.Image.Image) -> list[dict]:
        """{the pipeline's key of a word: its regions}, for all target prompts or for each."""

        def drawn(word: str, texts: list[str]):
            regions = [self.draw(f"{setting}` `{word}", text, image) for text in texts]
            return regions if len(regions) > 1 else regions[0]  # alone, an error calls it by its word and no number

        return [{mask_key(word): drawn(word, texts) for word, texts in masks.items()} for masks in self.told(setting)]


def check_out(out: str, folder: bool) -> Path:
    """`out`, once it can be written: the nearest part of it that exists is a folder, and ours to write."""
    path = Path(out)
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if (path.exists() and path.is_dir() != folder) or not (existing.is_dir() or existing == path):
        raise ValueError(f"`out` {out!r}: {existing} is {'no' if folder or existing != path else 'a'} folder.")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"`out` {out!r}: {existing} cannot be written.")
    return path


def load_pipeline(args: argparse.Namespace) -> MDEEditPipeline:
    device = args.device
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with reading("device", device):
        torch.zeros(1, device=device).cpu()
    with reading("model", args.model):
        pipe = MDEEditPipeline.from_pretrained(args.model)
    dtype = getattr(torch, args.dtype)
    loaded = {part.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module)}
    return pipe.to(device) if loaded == {dtype} else pipe.to(device, dtype)  # diffusers warns of any cast


def as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as it is inverted, in its own size."""
    pixels = on_white(read_pixels(image, "`image`")) * 255
    return PIL.Image.fromarray(pixels.round().to(torch.uint8).expand(*pixels.shape[:2], 3).numpy())


def reconstruction(pipe: MDEEditPipeline, inversion: Inversion) -> PIL.Image.Image:
    """The picture that an inversion is of, in its own size, as far as the inversion knows it."""
    picture = pipe.decode_source(inversion, "pil")[0]
    return picture if inversion.image_size is None else picture.resize(inversion.image_size[::-1])


# ---------------------------------------------------------------------------------------------------------------------
# An edit, step by step
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What an edit's settings ask for, its files read; no model is needed to make one.

    args: the settings; `prompt` one text or a list, `object` and `attribute` one {word: regions} or one per prompt.
    regions: its masks. settings: how it is edited. image, inversion: one of them, the other is None.
    """

    args: argparse.Namespace
    regions: Regions
    settings: Settings
    image: PIL.Image.Image | None
    inversion: Inversion | None

    @property
    def prompts(self) -> list[str]:
        return self.args.prompt if isinstance(self.args.prompt, list) else [self.args.prompt]


def read_request(args: argparse.Namespace, load_segmenter: Callable | None) -> Request:
    """Read the files that the settings name.

    Args:
        load_segmenter: see [`Regions`].

    Raises:
        ValueError: a file that cannot be read, or a setting out of range; names the setting.
    """
    regions, settings = Regions(args, load_segmenter), edit_settings(args)
    image, inversion = None, None
    if args.inversion:
        with reading("inversion", args.inversion):
            inversion = Inversion.load(args.inversion)
    else:
        image = read_picture("image", args.image)
    return Request(args, regions, settings, image, inversion)


def edit_settings(args: argparse.Namespace) -> Settings:
    return Settings(**{setting.name: getattr(args, setting.name) for setting in fields(Settings)})


def inversion_settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_inference_steps": args.steps,
        "method": args.method,
        "guidance_scale": args.guidance_scale,
        "height": args.height,
        "width": args.width,
    }


def prepare(request: Request, pipe: MDEEditPipeline) -> list[list[dict]]:
    """Check all that can be before the inversion, so that a misspelt word is known before it.

    Returns:
        object masks and attribute masks, each one dict per target prompt; source words may stand in a mask's place.

    Raises:
        ValueError: a picture, word, mask or setting that cannot be used; names it.
    """
    args, image, inversion = request.args, request.image, request.inversion
    if image is None:
        picture = reconstruction(pipe, inversion)
        source_prompt, image_size, latent_size = inversion.prompt, inversion.image_size, inversion.latents.shape[-2:]
    else:
        pixels, image_size = pipe.check_picture(
            image, args.source_prompt, prompt_name="source_prompt", **inversion_settings(args)
        )
        picture = as_rgb(image)
        source_prompt, latent_size = args.source_prompt, [side // pipe.vae_scale_factor for side in pixels.shape[-2:]]
    prompts = request.prompts
    drawn = [request.regions.draw_all(setting, picture) for setting in ("object", "attribute")]
    masks = [masks if len(masks) == len(prompts) else masks * len(prompts) for masks in drawn]
    rest = (image_size, tuple(latent_size), request.settings, [None] * len(prompts))
    pipe.check_edits(prompts, source_prompt, masks, *rest)
    return masks


def invert(args: argparse.Namespace, pipe: MDEEditPipeline, image: PIL.Image.Image) -> Inversion:
    # of a direct inversion the edit's is its own; the others start from it
    return pipe.invert(image, args.source_prompt, **inversion_settings(args), negative_prompt=args.negative_prompt)


@dataclass(frozen=True)
class Edited:
    """What [`edit`] gives back.

    output: the pipeline's. masks: object masks and attribute masks, each one dict per target prompt, all drawn.
    cost: see [`measured`]. source: the picture in the size in which it was inverted; without it, the reconstruction.
    """

    output: Any
    masks: list[list[dict]]
    cost: dict[str, float]
    source: PIL.Image.Image


def edit(
    request: Request,
    pipe: MDEEditPipeline,
    inversion: Inversion,
    masks: list[list[dict]],
    callback: Callable | None = None,
    edits_per_pass: int | None = None,
) -> Edited:
    """Edit an inversion by every target prompt of a request.

    Args:
        masks: what [`prepare`] returned.
        callback, edits_per_pass: the pipeline's `callback_on_step_end` and argument of this name.
    """
    args, seed = request.args, request.args.seed
    words = source_words(masks)
    if words:
        masks = with_regions(masks, pipe.find_regions(inversion, words))
    objects, attributes = masks
    # one each, so that a prompt's noise does not depend on what else is asked for
    generators = [torch.Generator().manual_seed(seed) for _ in request.prompts] if seed is not None else None
    with measured(pipe.unet) as cost:
        output = pipe(
            prompt=request.prompts,
            inversion=inversion,
            object_masks=objects,
            attribute_masks=attributes,
            guidance_scale=args.guidance_scale,
            negative_prompt=args.negative_prompt,
            generator=generators,
            callback_on_step_end=callback,
            output_attention_maps=True,
            edits_per_pass=edits_per_pass,
            **vars(request.settings),
        )
    cost["seconds"] = round(cost["seconds"], 2)
    if request.image is None:
        source = output.source_images[0]
    else:
        pixels = pipe.prepare_image(request.image, args.height, args.width)
        source = pipe.image_processor.postprocess(pixels, "pil")[0]
    return Edited(output, masks, cost, source)


# ---------------------------------------------------------------------------------------------------------------------
# What is told of it
# ---------------------------------------------------------------------------------------------------------------------


def drawn_masks(edited: Edited, inversion: Inversion, number: int) -> list[tuple]:
    """Pairs of key and (height, width) binary mask of a target prompt, objects then attributes."""
    sizes = [size for size in (inversion.image_size, tuple(inversion.latents.shape[-2:])) if size is not None]
    # pairs, not a dictionary: a word may be an object and an attribute at once
    pairs = [pair for masks in edited.masks for pair in masks[number].items()]
    return [(key, as_binary_mask(mask, repr(key), sizes)) for key, mask in pairs]


def used_settings(args: argparse.Namespace, inversion: Inversion) -> dict[str, Any]:
    """The settings as they were used, also those that an inversion brought."""
    used = {
        "source_prompt": inversion.prompt,
        "method": inversion.method,
        "steps": inversion.num_inference_steps,
        "guidance_scale": inversion.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        "negative_prompt": inversion.negative_prompt if args.negative_prompt is None else args.negative_prompt,
    }
    unsaid = ("command", "out", "device")
    return {k: v for k, v in {**vars(args), **used}.items() if k not in unsaid}


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    try:
        own = version("mde-edit")
    except PackageNotFoundError:  # imported from a clone's parent folder
        own = "not installed"
    return {
        "mde_edit": own,
        "python": platform.python_version(),
        **{m.__name__: m.__version__ for m in (torch, diffusers, transformers)},
    }


def figures(request: Request, edited: Edited, inversion: Inversion, number: int) -> dict[str, float | None]:
    """The figures of a target prompt: iterations of the guidance, PSNRs in dB."""
    masks = [mask for _, mask in drawn_masks(edited, inversion, number)]
    latent_size, dilation = tuple(inversion.latents.shape[-2:]), request.settings.mask_dilation
    output = edited.output
    pictures = (edited.source, output.images[number], output.source_images[0])
    return {
        "guidance_iterations": len(output.losses[number]),
        **closeness(request.image is None, *pictures, masks, latent_size, dilation),
    }


def report(request: Request, edited: Edited, inversion: Inversion) -> dict[str, Any]:
    """What an edit of one target prompt leaves in its run.json: settings, versions, cost, figures and losses."""
    return {
        "settings": used_settings(request.args, inversion),
        "versions": versions(),
        "edit": edited.cost,
        **figures(request, edited, inversion, 0),
        "losses": edited.output.losses[0],
    }


def closeness(
    reconstructed: bool, source, edited, reconstruction, masks, latent_size, mask_dilation
) -> dict[str, float | None]:
    """PSNRs in dB against the picture that was inverted (or `reconstructed`); None where there is nothing to compare.

    `background_psnr` is outside the masks, its strict form outside all that M of Eq. 7-8 let change.
    """
    height, width = source.size[::-1]
    background, strict = torch.ones(2, height, width, dtype=torch.bool)
    for mask in masks:
        background &= resize_mask(mask, (height, width)) < 0.5
    strict &= resize_mask(edit_mask(masks, latent_size, mask_dilation), (height, width)) == 0
    x, y, z = (as_array(image) for image in (source, edited, reconstruction))
    figures = {
        "reconstruction_psnr": psnr(x, z) if not reconstructed else float("nan"),
        "background_psnr": psnr(x, y, background.numpy()),
        "background_psnr_strict": psnr(x, y, strict.numpy()),
    }
    return {name: None if value != value else round(value, 2) for name, value in figures.items()}
