"""Procedural scenes of emoji: pictures, captions, masks and exact edits.

A `Scene` is a small immutable description; everything else is derived from it and depends on nothing but it:

    scene = random_scene(random.Random(0))
    scene = Scene.of("cat", "straw hat", background="on grass")        # or by words
    drawn = scene.render(size=128)                    # drawn.image, drawn.full[i], drawn.visible[i]
    caption = scene.caption(phrasing=0)               # caption.text, caption.nouns[i], caption.attributes[i]
    ideal = scene.edited({"cat": "dog", "hat": "red hat"}).render(128).image

Lengths are shares of the picture's side, so a scene renders at any size. Object i is the same object everywhere:
`scene.objects[i]`, `drawn.visible[i]`, `caption.nouns[i]`.
"""

import functools
import math
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image


SPRITES = Path(__file__).with_name("sprites")


class Animal(NamedTuple):
    code_point: str
    brim: float  # height at which headwear ends, share of the sprite's height from its top
    head_width: float  # share of the sprite's width


class Headwear(NamedTuple):
    code_point: str
    width: float  # share of the wearer's head width


class Thing(NamedTuple):
    code_point: str
    recolored: bool


ANIMALS = {
    "cat": Animal("1f431", 0.30, 0.86),
    "dog": Animal("1f436", 0.24, 0.70),
    "tiger": Animal("1f42f", 0.26, 0.80),
    "fox": Animal("1f98a", 0.36, 0.78),
    "lion": Animal("1f981", 0.24, 0.72),
    "panda": Animal("1f43c", 0.26, 0.80),
    "bear": Animal("1f43b", 0.24, 0.80),
    "rabbit": Animal("1f430", 0.52, 0.62),
    "frog": Animal("1f438", 0.22, 0.72),
    "pig": Animal("1f437", 0.24, 0.70),
    "monkey": Animal("1f435", 0.24, 0.72),
    "koala": Animal("1f428", 0.28, 0.66),
    "mouse": Animal("1f42d", 0.44, 0.62),
    "cow": Animal("1f42e", 0.28, 0.56),
    "wolf": Animal("1f43a", 0.34, 0.72),
    "penguin": Animal("1f427", 0.17, 0.72),
}
HEADWEAR = {
    "hat": Headwear("1f452", 0.95),
    "cap": Headwear("1f9e2", 0.74),
    "crown": Headwear("1f451", 0.76),
    "helmet": Headwear("1fa96", 0.9),
}
THINGS = {
    "ball": Thing("1f3c0", True),
    "balloon": Thing("1f388", True),
    "mug": Thing("2615", True),
    "car": Thing("1f697", True),
    "umbrella": Thing("2602-fe0f", True),
    "star": Thing("2b50", True),
    "apple": Thing("1f34e", False),
    "pear": Thing("1f350", False),
    "pumpkin": Thing("1f383", False),
    "mushroom": Thing("1f344", False),
    "cactus": Thing("1f335", False),
    "cake": Thing("1f382", False),
}
KINDS = (*ANIMALS, *HEADWEAR, *THINGS)
RECOLORED = (*HEADWEAR, *(kind for kind, thing in THINGS.items() if thing.recolored))

COLORS = {  # sRGB, 0-255
    "red": (226, 32, 44),
    "orange": (252, 124, 12),
    "yellow": (252, 208, 16),
    "green": (48, 166, 58),
    "blue": (30, 100, 228),
    "purple": (132, 62, 200),
    "pink": (252, 132, 190),
    "white": (246, 246, 250),
}
TEXTURES = ("striped", "dotted", "checkered")  # on every color but white, whose second color would be itself
BACKGROUNDS = (
    "",  # a plain studio wall, never named in captions
    "on grass",
    "in the snow",
    "at the beach",
    "at night",
    "in the desert",
    "under water",
    "at sunset",
)
ATTRIBUTES = ("straw", *COLORS, *TEXTURES)

HELD_OUT_SHARE = 8  # one in so many (animal, headwear, color) combinations never occurs in training


# Description


