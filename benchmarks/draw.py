"""Draw the benchmark's cases with the scene generator that trained the embedded model.

    python -m benchmarks.draw --set dev --out bench_out/dev

Deterministic: a case depends on its set, split, task and number alone. Its scenes come from seeds that training never
draws from, and may hold combinations that training never shows.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.cases import Case, Expected, Region, Word, save_cases, touching
from training.judge import object_window
from training.scenes import (
    ANIMALS,
    COLORS,
    HEADWEAR,
    RECOLORED,
    TEXTURES,
    THINGS,
    Caption,
    Drawn,
    Object,
    Scene,
    random_scene,
)


SETS = {"dev": ("dev", 4), "quick": ("dev", 2), "test": ("test", 13)}  # seed, and cases per task and split
SPLITS = ("non_overlap", "overlap")
SMALLEST = 0.012  # share of the picture that an edited object must show, before and after

Changes = dict[int, Object]  # object index -> what it becomes


# Single edits


def other_kind(scene: Scene, index: int, rng: random.Random) -> Object:
    """The object as another kind that the scene does not show, its color and texture kept where they can be."""
    item = scene.objects[index]
    same_class = next(group for group in (ANIMALS, HEADWEAR, THINGS) if item.kind in group)
    shown = {one.kind for one in scene.objects}
    if item.color:
        same_class = [kind for kind in same_class if kind in RECOLORED]
    return replace(item, kind=rng.choice([kind for kind in same_class if kind not in shown]))


def other_color(scene: Scene, index: int, rng: random.Random) -> Object | None:
    """The object in a color that the scene does not show."""
    item = scene.objects[index]
    shown = {one.color for one in scene.objects}
    choices = [color for color in COLORS if color not in shown and not (item.texture and color == "white")]
    return replace(item, color=rng.choice(choices)) if item.kind in RECOLORED else None


def other_texture(scene: Scene, index: int, rng: random.Random) -> Object | None:
    """The object in another texture."""
    item = scene.objects[index]
    if item.color in (None, "white"):
        return None
    return replace(item, texture=rng.choice([texture for texture in TEXTURES if texture != item.texture]))


def other_color_and_kind(scene: Scene, index: int, rng: random.Random) -> Object | None:
    """Another kind in another color: the attribute sits on an object that is itself replaced."""
    recolored = other_color(scene, index, rng)
    if recolored is None or scene.objects[index].color is None:
        return None
    return other_kind(
        replace(scene, objects=(*scene.objects[:index], recolored, *scene.objects[index + 1 :])), index, rng
    )


EDITS: tuple[Callable, ...] = (other_kind, other_color, other_texture, other_color_and_kind)


# Tasks: a scene and the changes asked of it, or None where the scene does not allow them


def several(edit: Callable) -> Callable[[Scene, random.Random], tuple[Scene, Changes] | None]:
    """Two to four objects, each with the same sort of edit."""

    def task(scene: Scene, rng: random.Random) -> tuple[Scene, Changes] | None:
        order = rng.sample(range(len(scene.objects)), len(scene.objects))
        changes: Changes = {}
        for index in order[: rng.choice((2, 2, 3, 4))]:
            changed = edit(apply(scene, changes), index, rng)  # so that two edits never ask for the same thing
            if changed is not None:
                changes[index] = changed
        return scene, changes

    return task


def together(scene: Scene, rng: random.Random) -> tuple[Scene, Changes] | None:
    """Replacement, recoloring and a new texture in one picture, each on its own object."""
    if len(scene.objects) < 3:
        return None
    changes: Changes = {}
    chosen = rng.sample(range(len(scene.objects)), 3)
    for edit, index in zip((other_kind, other_color, other_texture), chosen, strict=True):
        changed = edit(apply(scene, changes), index, rng)
        if changed is None:
            return None
        changes[index] = changed
    return scene, changes


def chain(scene: Scene, rng: random.Random) -> tuple[Scene, Changes] | None:
    """The first animal becomes the second's kind, the second something else."""
    animals = [index for index, item in enumerate(scene.objects) if item.kind in ANIMALS]
    if len(animals) < 2:
        return None
    first, second = rng.sample(animals, 2)
    return scene, {
        first: replace(scene.objects[first], kind=scene.objects[second].kind),
        second: other_kind(scene, second, rng),
    }


def swap(scene: Scene, rng: random.Random) -> tuple[Scene, Changes] | None:
    """Two objects exchange their colors."""
    colored = [index for index, item in enumerate(scene.objects) if item.color and not item.texture]
    if len(colored) < 2:
        return None
    one, other = rng.sample(colored, 2)
    first, second = scene.objects[one], scene.objects[other]
    if first.color == second.color:
        return None
    return scene, {one: replace(first, color=second.color), other: replace(second, color=first.color)}


