"""Editing with SDXL, on a small one with random weights."""

import copy
import inspect
from contextlib import contextmanager
from dataclasses import fields, make_dataclass, replace
from types import SimpleNamespace

import accelerate
import numpy as np
import peft
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.callbacks import SDXLCFGCutoffCallback
from mde_edit import Inversion, MDEEditPipeline, MDEEditXLPipeline
from mde_edit.attention_processors import attention_layers, select_loss_layers
from mde_edit.conditioning import Conditioning
from mde_edit.editing import item_of
from mde_edit.masks import binarize_mask, dilate_mask, resize_mask
from mde_edit.prompts import align_tokens
from safetensors import safe_open
from safetensors.torch import save_file

from .conftest import HEIGHT, LATENTS, SOURCE, TARGET, WIDTH, count_unet_calls, make_pipe, short_edit
from .oracle import naive_edit
from .test_denoise import DOG, RED, SETTINGS
from .tiny_xl import BETAS, POOLED, make_components, make_xl


STEPS = 3
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def parts(tokenizer):
    return make_components(tokenizer)


@pytest.fixture
def pipe(parts):
    return make_xl(parts, MDEEditXLPipeline)


@pytest.fixture
def own(parts):
    """A pipeline whose models a test may change."""
    return make_xl({name: copy.deepcopy(part) for name, part in parts.items()}, MDEEditXLPipeline)


@pytest.fixture(scope="module")
def inversion(parts, image):
    return make_xl(parts, MDEEditXLPipeline).invert(image, SOURCE, num_inference_steps=STEPS, guidance_scale=3.0)


@pytest.fixture
def edit(pipe, inversion, masks):
    return short_edit(pipe, inversion, masks, optimization_iterations=1, optimization_steps=0.2)


@contextmanager
def seen_by(module, *names):
    """The keyword arguments called `names` of every call of `module`."""
    seen = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([kwargs.get(name) for name in names]), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


def read(pipe, prompt):
    """Embedding and pooled embedding, as diffusers reads a prompt."""
    embeds, _, pooled, _ = StableDiffusionXLPipeline.encode_prompt(pipe, prompt, do_classifier_free_guidance=False)
    return embeds.detach(), pooled.detach()


# The engine


