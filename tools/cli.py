# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""The command line: `mde-edit invert`, `edit` and, to share the pipeline, `bundle` and `push`; each has `--help`."""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_args

import diffusers
import PIL.Image
import torch
import transformers
from diffusers.utils import load_image

from ..bundle import self_contained_source
from ..denoise import PRESETS, Settings
from ..inversion import INVERSION_METHODS, Inversion
from ..masks import as_binary_mask, edit_mask, resize_mask
from ..mde_pipeline import MDEEditPipeline
from .measure import as_array, measured, peak_memory_mib, psnr
from .publish import files_to_push, push
from .sheet import draw_sheet


ROOT = Path(__file__).resolve().parents[1]


def word_and_mask(text: str):
    """ "dog=mask.png" or, for the second "dog", "dog:1=mask.png"."""
    word, separator, path = text.rpartition("=")
    if not separator or not word or not path:
        raise argparse.ArgumentTypeError(f"{text!r}: write WORD=MASK.png, or WORD:1=MASK.png for its second occurrence")
    return word, path


def mask_key(word: str):
    """The pipeline's key for "dog" or "dog:1"."""
    name, separator, occurrence = word.rpartition(":")
    return (name, int(occurrence)) if separator and occurrence.isdigit() else word


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mde-edit", description="Mask-guided editing of several objects of one picture."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config", help="JSON file with any of these settings; flags override it, paths are relative to it"
    )
    common.add_argument("--model", help="folder or Hub name of a Stable Diffusion 1.x/2.x model (default: emoji_ldm)")
    common.add_argument("--image", help="the picture: file or URL")
    common.add_argument("--source-prompt", help="what the picture shows")
    common.add_argument("--out", help="where to write: a folder (edit) or a .safetensors file (invert)")
    common.add_argument("--method", choices=INVERSION_METHODS, help="inversion (default: null_text)")
    common.add_argument("--steps", type=int, help="DDIM steps (default: 50)")
    common.add_argument("--guidance-scale", type=float, help="classifier-free guidance (default: 7.5)")
    common.add_argument("--height", type=int, help="resize the picture to this height")
    common.add_argument("--width", type=int, help="resize the picture to this width")
    common.add_argument("--device", help="cuda, mps, cpu (default: the best there is)")
    common.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the model (default: float32)")

    commands.add_parser("invert", parents=[common], help="invert a picture once, to edit it often")
    edit = commands.add_parser("edit", parents=[common], help="edit a picture")
    edit.add_argument("--prompt", help="what the picture should show")
    edit.add_argument(
        "--object", action="append", type=word_and_mask, metavar="WORD=MASK", help="new object and its region"
    )
    edit.add_argument(
        "--attribute", action="append", type=word_and_mask, metavar="WORD=MASK", help="attribute and its region"
    )
    edit.add_argument("--inversion", help="file from `mde-edit invert`, instead of --image and --source-prompt")
    edit.add_argument("--seed", type=int, help="of the noise that --eta adds")
    edit.add_argument("--preset", choices=PRESETS, help="named settings, which flags and the config override")
    bundle = commands.add_parser("bundle", help="write the pipeline as one self-contained file")
    bundle.add_argument("--out", required=True, help="the file to write; diffusers finds it by its name, mde_edit.py")
    hub = commands.add_parser("push", help="upload the pipeline's code and card to the Hugging Face Hub")
    hub.add_argument("repo", help="user/name; made if there is none")
    hub.add_argument("--with-model", metavar="FOLDER", help="a saved pipeline that goes there too, such as emoji_ldm")
    hub.add_argument("--dry-run", action="store_true", help="only list what would go")
    hub.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    hub.add_argument("--message", default="Upload MDE-Edit", help="of the commit")
    for setting in fields(Settings):  # one flag each
        kind = (get_args(setting.type) or (setting.type,))[0]
        choices = setting.metadata["choices"] or None
        flag = f"--{setting.name.replace('_', '-')}"
        edit.add_argument(flag, type=kind, choices=choices, help=f"default: {setting.default}")
    return parser


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags over the config file's settings over the defaults; `object` and `attribute` as {word: path}."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command not in ("invert", "edit"):
        return args
    settings = {"model": "emoji_ldm", "method": "null_text", "steps": 50, "guidance_scale": 7.5, "dtype": "float32"}
    if args.config:
        folder = Path(args.config).parent
        config = json.loads(Path(args.config).read_text())
        unknown = set(config) - set(vars(args)) | set(config) & {"config", "command"}
        if unknown:
            parser.error(f"{args.config} has unknown settings: {', '.join(sorted(unknown))}")
        for name in {"image", "inversion"} & set(config):
            config[name] = str(folder / config[name])
        for name in {"object", "attribute"} & set(config):
            config[name] = {word: str(folder / path) for word, path in config[name].items()}
        settings.update(config)
    for name, value in vars(args).items():
        if value is not None or name not in settings:
            settings[name] = dict(value) if name in ("object", "attribute") and value else value
    needed = ["out"] if args.command == "edit" and settings["inversion"] else ["out", "image", "source_prompt"]
    missing = [name for name in needed + ["prompt"] * (args.command == "edit") if not settings[name]]
    if missing:
        parser.error("missing " + ", ".join(f"--{name.replace('_', '-')}" for name in missing))
    return argparse.Namespace(**settings)


