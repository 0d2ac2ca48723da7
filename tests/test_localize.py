"""Masks from the model's own attention: the formula on maps whose answer is known, and the pipeline around it."""

import random
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mde_edit import MDEEditPipeline
from mde_edit.attention_processors import attention_control, attention_layers
from mde_edit.localize import largest_islands, localization_layers, source_attention, word_region
from mde_edit.prompts import prompt_phrases

from benchmarks import localization
from benchmarks.cases import save_cases
from benchmarks.draw import draw_case
from benchmarks.localization import iou, measure, seen_scene
from training.scenes import Scene, random_scene

from .conftest import HEIGHT, LATENTS, SOURCE, TARGET, WIDTH, count_unet_calls, make_pipe, state_of


def islands(region: np.ndarray) -> list[set]:
    """Connected parts, eight neighbors, by flooding."""
    left, parts = set(zip(*np.nonzero(region))), []
    while left:
        part, queue = set(), deque([left.pop()])
        while queue:
            y, x = queue.popleft()
            part.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            queue.extend(near)
        parts.append(part)
    return parts


@given(st.integers(0, 10**6), st.floats(0.1, 0.9), st.integers(1, 12), st.integers(1, 12))
@settings(deadline=None)
def test_small_islands_go_and_large_ones_stay(seed, density, height, width):
    region = torch.from_numpy(np.random.default_rng(seed).random((height, width)) < density)
    parts = islands(region.numpy())
    largest = max(map(len, parts), default=0)
    expected = {cell for part in parts if len(part) >= 0.5 * largest for cell in part}
    assert set(zip(*np.nonzero(largest_islands(region, 0.5).numpy()))) == expected


def test_a_long_snake_is_one_island():
    snake = torch.zeros(41, 41, dtype=torch.bool)
    snake[::2] = True
    snake[1::4, -1] = snake[3::4, 0] = True
    assert torch.equal(largest_islands(snake, 1.0), snake)


def maps_of(*masks):
    """Cross-attention whose token k looks at masks[k], a little elsewhere; self-attention that changes nothing."""
    cross = torch.stack([torch.from_numpy(mask).float() * 0.5 + 0.01 for mask in masks])
    return cross, torch.eye(masks[0].size)


def test_each_word_gets_the_pixels_it_looks_at_most():
    left, right = np.zeros((8, 12), bool), np.zeros((8, 12), bool)
    left[:, :6], right[2:6, 6:] = True, True
    cross, own = maps_of(left, right)
    size = (64, 96)
    big = [np.kron(mask, np.ones((8, 8), bool)) for mask in (left, right)]
    found = [word_region(cross, own, (k,), [(1 - k,)], size).numpy() for k in (0, 1)]
    assert iou(found[0], big[0]) > 0.9 and iou(found[1], big[1]) > 0.9
    assert not (found[0] & found[1]).any()
    # a word with no rival has its own shape too, and scale does not matter
    alone = word_region(cross / 100, own, (1,), [], size).numpy()
    assert iou(alone, big[1]) > 0.9
    # tokens of one word count together
    assert torch.equal(word_region(cross, own, (1, 1), [(0,)], size), torch.from_numpy(found[1]))


def test_pixels_that_look_at_each_other_agree():
    """A word that looks at one corner of a thing gets all of it, if the thing's pixels attend to each other."""
    thing, corner = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    thing[2:6, 2:6], corner[2:4, 2:6] = True, True
    cross, _ = maps_of(corner, ~thing)
    inside = torch.from_numpy(thing.flatten())
    own = torch.where(inside[:, None] == inside[None], 1.0, 0.0)
    own = own / own.sum(1, keepdim=True)
    assert iou(word_region(cross, own, (0,), [(1,)], (64, 64)).numpy(), np.kron(thing, np.ones((8, 8), bool))) > 0.9