@dataclass(frozen=True)
class Object:
    """One drawn sprite.

    Attributes:
        kind: one of `KINDS`, also the noun that names it.
        color: one of `COLORS`, or None for the sprite's own colors (a hat's own look is straw).
        texture: one of `TEXTURES` drawn in white over `color`, or None.
        x: center, share of the picture's width. For worn headwear: shift in wearer widths.
        y: lower edge, share of the picture's height. For worn headwear: shift in wearer widths.
        size: long side, share of the picture's side. For worn headwear: factor on the fitting width.
        worn_by: index of the wearing animal, for headwear only.
    """

    kind: str
    color: str | None = None
    texture: str | None = None
    x: float = 0.5
    y: float = 0.9
    size: float = 0.5
    worn_by: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; known are {', '.join(KINDS)}")
        if self.color is not None and (self.color not in COLORS or self.kind not in RECOLORED):
            raise ValueError(f"a {self.kind} cannot be {self.color!r}")
        if self.texture is not None and (self.texture not in TEXTURES or self.color in (None, "white")):
            raise ValueError(f"texture {self.texture!r} needs a color other than white")

    @property
    def adjectives(self) -> tuple[str, ...]:
        if self.kind == "hat" and self.color is None:
            return ("straw",)
        return tuple(word for word in (self.color, self.texture) if word)

    def restyled(self, words: str) -> "Object":
        """The object that `words` ("dog", "red striped hat") name, in this object's place."""
        *adjectives, kind = words.split()
        unknown = [word for word in adjectives if word not in ATTRIBUTES]
        if unknown or ("straw" in adjectives and (kind != "hat" or len(adjectives) > 1)):
            raise ValueError(f"cannot draw {words!r}")
        color = next((word for word in adjectives if word in COLORS), None)
        texture = next((word for word in adjectives if word in TEXTURES), None)
        return replace(self, kind=kind, color=color, texture=texture)


