# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""The command line: `mde-edit invert`, `edit` and, to share the pipeline, `bundle` and `push`; each has `--help`."""

import argparse
import inspect
import json
import platform
import sys
import textwrap
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers
from diffusers.utils import load_image

from .bundle import self_contained_source
from .inversion import INVERSION_METHODS, Inversion
from .losses import dilate_mask, resize_mask
from .mde_pipeline import CCL_FORMS, PRESETS, MDEEditPipeline, as_binary_mask, default_dilation
from .publish import files_to_push, push


EDIT_SETTINGS = {  # settings of `MDEEditPipeline.__call__` that are plain numbers or names: one flag each
    "cross_replace_steps": float,
    "self_replace_steps": float,
    "oal_weight": float,
    "ccl_weight": float,
    "ccl_form": str,
    "optimization_steps": float,
    "optimization_iterations": int,
    "optimization_tolerance": float,
    "step_size": float,
    "max_update": float,
    "attention_resolution": int,
    "mask_dilation": int,
    "background_blend": float,
    "eta": float,
}


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
    defaults = inspect.signature(MDEEditPipeline.__call__).parameters
    for name, kind in EDIT_SETTINGS.items():
        choices = CCL_FORMS if name == "ccl_form" else None
        edit.add_argument(
            f"--{name.replace('_', '-')}", type=kind, choices=choices, help=f"default: {defaults[name].default}"
        )
    return parser


def read_arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
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


@contextmanager
def measured(pipe: MDEEditPipeline):
    """Seconds and U-Net passes of what runs inside: forwards, their rows, and how many ran to the U-Net's end."""
    record, start = Counter(forwards=0, rows=0, whole=0), time.perf_counter()

    def before(module, inputs):
        record.update(forwards=1, rows=len(inputs[0]))

    hooks = [
        pipe.unet.register_forward_pre_hook(before),
        pipe.unet.register_forward_hook(lambda *_: record.update(whole=1)),
    ]
    try:
        yield record
    finally:
        record["seconds"] = round(time.perf_counter() - start, 2)
        for hook in hooks:
            hook.remove()