def test_a_word_that_looks_everywhere_alike_has_no_region():
    left = np.zeros((8, 8), bool)
    left[:, :4] = True
    cross, own = maps_of(np.ones((8, 8), bool), left)
    assert not word_region(cross[:1], own, (0,), [], (64, 64)).any()
    assert word_region(cross, own, (1,), [(0,)], (64, 64)).any()


@pytest.mark.parametrize(
    "prompt,phrases",
    [
        ("a cat wearing a straw hat", [(2,), (5, 6)]),
        ("the big cat, a dog and a tiger on grass", [(2, 3), (6,), (9,), (11,)]),
        ("a", []),
    ],
)
def test_phrases_lie_between_words_that_name_nothing(tokenizer, prompt, phrases):
    assert prompt_phrases(tokenizer, prompt) == phrases


def test_layers_are_those_at_a_half_and_a_quarter(pipe):
    cross, own = localization_layers(attention_layers(pipe.unet, LATENTS), LATENTS)
    assert {layer.size for layer in cross} == {(4, 8), (2, 4)} and all(layer.is_cross for layer in cross)
    assert {layer.size for layer in own} == {(4, 8)} and not any(layer.is_cross for layer in own)
    odd, _ = localization_layers(attention_layers(pipe.unet, (7, 15)), (7, 15))
    assert {layer.size for layer in odd} == {(4, 8), (2, 4)}
    finest = [layer for layer in attention_layers(pipe.unet, LATENTS) if layer.size == LATENTS]
    cross, own = localization_layers(finest, LATENTS)  # a U-Net that attends nowhere else
    assert cross and own and {layer.size for layer in (*cross, *own)} == {LATENTS}


def test_attention_is_averaged_as_probabilities(pipe, inversion):
    with attention_control(pipe.unet):
        cross, own = source_attention(pipe.unet, pipe.ddim_scheduler(5), inversion, pipe.condition(SOURCE))
    assert cross.shape == (77, 4, 8) and own.shape == (32, 32)
    assert torch.allclose(cross.sum(0), torch.ones(4, 8), atol=1e-5)
    assert torch.allclose(own.sum(1), torch.ones(32), atol=1e-5)


def test_a_generated_mask(pipe, inversion):
    before = state_of(pipe)
    with count_unet_calls(pipe.unet) as calls:
        mask = pipe.generate_mask(inversion, "hat")
    assert calls["forward"] == 3 and calls["probe"] == 2
    assert mask.shape == (HEIGHT, WIDTH) and mask.dtype == bool and mask.any() and not mask.all()
    assert np.array_equal(mask, pipe.generate_mask(inversion, "hat")) and state_of(pipe) == before
    assert not np.array_equal(mask, pipe.generate_mask(inversion, "cat"))
    assert not np.array_equal(pipe.generate_mask(inversion, ("a", 0)), pipe.generate_mask(inversion, ("a", 1)))


def test_the_mask_has_the_size_of_the_picture_before_it_was_resized(pipe, image):
    resized = pipe.invert(image, SOURCE, 2, "direct", height=32, width=32)
    assert pipe.generate_mask(resized, "hat").shape == (HEIGHT, WIDTH)


def test_a_word_in_a_masks_place_is_its_mask(pipe, inversion, image):
    edit = {"optimization_iterations": 1, "output_type": "latent"}
    masks = {word: pipe.generate_mask(inversion, word) for word in ("cat", "straw hat", ("a", 1))}
    drawn = pipe(
        TARGET,
        inversion,
        object_masks={"dog": [masks["cat"], masks["a", 1]]},
        attribute_masks={"red": masks["straw hat"]},
        **edit,
    )
    words = {"object_masks": {"dog": ["cat", [("a", 1)]]}, "attribute_masks": {"red": "straw hat"}}
    assert torch.equal(pipe(TARGET, inversion, **words, **edit).images, drawn.images)
    whole = {"image": image, "source_prompt": SOURCE, "num_inference_steps": 5, "inversion_method": "direct"}
    once = pipe(TARGET, **whole, guidance_scale=3.0, **words, **edit)
    assert torch.equal(once.images, drawn.images)


