"""The edit as a whole, on a tiny pipeline of Stable Diffusion 1.4's shape."""

import copy
import math
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from mde_edit import denoise
from mde_edit.denoise import PRESETS
from mde_edit.masks import dilate_mask, resize_mask

from .conftest import HEIGHT, LATENTS, SOURCE, TARGET, WIDTH, count_unet_calls, make_pipe, short_edit, state_of


@pytest.fixture
def edit(pipe, inversion, masks):
    return short_edit(pipe, inversion, masks, optimization_iterations=2)


@pytest.fixture(scope="module")
def plain(components, inversion, masks):
    """What `edit()` gives."""
    return short_edit(make_pipe(components), inversion, masks, optimization_iterations=2)().images


def latent_mask(masks, dilation):
    return dilate_mask(sum(resize_mask(torch.from_numpy(m) > 0, LATENTS) for m in masks).gt(0).float(), dilation).bool()


# What the result is


@pytest.mark.parametrize("dilation", [0, 2])
def test_outside_the_dilated_masks_the_latents_are_the_sources(edit, inversion, masks, dilation):
    out = edit(mask_dilation=dilation)
    mask = latent_mask(masks, dilation)
    assert torch.equal(out.images[0][:, ~mask], inversion.latents[-1][:, ~mask])
    assert (out.images[0][:, mask] - inversion.latents[-1][:, mask]).abs().max() > 0.01


def test_without_masks_it_is_prompt_to_prompt(edit, inversion, pipe):
    with count_unet_calls(pipe.unet) as calls:
        out = edit(object_masks=None, attribute_masks=None)
    assert calls["batch 1"] == 4 and out.losses == [[]]  # source passes only
    assert (out.images - inversion.latents[-1:]).abs().min() > 0  # no M, no blending


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_scale": 5.0},
        {"guidance_scale": 1.0},
        {"cross_replace_steps": 0.2},
        {"self_replace_steps": 0.0},
        {"oal_weight": 0.0},
        {"ccl_weight": 0.3},
        {"ccl_form": "spatial_ratio"},
        {"ccl_form": "token_ratio"},
        {"optimization_steps": 0.2},
        {"optimization_iterations": 1},
        {"optimization_threshold": 0.0},
        {"step_size": 0.1},
        {"max_update": 0.005},
        {"max_update": None},
        {"outside_attention": 0.0},
        {"attention_resolution": 4},
        {"mask_dilation": 1},
        {"background_blend": 0.0},
        {"eta": 0.5},
        {"prompt": "a dog wearing a blue hat", "attribute_masks": None},
        {"object_masks": None},
        {"attribute_masks": None},
    ],
    ids=str,
)
def test_every_parameter_changes_the_result(edit, plain, change):
    torch.manual_seed(0)
    assert (edit(**change).images - plain).abs().max() > 1e-4


def shares_inside(out, masks):
    """Of the maps before each guided step, the share on pixels that the mask touches: {word: (guided steps,)}."""
    found = {}
    for word, mask in zip(("dog", "red"), masks):
        touched = resize_mask(torch.from_numpy(mask) > 0, LATENTS) > 0
        maps = out.attention_maps[0][word][:, 0]
        found[word] = (maps * touched).sum((-1, -2)) / maps.sum((-1, -2))
    return found


def test_only_words_that_look_past_their_masks_are_guided(edit, pipe, masks):
    """Both at 1; neither at 0, and then one short pass per guided step is all that it costs; between their shares the
    one that has less of its attention inside."""
    one = {"optimization_steps": 0.2, "output_attention_maps": True}
    out = edit(optimization_threshold=1.0, **one)
    assert {"oal", "ccl"} <= out.losses[0][0].keys()
    shares = {word: float(share) for word, share in shares_inside(out, masks).items()}
    assert abs(shares["dog"] - shares["red"]) > 0.02  # the middle lies between them
    between = sum(shares.values()) / 2
    kept, dropped = ("oal", "ccl") if shares["dog"] < shares["red"] else ("ccl", "oal")
    some = edit(optimization_threshold=between, **one)
    assert all(kept in entry and dropped not in entry for entry in some.losses[0]) and len(some.losses[0]) == 2
    weights = {"oal_weight": 0.0} if dropped == "oal" else {"ccl_weight": 0.0}
    assert torch.equal(some.images, edit(optimization_threshold=1.0, **weights, **one).images)
    with count_unet_calls(pipe.unet) as calls:
        none = edit(optimization_threshold=0.0)
    assert none.losses == [[]] and calls["batch 1"] == 4 + 2
    assert torch.equal(none.images, edit(optimization_iterations=0).images)