@dataclass(frozen=True)
class Caption:
    """A caption and where it names each object, as indices into `text.split()`.

    A word may carry a comma ("hat,"): strip it before comparing, a CLIP tokenizer splits it off by itself.
    """

    text: str
    nouns: tuple[int, ...]
    attributes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Drawn:
    """A rendered scene. Masks are boolean (size, size), True where an object is.

    Attributes:
        image: RGB picture.
        full: one mask per object, as if nothing stood before it.
        visible: one mask per object, without what later objects cover.
    """

    image: Image.Image
    full: tuple[np.ndarray, ...]
    visible: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Scene:
    """Objects in painting order (a later one covers an earlier one), before a background.

    Attributes:
        objects: painting order; a worn object follows its wearer.
        background: one of `BACKGROUNDS`.
        background_seed: picks the background's tint, horizon and details.
    """

    objects: tuple[Object, ...]
    background: str = ""
    background_seed: int = 0

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"unknown background {self.background!r}; known are {BACKGROUNDS}")
        for index, item in enumerate(self.objects):
            if item.worn_by is None:
                continue
            if item.kind not in HEADWEAR or not 0 <= item.worn_by < index:
                raise ValueError(f"object {index} ({item.kind}) cannot be worn by object {item.worn_by}")
            if self.objects[item.worn_by].kind not in ANIMALS:
                raise ValueError(f"a {self.objects[item.worn_by].kind} wears no {item.kind}")

    @classmethod
    def of(cls, *items: str, background: str = "", seed: int = 0) -> "Scene":
        """Scene of named objects, side by side; headwear goes to the animal named before it.

        `Scene.of("cat", "straw hat", "blue ball")` is a cat wearing a straw hat and a blue ball; its objects are in
        that order. Sizes and places are drawn from `seed`.
        """
        rng = random.Random(seed)
        groups: list[list[str]] = []
        for item in items:
            if item.split()[-1] in HEADWEAR and groups:
                groups[-1].append(item)
            else:
                groups.append([item])
        return cls(_arrange(groups, range(len(groups)), rng), background, rng.randrange(2**16))

    def find(self, noun: str) -> int:
        """Index of the only object of that kind."""
        found = [index for index, item in enumerate(self.objects) if item.kind == noun]
        if len(found) != 1:
            raise ValueError(f"the scene has {len(found)} objects called {noun!r}: give an index")
        return found[0]

    def edited(self, edits: dict[int | str, str | dict]) -> "Scene":
        """The same scene with some objects changed: rendered, this is an edit's ideal result.

        Args:
            edits: object (index, or its noun if that is unique) → words that now describe it ("dog", "red striped
                hat"; no color word: the sprite's own colors), or a dict of `Object` fields to replace.
        """
        objects = list(self.objects)
        for key, change in edits.items():
            index = self.find(key) if isinstance(key, str) else key
            item = objects[index]
            objects[index] = item.restyled(change) if isinstance(change, str) else replace(item, **change)
        return replace(self, objects=tuple(objects))

    # Geometry and drawing

    def boxes(self) -> list[tuple[float, float, float, float]]:
        """(left, top, width, height) of every object, shares of the picture's side."""
        boxes = []
        for item in self.objects:
            width, height = _sprite(item.kind).size
            if item.worn_by is None:
                scale = item.size / max(width, height)
                left, lower = item.x - width * scale / 2, item.y
            else:
                wearer = self.objects[item.worn_by]
                animal = ANIMALS[wearer.kind]
                wearer_left, wearer_top, wearer_width, wearer_height = boxes[item.worn_by]
                scale = wearer_width * animal.head_width * HEADWEAR[item.kind].width * item.size / width
                left = wearer_left + wearer_width * (0.5 + item.x) - width * scale / 2
                lower = wearer_top + wearer_height * animal.brim + wearer_width * item.y
            boxes.append((left, lower - height * scale, width * scale, height * scale))
        return boxes

    def render(self, size: int = 128) -> Drawn:
        """Draw the scene at `size` x `size` px."""
        canvas = _background(self.background, self.background_seed, size).copy()
        full = []
        for item, (left, top, width, height) in zip(self.objects, self.boxes(), strict=True):
            sprite = _styled(item.kind, item.color, item.texture)
            box = max(1, round(width * size)), max(1, round(height * size))
            sprite = sprite.resize(box, Image.Resampling.BILINEAR)
            corner = round(left * size), round(top * size)
            canvas.paste(sprite, corner, sprite)
            mask = Image.new("L", (size, size))
            mask.paste(sprite.getchannel("A"), corner)
            full.append(np.asarray(mask) > 127)
        visible, covered = [], np.zeros((size, size), bool)
        for mask in reversed(full):
            visible.append(mask & ~covered)
            covered |= mask
        return Drawn(canvas, tuple(full), tuple(reversed(visible)))

    # Words

    def caption(self, phrasing: int = 0) -> Caption:
        """One of `len(PHRASINGS)` ways to say the scene, objects from left to right."""
        style = PHRASINGS[phrasing % len(PHRASINGS)]
        words: list[str] = style.opening.split()
        nouns, attributes = [0] * len(self.objects), [()] * len(self.objects)
        background = self.background.split()
        if style.background_first and background:
            words += background[:-1] + [background[-1] + ","]

        def name(index: int) -> None:
            item = self.objects[index]
            adjectives = item.adjectives[::-1] if style.texture_first else item.adjectives
            named = [*adjectives, item.kind]
            words.append("an" if named[0][0] in "aeiou" else "a")
            attributes[index] = tuple(range(len(words), len(words) + len(adjectives)))
            words.extend(named)
            nouns[index] = len(words) - 1

        left_to_right = sorted(
            (index for index, item in enumerate(self.objects) if item.worn_by is None),
            key=lambda index: self.objects[index].x,
        )
        for place, index in enumerate(left_to_right):
            if place:
                joint = style.joint if place == len(left_to_right) - 1 else ","
                if joint == ",":
                    words[-1] += ","
                else:
                    words += joint.split()
            name(index)
            for worn, item in enumerate(self.objects):
                if item.worn_by == index:
                    words += style.wearing.split()
                    name(worn)
        if background and not style.background_first:
            if style.joint == ",":
                words[-1] += ","
            words += background
        return Caption(" ".join(words), tuple(nouns), tuple(attributes))

    @property
    def held_out(self) -> bool:
        """True if the scene shows a combination that never occurs in training."""
        return any(
            item.worn_by is not None and is_held_out(self.objects[item.worn_by].kind, item.kind, item.color)
            for item in self.objects
        )


