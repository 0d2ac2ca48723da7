"""The losses as functions: gradients, ranges, and every degenerate case of the method."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mde_edit.losses import (
    aggregate_maps,
    color_consistency_loss,
    object_alignment_loss,
    spatial_ratio_loss,
    word_map,
)


LAYERS, PIXELS, TOKENS = 3, 12, 9


def softmax_maps(seed, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(LAYERS, PIXELS, TOKENS, generator=generator, dtype=dtype)).softmax(-1)


def half_mask():
    return (torch.arange(PIXELS) < PIXELS // 3).double()


@given(st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 4.0]))
@settings(max_examples=8, deadline=None)
def test_gradients_against_finite_differences(seed, scale):
    logits = scale * torch.randn(
        LAYERS, PIXELS, TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    logits.requires_grad_()
    soft = torch.rand(2, PIXELS, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    shared = softmax_maps(seed + 2)[..., :4].sum(-1)

    def oal(x):
        # The norm is a constant to the gradient, so the finite difference must hold it still too.
        attention = torch.stack([aggregate_maps(x.softmax(-1), (2, 3)), aggregate_maps(x.softmax(-1), (5,))])
        return object_alignment_loss(attention, soft)

    def ccl(x):
        return color_consistency_loss(word_map(x.softmax(-1), (4,)), shared, half_mask())

    def leak(x):
        return spatial_ratio_loss(word_map(x.softmax(-1), (4,)), half_mask())

    assert torch.autograd.gradcheck(ccl, logits, atol=1e-6)
    assert torch.autograd.gradcheck(leak, logits, atol=1e-6)
    # OAL: along directions that leave the arg-max of each object's map alone, the two gradients agree.
    (grad,) = torch.autograd.grad(oal(logits), logits)
    with torch.no_grad():
        maps = logits.softmax(-1)
        peaks = {int(aggregate_maps(maps, i).argmax()) for i in ((2, 3), (5,))}
        direction = torch.randn_like(logits)
        direction[:, list(peaks)] = 0
        h = 1e-6
        numeric = (oal(logits + h * direction) - oal(logits - h * direction)) / (2 * h)
    assert math.isclose(numeric, (grad * direction).sum(), rel_tol=1e-4, abs_tol=1e-7)


def test_object_loss_by_hand():
    """Two pixels, S = (1, 0), S_hat = (0.5, 0.25)."""
    loss = object_alignment_loss(torch.tensor([[0.5, 0.25]]), torch.tensor([[1.0, 0.0]]), eps=0.0, norm_eps=0.05)
    absolute = -(math.log(0.5) + math.log(0.75)) / 2
    relative = -(math.log(0.95) + math.log(1 - 0.5)) / 2
    assert math.isclose(loss, absolute + relative, rel_tol=1e-5)


def test_color_loss_by_hand():
    loss = color_consistency_loss(torch.tensor([[0.3, 0.9]]), torch.tensor([[0.3, 0.1]]), torch.tensor([1.0, 0.0]))
    assert math.isclose(loss, 0.25, rel_tol=1e-4)
    leak = spatial_ratio_loss(torch.tensor([[0.3, 0.9]]), torch.tensor([1.0, 0.0]))
    assert math.isclose(leak, 3 - 4 * 0.25, rel_tol=1e-5)


def test_the_released_programs_softmax_axis_has_no_gradient_and_ours_has():
    scores = torch.randn(2, 8, TOKENS, PIXELS, dtype=torch.float64, requires_grad=True)  # layers, heads, tokens, pixels
    mask = half_mask()[None]
    for axis, alive in ((1, False), (2, True)):
        attention = scores.softmax(axis).mean((0, 1))[3:4]
        (grad,) = torch.autograd.grad(object_alignment_loss(attention, mask), scores)
        assert bool(grad.abs().max() > 1e-6) == alive


def test_the_object_loss_lives_where_attention_is_diluted():
    """At p = 1/77 everywhere a clip would have no gradient; here the mask gets more attention and the rest less."""
    attention = torch.full((1, PIXELS), 1 / 77).requires_grad_()
    (grad,) = torch.autograd.grad(object_alignment_loss(attention, half_mask()[None].float()), attention)
    inside = half_mask().bool()
    assert (grad[0, inside] < 0).all() and (grad[0, ~inside] > 0).all()


def test_a_leaking_peak_is_pushed_down():
    attention = torch.full((1, PIXELS), 0.05)
    attention[0, -1] = 0.3  # outside the mask
    attention.requires_grad_()
    (grad,) = torch.autograd.grad(object_alignment_loss(attention, half_mask()[None].float()), attention)
    assert grad[0, -1] > 0


def test_color_loss_has_no_gradient_outside_its_mask():
    attention = softmax_maps(0)[..., 4].clone().requires_grad_()
    (grad,) = torch.autograd.grad(
        color_consistency_loss(attention, softmax_maps(1)[..., :3].sum(-1), half_mask()), attention
    )
    inside = half_mask().bool()
    assert (grad[:, inside] < 0).all() and (grad[:, ~inside] == 0).all()


def test_leakage_loss_pushes_attention_outside_down():
    attention = softmax_maps(0)[..., 4].clone().requires_grad_()
    (grad,) = torch.autograd.grad(spatial_ratio_loss(attention, half_mask()), attention)
    inside = half_mask().bool()
    assert (grad[:, inside] < 0).all() and (grad[:, ~inside] > 0).all()


@given(st.integers(0, 10_000), st.floats(0.0, 50.0))
@settings(max_examples=30, deadline=None)
def test_losses_stay_in_their_ranges(seed, scale):
    maps = softmax_maps(seed, scale, torch.float32)
    mask = half_mask().float()
    attention = word_map(maps, (2, 3))
    shared = word_map(maps, (0, 1, 4, 5, 6, 7, 8))
    assert 0 <= color_consistency_loss(attention, shared, mask) <= 1
    assert -1.001 <= spatial_ratio_loss(attention, mask) <= 3.001
    oal = object_alignment_loss(aggregate_maps(maps, (2, 3))[None], mask[None])
    assert torch.isfinite(oal) and oal >= 0
    assert torch.allclose(maps.sum(-1), torch.ones(LAYERS, PIXELS), atol=1e-5)


def test_an_object_does_not_weaken_another():
    """Sum over objects: the first object's gradient does not shrink when a second one joins."""
    attention = softmax_maps(3).mean(0).T[:2].clone().requires_grad_()  # (objects, pixels)
    masks = torch.stack([half_mask(), 1 - half_mask()])
    (both,) = torch.autograd.grad(object_alignment_loss(attention, masks), attention)
    (alone,) = torch.autograd.grad(object_alignment_loss(attention[:1], masks[:1]), attention)
    assert torch.allclose(both[0], alone[0])