@pytest.mark.parametrize("ccl_form", [pytest.param("token_ratio", marks=slow), "both"])
def test_engine_equals_the_naive_algorithm(pipe, inversion, masks, edit, ccl_form):
    h, w = inversion.latents.shape[-2:]
    layers = attention_layers(pipe.unet, (h, w))
    loss_layers = [layer for layer in layers if layer.is_cross and layer.size == (h // 2, w // 2)]
    soft = [resize_mask(torch.from_numpy(m) > 0, (h // 2, w // 2)) for m in masks]
    outside = [resize_mask(torch.from_numpy(m) > 0, (h, w)) for m in masks]
    regions = [
        ("object", (DOG,), soft[0].flatten(), binarize_mask(soft[0]).flatten()),
        ("attribute", (RED,), soft[1].flatten(), binarize_mask(soft[1]).flatten()),
    ]
    texts = {"source": read(pipe, SOURCE), "target": read(pipe, TARGET)}
    texts["plain"] = (torch.zeros(1, 77, 40), torch.zeros(1, POOLED))
    sizes = torch.tensor([[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]])
    expected = naive_edit(
        pipe,
        inversion,
        texts["source"][0],
        texts["target"][0],
        align_tokens(pipe.tokenizer, SOURCE, TARGET),
        regions,
        dilate_mask(((outside[0] + outside[1]) > 0).float(), 1),
        [layer.name for layer in loss_layers],
        {layer.name for layer in layers if not layer.is_cross},
        {**SETTINGS, "ccl_form": ccl_form},
        {mode: {"text_embeds": pooled, "time_ids": sizes} for mode, (_, pooled) in texts.items()},
    )
    out = edit(ccl_form=ccl_form, **SETTINGS)
    assert (out.images - expected).abs().max() < 1e-4
    plain = edit(**{**SETTINGS, "optimization_iterations": 0})
    assert (out.images - plain.images).abs().max() > 1e-2  # the comparison has teeth


def test_without_injection_it_is_diffusers_own_sample(parts, pipe, image):
    """The same noise, prompt and sizes through `StableDiffusionXLPipeline`, which the engine knows nothing of."""
    inverted = pipe.invert(image, SOURCE, 4, guidance_scale=3.0, height=32, width=48)
    base = StableDiffusionXLPipeline(
        **parts, scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    )
    base.set_progress_bar_config(disable=True)
    sample = base(
        TARGET,
        latents=inverted.latents[:1],
        num_inference_steps=4,
        guidance_scale=3.0,
        original_size=(HEIGHT, WIDTH),
        target_size=(32, 48),
        height=32,
        width=48,
        output_type="latent",
    ).images
    edited = pipe(TARGET, inverted, cross_replace_steps=0.0, self_replace_steps=0.0, output_type="latent").images
    assert torch.allclose(edited, sample, atol=1e-4)


@pytest.mark.parametrize("method", ["null_text", pytest.param("negative_prompt", marks=slow)])
def test_same_prompt_without_losses_is_the_reconstruction(pipe, image, method):
    inverted = pipe.invert(image, SOURCE, STEPS, method=method, guidance_scale=3.0, num_inner_steps=2)
    out = pipe(SOURCE, inverted, output_type="latent")
    assert torch.allclose(out.images, inverted.latents[-1:], atol=2e-4)


def test_direct_reconstruction_is_the_vae_round_trip(pipe, inversion, image):
    latents = pipe.vae.encode(pipe.prepare_image(image)).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert inversion.method == "direct" and torch.equal(inversion.latents[-1:], latents)
    decoded = (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(pipe(TARGET, inversion, output_type="pt").source_images, decoded, atol=1e-4)


def test_outside_the_masks_the_latents_are_the_sources(edit, inversion, masks):
    out = edit(mask_dilation=1)
    outside = sum(resize_mask(torch.from_numpy(m) > 0, LATENTS) for m in masks).gt(0).float()
    outside = ~dilate_mask(outside, 1).bool()
    assert torch.equal(out.images[0][:, outside], inversion.latents[-1][:, outside])


def test_several_prompts_and_pictures_are_edits_alone(pipe, edit, image, masks):
    other = "a tiger wearing a blue hat"
    changes = {"object_masks": [{"dog": masks[0]}, {"tiger": masks[0]}], "attribute_masks": None}
    both = edit([TARGET, other], **changes).images
    for k, prompt in enumerate((TARGET, other)):
        alone = edit(prompt, **{**changes, "object_masks": changes["object_masks"][k]}).images
        assert torch.equal(both[k : k + 1], alone)
    # one per pass by default; in one pass but for rounding
    with count_unet_calls(pipe.unet) as calls:
        together = edit([TARGET, other], **changes, edits_per_pass=2).images
    assert calls["batch 4"] == STEPS
    assert (both - together).abs().max() < 1e-4 < (both[0] - both[1]).abs().max()
    pictures = [image, image[::-1].copy()]
    short = {"inversion": None, "source_prompt": SOURCE, "num_inference_steps": 2, "guidance_scale": 3.0}
    two = edit([TARGET, other], image=pictures, **short, **changes).images
    one = edit(other, image=pictures[1], **short, object_masks={"tiger": masks[0]}, attribute_masks=None).images
    assert torch.equal(two[1:], one)


def test_the_losses_read_and_the_passes_leave_at_the_level_of_the_rule(parts, edit, pipe):
    unet = parts["unet"]
    assert {layer.size for layer in select_loss_layers(attention_layers(unet, (128, 128)))} == {(32, 32)}
    assert {layer.size for layer in select_loss_layers(attention_layers(unet, LATENTS))} == {(4, 8)}
    with count_unet_calls(unet) as calls:
        edit(attention_resolution=4)
    assert calls["batch 1"] == 2 + 1 and calls["complete"] == 2 + STEPS
    ran = []
    hook = unet.up_blocks[1].register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    edit(attention_resolution=4)
    hook.remove()
    assert True not in ran[2:]  # but for the fingerprint's


def test_a_generated_mask(pipe, inversion):
    mask = pipe.generate_mask(inversion, "hat")
    assert mask.shape == (HEIGHT, WIDTH) and 0 < mask.mean() < 1


def test_a_call_puts_everything_back(pipe, edit, inversion, monkeypatch):
    def state():
        models = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
        parameters = [p for model in models for p in model.parameters()]
        return (
            {name: id(processor) for name, processor in pipe.unet.attn_processors.items()},
            [(p.requires_grad, p.grad, p.dtype) for p in parameters],
            (id(pipe.scheduler), dict(pipe.scheduler.config)),
        )

    before = state()
    edit()
    assert state() == before

    def fail(*_):
        raise RuntimeError("in the loop")

    with pytest.raises(RuntimeError, match="in the loop"):
        edit(callback_on_step_end=fail)
    assert state() == before


# What the U-Net is told


def test_the_unet_is_told_both_readings_and_the_pictures_sizes(pipe, image):
    with seen_by(pipe.unet, "encoder_hidden_states", "added_cond_kwargs") as seen:
        inverted = pipe.invert(PIL.Image.fromarray(image), SOURCE, 2, height=32, width=50)
        count = len(seen)
        pipe(TARGET, inverted, output_type="latent")
    assert inverted.time_ids.tolist() == [[HEIGHT, WIDTH, 0, 0, 32, 48]] and inverted.image_size == (HEIGHT, WIDTH)
    source, target = read(pipe, SOURCE), read(pipe, TARGET)
    for embeds, added in seen:
        assert torch.equal(added["time_ids"], inverted.time_ids.expand(len(embeds), 6))
    for embeds, added in seen[:count]:
        assert torch.equal(embeds, source[0]) and torch.equal(added["text_embeds"], source[1])
    embeds, added = seen[-1]
    assert torch.equal(embeds, torch.cat([torch.zeros_like(target[0]), target[0]]))  # zeros for no prompt
    assert torch.equal(added["text_embeds"], torch.cat([torch.zeros_like(target[1]), target[1]]))


@pytest.mark.parametrize(
    "size,told",
    [
        ((HEIGHT, WIDTH), (HEIGHT, WIDTH)),
        ((HEIGHT // 2, WIDTH // 2), (HEIGHT, WIDTH)),
        ((2 * HEIGHT, 2 * WIDTH), (2 * HEIGHT, 2 * WIDTH)),
        ((2 * HEIGHT, WIDTH // 2), (2 * HEIGHT, WIDTH)),
    ],
)
def test_no_picture_is_told_to_be_blown_up(pipe, size, told):
    assert pipe.time_ids((HEIGHT, WIDTH), size).tolist() == [[*told, 0, 0, *size]]


def test_no_prompt_is_zeros_where_the_model_was_trained_so(parts, pipe, edit, image, inversion):
    assert not inversion.null_embeds.any() and inversion.negative_prompt is None
    other = make_xl(parts, MDEEditXLPipeline, force_zeros_for_empty_prompt=False)
    inverted = other.invert(image, SOURCE, STEPS, guidance_scale=3.0)
    assert torch.equal(inverted.null_embeds, read(pipe, "")[0]) and inverted.negative_prompt == ""
    assert torch.equal(inverted.pooled_null_embeds, read(pipe, "")[1])
    # as in diffusers, an empty text that is given is read
    assert torch.equal(edit(negative_prompt="").images, edit(pipe=other, inversion=inverted).images)
    assert not torch.equal(edit(negative_prompt="").images, edit().images)


def test_null_text_optimizes_the_embedding_and_keeps_the_rest(pipe, image):
    inverted = pipe.invert(image, SOURCE, 3, "null_text", 3.0, num_inner_steps=3, early_stop_epsilon=0.0)
    assert inverted.null_embeds.shape == (3, 77, 40) and inverted.null_embeds[-1].any()
    assert not inverted.pooled_null_embeds.any()
    with pytest.raises(ValueError, match="`negative_prompt` cannot change"):
        pipe(TARGET, inverted, negative_prompt="")


def test_embeddings_of_the_users_own(pipe, edit, image, inversion, tmp_path):
    embeds, pooled = read(pipe, TARGET)
    plain = edit().images
    assert torch.equal(edit(prompt_embeds=embeds, pooled_prompt_embeds=pooled).images, plain)
    assert not torch.equal(edit(prompt_embeds=embeds * 1.2, pooled_prompt_embeds=pooled).images, plain)
    assert not torch.equal(edit(prompt_embeds=embeds, pooled_prompt_embeds=pooled * 1.2).images, plain)
    negative = dict(zip(("negative_prompt_embeds", "negative_pooled_prompt_embeds"), read(pipe, "a tiger")))
    assert torch.equal(edit(**negative).images, edit(negative_prompt="a tiger").images)
    assert not torch.equal(edit(**negative).images, plain)
    embeds, pooled = (1.1 * part for part in read(pipe, SOURCE))
    inverted = pipe.invert(image, SOURCE, STEPS, "direct", 3.0, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    inverted.save(tmp_path / "cat.safetensors")
    loaded = pipe.load_inversion(tmp_path / "cat.safetensors")
    assert torch.equal(loaded.pooled_prompt_embeds, pooled)
    edited = edit(inversion=loaded).images
    given = {"source_prompt_embeds": embeds, "source_pooled_prompt_embeds": pooled}
    once = {
        "inversion": None,
        "image": image,
        "source_prompt": SOURCE,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
    }
    assert torch.equal(edit(**once, **given).images, edited) and not torch.equal(edited, plain)


def test_either_part_of_what_is_not_wanted_may_be_one_for_all_pictures():
    embeds, pooled = torch.randn(2, 77, 40), torch.randn(2, POOLED)
    for given in (Conditioning(embeds[:1], pooled), Conditioning(embeds, pooled[:1]), Conditioning(embeds, pooled)):
        second = item_of(given, 1)
        assert torch.equal(second.embeds, given.embeds[-1:]) and torch.equal(second.pooled, given.pooled[-1:])
        assert second.time_ids is None


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"prompt_embeds": torch.zeros(1, 77, 40)}, "`pooled_prompt_embeds` is NoneType: .*encode_prompt"),
        ({"pooled_prompt_embeds": torch.zeros(1, POOLED)}, "`pooled_prompt_embeds` goes with `prompt_embeds`"),
        ({"negative_pooled_prompt_embeds": torch.zeros(1, POOLED)}, "goes with `negative_prompt_embeds`"),
        (
            {"prompt_embeds": torch.zeros(1, 77, 40), "pooled_prompt_embeds": torch.zeros(1, POOLED + 1)},
            r"`pooled_prompt_embeds` is \(1, 17\): .*\(1, 16\)",
        ),
        ({"prompt_embeds": torch.zeros(1, 77, 16), "pooled_prompt_embeds": torch.zeros(1, POOLED)}, r"\(1, 77, 40\)"),
        ({"prompt_2": "a dog"}, "`prompt_2` has no place in MDE-Edit: both text encoders"),
        ({"negative_prompt_2": "a dog"}, "`negative_prompt_2` has no place"),
        ({"original_size": (64, 64)}, "`original_size` has no place in MDE-Edit: .*`height` and `width`"),
        ({"denoising_end": 0.8}, "`denoising_end` has no place.*refiner"),
        ({"ip_adapter_image": 1}, "`ip_adapter_image` has no place"),
        ({"clip_skip": 3}, "`clip_skip` is 3: use a whole number from 0 to 2"),
        ({"object_masks": {"dog": "lion"}}, r"object_masks\['dog'\] names no word of the source prompt: 'lion'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_before_any_pass(pipe, edit, arguments, message):
    with count_unet_calls(pipe.unet) as calls, pytest.raises(ValueError, match=message):
        edit(**arguments)
    assert not calls


def test_a_misspelt_argument_is_a_type_error(edit):
    with pytest.raises(TypeError, match=r"MDEEditXLPipeline.__call__\(\) got an unexpected keyword argument 'promt_2'"):
        edit(promt_2="a dog")


@pytest.mark.parametrize("name", ["invert", "__call__"])
def test_the_calls_are_those_of_stable_diffusion(name):
    ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (MDEEditXLPipeline, MDEEditPipeline))
    common = [parameter for parameter in ours if "pooled" not in parameter]
    assert common == list(theirs)
    changed = {parameter for parameter in common if ours[parameter].default != theirs[parameter].default}
    assert changed <= {"method", "inversion_method"} and "direct" in {ours[one].default for one in changed}


def test_clip_skip(pipe, image, edit):
    inverted = pipe.invert(image, SOURCE, STEPS, guidance_scale=3.0, clip_skip=1)
    embeds, _, pooled, _ = pipe.encode_prompt(TARGET, do_classifier_free_guidance=False, clip_skip=1)
    skipped = edit(inversion=inverted).images
    assert torch.equal(skipped, edit(inversion=inverted, prompt_embeds=embeds, pooled_prompt_embeds=pooled).images)
    assert not torch.equal(skipped, edit().images)


# The inversion


def test_an_inversion_is_saved_whole(inversion, edit, tmp_path):
    inversion.save(tmp_path / "cat.safetensors")
    loaded = Inversion.load(tmp_path / "cat.safetensors")
    for field in fields(inversion):
        value, other = (getattr(one, field.name) for one in (inversion, loaded))
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value
    assert torch.equal(edit(inversion=loaded).images, edit().images)


def test_a_file_from_before_there_were_families_is_stable_diffusions(components, image, tmp_path):
    path = tmp_path / "cat.safetensors"
    sd = make_pipe(components)
    inversion = sd.invert(image, SOURCE, 2, "direct")
    inversion.save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    older = {
        name: value for name, value in metadata.items() if name not in ("family", "time_ids") and "pooled" not in name
    }
    assert len(older) == len(metadata) - 4
    save_file(tensors, path, older)
    loaded = Inversion.load(path)
    assert loaded.family == "sd"
    assert torch.equal(
        sd(TARGET, loaded, output_type="latent").images, sd(TARGET, inversion, output_type="latent").images
    )


def test_an_inversion_of_another_family_is_refused_by_name(components, pipe, image, inversion, tmp_path):
    sd = make_pipe(components)
    other = sd.invert(image, SOURCE, 2, "direct")
    for editor, given, named in ((sd, inversion, "MDEEditXLPipeline"), (pipe, other, "MDEEditPipeline")):
        with count_unet_calls(editor.unet) as calls, pytest.raises(ValueError, match=f"edit it with {named}"):
            editor(TARGET, given)
        with pytest.raises(ValueError, match=f"edit it with {named}"):
            editor.generate_mask(given, "cat")
        assert not calls


@pytest.mark.parametrize(
    "damage,message",
    [
        ({"time_ids": None}, "its time_ids are no tensor"),
        ({"time_ids": torch.zeros(1, 5)}, "its time_ids are"),
        ({"pooled_null_embeds": None}, "its pooled_null_embeds are no tensor"),
        ({"prompt_embeds": torch.zeros(1, 77, 40)}, "its pooled_prompt_embeds are no tensor"),
        ({"family": "flux"}, "`family` is 'flux'"),
        ({"family": "sd"}, "another family's"),
    ],
    ids=str,
)
def test_a_damaged_inversion_is_refused(pipe, inversion, damage, message):
    with count_unet_calls(pipe.unet) as calls, pytest.raises(ValueError, match=message):
        pipe(TARGET, replace(inversion, **damage))
    assert not calls


def test_an_inversion_of_an_older_copy_of_the_code_is_stable_diffusions(components, image):
    """Two doors in one process can lead to two versions, each with its own class."""
    sd = make_pipe(components)
    inversion = sd.invert(image, SOURCE, 1, "direct", height=32, width=32)
    of_sdxl = ("family", "pooled_null_embeds", "pooled_prompt_embeds", "time_ids")
    values = {f.name: getattr(inversion, f.name) for f in fields(inversion) if f.name not in of_sdxl}
    older = make_dataclass("Inversion", [(name, object) for name in values])(**values)
    ours, expected = (sd(TARGET, one, output_type="latent") for one in (older, inversion))
    assert torch.equal(ours.images, expected.images)
    del older.fingerprint
    with pytest.raises(ValueError, match="`inversion` is damaged .*fingerprint.*: call `pipe.invert` again"):
        sd(TARGET, older)


# Other classes and other models


def test_each_class_names_the_one_to_use(parts, components, pipe):
    sd = make_pipe(components)
    with pytest.raises(ValueError, match="MDEEditPipeline is not: use MDEEditXLPipeline"):
        make_pipe({**components, "unet": parts["unet"]})
    with pytest.raises(ValueError, match="MDEEditXLPipeline is not: use MDEEditPipeline"):
        make_xl({**parts, "unet": components["unet"]}, MDEEditXLPipeline)
    with pytest.raises(ValueError, match="use MDEEditXLPipeline"):
        MDEEditPipeline.from_pipe(StableDiffusionXLPipeline(**pipe.components))
    with pytest.raises(ValueError, match="use MDEEditPipeline"):
        MDEEditXLPipeline.from_pipe(sd)
    sd.unet = parts["unet"]  # later on
    with pytest.raises(ValueError, match="use MDEEditXLPipeline"):
        sd.invert(np.zeros((32, 32, 3), np.uint8), SOURCE)


def test_from_pretrained_of_the_other_family_names_the_class(pipe, components, tmp_path):
    StableDiffusionXLPipeline(**pipe.components).save_pretrained(tmp_path / "xl")
    base = StableDiffusionPipeline(**make_pipe(components).components, requires_safety_checker=False)
    base.save_pretrained(tmp_path / "sd")
    with pytest.raises(ValueError, match="use MDEEditXLPipeline"):
        MDEEditPipeline.from_pretrained(tmp_path / "xl")
    with pytest.raises(ValueError, match="use MDEEditPipeline"):
        MDEEditXLPipeline.from_pretrained(tmp_path / "sd")


def test_the_refiner_and_other_models_are_refused_by_name(parts, own, image, inversion):
    refiner = make_xl({**parts, "text_encoder": None, "tokenizer": None}, MDEEditXLPipeline)
    whole = make_xl({**parts, "text_encoder_2": None}, MDEEditXLPipeline)
    for one, message in ((refiner, "SDXL's refiner"), (whole, "has no text_encoder_2")):
        with pytest.raises(ValueError, match=message):
            one.invert(image, SOURCE)
        with pytest.raises(ValueError, match=message):
            one(TARGET, inversion)
    inpainting = copy.deepcopy(own)
    inpainting.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="reads 9 channels.*text-to-image model of SDXL"):
        inpainting.invert(image, SOURCE)
    own.unet.encoder_hid_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="unload_ip_adapter"):
        own.invert(image, SOURCE)


# What users have on their pipeline


def test_from_pipe_shares_the_weights(parts, edit, pipe):
    base = StableDiffusionXLImg2ImgPipeline(**pipe.components)
    mine = MDEEditXLPipeline.from_pipe(base)
    mine.set_progress_bar_config(disable=True)
    assert mine.unet is base.unet and mine.text_encoder_2 is base.text_encoder_2
    assert torch.equal(edit(pipe=mine).images, edit().images)


@pytest.mark.parametrize("force_upcast,dtype", [(True, torch.float32), (False, torch.float16)])
def test_a_vae_that_leaves_half_precision(own, image, force_upcast, dtype):
    """In float32 for as long as it works, where its config asks for that, and afterwards as it was."""
    own.vae.half().register_to_config(force_upcast=force_upcast)  # sdxl-vae-fp16-fix says it needs none
    seen = []
    for module in (own.vae.encoder, own.vae.decoder):
        module.register_forward_pre_hook(lambda module, args: seen.append((args[0].dtype, module.conv_in.weight.dtype)))
    own(TARGET, own.invert(image, SOURCE, 2), output_type="np")
    assert len(seen) == 4 and set(seen) == {(dtype, dtype)}  # a picture, an edit, the reconstruction and its probe
    assert {p.dtype for p in own.vae.parameters()} == {torch.float16}


def test_what_the_vae_states_of_its_latents_is_taken_out_and_put_back(own, image):
    """As diffusers' SDXL pipelines do: image-to-image encodes, and all decode."""
    mean, deviation = [0.3, -0.2, 0.1, 0.0], [0.5, 1.5, 2.0, 1.0]
    plain = own.encode(own.prepare_image(image))
    own.vae.register_to_config(latents_mean=mean)  # one without the other says nothing
    assert torch.equal(own.encode(own.prepare_image(image)), plain)
    own.vae.register_to_config(latents_std=deviation)
    pixels = own.prepare_image(image)
    latents = own.encode(pixels)
    base = StableDiffusionXLImg2ImgPipeline(**own.components)
    theirs = base.prepare_latents(pixels, None, 1, 1, torch.float32, "cpu", torch.Generator().manual_seed(0), False)
    spread = own.vae.encode(pixels).latent_dist.std * own.vae.config.scaling_factor
    spread = spread / torch.tensor(deviation).view(1, 4, 1, 1)
    assert ((latents - theirs).abs() < 6 * spread).all() and not torch.allclose(latents, plain, atol=1e-2)
    own.vae.register_to_config(latents_mean=None, latents_std=None)
    decoded = own.decode_pixels(plain)
    own.vae.register_to_config(latents_mean=mean, latents_std=deviation)
    assert torch.allclose(own.decode_pixels(latents), decoded, atol=1e-4)


def test_a_watermark_is_diffusers_own(own, edit):
    plain = edit(pipe=own, output_type="np").images
    own.watermark = SimpleNamespace(apply_watermark=lambda pixels: -pixels)
    assert np.allclose(edit(pipe=own, output_type="np").images, 1 - plain, atol=1e-5)


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=slow), torch.float16])
def test_half_precision(own, image, masks, edit, dtype):
    own.to(dtype)
    inverted = own.invert(image, SOURCE, 3, guidance_scale=3.0)
    assert inverted.latents.dtype == inverted.time_ids.dtype == torch.float32
    out = edit(pipe=own, inversion=inverted)
    assert torch.isfinite(out.images).all() and out.losses[0][0]["oal"] > 0
    assert {p.dtype for p in (*own.unet.parameters(), *own.vae.parameters())} == {dtype}


def test_lora_on_the_unet_and_both_text_encoders(own, image, edit, inversion):
    plain = edit(pipe=own).images
    layers = {"unet": ["to_q", "to_v"], "text_encoder": ["q_proj"], "text_encoder_2": ["q_proj"]}
    for name, targets in layers.items():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=targets)
        getattr(own, name).add_adapter(config, "one")
    with pytest.raises(ValueError, match="another model, or another LoRA"):
        edit(pipe=own)
    short = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    images = [
        edit(pipe=own, inversion=own.invert(image, SOURCE, **short, cross_attention_kwargs={"scale": scale})).images
        for scale in (1.0, 0.0)
    ]
    assert torch.allclose(images[1], plain, atol=1e-4) and (images[0] - plain).abs().max() > 1e-3


@pytest.mark.parametrize("vectors", [pytest.param(1, marks=slow), 2])
def test_textual_inversion_tokens_are_words(own, image, masks, vectors):
    def load(width, **where):
        own.load_textual_inversion({"<toy>": torch.ones(vectors, width)}, **where)

    prompt, inverted = "a <toy> wearing a red hat", own.invert(image, SOURCE, 2)
    load(16)  # into the first tokenizer and encoder alone
    with pytest.raises(ValueError, match="two tokenizers read `prompt`.*differently"):
        own(prompt, inverted, object_masks={"<toy>": masks[0]})
    load(24, tokenizer=own.tokenizer_2, text_encoder=own.text_encoder_2)
    assert own.tokens(prompt)[1 + vectors] == ("wearing", (2 + vectors,))
    out = own(prompt, inverted, object_masks={"<toy>": masks[0]}, output_type="latent", optimization_iterations=1)
    assert torch.isfinite(out.images).all()


@slow
def test_model_offload(own, edit):
    plain = edit(pipe=own, output_type="np").images
    own.enable_model_cpu_offload(device="cpu")
    assert np.abs(edit(pipe=own, output_type="np").images - plain).max() < 2e-3


def test_sequential_offload(own, image, edit):
    """Every weight is an empty tensor outside its layer's own forward; the VAE is stored in half precision."""
    own.vae.half()
    plain = edit(pipe=own, output_type="np").images
    for model in (own.unet, own.text_encoder, own.text_encoder_2, own.vae):
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        accelerate.cpu_offload(model, torch.device("cpu"), state_dict=weights)
    assert np.abs(edit(pipe=own, output_type="np").images - plain).max() < 2e-3
    assert own.vae.dtype == torch.float16


def test_callbacks_have_what_sdxl_gives_them(pipe, edit):
    names, shapes = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"], []

    def watch(pipe, i, t, tensors):
        assert list(tensors) == names and pipe.num_timesteps == STEPS and pipe.denoising_end is None
        shapes.append([tuple(tensor.shape) for tensor in tensors.values()])
        return {"add_text_embeds": tensors["add_text_embeds"] * 1.5} if i == 1 else None

    changed = edit([TARGET] * 2, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names).images
    assert shapes == [[(2, 4, *LATENTS), (4, 77, 40), (4, POOLED), (4, 6)]] * STEPS
    plain = edit().images
    assert not torch.allclose(changed[:1], plain, atol=1e-4)
    with count_unet_calls(pipe.unet) as calls:
        cut = edit(callback_on_step_end=SDXLCFGCutoffCallback(cutoff_step_ratio=0.5)).images
    assert calls["batch 2"] == 2 and not torch.equal(cut, plain)
    with pytest.raises(
        ValueError, match="returned prompt_embeds, add_text_embeds, add_time_ids with fewer rows than the 2"
    ):
        edit([TARGET] * 2, callback_on_step_end=SDXLCFGCutoffCallback(cutoff_step_ratio=0.5))
