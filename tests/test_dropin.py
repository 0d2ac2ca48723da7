"""What users already have on their pipeline: each works with an edit, seen in the result, or is refused by name."""

import copy

import accelerate
import numpy as np
import peft
import PIL.Image
import pytest
import tomesd
import torch
import transformers
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from mde_edit import MDEEditPipeline
from transformers import CLIPConfig, CLIPImageProcessor

from .conftest import SOURCE, TARGET, count_unet_calls, make_pipe, state_of


@pytest.fixture
def own(components):
    """A pipeline whose models a test may change."""
    return make_pipe({**{k: copy.deepcopy(v) for k, v in components.items()}})


@pytest.fixture
def run(image, masks):
    """Invert and edit in two steps with both losses; gives the edited picture and the reconstruction, (H, W, 3)."""

    def run(pipe, prompt=TARGET, source=SOURCE, method="direct", **changes):
        inversion = pipe.invert(
            image, source, num_inference_steps=2, method=method, guidance_scale=3.0, num_inner_steps=2
        )
        settings = {
            "object_masks": {"dog": masks[0]},
            "attribute_masks": {"red": masks[1]},
            "optimization_iterations": 2,
            "optimization_steps": 0.5,
            "output_type": "np",
        }
        out = pipe(prompt, inversion, **{**settings, **changes})
        return out.images[0], out.source_images[0]

    return run


def close(a, b, tolerance=2e-3):
    return np.abs(a - b).max() < tolerance


# Adapters


def test_lora_on_the_unet_and_the_text_encoder(own, run, image):
    plain = run(own)[0]
    inversion = own.invert(image, SOURCE, 2, method="direct")
    torch.manual_seed(0)
    lora = {"r": 2, "init_lora_weights": False}
    own.unet.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], **lora))
    with_unet = run(own)[0]
    assert not close(plain, with_unet)
    with pytest.raises(ValueError, match="another model, or another LoRA"):
        own(TARGET, inversion)
    own.text_encoder.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"], **lora))
    before = state_of(own)
    assert not close(run(own)[0], with_unet) and state_of(own) == before
    same, reconstruction = run(own, SOURCE, object_masks=None, attribute_masks=None, method="null_text")
    # with transformers 4 the optimized embeddings enlarge what is rounded
    assert close(same, reconstruction, 2e-3 if int(transformers.__version__.split(".")[0]) > 4 else 1e-2)
    own.unet.disable_adapters()
    own.text_encoder.disable_adapters()
    assert close(run(own)[0], plain)


@pytest.mark.parametrize("vectors", [1, 3])
def test_textual_inversion_tokens_are_words(own, run, image, masks, vectors):
    torch.manual_seed(0)
    own.load_textual_inversion({"<toy>": torch.randn(vectors, 16)})
    prompt = "a <toy> wearing a red hat"
    assert own.tokens(prompt)[1 + vectors] == ("wearing", (2 + vectors,))
    objects = {"object_masks": {"<toy>": masks[0]}}
    every = {"object_masks": {tuple(range(2, 2 + vectors)): masks[0]}}  # all the vectors of the word
    edited = run(own, prompt, **objects)[0]
    assert np.array_equal(edited, run(own, prompt, **every)[0])
    assert not close(edited, run(own, "a dog wearing a red hat", object_masks={"dog": masks[0]})[0], 1e-4)
    # as a word of the source too: what follows it keeps its place, so that the same prompt is the same picture
    same, reconstruction = run(own, prompt, prompt, object_masks=None, attribute_masks=None, method="null_text")
    assert close(same, reconstruction)


