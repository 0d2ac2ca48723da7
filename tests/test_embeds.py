"""Negative prompts and embeddings that users bring, as in Stable Diffusion's own pipeline."""

from dataclasses import replace

import pytest
import torch
from mde_edit import Inversion

from .conftest import SOURCE, TARGET, count_unet_calls, make_pipe


# one by one, so that an edit is to the bit what it is alone
EDIT = {"optimization_iterations": 1, "optimization_steps": 0.4, "output_type": "latent", "edits_per_pass": 1}
SHORT = {"num_inference_steps": 3, "guidance_scale": 3.0, "num_inner_steps": 2}
NEGATIVE = "a tiger on grass"


@pytest.fixture
def edit(pipe, inversion, masks):
    def edit(prompt=TARGET, inversion=inversion, **changes):
        return pipe(prompt, inversion, object_masks={"dog": masks[0]}, **EDIT, **changes).images

    return edit


def test_a_negative_prompt_is_the_unconditional_row_of_an_edit(pipe, edit, image):
    plain, negative = edit(), edit(negative_prompt=NEGATIVE)
    assert not torch.equal(plain, negative) and torch.equal(edit(negative_prompt=""), plain)
    embeds = pipe.embed(NEGATIVE)
    assert torch.equal(edit(negative_prompt_embeds=embeds), negative)
    inverted = pipe.invert(image, SOURCE, 5, method="direct", guidance_scale=3.0, negative_prompt=NEGATIVE)
    assert inverted.negative_prompt == NEGATIVE and torch.equal(edit(inversion=inverted), negative)
    assert torch.equal(edit(inversion=inverted, negative_prompt=""), plain)  # the edit's own goes first
    assert torch.equal(edit(guidance_scale=1.0, negative_prompt=NEGATIVE), edit(guidance_scale=1.0))


def test_each_prompt_may_have_its_own(edit):
    both = edit([TARGET, TARGET], negative_prompt=[NEGATIVE, ""])
    assert torch.equal(both, torch.cat([edit(negative_prompt=NEGATIVE), edit()]))
    assert torch.equal(edit([TARGET, TARGET], negative_prompt=NEGATIVE)[1], both[0])


def test_null_text_starts_from_the_negative_prompt_and_holds_for_it_alone(pipe, image, edit):
    plain = pipe.invert(image, SOURCE, **SHORT)
    inverted = pipe.invert(image, SOURCE, **SHORT, negative_prompt=NEGATIVE)
    assert not torch.allclose(plain.null_embeds, inverted.null_embeds, atol=1e-2)
    same = pipe.invert(image, SOURCE, **SHORT, negative_prompt_embeds=pipe.embed(NEGATIVE))
    assert torch.equal(same.null_embeds, inverted.null_embeds) and same.negative_prompt is None
    # without losses the same prompt is still the reconstruction
    out = pipe(SOURCE, inverted, output_type="latent")
    assert torch.allclose(out.images, inverted.latents[-1:], atol=2e-4)
    assert torch.equal(edit(inversion=inverted, negative_prompt=NEGATIVE), edit(inversion=inverted))
    assert torch.equal(edit(inversion=plain, negative_prompt=[""]), edit(inversion=plain))
    for inversion, given in (
        (inverted, {"negative_prompt": "blurry"}),
        (plain, {"negative_prompt": NEGATIVE}),
        (same, {"negative_prompt": NEGATIVE}),
        (plain, {"negative_prompt_embeds": pipe.embed("")}),
    ):
        with (
            count_unet_calls(pipe.unet) as calls,
            pytest.raises(ValueError, match=f"`{next(iter(given))}` cannot change"),
        ):
            edit(inversion=inversion, **given)
        assert not calls


@pytest.mark.parametrize("method", ["direct", "null_text"])
def test_one_call_takes_them_too(pipe, image, masks, method):
    source = {"image": image, "source_prompt": SOURCE, "num_inference_steps": 3, "inversion_method": method}
    edit = {"object_masks": {"dog": masks[0]}, **EDIT}
    weighted = pipe.embed(SOURCE) * 1.1
    once = pipe(TARGET, **source, **edit, negative_prompt=NEGATIVE, source_prompt_embeds=weighted)
    inverted = pipe.invert(image, SOURCE, 3, method, negative_prompt=NEGATIVE, prompt_embeds=weighted)
    assert torch.equal(once.images, pipe(TARGET, inverted, **edit).images)
    plain = pipe.invert(image, SOURCE, 3, method, negative_prompt=NEGATIVE)
    assert not torch.equal(plain.latents, inverted.latents)
    if method == "direct":
        each = pipe([TARGET] * 2, **source, **edit, negative_prompt=[NEGATIVE, ""], source_prompt_embeds=weighted)
        assert torch.equal(each.images[:1], once.images) and not torch.equal(each.images[1:], once.images)


def test_prompt_embeds_stand_in_for_the_text_encoder(pipe, edit):
    own = pipe.embed(TARGET)
    assert torch.equal(edit(prompt_embeds=own), edit())
    heavier = own.clone()
    heavier[:, 2] *= 1.3
    assert not torch.equal(edit(prompt_embeds=heavier), edit())
    both = edit([TARGET, TARGET], prompt_embeds=torch.cat([heavier, own]))
    assert torch.equal(both, torch.cat([edit(prompt_embeds=heavier), edit()]))