@pytest.mark.parametrize(
    "word,message",
    [
        ("banana", r"object_masks\['dog'\] names no word of the source prompt: 'banana' is not in the prompt"),
        ("dog.png", "A mask's file has to be opened"),
        ("a", "'a' occurs 2 times"),
        (("cat", 1), "no occurrence 1"),
        ("", "not in the prompt"),
        ("\ud800", "lone surrogate"),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("given", ["inversion", "image"])
def test_a_word_that_is_not_there_is_refused_before_any_pass(pipe, inversion, image, given, word, message):
    source = {"inversion": inversion} if given == "inversion" else {"image": image, "source_prompt": SOURCE}
    with count_unet_calls(pipe.unet) as calls, pytest.raises(ValueError, match=message):
        pipe(TARGET, **source, object_masks={"dog": word})
    with count_unet_calls(pipe.unet) as more, pytest.raises(ValueError, match=message.split(": ")[-1]):
        pipe.generate_mask(inversion, word)
    assert not calls and not more


@pytest.mark.parametrize("word", [None, 2.5, ["cat"], {"cat": 1}, ("cat", "hat")], ids=str)
def test_what_is_no_word_is_refused_by_name(pipe, inversion, word):
    with pytest.raises(ValueError, match="`word` names no word .* does not name a word"):
        pipe.generate_mask(inversion, word)


def test_another_models_inversion_has_no_masks_here(components, inversion):
    other = make_pipe(components, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="another noise schedule"):
        other.generate_mask(inversion, "cat")


def test_a_word_that_is_nowhere_says_so(pipe, inversion, monkeypatch):
    monkeypatch.setattr("mde_edit.editing.word_region", lambda *_: torch.zeros(HEIGHT, WIDTH, dtype=torch.bool))
    with pytest.raises(ValueError, match="attention finds 'cat' nowhere in the picture.*Draw its mask"):
        pipe.generate_mask(inversion, "cat")


def test_the_embedded_model_finds_what_it_sees():
    """Held-out combinations; the figure over 200 scenes is in benchmarks/RESULTS.md."""
    pipe = MDEEditPipeline.from_pretrained("emoji_ldm")
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(5)
    entries = [
        e for k in range(4) for e in measure(pipe, seen_scene(random_scene(rng, held_out=True), k, 128), steps=10)
    ]
    assert np.mean([entry["iou"] for entry in entries]) > 0.75
    assert all(entry["everything"] < entry["ceiling"] <= 1 for entry in entries)
    alone = measure(pipe, seen_scene(Scene.of("cat", background="on grass"), 0, 128), steps=10)
    assert alone[0]["iou"] > 0.85


def test_the_benchmark_prints_a_row_per_softness(capsys):
    localization.main(["--scenes", "2", "--steps", "3", "--soften", "1", "0.2"])
    head, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 0.2"]
    assert all(row.count("|") == head.count("|") for row in rows)
    sharp, soft = (float(row.split(" | ")[-2].split()[0]) for row in rows)
    assert soft < sharp  # diluted attention lies less in the masks


def test_real_cases_are_measured_as_scenes_are(capsys, tmp_path):
    """The words of a case's source, of pictures of any size."""
    cases = [draw_case("dev", "non_overlap", task, 0, size=134) for task in ("object", "twin")]
    save_cases(cases, tmp_path)
    localization.main(["--cases", str(tmp_path), "--steps", "3"])
    row = capsys.readouterr().out.strip().splitlines()[-1].split(" | ")
    told = [case.source_prompt.count(region.source) == 1 for case in cases for region in case.regions]
    assert int(row[1]) == sum(told) < len(told)  # which of the twins is meant, their word does not say
    iou, everything = (float(row[k].split()[0]) for k in (2, 5))
    assert 2 * everything < iou <= 1
