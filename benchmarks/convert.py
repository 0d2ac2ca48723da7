"""Real pictures as cases, and as rows of `mde-edit batch` (edits.jsonl): data sets that people have, from their files.

    python -m benchmarks.convert lomoe LoMOE-Bench --out bench_out/lomoe
    python -m benchmarks.convert oir OIR-Bench/multi_object.yaml --out bench_out/oir
    python -m benchmarks.convert pie PIE_Bench_pp --out bench_out/pie
    python -m benchmarks.convert coco annotations/instances_val2017.json --images val2017 --out bench_out/coco

Layouts as their projects read them (2024):
- LoMOE-Bench: `LoMOE.json`, number -> `image_path`, `mask_path` and `fg_prompt` (several, each in double quotes), and
  `source_prompt` likewise, else line by line in `utils/mask_orig_prompts.txt`; the whole target prompts line by line in
  `utils/target_prompts.txt`. It has no source prompts: they are the target prompts with the phrases put back.
- OIR-Bench: a YAML of entries with `image_path`, `origin_prompt`, `target_prompt`, `origin_change`, `prompt_change` and
  `prompt_change_mask`; paths are relative to the YAML's folder or one above it.
- PIE-Bench++: `*/*.parquet`, read with pyarrow, one folder per kind of edit. A record has `id`, `image` (`bytes`),
  `source_prompt` and `target_prompt` with the changed words in brackets, `blended_words` (a JSON list of "old,new") and
  `mask` ("start length start length ..." over the rows of 512x512 pixels), which is one for all of its changes. What
  names no word to change (most additions, deletions, styles and backgrounds) is left out.
- COCO: instance annotations. It has no edits: every object chosen becomes another of its supercategory.
"""

import argparse
import io
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

from benchmarks.cases import Case, Region, Word, save_cases, touching


LINKING = {"a", "an", "the", "of", "with", "in", "on", "and"}
PIE_SIDE = 512  # of the pictures that PIE-Bench++'s masks are told on
COCO_SHARE = (0.03, 0.5)  # of the picture, that an object to edit covers


def words_of(text: str) -> list[str]:
    return [word for word in re.split(r"[\s,.;:]+", text.lower()) if word]


def region(name: str, mask: np.ndarray, source: str, target: str, target_prompt: str, noun: bool) -> Region:
    """A region whose phrase `target` stands in `target_prompt`.

    With `noun`, the phrase's last word is a thing: a new one is an object to draw. Other new words are attributes.

    Raises:
        ValueError: the phrase does not stand there, or changes nothing.
    """
    prompt, phrase = words_of(target_prompt), words_of(target)
    places = [start for start in range(len(prompt)) if prompt[start : start + len(phrase)] == phrase]
    if not places:
        raise ValueError(f"{name}: {target!r} does not stand in the target prompt {target_prompt!r}")

    def word(offset: int) -> Word:
        place = places[0] + offset
        return prompt[place], prompt[:place].count(prompt[place])

    before = words_of(source)
    new = [i for i, one in enumerate(phrase) if one not in before and one not in LINKING]
    if not new:
        raise ValueError(f"{name}: nothing changes from {source!r} to {target!r}")
    last = len(phrase) - 1 if noun else None
    return Region(
        name=name,
        mask=mask,
        source=source,
        target=target,
        object=word(last) if last in new else None,
        attributes=tuple(word(i) for i in new if i != last),
    )


def make_case(
    name: str, image: Image.Image, prompts: tuple[str, str], changes: list[tuple], nouns: bool = True
) -> Case:
    """A case of (mask, source words, target words) per object, its split told by the masks; `nouns`: see [`region`]."""
    regions = tuple(
        region(f"object{index}", mask, source, target, prompts[1], nouns)
        for index, (mask, source, target) in enumerate(changes)
    )
    return Case(
        name=name,
        split="overlap" if touching([one.mask for one in regions]) else "non_overlap",
        task="object"
        if all(one.object for one in regions)
        else "mixed"
        if any(one.object for one in regions)
        else "attribute",
        image=image,
        source_prompt=prompts[0],
        target_prompt=prompts[1],
        regions=regions,
    )


