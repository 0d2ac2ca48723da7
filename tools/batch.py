# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""`mde-edit batch`: many rows by the code that edits one, each with a folder of its own below --out."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tqdm import tqdm

from ..inversion import Inversion
from ..mde_pipeline import MDEEditPipeline
from .cache import InversionCache, inversion_key, model_digest
from .edit import (
    Edited,
    Failed,
    Request,
    as_rgb,
    check_out,
    edit,
    figures,
    invert,
    load_pipeline,
    prepare,
    read_picture,
    read_request,
    used_settings,
    versions,
)
from .files import replacing, write_json
from .measure import measured, peak_memory_mib
from .options import ROW
from .rows import Row, read_rows
from .segment import load_segmenter
from .sheet import draw_contact_sheets
from .spread import Job, processes, spread


_SETTINGS = [name for name in ROW if name not in ("name", "prompt", "device")]
_PSNRS = ["reconstruction_psnr", "background_psnr", "background_psnr_strict"]
_LOSSES = ["loss", "oal", "ccl"]
COLUMNS = [
    *("row", "name", "picture", "prompt"),
    *_SETTINGS,
    *("inversion_seconds", "edit_seconds", "guidance_iterations"),
    *_PSNRS,
    *_LOSSES,
    "error",
]


@dataclass(frozen=True)
class Models:
    """What this process has loaded, each model once."""

    pipes: dict[tuple, tuple[MDEEditPipeline, str] | Exception] = field(default_factory=dict)
    segmenters: dict[tuple, Callable] = field(default_factory=dict)

    def pipe(self, args: argparse.Namespace) -> tuple[MDEEditPipeline, str]:
        """A row's pipeline and its [`model_digest`]; what could not be loaded for one row is not tried for the next."""
        key = (args.model, args.device, args.dtype)
        if key not in self.pipes:
            try:
                pipe = load_pipeline(args)
                pipe.set_progress_bar_config(disable=True)  # there is one over all rows
                self.pipes[key] = pipe, model_digest(pipe)
            except Exception as error:
                self.pipes[key] = error
        loaded = self.pipes[key]
        if isinstance(loaded, Exception):
            raise loaded
        return loaded

    def segmenter(self, *key) -> Callable:
        """[`load_segmenter`], once for the same arguments."""
        if key not in self.segmenters:
            self.segmenters[key] = load_segmenter(*key)
        return self.segmenters[key]


def run_batch(args: argparse.Namespace) -> str | None:
    """Edit the rows; at the end the main process writes the table and the contact sheet.

    Returns:
        what was done, in the main process.

    Raises:
        ValueError: nothing can be read or written; with `fail_fast`, the first row that cannot be edited.
        Failed: some rows could not be edited. The others are done.
    """
    out = check_out(args.out, folder=True)
    rows = read_rows(args.rows, args.shared)
    state = processes()
    # "cuda" is this process's own of several; "cpu:1" would be a copy of the weights, aligned and rounding otherwise
    device = "cpu" if state.device.type == "cpu" else str(state.device)
    for row in rows:
        if row.args is not None and row.args.device in (None, state.device.type):
            row.args.device = device
    models = Models()
    cache = InversionCache(Path(args.cache) if args.cache else out / ".inversions", args.cache_size * 1e9)
    jobs = [Job(row, out / row.name / "run.json", row.key) for row in rows]
    if state.is_main_process:
        for job in jobs:
            put_back(job)
    state.wait_for_everyone()
    before = spread(jobs, lambda share: work(share, models, cache, args.edits_per_pass, args.fail_fast), state)
    if not state.is_main_process:
        return None
    records = [json.loads(job.record.read_text(encoding="utf-8")) for job in jobs]
    write_table(out / "batch.csv", rows, records)
    sheets = draw_contact_sheets(out, contacts(out, rows, records))
    failed = [row.where for row, record in zip(rows, records) if "error" in record]
    done = f"{len(rows) - len(failed)} of {len(rows)} rows edited, {before} of them before"
    if failed:
        shown = ", ".join(failed[:3]) + (", ..." if len(failed) > 3 else "")
        raise Failed(f"{done}; {len(failed)} could not be ({shown}): {out}/batch.csv says why")
    return f"{done}: wrote {out}/batch.csv, {', '.join(sheets)}"


def work(
    jobs: list[Job], models: Models, cache: InversionCache, edits_per_pass: int | None, fail_fast: bool
) -> Iterator[Job]:
    """Edit a process's share of the rows, once all of it is checked; yields what is done or cannot be."""
    sound = []
    for job in jobs:
        if attempt(lambda job=job: check(job.task, models), job, fail_fast):
            sound.append(job)
        else:
            yield job
    for job in sound:
        attempt(lambda job=job: edit_row(job, models, cache, edits_per_pass), job, fail_fast)
        yield job


def attempt(action: Callable[[], None], job: Job, fail_fast: bool) -> bool:
    """Whether `action` went well. If not, the row's record and a line say why.

    Raises:
        ValueError: with `fail_fast`, instead.
    """
    try:
        action()
    except Exception as error:  # whatever a row's trouble is, the others do not share it
        known = isinstance(error, (ValueError, FloatingPointError, OSError))
        reason = " ".join(str(error).split() if known else [f"{type(error).__name__}:", *str(error).split()])
        if fail_fast:
            raise ValueError(f"{job.task.where}: {reason}") from error
        set_aside(job)
        write_json(job.record, {"row": job.task.where, "error": reason})
        tqdm.write(f"mde-edit: {job.task.where}: {reason}", file=sys.stderr)
        return False
    return True


