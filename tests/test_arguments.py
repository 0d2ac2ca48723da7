"""Arguments of Stable Diffusion's own pipeline, as scripts bring them: each has the effect that it has there, an
inversion remembers it, and an edit that contradicts it is refused by name before any pass. And several pictures."""

import copy
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from mde_edit import Inversion
from mde_edit.inversion import guided_noise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from .conftest import HEIGHT, LATENTS, SOURCE, TARGET, WIDTH, count_unet_calls, make_pipe, state_of, steepen


EDIT = {"optimization_iterations": 1, "optimization_steps": 0.4, "output_type": "latent"}
DIRECT = {"num_inference_steps": 2, "method": "direct", "guidance_scale": 3.0}
NULL_TEXT = {"num_inference_steps": 2, "guidance_scale": 3.0, "num_inner_steps": 2}
OTHER = "a tiger wearing a blue hat"


@pytest.fixture(scope="module")
def components(components):
    """With half the levels, since every test here inverts and edits several times."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    steepen(unet)
    return {**components, "unet": unet.eval()}


@pytest.fixture(scope="module")
def inversion(components, image):
    return make_pipe(components).invert(image, SOURCE, **DIRECT)


@pytest.fixture
def edit(pipe, masks):
    def edit(prompt=TARGET, inversion=None, pipe=pipe, **changes):
        return pipe(prompt, inversion, object_masks={2: masks[0]}, **EDIT, **changes).images

    return edit


@pytest.fixture(scope="module")
def adapted(components):
    """A pipeline with a LoRA on the U-Net and one on the text encoder, at half their strength."""
    pipe = make_pipe({name: copy.deepcopy(part) for name, part in components.items()})
    torch.manual_seed(0)
    lora = {"r": 2, "init_lora_weights": False}
    pipe.unet.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_v", "ff.net.0.proj"], **lora))
    pipe.text_encoder.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"], **lora))
    pipe.set_adapters("default", 0.5)
    return pipe


def strengths(pipe):
    models = (pipe.unet, pipe.text_encoder)
    return [dict(m.scaling) for model in models for m in model.modules() if hasattr(m, "scale_layer")]


def refused(pipe, message, **arguments):
    before = state_of(pipe)
    with count_unet_calls(pipe.unet) as calls, pytest.raises(ValueError, match=message):
        pipe(**{"prompt": TARGET, **arguments})
    assert not calls and state_of(pipe) == before


# clip_skip


def test_clip_skip_is_an_encoder_with_fewer_layers(components, pipe, tmp_path):
    components["text_encoder"].save_pretrained(tmp_path)
    shallow = make_pipe({**components, "text_encoder": CLIPTextModel.from_pretrained(tmp_path, num_hidden_layers=1)})
    assert torch.allclose(pipe.embed(TARGET, clip_skip=1), shallow.embed(TARGET), atol=1e-6)
    assert torch.allclose(pipe.embed(TARGET, clip_skip=0), pipe.embed(TARGET), atol=1e-6)
    assert not torch.allclose(pipe.embed(TARGET, clip_skip=2), shallow.embed(TARGET), atol=1e-2)


def test_an_edit_reads_prompts_as_the_inversion_did(pipe, image, edit, tmp_path):
    plain, skipped = pipe.invert(image, SOURCE, **DIRECT), pipe.invert(image, SOURCE, **DIRECT, clip_skip=1)
    assert skipped.clip_skip == 1 and plain.clip_skip is pipe.invert(image, SOURCE, **DIRECT, clip_skip=0).clip_skip
    assert not torch.equal(plain.latents, skipped.latents)
    assert torch.equal(plain.null_embeds, skipped.null_embeds)  # as in diffusers: prompts alone
    skipped.save(tmp_path / "x")
    expected = edit(inversion=skipped, prompt_embeds=pipe.embed(TARGET, 1))
    assert torch.equal(edit(inversion=Inversion.load(tmp_path / "x"), clip_skip=1), expected)
    assert torch.equal(edit(inversion=skipped), expected)
    assert not torch.equal(edit(inversion=skipped, prompt_embeds=pipe.embed(TARGET)), expected)
    source = {"image": image, "source_prompt": SOURCE, "num_inference_steps": 2, "inversion_method": "direct"}
    assert torch.equal(edit(**source, guidance_scale=3.0, clip_skip=1), expected)
    refused(pipe, "`clip_skip` is 2 and the inversion was made with 1: leave it out", inversion=skipped, clip_skip=2)
    refused(pipe, "`clip_skip` is 1 and the inversion was made with 0", inversion=plain, clip_skip=1)
    refused(pipe, "`clip_skip` is 3: use a whole number from 0 to 2", inversion=plain, clip_skip=3)
    with pytest.raises(ValueError, match="another model, or another LoRA, .*text encoder"):
        edit(inversion=replace(skipped, clip_skip=None))


# guidance_rescale


def test_guidance_is_rescaled_as_diffusers_does_it():
    torch.manual_seed(0)
    null, cond = torch.randn(2, 3, 4, 5, 6)
    noise = null + 4 * (cond - null)
    assert torch.equal(guided_noise(null, cond, 4.0), noise)
    assert torch.equal(guided_noise(null, cond, 4.0, 0.7), rescale_noise_cfg(noise, cond, 0.7))
    # wholly rescaled, it has the conditional prediction's spread
    assert torch.allclose(guided_noise(null, cond, 4.0, 1.0).std((1, 2, 3)), cond.std((1, 2, 3)))


def test_an_edit_of_a_direct_inversion_chooses_its_own_rescaling(pipe, image, edit):
    plain, inverted = pipe.invert(image, SOURCE, **DIRECT), pipe.invert(image, SOURCE, **DIRECT, guidance_rescale=0.7)
    assert inverted.guidance_rescale == 0.7 and torch.equal(inverted.latents, plain.latents)
    without, rescaled = edit(inversion=plain), edit(inversion=inverted)
    assert torch.equal(edit(inversion=plain, guidance_rescale=0.7), rescaled) and not torch.equal(without, rescaled)
    assert torch.equal(edit(inversion=inverted, guidance_rescale=0), without)


def test_null_text_retraces_the_picture_under_its_rescaled_guidance_alone(pipe, image):
    rescaled = pipe.invert(image, SOURCE, **NULL_TEXT, guidance_rescale=0.7)
    plain = pipe.invert(image, SOURCE, **NULL_TEXT)
    assert not torch.allclose(plain.null_embeds, rescaled.null_embeds, atol=1e-3)
    for given in ({}, {"guidance_rescale": 0.7}):
        out = pipe(SOURCE, rescaled, output_type="latent", **given)
        assert torch.allclose(out.images, rescaled.latents[-1:], atol=2e-4)
    refused(pipe, "`guidance_rescale` is 0.5 and .*made for 0.7", inversion=rescaled, guidance_rescale=0.5)
    refused(pipe, "`guidance_rescale` is 0.7 and .*made for 0.0", inversion=plain, guidance_rescale=0.7)
    refused(pipe, "`guidance_rescale` is 2: use a number from 0 to 1", inversion=plain, guidance_rescale=2)
    with pytest.raises(ValueError, match="`guidance_rescale` is 'much'"):
        pipe.invert(image, SOURCE, **NULL_TEXT, guidance_rescale="much")


# cross_attention_kwargs


def test_a_loras_scale_is_its_strength(adapted, image, edit, tmp_path):
    before = strengths(adapted)
    scaled = adapted.invert(image, SOURCE, **DIRECT, cross_attention_kwargs={"scale": 0.6})
    assert scaled.lora_scale == 0.6 and strengths(adapted) == before
    scaled.save(tmp_path / "x")
    out = edit(inversion=Inversion.load(tmp_path / "x"), pipe=adapted)
    assert torch.equal(edit(inversion=scaled, pipe=adapted, cross_attention_kwargs={"scale": 0.6}), out)
    assert strengths(adapted) == before
    regions = adapted.generate_mask(scaled, "cat")
    refused(adapted, "'scale' of 1.0 and the inversion was made with 0.6", inversion=scaled, **kwargs(1.0))
    with pytest.raises(ValueError, match="another model, or another LoRA"):
        edit(inversion=replace(scaled, lora_scale=1.0), pipe=adapted)
    adapted.set_adapters("default", 0.3)  # the same strength said otherwise
    try:
        same = adapted.invert(image, SOURCE, **DIRECT)
        assert torch.allclose(same.latents, scaled.latents, atol=1e-5)
        assert torch.allclose(edit(inversion=same, pipe=adapted), out, atol=1e-4)
        refused(adapted, "'scale' of 0.5 and the inversion was made with 1.0", inversion=same, **kwargs(0.5))
        assert (adapted.generate_mask(same, "cat") == regions).all()
    finally:
        adapted.set_adapters("default", 0.5)


def kwargs(scale):
    return {"cross_attention_kwargs": {"scale": scale}}


def test_a_scale_of_nothing_is_no_lora_and_is_undone_even_then(adapted, pipe, image, edit):
    before = strengths(adapted)
    source = {"image": image, "source_prompt": SOURCE, "num_inference_steps": 2, "inversion_method": "direct"}
    none = edit(pipe=adapted, **source, **kwargs(0), negative_prompt="a tiger")
    assert torch.allclose(none, edit(**source, negative_prompt="a tiger"), atol=1e-5) and strengths(adapted) == before
    # null-text's optimization under it, too
    short = {"num_inference_steps": 1, "num_inner_steps": 1}
    inverted = adapted.invert(image, SOURCE, **short, **kwargs(0))
    assert torch.allclose(inverted.null_embeds, pipe.invert(image, SOURCE, **short).null_embeds, atol=1e-3)
    assert strengths(adapted) == before


@pytest.mark.parametrize(
    "value,message",
    [
        ({"gligen": 1}, r"`cross_attention_kwargs` has \['gligen'\]: only 'scale'.*Leave the rest out"),
        ({"control": 1, "scale": 1}, r"has \['control'\]"),
        (5, "`cross_attention_kwargs` is 5: pass a dict"),
        ({"scale": "big"}, r"`cross_attention_kwargs\[\"scale\"\]` is 'big'"),
        ({"scale": float("nan")}, "is nan"),
    ],
    ids=str,
)
def test_other_attention_arguments_are_refused(pipe, image, inversion, value, message):
    refused(pipe, message, inversion=inversion, cross_attention_kwargs=value)
    with count_unet_calls(pipe.unet) as calls, pytest.raises(ValueError, match=message):
        pipe.invert(image, SOURCE, 2, cross_attention_kwargs=value)
    assert not calls


def test_callbacks_read_them_and_change_the_rescaling(pipe, image, edit):
    inverted = pipe.invert(image, SOURCE, **DIRECT, clip_skip=1, guidance_rescale=0.7)
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append((pipe.clip_skip, pipe.guidance_rescale, pipe.cross_attention_kwargs))
        pipe._guidance_rescale = 0.0
        return {}

    changed = edit(inversion=inverted, callback_on_step_end=callback)
    assert seen == [(1, 0.7, {"scale": 1.0}), (1, 0.0, {"scale": 1.0})]
    assert not torch.equal(changed, edit(inversion=inverted))


def test_a_file_from_before_has_the_defaults(inversion, tmp_path):
    inversion.save(tmp_path / "x")
    with safe_open(tmp_path / "x", "pt") as file:
        metadata = file.metadata()
    for name in ("guidance_rescale", "clip_skip", "lora_scale"):
        del metadata[name]
    save_file(load_file(tmp_path / "x"), tmp_path / "old", metadata)
    old = Inversion.load(tmp_path / "old")
    assert (old.guidance_rescale, old.clip_skip, old.lora_scale) == (0.0, None, 1.0)


# Several pictures


@pytest.fixture
def two(image, masks):
    """Two pictures with their prompts and masks, as arguments of one call, and of one call each."""
    flipped = np.ascontiguousarray(image[:, ::-1])
    both = {
        "prompt": [TARGET, OTHER],
        "image": [image, flipped],
        "source_prompt": [SOURCE, "a polar bear on grass"],
        "object_masks": [{"dog": masks[0]}, {"tiger": masks[0][:, ::-1]}],
        "attribute_masks": [None, {"blue": masks[1]}],
    }
    return both, [{name: values[k] for name, values in both.items()} for k in range(2)]


@pytest.mark.parametrize("method", ["direct", "null_text"])
def test_each_of_several_pictures_is_edited_as_if_alone(pipe, two, method):
    both, each = two
    rest = {**EDIT, "optimization_steps": 1.0, "num_inference_steps": 1, "inversion_method": method}
    rest |= {"output_attention_maps": True}
    negative = ["", "a cat"]
    together = pipe(**both, **rest, negative_prompt=negative)
    for k, one in list(enumerate(each))[method == "null_text" :]:  # which takes its time
        alone = pipe(**one, **rest, negative_prompt=negative[k])
        assert torch.equal(together.images[k : k + 1], alone.images)
        assert torch.equal(together.source_images[k : k + 1], alone.source_images)
        assert together.losses[k] == alone.losses[0]
        assert all(torch.equal(m, alone.attention_maps[0][key]) for key, m in together.attention_maps[k].items())
    assert len(together.images) == len(together.source_images) == 2


def test_embeddings_noise_and_regions_go_with_their_picture(pipe, two):
    both, each = two
    embeds = [pipe.embed(text) * factor for text, factor in ((TARGET, 1.1), (OTHER, 0.9))]
    sources = [pipe.embed(one["source_prompt"]) * 1.05 for one in each]
    both["object_masks"][0] = each[0]["object_masks"] = {"dog": "cat"}
    rest = {**EDIT, "num_inference_steps": 1, "inversion_method": "direct", "eta": 0.5, "edits_per_pass": 1}

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    given = {"prompt_embeds": torch.cat(embeds), "source_prompt_embeds": torch.cat(sources)}
    four = pipe(**both, **rest, **given, num_images_per_prompt=2, generator=seeded(1, 2, 3, 4))
    for k, seed, one in ((0, 2, each[0]), (1, 3, each[1])):
        given = {"prompt_embeds": embeds[k], "source_prompt_embeds": sources[k]}
        alone = pipe(**one, **rest, **given, generator=seeded(seed))
        assert torch.equal(four.images[seed - 1], alone.images[0])
    assert len(four.images) == 4 and len(four.source_images) == 2


def test_what_is_not_a_list_holds_for_all_pictures(pipe, image, masks):
    tensor = torch.from_numpy(np.stack([image, image[::-1]])).movedim(-1, 1)
    rest = {**EDIT, "num_inference_steps": 1, "inversion_method": "direct", "object_masks": {"dog": masks[0]}}
    words = {"prompt": TARGET, "source_prompt": SOURCE}
    batch = pipe(image=tensor, **words, **rest)
    each = {name: [text] * 2 for name, text in words.items()}
    assert torch.equal(pipe(image=list(tensor), **each, **rest).images, batch.images) and len(batch.images) == 2
    one = pipe([TARGET], image=[image], source_prompt=[SOURCE], **rest).images
    assert torch.equal(one, batch.images[:1])
    resized = {**rest, "height": 32, "width": 48, "output_type": "np", "object_masks": None}
    decoded = pipe([TARGET, TARGET], image=[image, PICTURE], source_prompt=SOURCE, **resized)
    assert decoded.images.shape == decoded.source_images.shape == (2, 32, 48, 3)


PICTURE = np.zeros((40, 60, 3), np.uint8)


def test_a_callback_has_the_latents_of_all_pictures(pipe, two):
    shapes = []

    def stop(pipe, i, t, tensors):
        shapes.append([tuple(tensor.shape) for tensor in tensors.values()])
        pipe._interrupt = True
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    rest = {**EDIT, "num_inference_steps": 2, "inversion_method": "direct", "callback_on_step_end": stop, **names}
    assert not pipe(**two[0], **rest).images.any() and shapes == [[(2, 4, *LATENTS), (4, 77, 16)]]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"prompt": [TARGET] * 3}, "`prompt` is a list of 3 and `image` one of 2: pass one prompt per picture"),
        ({"source_prompt": [SOURCE]}, "`image` holds 2 pictures and `source_prompt` 1 prompts"),
        ({"source_prompt": [SOURCE, ""]}, r"`source_prompt\[1\]` is ''"),
        ({"source_prompt": None}, "`image` needs `source_prompt`"),
        ({"image": []}, "`image` holds 0 pictures"),
        ({"image": [PICTURE, 5]}, r"`image\[1\]` is a int"),
        ({"image": [PICTURE, PICTURE[:20]]}, r"different sizes \(56x40, 56x16, .*pass `height` and `width`"),
        ({"object_masks": [{"dog": np.ones((HEIGHT, WIDTH))}]}, r"one dict per prompt \(2\)"),
        ({"object_masks": [None, {"dog": np.ones((HEIGHT, WIDTH))}]}, "'dog' is not in the prompt 'a tiger"),
        ({"object_masks": [None, {"tiger": "dog"}]}, "names no word of the source prompt"),
        ({"generator": [torch.Generator()]}, r"one per picture \(2\)"),
        ({"negative_prompt": ["a", "b", "c"]}, r"one per prompt \(2\)"),
        ({"source_prompt_embeds": torch.zeros(3, 77, 16)}, r"`source_prompt_embeds` is \(3, 77, 16\)"),
        ({"prompt_embeds": torch.zeros(3, 77, 16)}, r"`prompt_embeds` is \(3, 77, 16\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_pictures_that_do_not_fit_together_are_refused_before_any_pass(pipe, two, change, message):
    refused(pipe, message, **{**two[0], **change})


def test_one_inversion_is_of_one_picture(pipe, image):
    with pytest.raises(ValueError, match="`image` is a list of 2: invert one picture at a time"):
        pipe.invert([image, image], SOURCE)