class Phrasing(NamedTuple):
    opening: str
    wearing: str
    joint: str  # before the last object; others are joined by commas
    texture_first: bool
    background_first: bool


PHRASINGS = (
    Phrasing("", "wearing", "and", False, False),
    Phrasing("", "in", "next to", True, False),
    Phrasing("a picture of", "wearing", "and", True, False),
    Phrasing("", "with", "beside", False, False),
    Phrasing("", "wearing", ",", False, False),
    Phrasing("", "wearing", "and", False, True),
)
WORDS = tuple(  # every word a caption can hold
    dict.fromkeys(
        " ".join(
            (*(f"{p.opening} {p.wearing} {p.joint}" for p in PHRASINGS), *BACKGROUNDS, *ATTRIBUTES, *KINDS, "a an")
        )
        .replace(",", "")
        .split()
    )
)


def is_held_out(animal: str, headwear: str, color: str | None) -> bool:
    """Whether an animal wearing headwear of that color is kept out of training (to test composition)."""
    if color is None:
        return False
    return zlib.crc32(f"{animal} {headwear} {color}".encode()) % HELD_OUT_SHARE == 0


# Random scenes


def random_scene(rng: random.Random, held_out: bool | None = False, groups: int | None = None) -> Scene:
    """Draw a scene.

    Args:
        rng: all randomness comes from here.
        held_out: False for scenes fit for training, True for scenes with a held-out combination, None for either.
        groups: number of things and (dressed) animals side by side, 1 to 3; None draws it.
    """
    while True:
        count = groups or rng.choices((1, 2, 3), (0.38, 0.5, 0.12))[0]
        scene = Scene(
            _arrange(_random_groups(rng, count), rng.sample(range(count), count), rng),
            rng.choice(BACKGROUNDS[:1] * 2 + BACKGROUNDS[1:]),
            rng.randrange(2**16),
        )
        if held_out is None or scene.held_out == held_out:
            return scene


def _random_groups(rng: random.Random, count: int) -> list[list[str]]:
    dressed = {1: 0.75, 2: 0.42}.get(count, 0.3)
    animals, things = list(ANIMALS), list(THINGS)
    rng.shuffle(animals)
    rng.shuffle(things)
    groups = []
    for _ in range(count):
        if rng.random() < dressed and (count < 3 or all(len(group) == 1 for group in groups)):
            groups.append([animals.pop(), _random_style(rng, rng.choice(("hat", *HEADWEAR)))])
        elif rng.random() < 0.5:
            groups.append([animals.pop()])
        else:
            groups.append([_random_style(rng, things.pop())])
    return groups


def _random_style(rng: random.Random, kind: str) -> str:
    if kind not in RECOLORED or rng.random() < 0.2:
        return "straw hat" if kind == "hat" else kind
    color = rng.choice(list(COLORS))
    texture = rng.choice(TEXTURES) + " " if color != "white" and rng.random() < 0.4 else ""
    return f"{color} {texture}{kind}"


def _arrange(groups: list[list[str]], order: Iterable[int], rng: random.Random) -> tuple[Object, ...]:
    """Place groups side by side, left to right, painted in `order`; neighbors may touch and overlap."""
    count = len(groups)
    low, high = {1: (0.5, 0.64), 2: (0.38, 0.46), 3: (0.29, 0.33)}.get(count, (0.7 / count, 0.9 / count))
    squeeze = rng.uniform(0.78, 1.0) if count > 1 else 1.0
    objects: list[Object] = []
    for place in order:
        items = groups[place]
        x = 0.5 + ((place + 0.5) / count - 0.5) * squeeze + rng.uniform(-1, 1) * 0.06 / count
        worn = len(items) > 1
        size = rng.uniform(low, high)
        y = rng.uniform(0.86, 0.96) if worn else rng.uniform(max(size + 0.04, 0.68), 0.95)
        animal = Object("cat", x=x, y=y, size=size).restyled(items[0])
        objects.append(animal)
        for item in items[1:]:
            headwear = Object(
                "hat",
                x=rng.uniform(-0.04, 0.04),
                y=rng.uniform(-0.02, 0.02),
                size=rng.uniform(0.9, 1.1),
            ).restyled(item)
            objects.append(replace(headwear, worn_by=objects.index(animal)))
    return tuple(objects)