def test_a_loaded_ip_adapter_is_refused_until_it_is_unloaded(own, image, inversion):
    """A real one, of the original "ip-adapter_sd15" layout, with weights of zero."""
    width, layers = own.unet.config.cross_attention_dim, {}
    for k, name in enumerate(name for name in own.unet.attn_processors if ".attn2." in name):
        channels = own.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        layers |= {f"{2 * k + 1}.to_{part}_ip.weight": torch.zeros(channels, width) for part in ("k", "v")}
    projection = {"proj.weight": torch.zeros(4 * width, 8), "proj.bias": torch.zeros(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    weights = {"image_proj": projection, "ip_adapter": layers}
    own.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    with pytest.raises(ValueError, match="unload_ip_adapter"):
        own.invert(image, SOURCE, num_inference_steps=2)
    with pytest.raises(ValueError, match="unload_ip_adapter"):
        own(TARGET, inversion)
    own.unload_ip_adapter()
    assert torch.isfinite(own(TARGET, inversion, output_type="latent").images).all()


# Which model an inversion was made with: what it does, not how it is stored


def fuse_and_unfuse(pipe):
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()


def group_offload(pipe, folder=None):
    if not hasattr(pipe.unet, "enable_group_offload"):
        pytest.skip("a release before group offload")
    devices = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    try:
        pipe.unet.enable_group_offload(**devices, offload_type="leaf_level", offload_to_disk_path=folder)
    except AttributeError:
        pytest.skip("releases around 0.35 want an accelerator for it")


SAME = {
    "fused": lambda pipe, folder: pipe.fuse_qkv_projections(),
    "unfused": lambda pipe, folder: fuse_and_unfuse(pipe),
    "a new word": lambda pipe, folder: pipe.load_textual_inversion({"<toy>": torch.ones(16)}),
    "group offload": lambda pipe, folder: group_offload(pipe),
    "group offload to disk": lambda pipe, folder: group_offload(pipe, str(folder)),
    "model offload": lambda pipe, folder: pipe.enable_model_cpu_offload(device="cpu"),
    "sliced attention": lambda pipe, folder: pipe.enable_attention_slicing(1),
    "channels last": lambda pipe, folder: pipe.unet.to(memory_format=torch.channels_last),
    "adapters that add nothing": lambda pipe, folder: add_adapters(pipe, one=0.0),
    "gradient checkpointing": lambda pipe, folder: pipe.unet.enable_gradient_checkpointing(),
}


@pytest.mark.parametrize("change", SAME)
def test_an_inversion_serves_the_same_model_stored_otherwise(own, image, tmp_path, change):
    inversion = own.invert(image, SOURCE, 2, method="direct")
    SAME[change](own, tmp_path)
    own(TARGET, inversion, output_type="latent")
    own.invert(image, SOURCE, 2, method="direct")


def add_adapters(pipe, **strengths):
    """Two LoRAs, one and two, at these strengths."""
    for k, name in enumerate(("one", "two")):
        torch.manual_seed(k)
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        pipe.unet.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=layers), name)
    pipe.set_adapters(list(strengths), list(strengths.values()))


def fine_tune(module, share):
    """Every weight moved by a share of its tensor's spread."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += (
            share * parameter.data.norm() / parameter.numel() ** 0.5 * torch.randn(parameter.shape, generator=generator)
        )


FREEU = {"s1": 0.9, "s2": 0.2, "b1": 1.5, "b2": 1.6}
OTHER = {
    "another adapter": lambda pipe: pipe.set_adapters("two"),
    "another strength": lambda pipe: pipe.set_adapters("one", 0.8),
    "both adapters": lambda pipe: pipe.set_adapters(["one", "two"]),
    "no adapter": lambda pipe: pipe.unet.disable_adapters(),
    "a fine-tuned U-Net": lambda pipe: fine_tune(pipe.unet, 0.003),
    "fine-tuned attention": lambda pipe: fine_tune(pipe.unet.mid_block, 0.02),
    "another text encoder": lambda pipe: fine_tune(pipe.text_encoder, 0.02),
    "FreeU": lambda pipe: pipe.enable_freeu(**FREEU),
}


@pytest.mark.parametrize("change", OTHER)
def test_an_inversion_of_a_model_that_does_something_else_is_refused(own, image, change):
    add_adapters(own, one=1.0)
    inversion = own.invert(image, SOURCE, 2, method="direct")
    own(TARGET, inversion, output_type="latent")
    OTHER[change](own)
    before = state_of(own)
    with count_unet_calls(own.unet) as calls, pytest.raises(ValueError, match="made with another model.*invert"):
        own(TARGET, inversion)
    assert not calls["forward"] and state_of(own) == before


# What changes what attention means


def test_processors_that_do_more_than_attend_are_refused(own, image, inversion):
    class Louder(AttnProcessor):
        def __call__(self, *arguments, **named):
            return 1.2 * super().__call__(*arguments, **named)

    own.unet.set_attn_processor(Louder())
    message = "processors .Louder. do more than attend.*set_attn_processor"
    for call in (lambda: own.invert(image, SOURCE, 2), lambda: own(TARGET, inversion)):
        before = state_of(own)
        with count_unet_calls(own.unet) as calls, pytest.raises(ValueError, match=message):
            call()
        assert not calls["forward"] and state_of(own) == before
    own.unet.set_attn_processor(AttnProcessor2_0())
    own(TARGET, inversion, output_type="latent")


def test_tomesd_is_refused_until_it_is_taken_off(own, image, inversion):
    tomesd.apply_patch(own, ratio=0.5)
    for call in (lambda: own.invert(image, SOURCE, 2), lambda: own(TARGET, inversion)):
        with count_unet_calls(own.unet) as calls, pytest.raises(ValueError, match="tomesd.remove_patch"):
            call()
        assert not calls
    tomesd.remove_patch(own)
    own(TARGET, inversion, output_type="latent")


def test_quantized_activations_have_no_gradient_and_are_refused(own, image):
    own.unet = torch.ao.quantization.quantize_dynamic(own.unet, {torch.nn.Linear})
    with (
        count_unet_calls(own.unet) as calls,
        pytest.raises(ValueError, match="No gradient runs.*quantize the weights alone"),
    ):
        own.invert(image, SOURCE, 2)
    assert not calls["forward"]


@pytest.mark.parametrize("method", ["direct", "null_text"])
def test_weights_stored_in_eight_bits(own, run, method):
    """diffusers' layerwise casting; the same as the rounded weights held in full."""
    if not hasattr(own.unet, "enable_layerwise_casting"):
        pytest.skip("a release before layerwise casting")
    own.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = own.unet.state_dict()
    assert torch.float8_e4m3fn in {weight.dtype for weight in stored.values()}
    small = run(own, method=method)[0]
    assert {name: weight.dtype for name, weight in own.unet.state_dict().items()} == {
        k: v.dtype for k, v in stored.items()
    }
    own.unet = UNet2DConditionModel.from_config(own.unet.config).eval()
    own.unet.load_state_dict({name: weight.float() for name, weight in stored.items()})
    assert close(run(own, method=method)[0], small)


