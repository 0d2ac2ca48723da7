"""The benchmark's peers from diffusers, on real but tiny parts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from benchmarks.cases import Case, Region
from benchmarks.methods import peers
from benchmarks.methods.ours import roundtrip
from benchmarks.methods.peers import METHODS
from tests.conftest import SOURCE, TARGET, count_unet_calls


STEPS = 4


@pytest.fixture
def case(image, masks):
    """The non-square picture of the pipeline's tests, its two regions overlapping."""
    animal, hat = (mask > 0 for mask in masks)
    regions = (
        Region("object0", animal, "cat", "dog", ("dog", 0)),
        Region("object1", hat, "straw hat", "red hat", None, (("red", 0),)),
    )
    return Case("case", "overlap", "object", Image.fromarray(image), SOURCE, TARGET, regions)


def difference(one, other):
    """Per pixel, of two pictures, in [0, 1]."""
    return np.abs(np.asarray(one, float) - np.asarray(other, float)).max(-1) / 255


@pytest.fixture
def sure_encoder(monkeypatch):
    """An encoder that draws the mean of its posterior, wide as a random model's is."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda posterior, generator=None: posterior.mode())


@torch.no_grad()
def source_latents(pipe, case):
    posterior = pipe.vae.encode(pipe.image_processor.preprocess(case.image)).latent_dist
    return pipe.vae.config.scaling_factor * posterior.mode()[0]


@pytest.fixture
def call_with(monkeypatch):
    """Add arguments to the calls of a diffusers pipeline; `output_type="latent"` makes a method return latents."""

    def patch(kind, **more):
        call = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda *args, **kwargs: call(*args, **kwargs, **more))

    return patch


@pytest.mark.parametrize("name", METHODS)
def test_a_peer_edits_repeatably_and_leaves_the_pipeline_as_it_was(name, pipe, case):
    unet, scheduler = pipe.unet, pipe.scheduler
    processors, config, length = unet.attn_processors, dict(scheduler.config), scheduler.num_inference_steps
    trained = unet.get_parameter("conv_in.bias"), unet.get_parameter("conv_out.bias")
    trained[0].requires_grad_(False)
    trained[1].grad = torch.ones_like(trained[1])
    try:
        needs = [parameter.requires_grad for parameter in unet.parameters()]
        image = METHODS[name](pipe, case, STEPS, 0)
        assert unet.attn_processors == processors
        assert [parameter.requires_grad for parameter in unet.parameters()] == needs
        assert (trained[1].grad == 1).all()
        assert [parameter is trained[1] for parameter in unet.parameters() if parameter.grad is not None] == [True]
    finally:
        trained[0].requires_grad_(True)
        trained[1].grad = None
    assert pipe.scheduler is scheduler and dict(scheduler.config) == config
    assert scheduler.num_inference_steps == length
    assert not unet._forward_hooks

    assert image.size == case.image.size
    assert difference(image, case.image).max() > 0.02
    assert difference(image, METHODS[name](pipe, case, STEPS, 0)).max() == 0
    assert difference(image, METHODS[name](pipe, case, STEPS, 1)).max() > 0


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_changes_the_picture(name, pipe, case):
    method = METHODS[name]
    assert method.grid.keys() == method.settings.keys()
    image = method(pipe, case, STEPS, 0)
    for setting, used in method.settings.items():
        other = max(method.grid[setting], key=lambda value: abs(value - used))
        assert difference(image, method(pipe, case, STEPS, 0, **{setting: other})).max() > 0, setting


def test_a_failing_peer_leaves_the_pipeline_as_it_was(pipe, case):
    processors = pipe.unet.attn_processors
    needs = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) == 2 * STEPS + 1:  # the inversion and the recording are over
            raise RuntimeError("out of memory")

    with pipe.unet.register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="out of memory"):
        METHODS["pix2pix_zero"](pipe, case, STEPS, 0)
    assert pipe.unet.attn_processors == processors
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == needs


@pytest.mark.parametrize(
    "name,setting,calls",
    [("sdedit", "strength", 1), ("inpaint", "strength", 1), ("cycle_diffusion", "strength", 1)]
    + [("diffedit", "inpaint_strength", 2)],
)
def test_strength_is_the_share_of_the_steps_that_run(name, setting, calls, pipe, case):
    for strength, share in ((0.5, 2), (1.0, 4)):
        with count_unet_calls(pipe.unet) as counts:
            METHODS[name](pipe, case, STEPS, 0, **{setting: strength})
        assert counts["forward"] == share * calls


def test_sdedit_with_little_noise_is_the_round_trip(pipe, case, sure_encoder):
    images = [METHODS["sdedit"](pipe, case, 50, 0, strength=strength) for strength in (0.02, 0.5)]
    near, far = (difference(image, roundtrip(pipe, case, 50, 0)).mean() for image in images)
    assert near < 0.1 and 2 * near < far, (near, far)


@pytest.mark.parametrize(
    "name,kind,tolerance",
    [
        ("inpaint", peers.StableDiffusionInpaintPipeline, 1e-6),
        ("diffedit", peers.StableDiffusionDiffEditPipeline, 0.1),  # its last blend is with the latents of timestep 1
    ],
)
def test_latents_outside_the_masks_are_the_source_s(name, kind, tolerance, pipe, case, call_with, sure_encoder):
    call_with(kind, output_type="latent")
    edited = METHODS[name](pipe, case, STEPS, 0)
    changed = (edited - source_latents(pipe, case)).abs().amax(0)
    inside = peers.latent_mask(pipe, case.union)[0, 0] > 0
    assert 0 < inside.float().mean() < 0.5
    assert changed[~inside].max() < tolerance < changed[inside].mean()


def test_ledits_pp_confines_a_concept_as_its_own_user_mask_does(pipe, case, call_with, monkeypatch):
    case = replace(case, regions=case.regions[:1])
    ours = METHODS["ledits_pp"](pipe, case, STEPS, 0)
    mask = peers.latent_mask(pipe, case.union)
    monkeypatch.setattr(peers, "latent_mask", lambda *_: torch.ones_like(mask))
    free = METHODS["ledits_pp"](pipe, case, STEPS, 0)
    call_with(peers.LEditsPPPipelineStableDiffusion, user_mask=mask)
    theirs = METHODS["ledits_pp"](pipe, case, STEPS, 0)
    assert difference(ours, theirs).max() <= 1 / 255 < difference(ours, free).max()


def test_ledits_pp_edits_every_region_in_its_own_mask(pipe, case, call_with):
    """One region's words change nothing where another region's mask, first to differ, is alone."""
    call_with(peers.LEditsPPPipelineStableDiffusion, output_type="latent")
    one_step = {"skip": 0.0, "source_guidance_scale": 0.0, "use_intersect_mask": False, "edit_threshold": 0.5}
    hat = replace(case.regions[1], target="blue cap")
    first, second = (
        METHODS["ledits_pp"](pipe, replace(case, regions=(case.regions[0], region)), 1, 0, **one_step)
        for region in (case.regions[1], hat)
    )
    changed = (first - second).abs().amax(0) > 1e-6
    assert changed.any() and not changed[peers.latent_mask(pipe, hat.mask)[0, 0] == 0].any()


def test_ledits_pp_without_guidance_stays_nearer_to_the_source(pipe, case, call_with):
    call_with(peers.LEditsPPPipelineStableDiffusion, output_type="latent")
    still = {"edit_guidance_scale": 0.0, "source_guidance_scale": 0.0}
    source = source_latents(pipe, case)
    kept, edited = (METHODS["ledits_pp"](pipe, case, STEPS, 0, **settings) for settings in (still, {}))
    # Not the same: the schedule's last step is long and without noise, which leaves it to the U-Net.
    assert (kept - source).abs().mean() < (edited - source).abs().mean()