# Degenerate cases


def test_mask_over_everything():
    attention = softmax_maps(0)[..., 4].clone().requires_grad_()
    everywhere = torch.ones(PIXELS, dtype=torch.float64)
    (grad,) = torch.autograd.grad(spatial_ratio_loss(attention, everywhere), attention)
    assert grad.abs().max() < 1e-6  # all attention is inside already
    (grad,) = torch.autograd.grad(object_alignment_loss(attention[:1], everywhere[None]), attention)
    assert (grad[0] < 0).all()  # p -> 1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_attention_of_zero_or_one_is_finite(value):
    attention = torch.full((1, PIXELS), value).requires_grad_()
    loss = object_alignment_loss(attention, half_mask()[None].float())
    loss = loss + color_consistency_loss(attention, attention.detach(), half_mask().float())
    loss = loss + spatial_ratio_loss(attention, half_mask().float())
    (grad,) = torch.autograd.grad(loss, attention)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()


def test_overlapping_objects_pull_to_one_half():
    """Where two masks overlap the tokens compete: with p_1 + p_2 = 1 the balance is at one half."""
    mask = torch.ones(2, PIXELS)
    losses = [
        float(object_alignment_loss(torch.stack([torch.full((PIXELS,), p), torch.full((PIXELS,), 1 - p)]), mask))
        for p in (0.3, 0.5, 0.7)
    ]
    assert losses[1] < losses[0] and losses[1] < losses[2]


def test_a_word_of_several_tokens_is_their_sum():
    maps = softmax_maps(0)
    assert torch.allclose(word_map(maps, (2, 3)), maps[..., 2] + maps[..., 3])
    assert torch.allclose(aggregate_maps(maps, (2, 3)), (maps[..., 2] + maps[..., 3]).mean(0))
    assert aggregate_maps(torch.ones(1, 4, 2), (0, 1)).max() == 1  # rounding cannot push a probability over one