def test_the_source_prompts_embeds_stay_with_the_inversion(pipe, image, tmp_path):
    weighted = pipe.embed(SOURCE) * 1.2
    inverted = pipe.invert(image, SOURCE, **SHORT, prompt_embeds=weighted)
    assert torch.equal(inverted.prompt_embeds, weighted)
    same = pipe(SOURCE, inverted, prompt_embeds=weighted, output_type="latent")
    assert torch.allclose(same.images, inverted.latents[-1:], atol=2e-4)
    inverted.save(tmp_path / "cat.safetensors")
    loaded = Inversion.load(tmp_path / "cat.safetensors")
    assert torch.equal(loaded.prompt_embeds, weighted)
    assert torch.equal(pipe(TARGET, loaded, **EDIT).images, pipe(TARGET, inverted, **EDIT).images)
    plain = pipe.invert(image, SOURCE, **SHORT)
    assert plain.prompt_embeds is None and plain.negative_prompt == ""
    assert (pipe.generate_mask(inverted, "cat") != pipe.generate_mask(plain, "cat")).any()


def test_an_inversion_whose_embeds_are_one_tensor_is_saved(pipe, image, tmp_path):
    weighted = pipe.embed(SOURCE) * 1.2
    inverted = pipe.invert(image, SOURCE, **{**SHORT, "method": "negative_prompt"}, prompt_embeds=weighted)
    inverted.save(tmp_path / "cat.safetensors")
    assert torch.equal(Inversion.load(tmp_path / "cat.safetensors").null_embeds, inverted.null_embeds)


def test_embeds_of_another_text_encoder_are_refused(pipe, inversion):
    other = replace(inversion, prompt_embeds=torch.zeros(1, 77, 32))
    with count_unet_calls(pipe.unet) as calls, pytest.raises(ValueError, match="`inversion.prompt_embeds` is"):
        pipe(TARGET, other)
    assert not calls


def test_compels_weights(components, image, masks):
    compel = pytest.importorskip("compel", exc_type=ImportError, reason="compel wants transformers 5")
    pipe = make_pipe(components)
    compel = compel.Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
    assert torch.allclose(compel(TARGET), pipe.embed(TARGET), atol=1e-6)
    inverted = pipe.invert(image, SOURCE, 3, "direct", 3.0, prompt_embeds=compel("a cat wearing a straw hat+"))
    edit = {"object_masks": {"dog": masks[0]}, **EDIT}
    plain, weighted = (
        pipe(TARGET, inverted, prompt_embeds=compel(text), **edit).images
        for text in (TARGET, "a dog++ wearing a red hat")
    )
    assert torch.isfinite(weighted).all() and not torch.equal(plain, weighted)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"prompt_embeds": torch.zeros(1, 77, 15)}, r"`prompt_embeds` is \(1, 77, 15\): .*\(1, 77, 16\)"),
        ({"prompt_embeds": torch.zeros(1, 154, 16)}, r"`prompt_embeds` is \(1, 154, 16\)"),
        ({"prompt_embeds": torch.zeros(2, 77, 16)}, r"`prompt_embeds` is \(2, 77, 16\)"),
        ({"prompt_embeds": torch.zeros(77, 16)}, "`prompt_embeds`"),
        ({"prompt_embeds": torch.zeros(1, 77, 16).long()}, "`prompt_embeds`"),
        ({"prompt_embeds": torch.full((1, 77, 16), torch.nan)}, "finite"),
        ({"prompt_embeds": [[1.0]]}, "`prompt_embeds` is list"),
        ({"negative_prompt_embeds": torch.zeros(1, 7, 16)}, "`negative_prompt_embeds`"),
        ({"negative_prompt": 5}, "`negative_prompt` is 5: pass a text"),
        ({"negative_prompt": ["a", "b"]}, r"one per prompt \(1\)"),
        ({"negative_prompt": "cat " * 80}, "has 80 tokens"),
        ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 77, 16)}, "not both"),
        ({"source_prompt_embeds": torch.zeros(1, 77, 16)}, "`source_prompt_embeds` goes with `image`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_before_any_pass(pipe, inversion, arguments, message):
    with count_unet_calls(pipe.unet) as calls, pytest.raises(ValueError, match=message):
        pipe(TARGET, inversion, **arguments)
    assert not calls


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"method": "negative_prompt", "negative_prompt": "a"}, "takes the source prompt there"),
        ({"method": "negative_prompt", "negative_prompt_embeds": torch.zeros(1, 77, 16)}, "takes the source prompt"),
        ({"negative_prompt": ["a"]}, "an inversion has one, a text"),
        ({"prompt_embeds": torch.zeros(2, 77, 16)}, "`prompt_embeds`"),
        ({"negative_prompt": b"a"}, "`negative_prompt` is b'a'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_an_inversion_refuses_what_does_not_fit(pipe, image, arguments, message):
    with count_unet_calls(pipe.unet) as calls, pytest.raises(ValueError, match=message):
        pipe.invert(image, SOURCE, 2, **arguments)
    assert not calls