def peak_memory_mib() -> Optional[int]:
    """Peak memory of this process (the device's on CUDA), or None where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> 20 if platform.system() == "Darwin" else peak >> 10


def as_array(image: PIL.Image.Image) -> np.ndarray:
    """(height, width, 3) float64 in [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


def psnr(a: np.ndarray, b: np.ndarray, where: Optional[np.ndarray] = None) -> Optional[float]:
    """PSNR in dB of two pictures, over the pixels of a boolean mask; None if it has none."""
    error = ((a - b) ** 2).mean(axis=-1)
    error = error if where is None else error[where]
    return None if error.size == 0 else round(float(-10 * np.log10(max(error.mean(), 1e-12))), 2)


def overlay(image: PIL.Image.Image, heat: np.ndarray) -> PIL.Image.Image:
    """A map over a grey version of the picture. heat: (h, w) in [0, 1]."""
    from matplotlib import colormaps

    heat_image = PIL.Image.fromarray((colormaps["inferno"](heat)[..., :3] * 255).astype(np.uint8))
    return PIL.Image.blend(image.convert("L").convert("RGB"), heat_image.resize(image.size, PIL.Image.BICUBIC), 0.65)


def draw_sheet(path: Path, source, output, masks: Sequence, source_prompt: str, prompt: str) -> None:
    """Everything to look at on one page: pictures, masks, attention before and after guidance, losses.

    masks: pairs of key and (height, width) binary mask, objects then attributes.
    """
    from matplotlib.figure import Figure

    reconstruction, edited = output.source_images[0], output.images[0]
    pictures = [(source, f"source\n{textwrap.fill(source_prompt, 36)}")]
    for key, mask in masks:
        shape = np.asarray(PIL.Image.fromarray(mask.numpy().astype(np.uint8) * 255).resize(source.size)) / 255
        pictures.append((overlay(source, 0.15 + 0.7 * shape), f"mask of {key!r}"))
    pictures += [(reconstruction, "reconstruction"), (edited, f"edit\n{textwrap.fill(prompt, 36)}")]
    attention = []
    for key, steps in output.attention_maps[0].items():  # (guided steps, before/after, h, w)
        first, last = steps[0, 0].numpy(), steps[-1, 1].numpy()
        peak = max(first.max(), last.max(), 1e-8)
        attention.append((overlay(reconstruction, first / peak), f"attention of {key!r}\nstep 1, before guidance"))
        attention.append((overlay(edited, last / peak), f"attention of {key!r}\nstep {len(steps)}, after guidance"))

    columns = max(len(pictures), len(attention) + 1)
    figure = Figure(figsize=(2.6 * columns, 6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    axes = figure.subplots(2, columns)
    for axis in axes.flatten():
        axis.axis("off")
    for row, panels in zip(axes, (pictures, attention)):
        for axis, (image, title) in zip(row, panels):
            axis.imshow(image, interpolation="nearest")
            axis.set_title(title, fontsize=8)
    if output.losses[0]:
        axis = axes[1, len(attention)]
        axis.axis("on")
        for name, label in (("oal", "OAL"), ("ccl", "CCL")):
            values = [entry[name] for entry in output.losses[0] if name in entry]
            if values:
                axis.plot(values, label=label, linewidth=1)
        axis.set_title("losses per guidance iteration", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


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


def run_edit(args: argparse.Namespace) -> Dict:
    """Invert (unless given), edit, write the four files; returns what run.json holds."""
    out = Path(args.out)
    pipe = load_pipeline(args)
    objects, attributes = (
        {mask_key(word): PIL.Image.open(path) for word, path in (given or {}).items()}
        for given in (args.object, args.attribute)
    )
    given = {name: getattr(args, name) for name in EDIT_SETTINGS if getattr(args, name) is not None}
    settings = {**PRESETS.get(args.preset, {}), **given}
    if args.inversion:
        inversion, inverted = Inversion.load(args.inversion), None
    else:
        image = load_image(args.image)
        with measured(pipe) as inverted:
            inversion = run_invert(args, pipe, image)
    with measured(pipe) as edited:
        output = pipe(
            prompt=args.prompt,
            inversion=inversion,
            object_masks=objects,
            attribute_masks=attributes,
            generator=None if args.seed is None else torch.Generator().manual_seed(args.seed),
            output_attention_maps=True,
            **settings,
        )
    out.mkdir(parents=True, exist_ok=True)
    output.images[0].save(out / "edited.png")
    output.source_images[0].save(out / "reconstruction.png")

    # The picture the latents stand for; without the file, the reconstruction is the best there is.
    source = image.convert("RGB").resize(output.images[0].size) if not args.inversion else output.source_images[0]
    size = tuple(inversion.latents.shape[-2:])
    # pairs, not a dictionary: a word may be an object and an attribute at once
    given = [*objects.items(), *attributes.items()]
    binary = [(key, as_binary_mask(mask, repr(key), size)) for key, mask in given]
    draw_sheet(out / "sheet.png", source, output, binary, inversion.prompt, args.prompt)
    height, width = source.size[::-1]
    background, strict = np.ones((height, width), bool), np.ones((height, width), bool)
    for _, mask in binary:
        background &= (resize_mask(mask, (height, width)) < 0.5).numpy()
        cells = dilate_mask(
            (resize_mask(mask, size) > 0).float(), settings.get("mask_dilation", default_dilation(size))
        )
        strict &= (resize_mask(cells, (height, width)) == 0).numpy()
    x, y, z = (as_array(i) for i in (source, output.images[0], output.source_images[0]))
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
        "reconstruction_psnr": None if args.inversion else psnr(x, z),
        "background_psnr": psnr(x, y, background),
        "background_psnr_strict": psnr(x, y, strict),
        "peak_memory_mib": peak_memory_mib(),
        "losses": output.losses[0],
    }
    (out / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    return run


def main(argv: Optional[List[str]] = None) -> int:
    args = read_arguments(argv)
    try:
        if args.command == "invert":
            pipe = load_pipeline(args)
            run_invert(args, pipe, load_image(args.image)).save(args.out)
            message = f"wrote {args.out}"
        elif args.command == "bundle":
            source = self_contained_source(Path(__file__).with_name("mde_pipeline.py"))
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            Path(args.out).write_text(source, encoding="utf-8")
            message = f"wrote {args.out}"
        elif args.command == "push":
            files = files_to_push(Path(__file__).parent, Path(args.with_model) if args.with_model else None)
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