def load_pipeline(args: argparse.Namespace) -> MDEEditPipeline:
    device = args.device
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    pipe = MDEEditPipeline.from_pretrained(args.model).to(device)
    return pipe if args.dtype == "float32" else pipe.to(getattr(torch, args.dtype))


def run_invert(args: argparse.Namespace, pipe: MDEEditPipeline, image: PIL.Image.Image) -> Inversion:
    return pipe.invert(
        image,
        args.source_prompt,
        num_inference_steps=args.steps,
        method=args.method,
        guidance_scale=args.guidance_scale,
        height=args.height,
        width=args.width,
    )


def run_edit(args: argparse.Namespace) -> dict:
    """Invert (unless given), edit, write the four files; returns what run.json holds."""
    out = Path(args.out)
    pipe = load_pipeline(args)
    objects, attributes = (
        {mask_key(word): PIL.Image.open(path) for word, path in (masks or {}).items()}
        for masks in (args.object, args.attribute)
    )
    flags = {setting.name: getattr(args, setting.name) for setting in fields(Settings)}
    settings = {**PRESETS.get(args.preset, {}), **{name: value for name, value in flags.items() if value is not None}}
    if args.inversion:
        inversion, inverted = Inversion.load(args.inversion), None
    else:
        image = load_image(args.image)
        with measured(pipe.unet) as inverted:
            inversion = run_invert(args, pipe, image)
        inverted["seconds"] = round(inverted["seconds"], 2)
    with measured(pipe.unet) as edited:
        output = pipe(
            prompt=args.prompt,
            inversion=inversion,
            object_masks=objects,
            attribute_masks=attributes,
            generator=None if args.seed is None else torch.Generator().manual_seed(args.seed),
            output_attention_maps=True,
            **settings,
        )
    edited["seconds"] = round(edited["seconds"], 2)
    out.mkdir(parents=True, exist_ok=True)
    output.images[0].save(out / "edited.png")
    output.source_images[0].save(out / "reconstruction.png")

    # The picture in the size in which it was inverted; without its file, the reconstruction is the nearest.
    if args.inversion:
        source = output.source_images[0]
    else:
        source = pipe.image_processor.postprocess(pipe.prepare_image(image, args.height, args.width), "pil")[0]
    latent_size = tuple(inversion.latents.shape[-2:])
    # pairs, not a dictionary: a word may be an object and an attribute at once
    pairs = [*objects.items(), *attributes.items()]
    sizes = [size for size in (inversion.image_size, latent_size) if size is not None]
    masks = [(key, as_binary_mask(mask, repr(key), sizes)) for key, mask in pairs]
    draw_sheet(out / "sheet.png", source, output, masks, inversion.prompt, args.prompt)
    run = {
        "settings": {k: v for k, v in vars(args).items() if v is not None and k not in ("config", "out", "device")},
        "device": str(pipe.device),
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (torch, diffusers, transformers)},
        },
        "inversion": inverted,
        "edit": edited,
        "guidance_iterations": len(output.losses[0]),
        **closeness(args, source, output, [mask for _, mask in masks], latent_size, settings.get("mask_dilation")),
        "peak_memory_mib": peak_memory_mib(),
        "losses": output.losses[0],
    }
    (out / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    return run


def closeness(args, source, output, masks, latent_size, mask_dilation) -> dict[str, float | None]:
    """PSNRs in dB against the picture that was inverted; None where there is nothing to compare.

    `background_psnr` is outside the masks, its strict form outside all that M of Eq. 7-8 let change.
    """
    height, width = source.size[::-1]
    background, strict = torch.ones(2, height, width, dtype=torch.bool)
    for mask in masks:
        background &= resize_mask(mask, (height, width)) < 0.5
    strict &= resize_mask(edit_mask(masks, latent_size, mask_dilation), (height, width)) == 0
    x, y, z = (as_array(image) for image in (source, output.images[0], output.source_images[0]))
    figures = {
        "reconstruction_psnr": psnr(x, z) if not args.inversion else float("nan"),
        "background_psnr": psnr(x, y, background.numpy()),
        "background_psnr_strict": psnr(x, y, strict.numpy()),
    }
    return {name: None if value != value else round(value, 2) for name, value in figures.items()}


def main(argv: list[str] | None = None) -> int:
    args = read_arguments(argv)
    try:
        if args.command == "invert":
            pipe = load_pipeline(args)
            run_invert(args, pipe, load_image(args.image)).save(args.out)
            message = f"wrote {args.out}"
        elif args.command == "bundle":
            source = self_contained_source(MDEEditPipeline.source_file)
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            Path(args.out).write_text(source, encoding="utf-8")
            message = f"wrote {args.out}"
        elif args.command == "push":
            files = files_to_push(ROOT, Path(args.with_model) if args.with_model else None)
            listing = "".join(f"{len(data):>10}  {path}\n" for path, data in files.items())
            summary = f"{len(files)} files, {sum(map(len, files.values()))} bytes"
            if args.dry_run:
                message = f"{listing}{summary} would go to {args.repo}"
            else:
                message = f"{listing}{summary}: {push(args.repo, files, args.message, args.private)}"
        else:
            run = run_edit(args)
            message = (
                f"wrote {args.out}/edited.png, reconstruction.png, sheet.png, run.json"
                f" (background PSNR {run['background_psnr']} dB)"
            )
    except (ValueError, FloatingPointError, OSError) as error:
        sys.stderr.write(f"mde-edit: {error}\n")
        return 1
    sys.stdout.write(message + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