# Sprites and colors


@functools.cache
def _sprite(kind: str) -> Image.Image:
    return Image.open(SPRITES / f"{kind}.webp").convert("RGBA")


@functools.lru_cache(maxsize=512)
def _styled(kind: str, color: str | None, texture: str | None) -> Image.Image:
    """The sprite in another color and texture, its shading kept."""
    sprite = _sprite(kind)
    if color is None:
        return sprite
    pixels = np.asarray(sprite).astype(np.float32) / 255  # (h, w, 4)
    rgb, alpha = pixels[..., :3], pixels[..., 3:]
    brightest, darkest = rgb.max(-1), rgb.min(-1)
    saturation = (brightest - darkest) / (brightest + 1e-6)
    if kind == "mug":  # the coffee stays brown
        changed = np.clip((0.42 - saturation) * 8, 0, 1)
    elif kind == "car":  # windows, tires and lamps stay
        changed = np.clip((rgb[..., 0] - rgb[..., 1:].max(-1) - 0.12) * 8, 0, 1)
    else:
        changed = np.ones_like(saturation)
    light = rgb @ np.array([0.35, 0.45, 0.2], np.float32)
    reference = np.percentile(light[(alpha[..., 0] > 0.5) & (changed > 0.5)], 75)
    shade = np.clip(light / reference, 0, 1.4)[..., None]
    base = np.broadcast_to(np.array(COLORS[color], np.float32) / 255, rgb.shape)
    if texture is not None:
        base = base + (0.98 - base) * _pattern(texture, *sprite.size)[..., None]
    # Below the reference the color darkens (a little less than the sprite, so that it stays nameable), above it lights.
    painted = base * np.minimum(shade, 1) ** 0.8
    painted = painted + (1 - painted) * np.clip(shade - 1.08, 0, 0.4)
    rgb = rgb + (painted - rgb) * changed[..., None]
    return Image.fromarray((np.concatenate([rgb, alpha], -1) * 255).round().astype(np.uint8), "RGBA")


def _pattern(texture: str, width: int, height: int) -> np.ndarray:
    """(height, width) in [0, 1], 1 where the second color goes; its period follows the sprite, not the picture."""
    period = 0.27 * max(width, height)
    v, u = np.mgrid[0:height, 0:width] / period
    if texture == "striped":
        wave = np.sin(2 * np.pi * (u + 0.35 * v))
    elif texture == "checkered":
        wave = np.sin(np.pi * u * 1.25) * np.sin(np.pi * v * 1.25) * 2
    else:
        row = np.floor(v / 0.85)
        du, dv = (u + 0.5 * (row % 2)) % 1 - 0.5, v / 0.85 - row - 0.5
        wave = 4 * (0.3 - np.hypot(du, dv * 0.85))
    return np.clip(0.5 + wave * 4, 0, 1).astype(np.float32)


# Backgrounds


