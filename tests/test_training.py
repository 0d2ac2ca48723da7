"""Properties of the embedded model's training code: scenes, tokenizer, and a two-step run of every stage."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import scenes
from training.scenes import PHRASINGS, WORDS, Scene, is_held_out, random_scene

SEEDS = st.integers(0, 10**5)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_a_scene_depends_on_its_seed_alone(seed):
    one, other = (random_scene(random.Random(seed)) for _ in range(2))
    assert one == other
    assert one.render(32).image.tobytes() == other.render(32).image.tobytes()


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_visible_masks_are_disjoint_parts_of_the_full_masks(seed):
    drawn = random_scene(random.Random(seed)).render(64)
    assert sum(mask.astype(int) for mask in drawn.visible).max() <= 1
    for full, visible in zip(drawn.full, drawn.visible):
        assert not (visible & ~full).any()
        assert visible.sum() > 0.3 * full.sum()  # named in the caption, so it must be seen


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(0, len(PHRASINGS) - 1))
def test_captions_name_every_object_by_its_words(seed, phrasing):
    scene = random_scene(random.Random(seed))
    caption = scene.caption(phrasing)
    words = [word.strip(",") for word in caption.text.split()]
    assert set(words) <= set(WORDS)
    for item, noun, attributes in zip(scene.objects, caption.nouns, caption.attributes, strict=True):
        assert words[noun] == item.kind
        assert sorted(words[index] for index in attributes) == sorted(item.adjectives)
        assert all(noun - 2 <= index < noun for index in attributes)
    for part in scene.background.split():
        assert part in words


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_a_scene_looks_alike_at_every_size(seed):
    scene = random_scene(random.Random(seed))
    large, small = scene.render(128), scene.render(64)
    shrunk = np.asarray(large.image.reduce(2)).astype(float)
    assert np.abs(shrunk - np.asarray(small.image)).mean() < 8
    for one, other in zip(large.full, small.full):
        assert abs(one.mean() - other.mean()) < 0.02


def test_edits_change_the_edited_objects_alone():
    scene = Scene.of("cat", "straw hat", "blue ball", background="on grass", seed=4)
    edited = scene.edited({"hat": "red striped hat"})
    assert edited.caption().text == "a cat wearing a red striped hat and a blue ball on grass"
    before, after = scene.render(128), edited.render(128)
    changed = np.abs(np.asarray(before.image).astype(int) - np.asarray(after.image)).max(-1) > 12
    assert changed.any()
    soft_edge = np.pad(before.full[1], 2)  # a mask is where opacity passes one half: the rim lies outside it
    near = sum(np.roll(soft_edge, (dy, dx), (0, 1)) for dy in range(-2, 3) for dx in range(-2, 3))[2:-2, 2:-2] > 0
    assert not (changed & ~near).any()
    assert scene.edited({0: "dog"}).objects[0].x == scene.objects[0].x
    assert scene.edited({}) == scene


def test_held_out_combinations_stay_out_of_training():
    combinations = [(a, h, c) for a in scenes.ANIMALS for h in scenes.HEADWEAR for c in scenes.COLORS]
    share = np.mean([is_held_out(*combination) for combination in combinations])
    assert 0.08 < share < 0.18
    for seed in range(300):
        assert not random_scene(random.Random(seed)).held_out
    assert random_scene(random.Random(0), held_out=True).held_out


@pytest.mark.parametrize(
    "build",
    [
        lambda: Scene.of("unicycle"),
        lambda: Scene.of("red cat"),
        lambda: Scene.of("white striped ball"),
        lambda: Scene.of("striped ball"),
        lambda: Scene.of("straw cap"),
        lambda: Scene.of("ball", "red hat"),
        lambda: Scene.of("cat", background="on the moon"),
        lambda: Scene.of("cat").find("dog"),
        lambda: Scene.of("cat", "red hat", "dog", "blue hat").edited({"hat": "cap"}),
    ],
)
def test_what_cannot_be_drawn_is_refused(build):
    with pytest.raises(ValueError):
        build()
