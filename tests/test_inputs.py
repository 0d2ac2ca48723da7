"""Every argument in the wrong type: refused by name and before any pass, with nothing left changed; and the parts of
`StableDiffusionPipeline`'s contract that scripts rely on."""

import copy
import inspect
import json
import os
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mde_edit import Inversion, MDEEditPipeline
from mde_edit.masks import as_binary_mask, edit_mask
from mde_edit.prompts import align_tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .conftest import HEIGHT, SOURCE, TARGET, WIDTH, count_unet_calls, make_pipe, state_of


MASK = np.ones((HEIGHT, WIDTH), bool)
PICTURE = PIL.Image.new("RGB", (WIDTH, HEIGHT))
FUZZ = int(os.environ.get("FUZZ", 150))
SHORT = {"optimization_iterations": 1, "optimization_steps": 0.4, "output_type": "latent"}


@pytest.fixture
def refuse(pipe, inversion):
    """Calls that must be refused with a message, before any pass, with nothing changed."""

    def refuse(message, call=pipe, **arguments):
        before = state_of(pipe)
        base = {"prompt": TARGET, "inversion": inversion} if call is pipe else {"prompt": SOURCE, "image": PICTURE}
        with count_unet_calls(pipe.unet) as calls, pytest.raises(ValueError, match=message):
            call(**{**base, **arguments})
        assert not calls and state_of(pipe) == before

    return refuse


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"inversion": "cat.safetensors"}, "`inversion` is a str: .*load_inversion"),
        ({"inversion": PICTURE}, "`inversion` is a Image: .*a picture is `image`"),
        ({"inversion": 5}, "`inversion` is a int"),
        ({"prompt": None}, "`prompt` is None"),
        ({"prompt": 5}, "`prompt` is 5"),
        ({"prompt": [None]}, "`prompt` is None"),
        ({"prompt": {"a": 1}}, "`prompt` is {'a': 1}"),
        ({"prompt": "a \ud800 dog"}, "lone surrogate"),
        ({"object_masks": 5}, "`object_masks` is a int"),
        ({"object_masks": PICTURE}, "`object_masks` is a Image"),
        ({"attribute_masks": MASK}, "`attribute_masks` is a ndarray"),
        ({"attribute_masks": [5]}, "one dict per prompt"),
        ({"object_masks": {True: MASK}}, "True does not name a word"),
        ({"object_masks": {None: MASK}}, "None does not name a word"),
        ({"object_masks": {(): MASK}}, r"\(\) does not name a word"),
        ({"object_masks": {("dog", True): MASK}}, "does not name a word"),
        ({"object_masks": {2.0: MASK}}, "2.0 does not name a word"),
        ({"object_masks": {"d\udc00g": MASK}}, "lone surrogate|does not name a word"),
        ({"object_masks": {np.int64(99): MASK}}, "Token position"),
        ({"generator": 5}, "`generator` is 5"),
        ({"generator": [torch.Generator()] * 2}, r"one per picture \(1\)"),
        ({"num_images_per_prompt": 2}, "all the same: set `eta` above 0"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
        ({"num_images_per_prompt": None}, "`num_images_per_prompt` is None"),
        ({"edits_per_pass": 0}, "`edits_per_pass` is 0"),
        ({"height": 512}, "`height` is 512 and the inversion's picture has 64: leave it out"),
        ({"width": "96"}, "`width` is '96': use a whole number"),
        ({"width": MASK}, "`width` is array"),
        ({"callback_on_step_end": 5}, "`callback_on_step_end` is 5"),
        ({"callback_on_step_end_tensor_inputs": None}, "`callback_on_step_end_tensor_inputs` is None"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "`callback_on_step_end_tensor_inputs` is 'latents'"),
        ({"inversion_method": "magic"}, "`inversion_method` is 'magic'"),
        ({"optimization_iterations": True}, "`optimization_iterations` is True"),
        ({"oal_weight": 10**30}, "`oal_weight` is"),
        ({"guidance_scale": float("inf")}, "`guidance_scale` is inf"),
        ({"guidance_scale": True}, "`guidance_scale` is True"),
        ({"ccl_form": ["both"]}, r"`ccl_form` is \['both'\]"),
        ({"output_type": []}, r"`output_type` is \[\]"),
        ({"output_type": MASK}, r"`output_type` is array"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_edit_names_what_it_cannot_use(refuse, arguments, message):
    refuse(message, **arguments)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"prompt": b"cat"}, "`prompt` is b'cat'"),
        ({"num_inference_steps": True}, "`num_inference_steps` is True"),
        ({"num_inference_steps": "5"}, "`num_inference_steps` is '5'"),
        ({"num_inference_steps": 1000}, "`num_inference_steps` is 1000.*use fewer"),
        ({"guidance_scale": 10**30}, "`guidance_scale` is"),
        ({"guidance_scale": [7.5]}, "`guidance_scale` is"),
        ({"method": None}, "`method` is None"),
        ({"num_inner_steps": None}, "`num_inner_steps` is None"),
        ({"early_stop_epsilon": "small"}, "`early_stop_epsilon` is 'small'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_inversion_names_what_it_cannot_use(pipe, refuse, arguments, message):
    refuse(message, pipe.invert, **arguments)


@pytest.mark.parametrize("number", [np.int64, np.float32, float])
def test_numbers_of_any_library_are_taken(pipe, image, masks, number):
    inverted = pipe.invert(image, SOURCE, number(2), "direct", number(3))
    edit = {"object_masks": {np.int32(2): masks[0]}, "optimization_iterations": number(1), "guidance_scale": number(3)}
    expected = pipe.invert(image, SOURCE, 2, "direct", 3.0)
    assert torch.equal(inverted.latents, expected.latents) and isinstance(inverted.guidance_scale, float)
    pipe(TARGET, inverted, **edit, output_type="latent")


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 10**20),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.sampled_from([MASK, PICTURE, torch.zeros(2), torch.Generator(), object(), np.float64("nan"), "\ud800", 1j]),
)
NAMES = """
    prompt inversion image source_prompt object_masks attribute_masks num_inference_steps inversion_method
    guidance_scale cross_replace_steps self_replace_steps oal_weight ccl_weight ccl_form optimization_steps
    optimization_iterations optimization_threshold step_size max_update attention_resolution mask_dilation
    background_blend eta generator output_type callback_on_step_end callback_on_step_end_tensor_inputs latents surprise
    negative_prompt prompt_embeds negative_prompt_embeds source_prompt_embeds height width num_images_per_prompt
    guidance_rescale cross_attention_kwargs clip_skip edits_per_pass
""".split()