def test_maps_before_and_after_are_told_of_a_step_that_guides_no_word(edit):
    maps = edit(optimization_threshold=0.0, output_attention_maps=True).attention_maps[0]
    assert all(map_.shape == (2, 2, *LATENTS) and torch.allclose(map_[:, 0], map_[:, 1]) for map_ in maps.values())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_an_edit_of_its_own(edit, name):
    preset = PRESETS[name]
    default = {"optimization_iterations": 3}  # another number than any preset's
    assert (edit(**default).images - edit(**{**default, **preset}).images).abs().max() > 1e-4


def test_noise_comes_from_the_generator(edit):
    seeds = [edit(eta=0.5, generator=torch.Generator().manual_seed(s)).images for s in (0, 0, 1)]
    assert torch.equal(seeds[0], seeds[1]) and not torch.equal(seeds[0], seeds[2])


def test_guidance_lowers_the_losses_and_raises_the_share_inside(edit, masks):
    out = edit(optimization_iterations=8, output_attention_maps=True, optimization_steps=0.4)
    for step in {entry["step"] for entry in out.losses[0]}:
        losses = [entry for entry in out.losses[0] if entry["step"] == step]
        assert losses[-1]["loss"] < losses[0]["loss"]
    for key, mask in (("dog", masks[0]), ("red", masks[1])):
        maps = out.attention_maps[0][key]
        assert maps.shape == (2, 2, *LATENTS)  # guided steps, before/after, h, w
        inside = resize_mask(torch.from_numpy(mask) > 0, LATENTS)
        shares = (maps * inside).sum((-1, -2)) / maps.sum((-1, -2))
        assert (shares[:, 1] > shares[:, 0]).all()


def test_the_loss_history_is_complete(edit):
    history = edit().losses[0]
    assert [(e["step"], e["iteration"]) for e in history] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(np.isclose(e["loss"], e["oal"] + 1.25 * e["ccl"]) and 0 <= e["capped"] <= 1 for e in history)
    assert "ccl" not in edit(attribute_masks=None).losses[0][0]


@pytest.mark.parametrize(
    "weights", [{"oal_weight": 0.0, "ccl_weight": 0.0}, {"optimization_iterations": 0}, {"optimization_steps": 0.0}]
)
def test_no_losses_means_no_guidance_passes(edit, pipe, weights):
    with count_unet_calls(pipe.unet) as calls:
        out = edit(**weights)
    assert calls["batch 1"] == 4 and out.losses == [[]]


def test_a_shared_word_with_a_mask_keeps_its_own_map(edit):
    """'hat' stands in both prompts; as an edited word it must not be overwritten by the source's map."""
    hat = {"object_masks": {"hat": np.ones((HEIGHT, WIDTH), bool)}, "optimization_threshold": 1.0}
    assert edit(**hat).losses[0][0]["oal"] > 0
    a, b = (edit(**hat, oal_weight=w).images for w in (0.0, 5.0))
    assert (a - b).abs().max() > 1e-3


def test_masks_in_every_form_mean_the_same(edit, masks):
    uint8 = masks[0]
    forms = [
        uint8,
        uint8 > 0,
        (uint8 > 0).astype(np.uint8),
        (uint8 > 0).astype(np.int64),
        uint8 / 255.0,
        PIL.Image.fromarray(uint8),
        PIL.Image.fromarray(uint8).convert("RGB"),
        PIL.Image.fromarray(uint8).convert("1"),
        torch.from_numpy(uint8),
        torch.from_numpy(uint8)[None] > 0,
        uint8[..., None],
        PIL.Image.fromarray(uint8).resize((2 * WIDTH, 2 * HEIGHT), 0),
        uint8[::-1][::-1],
    ]
    once = {"optimization_iterations": 1, "optimization_steps": 0.2, "attribute_masks": None}
    first, *others = [edit(object_masks={"dog": form}, **once).images for form in forms]
    assert all(torch.equal(first, other) for other in others)


def test_two_masks_for_the_same_tokens_are_one_region(edit, masks):
    union = np.maximum(*masks)
    merged = edit(object_masks={"dog": masks[0], 2: masks[1]}, attribute_masks=None)
    assert torch.equal(merged.images, edit(object_masks={"dog": union}, attribute_masks=None).images)