def test_caches_of_layers_are_refused(own, inversion):
    hooks = pytest.importorskip("diffusers.hooks", reason="a release before caches")
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("attn1",),
        cross_attention_block_identifiers=("attn2",),
        current_timestep_callback=lambda: 500,
    )
    hooks.apply_pyramid_attention_broadcast(own.unet, config)
    with count_unet_calls(own.unet) as calls, pytest.raises(ValueError, match="has the hook 'pyramid_attention_broad"):
        own(TARGET, inversion)
    assert not calls


# Memory and speed


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(2)], ids=["plain", "sliced"])
def test_attention_processors_set_before_are_used_and_stay(own, run, processor):
    plain = run(own)[0]
    own.unet.set_attn_processor(processor)
    assert close(run(own)[0], plain)
    assert all(p is processor for p in own.unet.attn_processors.values())


def test_vae_slicing_and_tiling(own, run):
    plain = run(own)[0]
    own.vae.enable_slicing()
    assert close(run(own)[0], plain)
    own.vae.enable_tiling()
    own.vae.tile_sample_min_size, own.vae.tile_latent_min_size = 32, 4
    tiled = run(own)[0]
    assert tiled.shape == plain.shape and np.isfinite(tiled).all()


def test_model_offload(own, run, monkeypatch):
    """accelerate's hooks as `enable_model_cpu_offload` installs them; the CPU stands in for the device."""
    plain = run(own, method="null_text")[0]
    own.enable_model_cpu_offload(device="cpu")
    before, freed = state_of(own), []
    free = own.maybe_free_model_hooks
    monkeypatch.setattr(own, "maybe_free_model_hooks", lambda: (freed.append(1), free())[1])
    assert close(run(own, method="null_text")[0], plain)
    assert len(freed) == 2  # after the inversion and after the edit
    assert state_of(own)[1:] == before[1:]


def test_sequential_offload(own, run):
    """Every weight is an empty tensor outside its layer's own forward."""
    plain = run(own, method="null_text")[0]
    list(own.unet.parameters())[0].requires_grad_(False)
    for model in (own.unet, own.text_encoder, own.vae):  # as `enable_sequential_cpu_offload` does with a device
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        accelerate.cpu_offload(model, torch.device("cpu"), state_dict=weights)
    grads = {name: p.requires_grad for name, p in own.unet.named_parameters()}
    assert all(p.is_meta for p in own.unet.parameters())
    assert close(run(own, method="null_text")[0], plain)
    assert {name: p.requires_grad for name, p in own.unet.named_parameters()} == grads
    assert not all(grads.values())


def test_fused_projections(own, run):
    plain = run(own)[0]
    own.fuse_qkv_projections()
    names = {type(p).__name__ for p in own.unet.attn_processors.values()}
    assert close(run(own)[0], plain)
    assert {type(p).__name__ for p in own.unet.attn_processors.values()} == names
    own.unfuse_qkv_projections()
    assert close(run(own)[0], plain)