class Reached(Exception):
    """The call got as far as the first pass."""


@given(st.sampled_from(NAMES), ANYTHING, st.booleans())
@settings(
    max_examples=FUZZ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_argument_is_used_or_refused_by_name(pipe, inversion, name, value, as_mask):
    """`make fuzz` runs ten thousand."""
    value = {"dog": value} if as_mask and name.endswith("masks") else value
    use_or_refuse(pipe, name, value, prompt=TARGET, inversion=inversion, object_masks={"dog": MASK})


def use_or_refuse(call, name, value, **arguments):
    """A call up to its first pass: it is reached, or the message names the argument."""
    pipe = getattr(call, "__self__", call)
    before = state_of(pipe)

    def reached(*_):
        raise Reached

    hook = pipe.unet.register_forward_pre_hook(reached)
    try:
        call(**{**arguments, name: value})
    except (ValueError, TypeError) as error:
        said = str(error)
        known = (name, "`image`", "`inversion`", "does not name a word", "not in the prompt", "prompt")
        assert any(word in said for word in known), said
        assert "torch" not in type(error).__module__ and len(said) < 1000
    except Reached:
        pass
    finally:
        hook.remove()
    assert state_of(pipe) == before


@pytest.mark.parametrize("number", [5e-324, 10**9, 1e9, 2**63, 1e38], ids=str)
def test_extreme_numbers_are_used_or_refused_by_name(pipe, inversion, number):
    for name in NAMES:
        use_or_refuse(pipe, name, number, prompt=TARGET, inversion=inversion, object_masks={"dog": MASK})
    for name in list(inspect.signature(pipe.invert).parameters)[2:]:
        use_or_refuse(pipe.invert, name, number, image=PICTURE, prompt=SOURCE)


# Inversion files


@pytest.fixture
def file(inversion, tmp_path):
    inversion.save(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        metadata = opened.metadata()
    return tmp_path / "x.safetensors", load_file(tmp_path / "x.safetensors"), metadata


@pytest.mark.parametrize(
    "change",
    [
        {"latents": lambda z: z[:3]},
        {"latents": lambda z: z[0]},
        {"latents": lambda z: z * float("nan")},
        {"null_embeds": lambda e: e[0]},
        {"null_embeds": lambda e: e.repeat(2, 1, 1)},
        {"timesteps": lambda t: t[:0]},
        {"timesteps": lambda t: t.float()},
        {"timesteps": lambda t: -t},
        {"alphas_cumprod": lambda a: a[:2]},
        {"fingerprint": lambda f: f.flatten()},
        {"method": "magic"},
        {"guidance_scale": "big"},
        {"guidance_scale": float("nan")},
        {"prompt": ""},
        {"prompt": 5},
        {"prediction_type": None},
        {"model_dtype": []},
        {"image_size": [1]},
        {"image_size": "big"},
        {"image_size": 5},
        {"prompt_embeds": "big"},
        {"prompt_embeds": [1.0]},
        {"negative_prompt": 5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_damaged_inversion_is_refused_when_it_is_loaded(file, change):
    path, tensors, metadata = file
    for name, value in change.items():
        if callable(value):
            tensors[name] = value(tensors[name]).contiguous()
        else:
            metadata[name] = json.dumps(value)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="x.safetensors' is not an inversion, or a damaged one"):
        Inversion.load(path)


@pytest.mark.parametrize("content", ["png", "text", "empty", "cut", "json", "deep"])
def test_a_foreign_file_is_refused(file, content):
    path, tensors, metadata = file
    if content == "png":
        PICTURE.save(path, "png")
    elif content in ("json", "deep"):
        broken = "{" if content == "json" else "[" * 100_000
        save_file(tensors, path, {**metadata, "prompt": broken})
    else:
        whole = path.read_bytes()
        path.write_bytes({"text": b"hello", "empty": b"", "cut": whole[: len(whole) // 2]}[content])
    with pytest.raises(ValueError, match="is not an inversion, or a damaged one"):
        Inversion.load(path)


@given(st.data())
@settings(max_examples=FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_a_whole_inversion_or_refused(file, data):
    """Bytes changed, cut out or put in, in the header or anywhere."""
    whole = file[0].with_name("whole")
    if not whole.exists():
        whole.write_bytes(file[0].read_bytes())
    content = bytearray(whole.read_bytes())
    reach = data.draw(st.sampled_from([8, 2000, len(content)]))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, min(reach, len(content))))
        content[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    file[0].write_bytes(content)
    try:
        loaded = Inversion.load(file[0])
    except ValueError as error:
        assert "is not an inversion, or a damaged one" in str(error)
    else:
        loaded.check_whole()
        assert torch.isfinite(loaded.latents).all() and loaded.prompt


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        Inversion.load(tmp_path / "no.safetensors")


def test_an_inversion_that_was_cut_in_memory_is_refused(refuse, inversion):
    refuse(
        "`inversion` is damaged .*its latents are 3 for 5 steps",
        inversion=replace(inversion, latents=inversion.latents[:3]),
    )


def test_inversions_can_be_compared_and_kept_in_sets(inversion):
    assert inversion == inversion and inversion != replace(inversion) and len({inversion, replace(inversion)}) == 2


# Parts


def test_from_pipe_says_what_it_takes(pipe):
    with pytest.raises(ValueError, match="`from_pipe` takes a pipeline, not 'folder'.*from_pretrained"):
        MDEEditPipeline.from_pipe("folder")

    class TwoEncoders:
        components = {**pipe.components, "text_encoder_2": None}

    with pytest.raises(ValueError, match="A TwoEncoders is not of .*two text encoders"):
        MDEEditPipeline.from_pipe(TwoEncoders())

    class NoUNet:
        components = {name: part for name, part in pipe.components.items() if name != "unet"}

    with pytest.raises(ValueError, match="it has no unet"):
        MDEEditPipeline.from_pipe(NoUNet())


def test_schedulers_that_cannot_be_inverted_are_refused_before_any_pass(components, image):
    base = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for scheduler, message in (
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler, whose noise schedule has no betas"),
        (DDIMScheduler(**base, rescale_betas_zero_snr=True), "`rescale_betas_zero_snr` and predicts epsilon"),
    ):
        pipe = make_pipe(components)
        pipe.scheduler = scheduler
        with count_unet_calls(pipe.unet) as calls, pytest.raises(ValueError, match=message):
            pipe.invert(image, SOURCE, 2)
        assert not calls


def test_the_tiny_autoencoder_works(components, image, masks):
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    pipe = make_pipe({**components, "vae": vae.eval()})
    inverted = pipe.invert(image, SOURCE, 2, method="direct", guidance_scale=3.0)
    out = pipe(TARGET, inverted, object_masks={"dog": masks[0]}, output_type="np", optimization_iterations=1)
    assert out.images.shape == out.source_images.shape == (1, HEIGHT, WIDTH, 3) and np.isfinite(out.images).all()


def test_a_distilled_model_that_takes_its_guidance_as_an_input_is_refused(components, image):
    config = {**components["unet"].config, "time_cond_proj_dim": 8, "_use_default_values": []}
    pipe = make_pipe({**components, "unet": UNet2DConditionModel.from_config(config)})
    with count_unet_calls(pipe.unet) as calls, pytest.raises(ValueError, match="time_cond_proj_dim.*LCM"):
        pipe.invert(image, SOURCE, 2)
    assert not calls


def test_weights_that_were_made_in_inference_mode_are_refused(components, image):
    with torch.inference_mode():
        unet = copy.deepcopy(components["unet"])
    pipe = make_pipe({**components, "unet": unet})
    with pytest.raises(ValueError, match="loaded inside `torch.inference_mode"):
        pipe.invert(image, SOURCE, 2)


def test_masks_and_words_are_prepared_on_the_cpu_whatever_the_default_device_is(tokenizer, masks):
    with torch.device("meta"):
        mask = as_binary_mask(PIL.Image.fromarray(masks[0]).convert("RGB"), "m", [(HEIGHT, WIDTH)])
        made = [mask, edit_mask([mask], (16, 24)), *align_tokens(tokenizer, SOURCE, TARGET).without([2])]
    assert all(tensor.device.type == "cpu" for tensor in made)


# Callbacks and generators, as in Stable Diffusion's own pipeline


def test_diffusers_own_callback_cuts_the_guidance(pipe, inversion, masks):
    edit = {"object_masks": {"dog": masks[0]}, **SHORT}
    with count_unet_calls(pipe.unet) as calls:
        cut = pipe(TARGET, inversion, **edit, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.4))
    assert calls["batch 2"] == 3  # of five: the callback acts after the third
    several = MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2)])
    assert torch.equal(pipe(TARGET, inversion, **edit, callback_on_step_end=several).images, cut.images)
    assert not torch.equal(pipe(TARGET, inversion, **edit).images, cut.images)
    assert pipe.num_timesteps == 5 and pipe.guidance_scale == 3.0 and pipe.do_classifier_free_guidance


def test_a_callback_may_exchange_the_prompt(pipe, inversion):
    other = pipe.embed("a tiger wearing a blue hat").detach()

    def exchange(pipe, i, t, tensors):
        assert tensors["prompt_embeds"].shape == (4, 77, 16)  # two prompts, unconditional rows first
        return {"prompt_embeds": other.repeat(4, 1, 1)}

    names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    prompts = [TARGET, "a tiger wearing a blue hat"]
    changed = pipe(prompts, inversion, **SHORT, callback_on_step_end=exchange, **names)
    plain = pipe(prompts, inversion, **SHORT)
    assert not torch.equal(changed.images[0], plain.images[0]) and torch.equal(changed.images[1], plain.images[1])


def test_what_a_callback_returns_is_a_dict(pipe, inversion):
    with pytest.raises(ValueError, match="returned a tuple: return the dict"):
        pipe(TARGET, inversion, **SHORT, callback_on_step_end=lambda *_: (1, 2))


def test_each_prompt_has_its_own_generator(pipe, inversion):
    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    prompts, edit = [TARGET, TARGET], {**SHORT, "eta": 0.5, "edits_per_pass": 1}
    both = pipe(prompts, inversion, **edit, generator=seeded(3, 3)).images
    assert torch.equal(both[0], both[1])
    other = pipe(prompts, inversion, **edit, generator=seeded(3, 4)).images
    assert torch.equal(other[0], both[0]) and not torch.equal(other[1], both[1])
    assert torch.equal(pipe(TARGET, inversion, **edit, generator=seeded(4)[0]).images[0], other[1])


def test_several_pictures_of_a_prompt_differ_by_their_noise(pipe, inversion, masks):
    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    edit = {**SHORT, "eta": 0.5, "edits_per_pass": 1}
    one, other = TARGET, "a tiger wearing a blue hat"
    four = pipe([one, other], inversion, **edit, num_images_per_prompt=2, generator=seeded(1, 2, 3, 4)).images
    each = [
        pipe(p, inversion, **edit, generator=g).images for p, g in zip((one, one, other, other), seeded(1, 2, 3, 4))
    ]
    assert torch.equal(four, torch.cat(each)) and not torch.equal(four[0], four[1])
    dog, tiger = {"dog": masks[0]}, {"tiger": masks[0]}
    whole = {"object_masks": [dog, tiger], "prompt_embeds": torch.cat([pipe.embed(one), pipe.embed(other)])}
    out = pipe([one, other], inversion, **edit, **whole, num_images_per_prompt=2, generator=seeded(1, 2, 3, 4))
    assert [entry[0]["step"] for entry in out.losses] == [0] * 4 and len(out.images) == 4


def test_the_one_call_form_resizes(pipe, image):
    source = {"image": image, "source_prompt": SOURCE, "num_inference_steps": 2, "inversion_method": "direct"}
    once = pipe(TARGET, **source, **SHORT, height=32, width=48).images
    inverted = pipe.invert(image, SOURCE, 2, "direct", height=32, width=48)
    assert torch.equal(once, pipe(TARGET, inverted, **SHORT, height=32, width=48.0).images)


def test_a_stable_diffusion_pipeline_still_takes_its_parts(pipe):
    assert type(MDEEditPipeline.from_pipe(StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)))
