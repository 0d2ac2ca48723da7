# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""The rows of a batch, from a `.jsonl` file or a folder; docs/batch.md says how they are written."""

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import file_digest
from .options import ROW, check_config, once, parse_region, row_settings


LONGEST_NAME = 200  # bytes: most file systems take 255, some of them spent on endings
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Row:
    """One picture and what is to be made of it, or why that cannot be.

    where: "edits.jsonl, line 3", or the row's file. name: of its folder. args: its settings, as those of `edit`, with
    the device still open; None with an error.
    """

    where: str
    name: str
    args: argparse.Namespace | None
    error: str | None = None

    def files(self) -> dict[str, str | None]:
        """The digest of every file that the settings name, None where it cannot be read."""
        args = vars(self.args)
        paths = [args[name] for name in ("image", "inversion") if args.get(name)]
        paths += [text for masks in _masks(args) for texts in masks.values() for text in texts]
        own = [path for path in paths if not _elsewhere(path)]
        return {path: file_digest(path) for path in own}

    def key(self, files: dict[str, str | None] | None = None) -> dict[str, str | None]:
        """What tells the row from what it was before it was changed: its settings, with the content of files in the
        place of their names, so that moving a folder changes nothing.

        Args:
            files: what [`Row.files`] gave; asked again without.
        """
        if self.args is None:
            return {"key": None}
        digests = self.files() if files is None else files

        def told(value):
            if isinstance(value, list):
                return [told(one) for one in value]
            if isinstance(value, dict):
                return {word: told(one) for word, one in value.items()}
            return digests.get(value, value) if isinstance(value, str) else value

        settings = {name: told(value) if name in _OF_FILES else value for name, value in vars(self.args).items()}
        settings.pop("device")
        return {"key": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()}


_OF_FILES = ("image", "inversion", "object", "attribute")


def _masks(args: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
    for name in ("object", "attribute"):
        masks = args.get(name) or {}
        yield from masks if isinstance(masks, list) else [masks]


def _elsewhere(text: str) -> bool:
    """Whether an image or a region is something else than a file of this machine."""
    return text.startswith(("http://", "https://")) or parse_region("object", text)[0] != "file"


def read_rows(source: str, shared: dict[str, Any]) -> list[Row]:
    """All rows, those with a mistake too.

    Args:
        source: a `.jsonl` file or a folder.
        shared: checked settings of rows that do not say otherwise.

    Raises:
        ValueError: there is nothing to read, or no row in it.
    """
    path = Path(source)
    try:
        found = list(_of_folder(path) if path.is_dir() else _of_lines(path))
    except OSError as error:
        raise ValueError(f"`rows` {source!r} cannot be read: {error}.") from error
    if not found:
        kind = "NAME.json with its NAME.png" if path.is_dir() else "line"
        raise ValueError(f"`rows` {source!r} holds no {kind}: see docs/batch.md.")
    rows: list[Row] = []
    taken: dict[str, str] = {}
    for where, name, read in found:
        row = _row(where, name, read, path if path.is_dir() else path.parent, shared, taken)
        taken[row.name.casefold()] = where  # some disks do not tell "Cat" from "cat"
        rows.append(row)
    return rows


def _of_lines(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(where it stands, what to call it, its settings or what is wrong with them) of each line that is not empty."""
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            yield f"{path.name}, line {number}", f"{number:05d}", _json(line)


def _json(text: bytes):
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        return ValueError(f"this is not JSON: {error}")


def _of_folder(folder: Path) -> Iterator[tuple[str, str, Any]]:
    """The same of each NAME.json, with the pictures that belong to it by their names."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    settings = [path for path in files if path.suffix.lower() == ".json"]
    used: set[Path] = set()
    for path in settings:
        read = _json(path.read_bytes())
        if isinstance(read, dict):
            images = [picture for picture in pictures if picture.stem == path.stem]
            masks = [
                picture
                for picture in pictures
                if picture.name.startswith((f"{path.stem}.object.", f"{path.stem}.attribute."))
            ]
            used.update(images, masks)
            read = _with_pictures(read, path.stem, images, masks)
        yield path.name, path.stem, read
    form = "pictures are NAME.png or .jpg, masks NAME.object.WORD.png or NAME.attribute.WORD.png"
    for picture in pictures:
        if picture not in used:  # a misspelt name is not to be lost in silence
            yield picture.name, picture.stem, ValueError(f"no NAME.json goes with it: {form}")


def _with_pictures(read: dict, stem: str, images: list[Path], masks: list[Path]):
    """What a NAME.json says, and what lies beside it."""
    if len(images) > 1:
        return ValueError(f"{' and '.join(image.name for image in images)} are both its picture: keep one")
    if images and not {"image", "inversion"} & set(read):
        read = {**read, "image": images[0].name}
    for mask in masks:
        kind, word = mask.stem.removeprefix(f"{stem}.").split(".", 1)
        told = read.setdefault(kind, {})
        if not isinstance(told, dict) or word in told:
            return ValueError(f"`{kind}` is told in it and by {mask.name}: keep one")
        told[word] = mask.name
    return read


def _row(where: str, name: str, read, folder: Path, shared: dict[str, Any], taken: dict[str, str]) -> Row:
    """A row of what was read, with a name that no other has."""
    try:
        if isinstance(read, ValueError):
            raise read
        row = check_config(read, ROW, "the row", folder)
        wanted = row.pop("name", name)
        _check_name(wanted, taken)
        args = argparse.Namespace(**row_settings(row, shared))
        _check_counts(args)
        return Row(where, wanted, args)
    except ValueError as error:
        while name.casefold() in taken:  # what went wrong has to stand somewhere
            name += "_"
        return Row(where, name, None, str(error))


def _check_name(name: str, taken: dict[str, str]) -> None:
    if name.casefold() in taken:
        raise ValueError(f"`name` {name!r} is that of {taken[name.casefold()]} too: give each row its own.")
    if name.startswith(".") or set(name) & set('/\\:*?"<>|') or name.lower().endswith((".png", ".csv")):
        raise ValueError(f"`name` {name!r} cannot be a folder's: use letters, digits, - and _.")
    if not name.isprintable():
        raise ValueError(f"`name` {name!r} cannot be a folder's: it holds a character that nobody can see.")
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"`name` '{name[:20]}...' has {len(name.encode())} bytes: shorten it to {LONGEST_NAME}.")


def _check_counts(args: argparse.Namespace) -> None:
    """Raise `ValueError` where masks are told per prompt, and not for each."""
    count = len(args.prompt) if isinstance(args.prompt, list) else 1
    for name in ("object", "attribute"):
        masks = getattr(args, name)
        if isinstance(masks, list) and len(masks) != count:
            raise ValueError(f"`{name}` has {len(masks)} sets of masks for {count} prompts: give one, or one each.")