@pytest.mark.parametrize("form", ["wrapped", "in place"])
def test_a_compiled_unet(own, run, form):
    plain = run(own)[0]
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    if form == "wrapped":
        own.unet = torch.compile(own.unet, backend=backend)
    else:
        own.unet.compile(backend=backend)
    assert close(run(own)[0], plain) and close(run(own, method="null_text")[0], run(own, method="null_text")[0])
    assert not compiled  # an edit runs the U-Net as written: its controls differ from call to call


def test_compiled_blocks_without_attention(own, run):
    """They run compiled, also with gradients, and a pass that leaves the U-Net early leaves none of them."""
    plain, compiled = [run(own, method=method)[0] for method in ("direct", "null_text")], []

    def backend(graph, inputs):
        compiled.append(torch.is_grad_enabled())
        return graph

    for block in own.unet.modules():
        if isinstance(block, (ResnetBlock2D, FeedForward)):
            block.compile(backend=backend, dynamic=True)
    again = [run(own, method=method)[0] for method in ("direct", "null_text")]
    torch.compiler.reset()
    assert all(close(one, other) for one, other in zip(again, plain))
    assert {True, False} <= set(compiled)


def test_freeu(own, run):
    plain = run(own)[0]
    own.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    same, reconstruction = run(own, SOURCE, object_masks=None, attribute_masks=None, method="null_text")
    assert close(same, reconstruction) and not close(run(own)[0], plain, 1e-4)
    own.disable_freeu()
    assert close(run(own)[0], plain)


# Arguments and parts


@pytest.mark.parametrize(
    "argument,message",
    [
        ({"ip_adapter_image": PIL.Image.new("RGB", (8, 8))}, "no words"),
        ({"latents": torch.zeros(1, 4, 16, 24)}, "where the inversion ended"),
        ({"timesteps": [1]}, "num_inference_steps"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_without_a_meaning_here_are_refused_by_name(pipe, inversion, argument, message):
    with pytest.raises(ValueError, match=f"`{next(iter(argument))}` has no place.*{message}"):
        pipe(TARGET, inversion, **argument)


def test_a_misspelt_argument_is_still_a_type_error(pipe, inversion):
    with pytest.raises(TypeError, match="unexpected keyword argument 'object_mask'"):
        pipe(TARGET, inversion, object_mask={})


def test_safety_checker(own, run):
    """A flagged edit comes back black, and says so; without one nothing is checked (the other tests)."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 16, "projection_dim": 8}
    config = CLIPConfig(text_config={**small, "projection_dim": 8}, vision_config=vision, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    own.register_modules(
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(1.0)
        checker.concept_embeds.copy_(torch.randn_like(checker.concept_embeds))
    assert run(own)[0].max() > 0  # similarity is below 1: nothing is flagged
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2.0)
    assert run(own)[0].max() == 0


def test_stable_diffusion_2(components, run):
    """v-prediction, linear projections, a head count per level, upcast attention."""
    torch.manual_seed(0)
    config = {**components["unet"].config, "use_linear_projection": True, "attention_head_dim": (2, 4, 4, 4)}
    unet = UNet2DConditionModel.from_config({**config, "upcast_attention": True}).eval()
    pipe = make_pipe({**components, "unet": unet}, prediction_type="v_prediction")
    same, reconstruction = run(pipe, SOURCE, object_masks=None, attribute_masks=None, method="null_text")
    assert close(same, reconstruction)
    assert not close(run(pipe)[0], reconstruction)


def test_from_other_stable_diffusion_pipelines(components, run, tmp_path):
    """`from_single_file` gives these too: whatever class holds the components, `from_pipe` takes them over."""
    parts = make_pipe(components).components
    plain = run(make_pipe(components))[0]
    for kind in (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline):
        source = kind(**parts, requires_safety_checker=False)
        pipe = MDEEditPipeline.from_pipe(source)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.unet is source.unet and close(run(pipe)[0], plain)
    back = StableDiffusionPipeline.from_pipe(pipe)
    assert back("a cat", num_inference_steps=1, output_type="np").images.shape[0] == 1
    back.save_pretrained(tmp_path)  # a folder that every class reads, without our code
    assert type(StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path)) is StableDiffusionImg2ImgPipeline


def test_models_of_another_kind_are_refused(own, image):
    own.unet = UNet2DConditionModel.from_config({**own.unet.config, "in_channels": 9})
    with pytest.raises(ValueError, match="reads 9 channels.*Use a text-to-image model of Stable Diffusion 1.x/2.x"):
        own.invert(image, SOURCE, 2)