def test_an_object_and_an_attribute_may_share_a_word(edit, masks):
    out = edit(attribute_masks={"dog": masks[1]}, output_attention_maps=True)
    assert {"oal", "ccl"} <= set(out.losses[0][0])
    assert {key: tuple(m.shape) for key, m in out.attention_maps[0].items()} == {"dog": (2, 2, *LATENTS)}


def test_occurrences_positions_and_phrases_name_words(edit, masks):
    prompt = "a dog and a dog"
    second = edit(prompt, object_masks={("dog", 1): masks[0]}, attribute_masks=None)
    assert torch.equal(second.images, edit(prompt, object_masks={5: masks[0]}, attribute_masks=None).images)
    first = edit(prompt, object_masks={("dog", 0): masks[0]}, attribute_masks=None)
    assert not torch.equal(second.images, first.images)
    phrase = edit("a polar bear", object_masks={"polar bear": masks[0]}, attribute_masks=None)
    assert torch.equal(
        phrase.images, edit("a polar bear", object_masks={(2, 3): masks[0]}, attribute_masks=None).images
    )


def test_a_full_mask_and_a_tiny_one_work(edit):
    everything, speck = np.ones((HEIGHT, WIDTH), bool), np.zeros((HEIGHT, WIDTH), bool)
    speck[40, 40] = True
    assert torch.isfinite(edit(object_masks={"dog": everything}, attribute_masks={"red": speck}).images).all()


# Nothing is left changed


def failing_at(step, error):
    def callback(pipe, i, t, kwargs):
        if i == step:
            raise error

    return callback


@pytest.mark.parametrize("step", [0, 2, 4])
@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
def test_everything_is_restored_after_an_interruption(edit, pipe, step, error):
    list(pipe.unet.parameters())[0].requires_grad_(False)
    before = state_of(pipe)
    with pytest.raises(type(error)):
        edit(callback_on_step_end=failing_at(step, error))
    assert state_of(pipe) == before
    list(pipe.unet.parameters())[0].requires_grad_(True)


