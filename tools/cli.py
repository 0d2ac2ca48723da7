# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""The command line: `mde-edit invert`, `mask`, `edit`, `app`; to share it, `bundle`, `push`. Each has `--help`."""

import argparse
import importlib.util
import json
import os
import platform
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers
from diffusers.utils import load_image
from safetensors import SafetensorError

from ..bundle import self_contained_source
from ..denoise import Settings
from ..inversion import Inversion
from ..masks import as_binary_mask, edit_mask, resize_mask, source_words, with_regions
from ..mde_pipeline import MDEEditPipeline
from ..pictures import on_white, read_pixels
from .measure import as_array, measured, peak_memory_mib, psnr
from .options import mask_key, parse_region, read_arguments
from .publish import files_of_space, files_to_push, push
from .segment import load_segmenter
from .sheet import draw_sheet, overlay


ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------------------------------
# What is read, each refused by the name of its setting
# ---------------------------------------------------------------------------------------------------------------------


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
    points, boxes and what is to be found wait for the picture."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.segmenter = args, None
        self.files: dict[str, PIL.Image.Image] = {}
        for setting in ("object", "attribute"):
            for word, texts in (getattr(args, setting, None) or {}).items():
                for text in texts:
                    self.check(f"{setting}` `{word}", text)

    def check(self, setting: str, text: str) -> None:
        kind, value = parse_region(setting, text)
        if kind == "file":
            self.files[value] = read_picture(setting, value)
        elif kind != "word" and not self.args.segmenter:
            raise ValueError(f"`{setting}` {text!r} needs --segmenter, as in --segmenter facebook/sam-vit-base.")

    def draw(self, setting: str, text: str, image: PIL.Image.Image | None):
        """What the pipeline takes for a region: a picture, a boolean array (height, width), or a source word.

        Args:
            image: the picture, upright and in its own size.
        """
        kind, value = parse_region(setting, text)
        if kind == "file":
            return self.files[value]
        if kind == "word":
            return value
        if self.segmenter is None:
            with reading("segmenter", self.args.segmenter):
                self.segmenter = load_segmenter(self.args.segmenter, self.args.detector, self.args.device)
        with reading(setting, text):
            return self.segmenter(image, **{"word" if kind == "find" else kind: value})

    def draw_all(self, setting: str, image: PIL.Image.Image | None) -> dict:
        """{the pipeline's key of a word: its regions}."""
        return {
            mask_key(word): [self.draw(f"{setting}` `{word}", text, image) for text in texts]
            for word, texts in (getattr(self.args, setting) or {}).items()
        }


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
    return pipe.to(device, getattr(torch, args.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def run_invert(args: argparse.Namespace) -> str:
    out = check_out(args.out, folder=False)
    image = read_picture("image", args.image)
    inversion = invert(args, load_pipeline(args), image)
    out.parent.mkdir(parents=True, exist_ok=True)
    inversion.save(out)
    return f"wrote {out}"


def inversion_settings(args: argparse.Namespace) -> dict:
    return {
        "num_inference_steps": args.steps,
        "method": args.method,
        "guidance_scale": args.guidance_scale,
        "height": args.height,
        "width": args.width,
    }


def invert(args: argparse.Namespace, pipe: MDEEditPipeline, image: PIL.Image.Image) -> Inversion:
    # of a direct inversion the edit's is its own; the others start from it
    return pipe.invert(image, args.source_prompt, **inversion_settings(args), negative_prompt=args.negative_prompt)


def run_edit(args: argparse.Namespace) -> str:
    """Check everything, invert (unless given), edit, write the four files."""
    out = check_out(args.out, folder=True)
    check_matplotlib()
    drawn = Regions(args)
    settings = Settings(**{setting.name: getattr(args, setting.name) for setting in fields(Settings)})
    if args.inversion:
        with reading("inversion", args.inversion):
            inversion, image, inverted = Inversion.load(args.inversion), None, None
        pipe = load_pipeline(args)
        picture = reconstruction(pipe, inversion)
        masks = [[drawn.draw_all(setting, picture)] for setting in ("object", "attribute")]
    else:
        image = read_picture("image", args.image)
        pipe = load_pipeline(args)
        pixels, image_size = pipe.check_picture(
            image, args.source_prompt, prompt_name="source_prompt", **inversion_settings(args)
        )
        masks = [[drawn.draw_all(setting, as_rgb(image))] for setting in ("object", "attribute")]
        latent_size = tuple(side // pipe.vae_scale_factor for side in pixels.shape[-2:])
        # so that a misspelt word is known before the inversion
        pipe.check_edits([args.prompt], args.source_prompt, masks, image_size, latent_size, settings, [None])
        with measured(pipe.unet) as inverted:
            inversion = invert(args, pipe, image)
        inverted["seconds"] = round(inverted["seconds"], 2)
    words = source_words(masks)
    if words:
        masks = with_regions(masks, pipe.find_regions(inversion, words))
    (objects,), (attributes,) = masks
    with measured(pipe.unet) as edited:
        output = pipe(
            prompt=args.prompt,
            inversion=inversion,
            object_masks=objects,
            attribute_masks=attributes,
            guidance_scale=args.guidance_scale,
            negative_prompt=args.negative_prompt,
            generator=None if args.seed is None else torch.Generator().manual_seed(args.seed),
            output_attention_maps=True,
            **vars(settings),
        )
    edited["seconds"] = round(edited["seconds"], 2)
    out.mkdir(parents=True, exist_ok=True)
    output.images[0].save(out / "edited.png")
    output.source_images[0].save(out / "reconstruction.png")

    # The picture in the size in which it was inverted; without its file, the reconstruction is the nearest.
    if image is None:
        source = output.source_images[0]
    else:
        source = pipe.image_processor.postprocess(pipe.prepare_image(image, args.height, args.width), "pil")[0]
    latent_size = tuple(inversion.latents.shape[-2:])
    # pairs, not a dictionary: a word may be an object and an attribute at once
    pairs = [*objects.items(), *attributes.items()]
    sizes = [size for size in (inversion.image_size, latent_size) if size is not None]
    masks = [(key, as_binary_mask(mask, repr(key), sizes)) for key, mask in pairs]
    draw_sheet(out / "sheet.png", source, output, masks, inversion.prompt, args.prompt)
    used = {
        "source_prompt": inversion.prompt,
        "method": inversion.method,
        "steps": inversion.num_inference_steps,
        "guidance_scale": inversion.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        "negative_prompt": inversion.negative_prompt if args.negative_prompt is None else args.negative_prompt,
    }
    unsaid = ("command", "out", "device")
    run = {
        "settings": {k: v for k, v in {**vars(args), **used}.items() if k not in unsaid},
        "device": str(pipe.device),
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (torch, diffusers, transformers)},
        },
        "inversion": inverted,
        "edit": edited,
        "guidance_iterations": len(output.losses[0]),
        **closeness(image is None, source, output, [m for _, m in masks], latent_size, settings.mask_dilation),
        "peak_memory_mib": peak_memory_mib(),
        "losses": output.losses[0],
    }
    (out / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    files = "edited.png, reconstruction.png, sheet.png, run.json"
    return f"wrote {out}/{files} (background PSNR {run['background_psnr']} dB)"


def closeness(reconstructed: bool, source, output, masks, latent_size, mask_dilation) -> dict[str, float | None]:
    """PSNRs in dB against the picture that was inverted (or `reconstructed`); None where there is nothing to compare.

    `background_psnr` is outside the masks, its strict form outside all that M of Eq. 7-8 let change.
    """
    height, width = source.size[::-1]
    background, strict = torch.ones(2, height, width, dtype=torch.bool)
    for mask in masks:
        background &= resize_mask(mask, (height, width)) < 0.5
    strict &= resize_mask(edit_mask(masks, latent_size, mask_dilation), (height, width)) == 0
    x, y, z = (as_array(image) for image in (source, output.images[0], output.source_images[0]))
    figures = {
        "reconstruction_psnr": psnr(x, z) if not reconstructed else float("nan"),
        "background_psnr": psnr(x, y, background.numpy()),
        "background_psnr_strict": psnr(x, y, strict.numpy()),
    }
    return {name: None if value != value else round(value, 2) for name, value in figures.items()}


def as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as it is inverted, in its own size."""
    pixels = on_white(read_pixels(image, "`image`")) * 255
    return PIL.Image.fromarray(pixels.round().to(torch.uint8).expand(*pixels.shape[:2], 3).numpy())


def reconstruction(pipe: MDEEditPipeline, inversion: Inversion) -> PIL.Image.Image:
    """The picture that an inversion is of, in its own size, as far as the inversion knows it."""
    picture = pipe.decode_source(inversion, "pil")[0]
    return picture if inversion.image_size is None else picture.resize(inversion.image_size[::-1])


def check_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("The sheet needs matplotlib: pip install 'mde-edit[demo]'.")


def run_mask(args: argparse.Namespace) -> str:
    """Write one region as a mask, and beside it the picture with the region marked."""
    out = check_out(args.out, folder=False)
    check_matplotlib()
    drawn = Regions(args)
    drawn.check("region", args.region)
    word = parse_region("region", args.region)[1] if args.region.startswith("word:") else None
    if args.inversion:
        with reading("inversion", args.inversion):
            inversion = Inversion.load(args.inversion)
        pipe = load_pipeline(args)
        picture = reconstruction(pipe, inversion)
    else:
        image = read_picture("image", args.image)
        picture = as_rgb(image)
        if word is not None:
            pipe = load_pipeline(args)
            pipe.check_source_word(args.source_prompt, word, "`region`")
            size = {"height": args.height, "width": args.width}
            inversion = pipe.invert(image, args.source_prompt, args.steps, "direct", **size)
    if word is not None:
        mask = pipe.generate_mask(inversion, word)
    else:
        mask = as_binary_mask(drawn.draw("region", args.region, picture), "`region`", [picture.size[::-1]]).numpy()
    mask = PIL.Image.fromarray(mask.astype(np.uint8) * 255).resize(picture.size)
    marked = out.with_name(f"{out.stem}_overlay.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    mask.save(out, "png")
    overlay(picture, 0.15 + 0.7 * np.asarray(mask) / 255).save(marked)
    return f"wrote {out} ({100 * np.asarray(mask).mean() / 255:.1f} % of the picture), {marked}"


def run_app(args: argparse.Namespace) -> str:
    """Serve the page until it is interrupted."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("The page needs gradio: pip install 'mde-edit[app]'.")
    check_matplotlib()
    segmenter = None
    if args.segmenter:
        with reading("segmenter", args.segmenter):
            segmenter = load_segmenter(args.segmenter, args.detector, args.device)
    from .app import serve
    from .studio import Studio

    serve(Studio(load_pipeline(args), args.model, segmenter), port=args.port, share=args.share, inbrowser=True)
    return "closed"


def run_bundle(args: argparse.Namespace) -> str:
    source = self_contained_source(MDEEditPipeline.source_file)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(source, encoding="utf-8")
    return f"wrote {args.out}"


def run_push(args: argparse.Namespace) -> str:
    if args.space:
        files = files_of_space(ROOT)
    else:
        files = files_to_push(ROOT, Path(args.with_model) if args.with_model else None)
    listing = "".join(f"{len(data):>10}  {path}\n" for path, data in files.items())
    summary = f"{len(files)} files, {sum(map(len, files.values()))} bytes"
    if args.dry_run:
        return f"{listing}{summary} would go to {args.repo}"
    return f"{listing}{summary}: {push(args.repo, files, args.message, args.private, args.space)}"


COMMANDS = {
    "invert": run_invert,
    "edit": run_edit,
    "mask": run_mask,
    "app": run_app,
    "bundle": run_bundle,
    "push": run_push,
}


def main(argv: list[str] | None = None) -> int:
    """0; 2 for what was asked wrongly, 1 for what went wrong, each with one line that says what."""
    try:
        args = read_arguments(argv)
        message = COMMANDS[args.command](args)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.stderr.write(f"mde-edit: {' '.join(str(error).split())}\n")
        return 2 if isinstance(error, ValueError) else 1
    sys.stdout.write(message + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
