"""What a benchmark case is, and how a set of them lies on disk.

A set is a folder with `cases.jsonl`, one case per line, beside its pictures and masks: drawn ones (`benchmarks.draw`)
and real ones (`benchmarks.convert`) have the same form, so every command runs on either. Beside it lies `edits.jsonl`,
the same cases as the rows of `mde-edit batch`.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image


SMALL = 0.025  # share of the picture: what is smaller is reported apart
TOUCHING = 0.02  # two masks nearer than this share of the picture's side overlap

Word = tuple[str, int]  # a word of the target prompt and which of its occurrences is meant, from 0


@dataclass(frozen=True)
class Region:
    """One edited object.

    Attributes:
        name: unique in the case.
        mask: boolean (h, w), where the source object is seen.
        source: the words that name it in the source prompt, "straw hat".
        target: the words that name it in the target prompt, "red hat".
        object: the new object's word in the target prompt; None if the object stays what it is.
        attributes: the new attribute words in the target prompt.
    """

    name: str
    mask: np.ndarray
    source: str
    target: str
    object: Word | None = None
    attributes: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Expected:
    """What a judge should find in the edited picture.

    Attributes:
        region: name of the region that this object is edited in; None for a bystander.
        kind: "dog".
        color: "red"; None if the words name none.
        texture: "striped"; None if the words name none.
        window: square around the object in the ideal picture: left, top, side, as shares of the picture's side.
    """

    region: str | None
    kind: str
    color: str | None
    texture: str | None
    window: tuple[float, float, float]


@dataclass(frozen=True)
class Case:
    """A picture and the edits asked of it.

    Attributes:
        name: unique in its set.
        split: "overlap" or "non_overlap".
        task: what kind of edit, "object", "color", "swap", ...
        image: the source picture.
        source_prompt: what it shows.
        target_prompt: what it should show.
        regions: one per edited object.
        ideal: the picture a perfect edit gives, where it is known.
        expected: every object of the ideal picture, where they are known.
    """

    name: str
    split: str
    task: str
    image: Image.Image
    source_prompt: str
    target_prompt: str
    regions: tuple[Region, ...]
    ideal: Image.Image | None = None
    expected: tuple[Expected, ...] = ()

    @property
    def object_masks(self) -> dict[Word, np.ndarray]:
        """New object word -> mask, as `MDEEditPipeline` takes them."""
        return {region.object: region.mask for region in self.regions if region.object}

    @property
    def attribute_masks(self) -> dict[Word, np.ndarray]:
        """New attribute word -> mask, as `MDEEditPipeline` takes them."""
        return {word: region.mask for region in self.regions for word in region.attributes}

    @cached_property
    def digest(self) -> str:
        """What it holds, told in 64 characters: cases drawn anew under an old name are others."""
        told = hashlib.sha256(repr((self.source_prompt, self.target_prompt, self.expected)).encode())
        for region in self.regions:
            told.update(repr(replace(region, mask=None)).encode())
            told.update(region.mask.tobytes())
        for picture in filter(None, (self.image, self.ideal)):
            told.update(repr(picture.size).encode() + picture.tobytes())
        return told.hexdigest()

    @property
    def union(self) -> np.ndarray:
        """Boolean (h, w): all masks together."""
        return np.any([region.mask for region in self.regions], axis=0)


def touching(masks: list[np.ndarray]) -> bool:
    """Whether any two masks come nearer than `TOUCHING`."""
    reach = max(1, round(TOUCHING * masks[0].shape[0]))
    shifts = range(-reach, reach + 1)
    for index, mask in enumerate(masks):
        padded = np.pad(mask, reach)
        grown = np.any([np.roll(padded, (dy, dx), (0, 1)) for dy in shifts for dx in shifts], axis=0)
        grown = grown[reach:-reach, reach:-reach]
        if any((grown & other).any() for other in masks[index + 1 :]):
            return True
    return False


def save_cases(cases: Iterable[Case], folder: Path) -> None:
    """Write a set: PNG pictures and masks, and last `cases.jsonl`, so that a broken-off folder is not taken for one."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, rows = [], []
    for case in cases:
        files = {"image": f"{case.name}.png", "ideal": f"{case.name}_ideal.png" if case.ideal else None}
        case.image.save(folder / files["image"])
        if case.ideal:
            case.ideal.save(folder / files["ideal"])
        regions = []
        for region in case.regions:
            mask = f"{case.name}_{region.name}.png"
            Image.fromarray(region.mask.astype(np.uint8) * 255).save(folder / mask)
            regions.append({**asdict(region), "mask": mask})
        entries = {key: getattr(case, key) for key in ("name", "split", "task", "source_prompt", "target_prompt")}
        expected = [asdict(one) for one in case.expected]
        lines.append(json.dumps({**entries, **files, "regions": regions, "expected": expected}))
        rows.append(json.dumps(as_row(case, files["image"], [region["mask"] for region in regions])))
    (folder / "edits.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "cases.jsonl").write_text("\n".join(lines) + "\n")


def as_row(case: Case, image: str, masks: list[str]) -> dict:
    """A case as `mde-edit batch` reads it.

    Args:
        image, masks: files of the picture and of its regions.
    """
    objects, attributes = {}, {}
    for region, mask in zip(case.regions, masks, strict=True):
        objects |= {f"{word}:{number}": mask for word, number in filter(None, [region.object])}
        attributes |= {f"{word}:{number}": mask for word, number in region.attributes}
    prompts = {"source_prompt": case.source_prompt, "prompt": case.target_prompt}
    return {"name": case.name, "image": image, **prompts, "object": objects, "attribute": attributes}


def load_cases(folder: Path) -> list[Case]:
    """Read a set.

    Raises:
        ValueError: a missing picture or mask, a mask of another size, or a word that the target prompt does not hold.
    """
    cases = []
    for number, line in enumerate((folder / "cases.jsonl").read_text().splitlines(), 1):
        if not line.strip():
            continue
        entry = json.loads(line)
        where = f"{folder.name}/cases.jsonl, line {number}"

        def picture(name: str, where: str = where) -> Image.Image:
            if not (folder / name).is_file():
                raise ValueError(f"{where}: no file {name!r}")
            with Image.open(folder / name) as image:
                image.load()
                return image

        image = picture(entry["image"]).convert("RGB")
        regions = []
        for region in entry["regions"]:
            mask = np.asarray(picture(region["mask"]).convert("L")) > 127
            if mask.shape != image.size[::-1]:
                raise ValueError(f"{where}: mask {region['mask']!r} is {mask.shape[::-1]}, the image {image.size}")
            object_word = tuple(region["object"]) if region["object"] else None
            attributes = tuple(tuple(word) for word in region["attributes"])
            for word, occurrence in (*((object_word,) if object_word else ()), *attributes):
                if entry["target_prompt"].lower().replace(",", " ").split().count(word.lower()) <= occurrence:
                    raise ValueError(f"{where}: the target prompt holds no {word!r} number {occurrence + 1}")
            regions.append(Region(**{**region, "mask": mask, "object": object_word, "attributes": attributes}))
        ideal = picture(entry["ideal"]).convert("RGB") if entry.get("ideal") else None
        entries = {key: entry[key] for key in ("name", "split", "task", "source_prompt", "target_prompt")}
        expected = tuple(Expected(**{**one, "window": tuple(one["window"])}) for one in entry.get("expected", ()))
        cases.append(Case(**entries, image=image, regions=tuple(regions), ideal=ideal, expected=expected))
    return cases