def prepare(image: Path, masks: list[Path], size: int) -> tuple[Image.Image, list[np.ndarray]]:
    """Picture and masks, center-cropped to a square of `size`."""

    def square(picture: Image.Image, resample: Image.Resampling) -> Image.Image:
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        return picture.crop((left, top, left + side, top + side)).resize((size, size), resample)

    with Image.open(image) as picture:
        full = picture.size
        cropped = square(picture.convert("RGB"), Image.Resampling.LANCZOS)
    found = []
    for path in masks:
        with Image.open(path) as mask:
            mask = mask.convert("L").resize(full, Image.Resampling.NEAREST)
            found.append(np.asarray(square(mask, Image.Resampling.NEAREST)) > 127)
    return cropped, found


def quoted(text: str) -> list[str]:
    return re.findall(r'"([^"]*)"', text)


def lomoe(folder: Path, size: int) -> Iterator[Case]:
    records = json.loads((folder / "LoMOE.json").read_text())
    utils = folder / "utils"
    targets = (utils / "target_prompts.txt").read_text().splitlines()
    sources = (
        (utils / "mask_orig_prompts.txt").read_text().splitlines()
        if (utils / "mask_orig_prompts.txt").is_file()
        else []
    )
    for key, record in sorted(records.items(), key=lambda item: int(item[0])):
        target_prompt, phrases = targets[int(key)], quoted(record["fg_prompt"])
        known = quoted(record["source_prompt"] if "source_prompt" in record else sources[int(key)])
        paths = [folder / path for path in quoted(record["mask_path"])]
        if not len(known) == len(phrases) == len(paths):
            raise ValueError(f"LoMOE {key}: {len(paths)} masks, {len(known)} source and {len(phrases)} target phrases")
        source_prompt = target_prompt
        for old, new in zip(known, phrases, strict=True):
            if new not in source_prompt:
                raise ValueError(f"LoMOE {key}: {new!r} does not stand in the target prompt {target_prompt!r}")
            source_prompt = source_prompt.replace(new, old, 1)
        image, masks = prepare(folder / record["image_path"], paths, size)
        changes = list(zip(masks, known, phrases, strict=True))
        yield make_case(f"lomoe_{int(key):03d}", image, (source_prompt, target_prompt), changes)


def oir(path: Path, size: int) -> Iterator[Case]:
    def find(name: str) -> Path:
        for folder in (path.parent, *path.parent.parents):
            if (folder / name).is_file():
                return folder / name
        raise ValueError(f"{path.name}: no file {name!r} beside it or above")

    for key, entry in yaml.safe_load(path.read_text()).items():
        masks = [find(name) for name in entry["prompt_change_mask"]]
        image, masks = prepare(find(entry["image_path"]), masks, size)
        changes = list(zip(masks, entry["origin_change"], entry["prompt_change"], strict=True))
        yield make_case(f"oir_{key}", image, (entry["origin_prompt"], entry["target_prompt"]), changes)


def pie(folder: Path, size: int) -> Iterator[Case]:
    import pyarrow.parquet  # of this layout alone

    for path in sorted(folder.glob("*/*.parquet")):
        for record in pyarrow.parquet.read_table(path).to_pylist():
            case = pie_case(record, path.parent.name, size)
            if case is not None:
                yield case