def twin(scene: Scene, rng: random.Random) -> tuple[Scene, Changes] | None:
    """Two of one kind, of which one is edited, as is some other object; the twin stays."""
    animals = [index for index, item in enumerate(scene.objects) if item.kind in ANIMALS]
    others = [index for index, item in enumerate(scene.objects) if item.kind in RECOLORED]
    if len(animals) < 2 or not others:
        return None
    first, second = rng.sample(animals, 2)
    scene = apply(scene, {second: replace(scene.objects[second], kind=scene.objects[first].kind)})
    edited = rng.choice((first, second))
    other = rng.choice(others)
    return scene, {edited: other_kind(scene, edited, rng), other: other_color(scene, other, rng)}


TASKS = {
    "object": several(other_kind),
    "color": several(other_color),
    "texture": several(other_texture),
    "all": together,
    "chain": chain,
    "swap": swap,
    "twin": twin,
    "object+color": several(other_color_and_kind),
}


def apply(scene: Scene, changes: Changes) -> Scene:
    return replace(scene, objects=tuple(changes.get(index, item) for index, item in enumerate(scene.objects)))


# Cases


def word_at(caption: Caption, place: int) -> Word:
    """The word at that place of a caption, and how many of its like stand before it."""
    words = [word.strip(",") for word in caption.text.split()]
    return words[place], words[:place].count(words[place])


def describe(item: Object) -> str:
    return " ".join((*item.adjectives, item.kind))


def region_of(index: int, source: Scene, target: Scene, caption: Caption, mask: np.ndarray) -> Region:
    before, after = source.objects[index], target.objects[index]
    new = [word for word in after.adjectives if word not in before.adjectives]
    places = dict(zip(after.adjectives, caption.attributes[index], strict=True))  # phrasing 0 keeps their order
    return Region(
        name=f"object{index}",
        mask=mask,
        source=describe(before),
        target=describe(after),
        object=word_at(caption, caption.nouns[index]) if before.kind != after.kind else None,
        attributes=tuple(word_at(caption, places[word]) for word in new),
    )


def draw_case(seed: str, split: str, task: str, number: int, size: int = 128, union: bool = False) -> Case:
    """Case `number` of a task and split.

    Args:
        seed: of the set.
        size: side of the pictures.
        union: masks hold the object's place after the edit too, not only what is seen of it before.
    """
    rng = random.Random(f"bench {seed} {split} {task} {number}")
    while True:
        found = TASKS[task](random_scene(rng, held_out=None, groups=rng.choice((2, 2, 3))), rng)
        if found is None or len(found[1]) < 2 or None in found[1].values():
            continue
        source, changes = found
        target = apply(source, changes)
        before, after = source.render(size), target.render(size)
        seen = [drawn.visible[index].mean() for drawn in (before, after) for index in changes]
        if min(seen) < SMALLEST or touching([before.full[index] for index in changes]) != (split == "overlap"):
            continue
        return assemble(f"{split}_{task}_{number:02d}", split, task, source, target, before, after, changes, union)


def assemble(
    name: str,
    split: str,
    task: str,
    source: Scene,
    target: Scene,
    before: Drawn,
    after: Drawn,
    changes: Changes,
    union: bool,
) -> Case:
    caption = target.caption()
    masks = {
        index: before.visible[index] | after.visible[index] if union else before.visible[index] for index in changes
    }
    return Case(
        name=name,
        split=split,
        task=task,
        image=before.image,
        source_prompt=source.caption().text,
        target_prompt=caption.text,
        regions=tuple(region_of(index, source, target, caption, masks[index]) for index in sorted(changes)),
        ideal=after.image,
        expected=tuple(
            Expected(
                region=f"object{index}" if index in changes else None,
                kind=item.kind,
                color=item.color,
                texture=item.texture,
                window=tuple(float(value) for value in object_window(after.visible[index])),
            )
            for index, item in enumerate(target.objects)
        ),
    )


def draw_cases(name: str, size: int = 128, union: bool = False) -> list[Case]:
    """A whole set: "dev" to tune on, "quick" its first cases, "test" to report."""
    seed, count = SETS[name]
    return [
        draw_case(seed, split, task, number, size, union)
        for split in SPLITS
        for task in TASKS
        for number in range(count)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="quick")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128, help="side of the pictures (%(default)s)")
    parser.add_argument("--union", action="store_true", help="masks also hold the edited object's new place")
    args = parser.parse_args(argv)
    save_cases(draw_cases(args.set, args.size, args.union), args.out)


if __name__ == "__main__":
    main()
