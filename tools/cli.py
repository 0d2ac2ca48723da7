# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""The command line: `mde-edit invert`, `mask`, `edit`, `batch`, `app`; to share it, `bundle`, `push`."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import PIL.Image

from ..bundle import self_contained_source
from ..inversion import Inversion
from ..masks import as_binary_mask
from ..mde_pipeline import MDEEditPipeline
from ..mde_pipeline_xl import MDEEditXLPipeline
from .edit import (
    Failed,
    Regions,
    as_rgb,
    check_out,
    drawn_masks,
    edit,
    invert,
    load_pipeline,
    prepare,
    read_picture,
    read_request,
    reading,
    reconstruction,
    report,
)
from .measure import measured, peak_memory_mib
from .options import parse_region, read_arguments
from .publish import files_of_blocks, files_of_space, files_to_push, push
from .segment import load_segmenter
from .sheet import draw_sheet, overlay


ROOT = Path(__file__).resolve().parents[1]


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


def run_edit(args: argparse.Namespace) -> str:
    """Check everything, invert (unless given), edit, write the four files."""
    out = check_out(args.out, folder=True)
    check_matplotlib()
    request = read_request(args, load_segmenter)
    pipe = load_pipeline(args)
    masks = prepare(request, pipe)
    inversion, inverted = request.inversion, None
    if inversion is None:
        with measured(pipe.unet) as inverted:
            inversion = invert(args, pipe, request.image)
        inverted["seconds"] = round(inverted["seconds"], 2)
    edited = edit(request, pipe, inversion, masks)
    output = edited.output
    out.mkdir(parents=True, exist_ok=True)
    output.images[0].save(out / "edited.png")
    output.source_images[0].save(out / "reconstruction.png")
    shown = drawn_masks(edited, inversion, 0)
    draw_sheet(out / "sheet.png", edited.source, output, shown, inversion.prompt, args.prompt)
    run = {
        **report(request, edited, inversion),
        "device": str(pipe.device),
        "inversion": inverted,
        "peak_memory_mib": peak_memory_mib(),
    }
    (out / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    files = "edited.png, reconstruction.png, sheet.png, run.json"
    return f"wrote {out}/{files} (background PSNR {run['background_psnr']} dB)"


def check_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("The sheet needs matplotlib: pip install 'mde-edit[demo]'.")


def run_mask(args: argparse.Namespace) -> str:
    """Write one region as a mask, and beside it the picture with the region marked."""
    out = check_out(args.out, folder=False)
    check_matplotlib()
    drawn = Regions(args, load_segmenter)
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


def run_batch(args: argparse.Namespace) -> str | None:
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("A batch needs accelerate: pip install 'mde-edit[demo]'.")
    from .batch import run_batch  # which imports it

    return run_batch(args)


def run_bundle(args: argparse.Namespace) -> str:
    out = Path(args.out)
    if args.blocks:
        files = {check_out(args.out, folder=True) / name: data for name, data in files_of_blocks(ROOT).items()}
    else:
        editor = MDEEditXLPipeline if args.xl else MDEEditPipeline
        files = {out: self_contained_source(editor.source_file).encode()}
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return f"wrote {args.out}"


def run_push(args: argparse.Namespace) -> str:
    if args.xl and (args.space or args.blocks):
        raise ValueError("--xl goes with the pipeline: blocks and page edit with Stable Diffusion 1.x/2.x alone.")
    if args.space:
        files = files_of_space(ROOT)
    elif args.blocks:
        files = files_of_blocks(ROOT)
    else:
        editor = MDEEditXLPipeline if args.xl else MDEEditPipeline
        files = files_to_push(ROOT, Path(args.with_model) if args.with_model else None, editor)
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
    "batch": run_batch,
    "bundle": run_bundle,
    "push": run_push,
}


def main(argv: list[str] | None = None) -> int:
    """0; 2 for what was asked wrongly, 1 for what went wrong, each with one line that says what."""
    try:
        args = read_arguments(argv)
        message = COMMANDS[args.command](args)
    except (ValueError, FloatingPointError, OSError, Failed) as error:
        sys.stderr.write(f"mde-edit: {' '.join(str(error).split())}\n")
        return 2 if isinstance(error, ValueError) else 1
    if message:  # of several processes one speaks
        sys.stdout.write(message + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
