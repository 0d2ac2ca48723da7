"""The engine gives the naive algorithm's result with a stated number of U-Net passes."""

import numpy as np
import pytest
import torch
from mde_edit.attention_processors import attention_layers
from mde_edit.masks import binarize_mask, dilate_mask, resize_mask
from mde_edit.prompts import align_tokens
from torch.utils._python_dispatch import TorchDispatchMode

from .conftest import SOURCE, TARGET, count_unet_calls, make_pipe
from .oracle import naive_edit


SETTINGS = {
    "guidance_scale": 3.0,
    "cross_replace_steps": 0.8,
    "self_replace_steps": 0.5,
    "oal_weight": 1.0,
    "ccl_weight": 1.25,
    "optimization_steps": 0.6,
    "optimization_iterations": 2,
    "optimization_threshold": 1.0,
    "step_size": 1.0,
    "max_update": 0.05,
    "background_blend": 0.4,
    "mask_dilation": 1,
}
DOG, RED = 2, 5


@pytest.mark.parametrize("ccl_form,outside,threshold", [("token_ratio", 1.0, 1.0), ("both", 0.25, 0.11)])
def test_engine_equals_the_naive_algorithm(pipe, inversion, masks, ccl_form, outside, threshold):
    h, w = inversion.latents.shape[-2:]
    layers = attention_layers(pipe.unet, (h, w))
    loss_layers = [layer for layer in layers if layer.is_cross and layer.size == (h, w)]
    soft = [resize_mask(torch.from_numpy(m) > 0, (h, w)) for m in masks]
    regions = [
        ("object", (DOG,), soft[0].flatten(), binarize_mask(soft[0]).flatten()),
        ("attribute", (RED,), soft[1].flatten(), binarize_mask(soft[1]).flatten()),
    ]
    kept = {}
    for size in {layer.size for layer in layers if layer.is_cross}:
        dog, red = (resize_mask(torch.from_numpy(m) > 0, size).flatten() for m in masks)
        kept[len(dog)] = torch.ones(len(dog), pipe.tokenizer.model_max_length)
        kept[len(dog)][:, DOG] = dog + (1 - dog) * outside
        kept[len(dog)][:, RED] = red + (1 - red) * outside
    expected = naive_edit(
        pipe,
        inversion,
        pipe.embed(SOURCE).detach(),
        pipe.embed(TARGET).detach(),
        align_tokens(pipe.tokenizer, SOURCE, TARGET),
        regions,
        dilate_mask(((soft[0] + soft[1]) > 0).float(), 1),
        [layer.name for layer in loss_layers],
        {layer.name for layer in layers if not layer.is_cross and layer.pixels <= h * w // 4},
        {**SETTINGS, "ccl_form": ccl_form, "optimization_threshold": threshold},
        kept=kept,
    )
    out = pipe(
        TARGET,
        inversion,
        object_masks={"dog": masks[0]},
        attribute_masks={"red": masks[1]},
        ccl_form=ccl_form,
        outside_attention=outside,
        output_type="latent",
        **{**SETTINGS, "optimization_threshold": threshold},
    )
    assert (out.images - expected).abs().max() < 1e-4
    # The comparison has teeth only if the guidance moved the latents by far more than that.
    plain = pipe(
        TARGET,
        inversion,
        object_masks={"dog": masks[0]},
        output_type="latent",
        **{**SETTINGS, "optimization_iterations": 0},
    )
    assert (out.images - plain.images).abs().max() > 1e-2


@pytest.mark.parametrize("cross,self_", [(0.8, 0.4), (0.2, 0.8), (0.0, 0.0)])
def test_pass_counts_of_an_edit(pipe, inversion, masks, cross, self_):
    """source passes + guided steps x iterations (which end early) + one batched pass per step."""
    n, iterations, guided = 5, 3, 2
    with count_unet_calls(pipe.unet) as calls:
        pipe(
            TARGET,
            inversion,
            object_masks={"dog": masks[0]},
            attribute_masks={"red": masks[1]},
            cross_replace_steps=cross,
            self_replace_steps=self_,
            optimization_steps=guided / n,
            optimization_iterations=iterations,
        )
    source = max(round(cross * n), round(self_ * n), guided)  # Eq. 6 reads the source in every guided step
    assert calls["batch 2"] == n
    assert calls["batch 1"] == source + guided * iterations
    assert calls["complete"] == source + n  # the guidance passes left after the last layer the losses read


def test_guidance_passes_do_not_reach_the_layers_above_the_losses(pipe, inversion, masks):
    """Losses read the coarse level: nothing of the finer up blocks runs in a guidance pass."""
    ran = []
    finest = inversion.latents.shape[-2:]  # other passes are the fingerprint's
    hook = pipe.unet.up_blocks[-1].register_forward_hook(
        lambda _, inputs, output: ran.append(torch.is_grad_enabled()) if output.shape[-2:] == finest else None
    )
    pipe(TARGET, inversion, object_masks={"dog": masks[0]}, attention_resolution=8, optimization_iterations=2)
    hook.remove()
    assert ran and not any(ran)


class Readings(TorchDispatchMode):
    """How often a GPU would have to be waited for: to read a number from it, or to copy a list of positions to it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.index.Tensor)
        return func(*args, **(kwargs or {}))


def test_iterations_do_not_wait_for_the_device(pipe, inversion, masks, monkeypatch):
    """Nor do those at a threshold, which is looked at once a step, or of several edits, of which it leaves some out."""
    lists, tolist = [], torch.Tensor.tolist  # which reads without an operation that a mode would see
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor) or tolist(tensor))
    counts, one_step = [], {"optimization_steps": 0.2, "cross_replace_steps": 0.2, "self_replace_steps": 0.0}
    everywhere = np.ones_like(masks[0])
    for iterations, threshold in ((1, 1.0), (3, 1.0), (1, 0.9), (3, 0.9)):
        settings = {**one_step, "optimization_iterations": iterations, "optimization_threshold": threshold}
        regions = {
            "object_masks": [{"dog": masks[0]}, {"dog": everywhere}, {"dog": masks[1]}],
            "attribute_masks": [{"red": masks[1]}, {}, {}],
        }
        lists.clear()
        with Readings() as readings:
            out = pipe([TARGET] * 3, inversion, **regions, **settings)
        assert {entry["iteration"] for entry in out.losses[0]} == set(range(iterations))
        assert bool(out.losses[1]) == (threshold == 1.0)
        counts.append(readings.count + len(lists))
    assert counts[0] == counts[1] < counts[2] == counts[3]


PROMPTS = [TARGET, "a tiger wearing a blue hat", "a dog wearing a blue cap", "a tiger wearing a red cap", TARGET]


@pytest.fixture
def several(masks):
    """Edits of one picture of all kinds: guided by both losses; looked at and not guided, since its mask is all of the
    picture; without masks; guided by each loss alone. Each has its own noise and its own negative prompt."""

    def arguments(which):
        objects = [{"dog": masks[0]}, {"tiger": np.ones_like(masks[0])}, {}, {"tiger": masks[1]}, {}]
        attributes = [{"red": masks[1]}, {}, {}, {}, {"red": masks[1]}]
        return {
            "prompt": [PROMPTS[k] for k in which],
            "object_masks": [objects[k] for k in which],
            "attribute_masks": [attributes[k] for k in which],
            "generator": [torch.Generator().manual_seed(k) for k in which],
            "negative_prompt": [["", "a polar bear", "grass", "a big old table", "a ball"][k] for k in which],
            **{**SETTINGS, "optimization_threshold": 0.6, "outside_attention": 0.5, "eta": 0.3},
            "guidance_rescale": 0.5,
            "output_type": "latent",
            "output_attention_maps": True,
        }

    return arguments


@pytest.mark.parametrize("per_pass,guidance_scale", [(2, 3.0), (5, 3.0), (5, 1.0)])
def test_edits_in_one_pass_are_what_they_are_alone(pipe, inversion, several, per_pass, guidance_scale):
    together = pipe(
        inversion=inversion, edits_per_pass=per_pass, **{**several(range(5)), "guidance_scale": guidance_scale}
    )
    assert [len(losses) > 0 for losses in together.losses] == [True, False, False, True, True]
    for k in range(5):
        alone = pipe(inversion=inversion, edits_per_pass=1, **{**several([k]), "guidance_scale": guidance_scale})
        assert (alone.images[0] - together.images[k]).abs().max() < 1e-4
        assert [entry.keys() for entry in together.losses[k]] == [entry.keys() for entry in alone.losses[0]]
        for one, other in zip(together.losses[k], alone.losses[0]):
            assert list(one.values()) == pytest.approx(list(other.values()), abs=1e-4)
        for key, maps in alone.attention_maps[0].items():
            assert torch.allclose(together.attention_maps[k][key], maps, atol=1e-4)
        others = [(together.images[k] - together.images[j]).abs().max() for j in range(5) if j != k]
        assert min(others) > 1e-2  # so that one edit in another's place would be seen


def test_several_prompts_share_passes(pipe, inversion, several):
    """One pass of the source per step for all; of the rest, as many edits in each as `edits_per_pass` says, whose
    unconditional rows are there as well. An edit that needs no guidance takes part in no iteration after the first."""
    iterations, guided, steps, source = SETTINGS["optimization_iterations"], 3, 5, 4

    def passes(which, **per_pass):
        with count_unet_calls(pipe.unet) as calls:
            pipe(inversion=inversion, **several(which), **per_pass)
        groups = -(-len(which) // per_pass.get("edits_per_pass", 4))
        assert calls["complete"] == source + groups * steps  # those of the guidance leave early, shared ones too
        return {name: count for name, count in calls.items() if name.startswith("batch")}

    looked_at = {"batch 4": guided, "batch 3": guided * (iterations - 1)}  # without the one that has no masks
    assert passes(range(5), edits_per_pass=5) == {"batch 1": source, **looked_at, "batch 10": steps}
    # the first two's iterations and the third's last pass of each step have two rows
    two = {"batch 1": source + guided * iterations, "batch 2": guided * iterations + steps, "batch 4": steps}
    assert passes([0, 3, 4], edits_per_pass=2) == two
    # four by default; of those the second and third leave the guidance, and the fifth is alone
    last = {"batch 8": steps, "batch 2": guided * (iterations - 1) + steps}
    assert passes(range(5)) == {"batch 1": source + guided * iterations, "batch 3": guided, **last}


def test_one_edit_per_pass_is_the_same_to_the_bit(pipe, inversion, several):
    together = pipe(inversion=inversion, edits_per_pass=1, **several(range(5))).images
    alone = [pipe(inversion=inversion, **several([k])).images for k in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_gradient_checkpointing_changes_nothing(components, inversion, masks, image):
    pipe = make_pipe(components)
    edit = {
        "object_masks": {"dog": masks[0]},
        "attribute_masks": {"red": masks[1]},
        **SETTINGS,
        "output_type": "latent",
    }
    plain = pipe(TARGET, inversion, attention_resolution=8, **edit)
    null = pipe.invert(image, SOURCE, num_inference_steps=2, num_inner_steps=2)
    pipe.unet.enable_gradient_checkpointing()
    try:
        again = pipe(TARGET, inversion, attention_resolution=8, **edit)
        null_again = pipe.invert(image, SOURCE, num_inference_steps=2, num_inner_steps=2)
    finally:
        pipe.unet.disable_gradient_checkpointing()
    assert torch.allclose(plain.images, again.images, atol=1e-6)
    assert torch.allclose(null.null_embeds, null_again.null_embeds, atol=1e-6)