def earlier(job: Job) -> Job:
    """A row that cannot be edited now, as it was when it could."""
    return replace(job, record=job.record.with_name("run.before.json"))


def set_aside(job: Job) -> None:
    """Make room for the record of an error. What an earlier run made of the row stays, under another record: a drive
    that is not there today or a misspelt model is no reason to lose it."""
    try:
        edited = "pictures" in json.loads(job.record.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        edited = False
    if edited:
        os.replace(job.record, earlier(job).record)
    elif not earlier(job).record.exists():
        clear(job)


def put_back(job: Job) -> None:
    """Let an earlier run's record count again, if the row is what it was then."""
    if earlier(job).is_done():
        os.replace(earlier(job).record, job.record)


def clear(job: Job) -> None:
    """Remove a row's files of before, the records first: without one, nothing else counts."""
    earlier(job).record.unlink(missing_ok=True)
    job.record.unlink(missing_ok=True)
    for pattern in ("edited*.png", ".*.tmp"):
        for path in job.record.parent.glob(pattern):
            path.unlink(missing_ok=True)


def check(row: Row, models: Models) -> None:
    """Raise for a row that cannot be edited, as far as that can be told without a pass on its picture."""
    if row.args is None:
        raise ValueError(row.error)
    request = read_request(row.args, None)
    prepare(request, models.pipe(row.args)[0])


def edit_row(job: Job, models: Models, cache: InversionCache, edits_per_pass: int | None) -> None:
    """Edit a row and write its files, the record last."""
    row, folder = job.task, job.record.parent
    files = row.files()  # before they are read: of one that changes meanwhile, the record knows the former
    request = read_request(row.args, models.segmenter)
    pipe, model = models.pipe(row.args)
    masks = prepare(request, pipe)
    inversion, inverted = inverted_once(request, pipe, model, cache)
    edited = edit(request, pipe, inversion, masks, edits_per_pass=edits_per_pass)
    clear(job)
    images = edited.output.images
    names = ["edited.png"] if len(images) == 1 else [f"edited_{number}.png" for number in range(len(images))]
    for name, image in zip(names, images):
        with replacing(folder / name) as temporary:
            image.save(temporary, "png")
    run = {
        "row": row.where,
        "settings": used_settings(row.args, inversion),
        "files": files,
        **row.key(files),
        "device": str(pipe.device),
        "versions": versions(),
        "inversion": inverted,
        "edit": edited.cost,
        "peak_memory_mib": peak_memory_mib(),
        "pictures": names,
        "edits": edits(request, edited, inversion),
    }
    write_json(job.record, run)


def inverted_once(
    request: Request, pipe: MDEEditPipeline, model: str, cache: InversionCache
) -> tuple[Inversion, dict[str, float] | None]:
    """A row's inversion, and what it cost; None if it was there already."""
    if request.inversion is not None:
        return request.inversion, None
    key = inversion_key(request, pipe, model)
    found = cache.get(key)
    if found is not None:
        return found, None
    with measured(pipe.unet) as cost:
        inversion = invert(request.args, pipe, request.image)
    cost["seconds"] = round(cost["seconds"], 2)
    try:
        cache.put(key, inversion)
    except (OSError, SafetensorError) as error:  # the edit does not need it
        tqdm.write(f"mde-edit: {cache.folder} keeps no inversion: {error}", file=sys.stderr)
    return inversion, cost


def edits(request: Request, edited: Edited, inversion: Inversion) -> list[dict[str, Any]]:
    """Of each target prompt: its figures, and the losses of every iteration."""
    return [
        {"prompt": prompt, **figures(request, edited, inversion, number), "losses": edited.output.losses[number]}
        for number, prompt in enumerate(request.prompts)
    ]


def write_table(path: Path, rows: list[Row], records: list[dict[str, Any]]) -> None:
    """A line per edited picture, and per row that could not be edited."""
    how = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}  # a file's name can be anything
    with replacing(path) as temporary, open(temporary, "w", **how) as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        table.writeheader()
        for row, record in zip(rows, records):
            known = record.get("settings") or (vars(row.args) if row.args else {})
            told = {name: json.dumps(v) if isinstance(v, (dict, list)) else v for name, v in known.items()}
            told |= {"row": row.where, "name": row.name}
            if "error" in record:
                table.writerow({**told, "error": record["error"]})
                continue
            told["inversion_seconds"] = (record["inversion"] or {"seconds": 0})["seconds"]
            told["edit_seconds"] = record["edit"]["seconds"]
            for name, one in zip(record["pictures"], record["edits"]):
                last = one["losses"][-1] if one["losses"] else {}
                losses = {name: last.get(name) for name in _LOSSES}
                table.writerow({**told, **one, **losses, "picture": f"{row.name}/{name}"})


def contacts(out: Path, rows: list[Row], records: list[dict[str, Any]]) -> Iterator[tuple]:
    """(the picture, its edit, what to write below) of every edit; the picture is None where it is no longer there."""
    for row, record in zip(rows, records):
        for name, one in zip(record.get("pictures", ()), record.get("edits", ())):
            kept = one["background_psnr"]
            title = row.name if kept is None else f"{row.name}   background {kept:.1f} dB"
            yield _source(row), as_rgb(read_picture("picture", str(out / row.name / name))), (title, one["prompt"])


def _source(row: Row):
    image = getattr(row.args, "image", None)  # an inversion's row has none
    try:
        return image and as_rgb(read_picture("image", image))
    except ValueError:
        return None