def test_everything_is_restored_after_success_and_after_a_failing_guidance_pass(edit, pipe, image, monkeypatch):
    before = state_of(pipe)
    edit()
    pipe.invert(image, SOURCE, 2, num_inner_steps=1)
    assert state_of(pipe) == before
    monkeypatch.setattr(denoise, "own_maps", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        edit()
    assert state_of(pipe) == before


def test_the_weights_get_no_gradient_and_inference_mode_is_no_obstacle(edit, pipe):
    normal = edit().images
    with torch.inference_mode():
        assert torch.equal(edit().images, normal)
    assert all(p.grad is None for p in pipe.unet.parameters())


# Shapes, dtypes, schedulers


@pytest.mark.parametrize("method", ["null_text", "direct"])
def test_bfloat16(components, image, masks, method):
    pipe = make_pipe(copy.deepcopy(components)).to(torch.bfloat16)
    inverted = pipe.invert(image, SOURCE, 2, method=method, num_inner_steps=1)
    assert inverted.latents.dtype == inverted.null_embeds.dtype == torch.float32
    edit = {"object_masks": {"dog": masks[0]}, "attribute_masks": {"red": masks[1]}, "optimization_iterations": 1}
    out = pipe(TARGET, inverted, optimization_steps=0.5, output_type="latent", **edit)
    assert out.images.dtype == torch.float32 and torch.isfinite(out.images).all() and len(out.losses[0]) == 1
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "scheduler",
    [{"prediction_type": "v_prediction"}, {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}],
    ids=str,
)
def test_other_schedulers(components, image, masks, scheduler):
    pipe = make_pipe(components, **scheduler)
    inverted = pipe.invert(image, SOURCE, 4, guidance_scale=3.0, num_inner_steps=2)
    same = pipe(SOURCE, inverted, output_type="latent")
    assert torch.allclose(same.images, inverted.latents[-1:], atol=1e-3)
    out = pipe(TARGET, inverted, object_masks={"dog": masks[0]}, optimization_iterations=2, output_type="latent")
    assert torch.isfinite(out.images).all() and len(out.losses[0]) == 4


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (56, 88)])
def test_any_size_square_portrait_or_odd(pipe, image, size):
    picture = np.resize(image, (*size, 3))
    mask = np.zeros(size, bool)
    mask[: size[0] // 2] = True
    out = pipe(
        TARGET,
        image=picture,
        source_prompt=SOURCE,
        num_inference_steps=3,
        object_masks={"dog": mask},
        optimization_iterations=1,
        inversion_method="direct",
        output_type="np",
    )
    assert out.images.shape == (1, *size, 3)


# The interface


def test_invert_and_edit_in_one_call(pipe, inversion, image, masks):
    edit = {
        "object_masks": {"dog": masks[0]},
        "optimization_iterations": 1,
        "guidance_scale": 3.0,
        "output_type": "latent",
    }
    one = pipe(TARGET, image=image, source_prompt=SOURCE, num_inference_steps=5, inversion_method="direct", **edit)
    assert torch.equal(one.images, pipe(TARGET, inversion, **edit).images)


@pytest.mark.parametrize("output_type,kind", [("pil", PIL.Image.Image), ("np", np.ndarray), ("pt", torch.Tensor)])
def test_output_types(edit, output_type, kind):
    out = edit(prompt=[TARGET, TARGET], output_type=output_type)
    assert len(out.images) == 2 and len(out.source_images) == 1
    assert isinstance(out.images[0] if output_type == "pil" else out.images, kind)
    as_tuple = edit(output_type=output_type, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 5 and out.nsfw_content_detected is None


def test_the_source_is_decoded_once_per_inversion_and_vae(pipe, inversion, masks, monkeypatch):
    inversion = replace(inversion)  # one that no test has decoded
    decoded, decode = [], pipe.decode_pixels

    def note_and_decode(latents):
        if latents.shape == inversion.latents[-1:].shape:  # not the small probe that tells the decoder
            decoded.append(torch.equal(latents, inversion.latents[-1:]))
        return decode(latents)

    monkeypatch.setattr(pipe, "decode_pixels", note_and_decode)
    first, again = (pipe(TARGET, inversion, object_masks={"dog": masks[0]}, output_type="pt") for _ in range(2))
    assert decoded == [False, True, False] and torch.equal(first.source_images, again.source_images)
    first.source_images.zero_()  # what a user does with one result is not the next one's
    assert torch.equal(pipe(TARGET, inversion, output_type="pt").source_images, again.source_images)
    pipe.vae = copy.deepcopy(pipe.vae)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.data += 0.1
    assert not torch.equal(pipe(TARGET, inversion, output_type="pt").source_images, again.source_images)


def test_callbacks_see_and_replace_latents_and_can_stop(edit, pipe):
    seen = []

    def zero_at_the_end(p, i, t, kwargs):
        seen.append((i, int(t), tuple(kwargs["latents"].shape)))
        return {"latents": kwargs["latents"] * 0} if i == 4 else {}

    assert edit(callback_on_step_end=zero_at_the_end).images.abs().max() == 0
    assert seen == [(i, t, (1, 4, *LATENTS)) for i, t in enumerate((801, 601, 401, 201, 1))]

    def stop(p, i, t, kwargs):
        p._interrupt = i == 1
        return kwargs

    with count_unet_calls(pipe.unet) as calls:
        edit(callback_on_step_end=stop)
    assert calls["batch 2"] == 2


def test_masks_may_be_given_per_prompt(edit, masks):
    out = edit(
        prompt=[TARGET, "a tiger wearing a straw hat"],
        object_masks=[{"dog": masks[0]}, {"tiger": masks[0]}],
        attribute_masks=[{"red": masks[1]}, None],
    )
    assert "ccl" in out.losses[0][0] and "ccl" not in out.losses[1][0]


def bad_mask(value=None, shape=(HEIGHT, WIDTH)):
    mask = np.zeros(shape, np.float32)
    if value is not None:
        mask[0, 0] = value
    return mask


@pytest.mark.parametrize(
    "change,message",
    [
        ({"object_masks": {"cat": bad_mask(1)}}, "'cat' is not in the prompt 'a dog wearing a red hat'"),
        ({"object_masks": {"a": bad_mask(1)}}, "'a' occurs 2 times"),
        ({"object_masks": {"dog": bad_mask()}}, r"object_masks\['dog'\] is empty"),
        ({"attribute_masks": {"red": bad_mask()}}, r"attribute_masks\['red'\] is empty"),
        ({"object_masks": {"dog": bad_mask(0.3)}}, "is empty"),
        ({"object_masks": {"dog": bad_mask(float("nan"))}}, "not finite"),
        ({"object_masks": {"dog": bad_mask(3.0)}}, "values from 0 to 3"),
        ({"object_masks": {"dog": bad_mask(-1.0)}}, "values from -1"),
        ({"object_masks": {"dog": bad_mask(1, (WIDTH, HEIGHT))}}, "is it transposed"),
        ({"object_masks": {"dog": np.ones((2, HEIGHT, WIDTH))}}, rf"has shape \(2, {HEIGHT}, {WIDTH}\)"),
        ({"object_masks": {"dog": np.ones(3)}}, r"has shape \(3,\)"),
        ({"object_masks": {"dog": "mask.png"}}, "names no word of the source prompt.*has to be opened"),
        ({"object_masks": [{}, {}]}, "one dict per prompt"),
        ({"prompt": []}, "empty list"),
        ({"prompt": ["", TARGET]}, "`prompt` is ''"),
        ({"prompt": "dog " * 80}, "has 80 tokens"),
        ({"inversion": None}, "Pass either `inversion`"),
        ({"image": bad_mask()}, "Pass either `inversion`"),
        ({"inversion": None, "image": np.zeros((HEIGHT, WIDTH, 3), np.uint8)}, "`image` needs `source_prompt`"),
        ({"inversion": None, "image": np.full((HEIGHT, WIDTH, 3), np.nan), "source_prompt": SOURCE}, "not finite"),
        ({"inversion": None, "image": np.zeros((HEIGHT, WIDTH, 3)), "source_prompt": "cat " * 80}, "has 80 tokens"),
        (
            {
                "inversion": None,
                "image": np.zeros((HEIGHT, WIDTH, 3)),
                "source_prompt": SOURCE,
                "num_inference_steps": 2000,
            },
            "from 1 to 1000",
        ),
        (
            {
                "inversion": None,
                "image": np.zeros((HEIGHT, WIDTH, 3)),
                "source_prompt": SOURCE,
                "num_inference_steps": 0,
            },
            "is 0: use",
        ),
        ({"source_prompt": SOURCE}, "an inversion knows its own prompt"),
        ({"attention_resolution": 12}, r"at this image size the U-Net has \[1, 2, 4, 8\]"),
        ({"cross_replace_steps": 1.5}, "`cross_replace_steps` is 1.5: use a number from 0 to 1"),
        ({"self_replace_steps": -0.1}, "`self_replace_steps`"),
        ({"optimization_steps": 20}, "`optimization_steps` is 20"),
        ({"optimization_iterations": 1.5}, "whole number of at least 0"),
        ({"background_blend": 2}, "`background_blend`"),
        ({"oal_weight": -1}, "`oal_weight`"),
        ({"ccl_weight": float("nan")}, "`ccl_weight`"),
        ({"step_size": "big"}, "`step_size`"),
        ({"max_update": -1}, "`max_update`"),
        ({"mask_dilation": 0.5}, "`mask_dilation`"),
        ({"optimization_threshold": 1.5}, "`optimization_threshold` is 1.5: use a number from 0 to 1"),
        ({"guidance_scale": 0.5}, "`guidance_scale` is 0.5"),
        ({"eta": 2}, "`eta`"),
        ({"ccl_form": "eq6"}, "choose one of 'token_ratio', 'spatial_ratio', 'both'"),
        ({"output_type": "jpg"}, "choose one of 'pil'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"choose from \['latents', 'prompt_embeds'\]"),
    ],
)
def test_bad_input_is_refused_before_any_pass(edit, pipe, change, message):
    before = state_of(pipe)
    with count_unet_calls(pipe.unet) as calls, pytest.raises(ValueError, match=message):
        edit(**change)
    assert not calls and state_of(pipe) == before


@pytest.mark.parametrize("poison", ["loss", "latents"])
def test_non_finite_numbers_stop_the_run_and_say_what_to_try(edit, pipe, monkeypatch, poison):
    if poison == "loss":
        monkeypatch.setattr(
            denoise, "own_maps", lambda unet, z, *a: (z.sum() * float("nan")).expand(len(z), 24, math.prod(LATENTS), 77)
        )
        with pytest.raises(FloatingPointError, match="iteration 0 .*Lower `step_size`"):
            edit()
    else:
        with pytest.raises(FloatingPointError, match="at step .*Lower `guidance_scale`"):
            edit(guidance_scale=1e38, object_masks=None, attribute_masks=None)


def test_tokens_lists_words_and_positions(pipe):
    assert pipe.tokens("a dog, wearing") == [("a", (1,)), ("dog", (2,)), (",", (3,)), ("wearing", (4,))]