def pie_case(record: dict, kind: str, size: int) -> Case | None:
    """A record of PIE-Bench++ as a case; None if it names no word to change.

    Args:
        kind: of the edit, its folder's name, such as "6_change_attribute_color_40".
    """
    prompts = tuple(re.sub(r"[\[\]]", "", record[name]) for name in ("source_prompt", "target_prompt"))
    runs = np.array(record["mask"].split(), int).reshape(-1, 2)
    flat = np.zeros(PIE_SIDE**2, np.uint8)
    for start, length in runs:
        flat[start : start + length] = 255
    with Image.open(io.BytesIO(record["image"]["bytes"])) as picture:
        image = picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    drawn = Image.fromarray(flat.reshape(PIE_SIDE, PIE_SIDE)).resize((size, size), Image.Resampling.NEAREST)
    mask, changes = np.asarray(drawn) > 127, []
    for pair in json.loads(record["blended_words"] or "[]"):
        old, _, new = (part.strip() for part in pair.partition(","))
        if (
            set(words_of(new)) - set(words_of(old)) - LINKING
            and f" {' '.join(words_of(new))} " in f" {' '.join(words_of(prompts[1]))} "
        ):
            changes.append((mask, old, new))
    attributes = "_color_" in kind or "_material_" in kind
    return make_case(f"pie_{record['id']}", image, prompts, changes, not attributes) if changes else None


def polygons(segmentation: list[list[float]], width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height))
    for points in segmentation:
        ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask


def coco(path: Path, images: Path, size: int, count: int, seed: int = 0) -> Iterator[Case]:
    """Pictures with two to four objects of different categories, each replaced within its supercategory."""
    data = json.loads(path.read_text())
    categories = {one["id"]: one for one in data["categories"]}
    kin: dict[str, list[str]] = {}
    for one in categories.values():
        kin.setdefault(one["supercategory"], []).append(one["name"])
    by_image: dict[int, list[dict]] = {}
    for one in data["annotations"]:
        by_image.setdefault(one["image_id"], []).append(one)
    rng = random.Random(seed)
    entries = sorted(data["images"], key=lambda entry: entry["id"])
    rng.shuffle(entries)

    def cases() -> Iterator[Case]:
        for entry in entries:
            area = entry["width"] * entry["height"]
            shown = by_image.get(entry["id"], [])
            usable = [
                one
                for one in shown
                if not one["iscrowd"]
                and COCO_SHARE[0] < one["area"] / area < COCO_SHARE[1]
                and sum(one["category_id"] == other["category_id"] for other in shown) == 1
                and len(kin[categories[one["category_id"]]["supercategory"]]) > 1
            ]
            if not 2 <= len(usable) <= 4:
                continue
            usable.sort(key=lambda one: one["bbox"][0])
            before = [categories[one["category_id"]]["name"] for one in usable]
            after: list[str] = []
            for one, name in zip(usable, before, strict=True):
                choices = kin[categories[one["category_id"]]["supercategory"]]
                choices = [choice for choice in choices if choice not in before and choice not in after] or [name]
                after.append(rng.choice(choices))
            if any(old == new for old, new in zip(before, after, strict=True)):
                continue
            prompts = tuple(
                "a photo of " + " and ".join(with_article(name) for name in names) for names in (before, after)
            )
            masks = [polygons(one["segmentation"], entry["width"], entry["height"]) for one in usable]
            with Image.open(images / entry["file_name"]) as picture:
                image = picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
            arrays = [np.asarray(mask.resize((size, size), Image.Resampling.NEAREST)) > 127 for mask in masks]
            yield make_case(f"coco_{entry['id']}", image, prompts, list(zip(arrays, before, after, strict=True)))

    yield from itertools.islice(cases(), count)


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", choices=("lomoe", "oir", "pie", "coco"))
    parser.add_argument(
        "path", type=Path, help="LoMOE-Bench's folder, OIR-Bench's YAML, PIE-Bench++'s folder, COCO's JSON"
    )
    parser.add_argument("--images", type=Path, help="COCO's folder of pictures")
    parser.add_argument("--count", type=int, default=100, help="COCO: how many cases (%(default)s)")
    parser.add_argument("--size", type=int, default=512, help="side of the pictures (%(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.layout == "coco":
        if args.images is None:
            parser.error("coco needs --images, the folder of the pictures")
        cases = coco(args.path, args.images, args.size, args.count)
    else:
        cases = {"lomoe": lomoe, "oir": oir, "pie": pie}[args.layout](args.path, args.size)
    cases = list(cases)
    save_cases(cases, args.out)
    print(f"{len(cases)} cases: {args.out}")


if __name__ == "__main__":
    main()