@functools.lru_cache(maxsize=64)
def _background(name: str, seed: int, size: int) -> Image.Image:
    rng = random.Random(f"{name} {seed}")
    y, x = (np.mgrid[0:size, 0:size].astype(np.float32) + 0.5) / size
    edge = 1.5 / size  # width of every soft edge: anti-aliased at any size

    def gradient(top, bottom, position=y):
        top, bottom = (np.array(color, np.float32) for color in (top, bottom))
        return top + (bottom - top) * np.clip(position, 0, 1)[..., None]

    def cover(picture, layer, share):
        return picture + (layer - picture) * np.clip(share, 0, 1)[..., None]

    def below(level, amplitude=0.03):
        """Share of each pixel under a gently waving horizon."""
        phase, frequency = rng.uniform(0, 2 * math.pi), rng.uniform(3, 7)
        return (y - level - amplitude * np.sin(frequency * x + phase)) / edge + 0.5

    def disc(picture, color, cx, cy, radius, opacity=1.0):
        """Paint a disc in place, touching only the pixels around it."""
        low = [max(0, int((c - radius) * size) - 1) for c in (cy, cx)]
        near = np.s_[low[0] : int((cy + radius) * size) + 2, low[1] : int((cx + radius) * size) + 2]
        share = (radius - np.hypot(x[near] - cx, y[near] - cy)) / edge + 0.5
        picture[near] = cover(picture[near], np.float32(color), opacity * np.clip(share, 0, 1))

    level = rng.uniform(0.42, 0.58)
    if name == "":
        hue, tint = rng.random(), rng.uniform(0.02, 0.12)
        top = np.array([1 - tint * (0.5 + 0.5 * math.cos(2 * math.pi * (hue + k / 3))) for k in range(3)]) * 250
        picture = gradient(top, top * rng.uniform(0.84, 0.95))
    elif name == "on grass":
        picture = gradient((150, 206, 250), (222, 240, 252), y / level)
        for _ in range(2):
            cx, cy = rng.random(), rng.uniform(0.05, 0.3)
            for shift in (-0.06, 0, 0.06):
                disc(picture, 250, cx + shift, cy, 0.05 + 0.02 * (shift == 0), 0.8)
        picture = cover(picture, gradient((142, 208, 98), (104, 178, 66), (y - level) / 0.5), below(level))
        picture = cover(picture, gradient((122, 194, 80), (88, 160, 56), (y - level) / 0.5), below(level + 0.2))
    elif name == "in the snow":
        picture = gradient((176, 200, 226), (222, 232, 244), y / level)
        picture = cover(picture, gradient((246, 250, 255), (226, 236, 248), (y - level) / 0.5), below(level))
        for _ in range(26):
            disc(picture, 255, rng.random(), rng.uniform(0, 0.95), rng.uniform(0.008, 0.014))
    elif name == "at the beach":
        picture = gradient((138, 210, 246), (214, 240, 250), y / level)
        picture = cover(picture, gradient((40, 152, 204), (92, 204, 214), (y - level) / 0.2), below(level, 0.0))
        picture = cover(picture, gradient((248, 226, 170), (236, 204, 140), (y - 0.7) / 0.3), below(level + 0.2))
    elif name == "at night":
        picture = gradient((16, 18, 54), (48, 46, 104), y / level)
        for _ in range(16):
            disc(picture, 235, rng.random(), rng.uniform(0, level), rng.uniform(0.005, 0.009))
        disc(picture, (250, 240, 200), rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.2), 0.06)
        picture = cover(picture, gradient((34, 36, 76), (22, 22, 50), (y - level) / 0.5), below(level + 0.08, 0.05))
    elif name == "in the desert":
        picture = gradient((252, 222, 164), (254, 240, 206), y / level)
        picture = cover(picture, gradient((230, 160, 86), (214, 138, 66), (y - level) / 0.5), below(level, 0.05))
        picture = cover(picture, gradient((218, 142, 70), (190, 112, 50), (y - level) / 0.5), below(level + 0.22, 0.06))
    elif name == "under water":
        picture = gradient((86, 204, 226), (14, 84, 142))
        slant, phase = rng.uniform(-0.5, 0.5), rng.random()
        rays = np.clip(np.sin(2 * np.pi * (2.2 * (x + slant * y) + phase)), 0, 1) * (1 - y)
        picture = cover(picture, 255.0, 0.16 * rays)
        for _ in range(10):
            cx, cy, radius = rng.random(), rng.random(), rng.uniform(0.012, 0.026)
            disc(picture, 240, cx, cy, radius, 0.6)
            disc(picture, (60, 160, 200), cx, cy, radius * 0.6, 0.5)
    else:
        picture = gradient((112, 76, 146), (252, 158, 92), y / level)
        disc(picture, (255, 230, 150), rng.uniform(0.2, 0.8), level - 0.04, 0.09)
        picture = cover(picture, gradient((96, 58, 92), (60, 36, 66), (y - level) / 0.5), below(level, 0.03))
    picture = picture * rng.uniform(0.94, 1.0)
    return Image.fromarray(np.clip(picture, 0, 255).round().astype(np.uint8), "RGB")
