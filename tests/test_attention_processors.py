"""Attention control: the layers' order and sizes, what a pass records, injects and captures, and where it ends."""

import pytest
import torch
from mde_edit.attention_processors import (
    Inject,
    Record,
    UNetExit,
    align_maps,
    attention_control,
    attention_layers,
    select_loss_layers,
)
from mde_edit.prompts import align_tokens

from .conftest import LATENTS, SOURCE, TARGET


def run_control(pipe, inversion, control, prompt, batch=1):
    t, embeds = inversion.timesteps[0], pipe.embed(prompt)
    with attention_control(pipe.unet), torch.no_grad():
        z = inversion.latents[:1].repeat(batch, 1, 1, 1)
        kwargs = {"control": control} if control else None
        return pipe.unet(z, t, embeds.repeat(batch, 1, 1), cross_attention_kwargs=kwargs).sample


@pytest.fixture
def record(pipe, inversion):
    layers = attention_layers(pipe.unet, LATENTS)
    cross, own = (frozenset(layer.name for layer in layers if layer.is_cross == c) for c in (True, False))
    record = Record(cross, own)
    run_control(pipe, inversion, record, SOURCE)
    return record


def test_layers_have_the_order_and_sizes_of_a_real_pass(pipe, inversion, record):
    """The record's dictionaries fill in execution order; the static list must name the same layers and pixels."""
    layers = attention_layers(pipe.unet, LATENTS)
    assert [layer.name for layer in layers if layer.is_cross] == list(record.cross)
    assert [layer.name for layer in layers if not layer.is_cross] == list(record.self_qk)
    assert all(record.cross[layer.name].shape == (8, layer.pixels, 77) for layer in layers if layer.is_cross)
    odd = Record(frozenset(layer.name for layer in layers if layer.is_cross), frozenset())
    with attention_control(pipe.unet), torch.no_grad():
        pipe.unet(torch.zeros(1, 4, 7, 15), 1, pipe.embed(SOURCE), cross_attention_kwargs={"control": odd})
    assert [m.shape[1] for m in odd.cross.values()] == [
        layer.pixels for layer in attention_layers(pipe.unet, (7, 15)) if layer.is_cross
    ]


def test_recorded_maps_are_probabilities_and_recording_changes_nothing(pipe, inversion, record):
    assert all(torch.allclose(m.sum(-1), torch.ones(()), atol=1e-5) for m in record.cross.values())
    layers = frozenset(record.cross), frozenset(record.self_qk)
    plain, recorded = (run_control(pipe, inversion, c, SOURCE) for c in (None, Record(*layers)))
    assert torch.allclose(plain, recorded, atol=1e-4)


def test_injecting_a_pass_into_itself_changes_nothing(pipe, inversion, record):
    alignment = align_tokens(pipe.tokenizer, SOURCE, SOURCE)
    control = Inject(align_maps(record.cross, [alignment]), alignment.shared[None], record.self_qk)
    assert torch.allclose(
        run_control(pipe, inversion, control, SOURCE), run_control(pipe, inversion, None, SOURCE), atol=1e-4
    )


def test_injected_maps_are_the_sources_on_shared_words_and_their_own_on_new_ones(pipe, inversion, record):
    alignment = align_tokens(pipe.tokenizer, SOURCE, TARGET)
    aligned = align_maps(record.cross, [alignment])
    name = next(iter(aligned))
    for j in range(77):
        expected = record.cross[name][..., alignment.mapper[j]] if alignment.shared[j] else torch.zeros(())
        assert torch.equal(aligned[name][0, ..., j], expected.expand_as(aligned[name][0, ..., j]))
    control = Inject(aligned, alignment.shared[None], {}, capture_layers=frozenset(aligned))
    run_control(pipe, inversion, control, TARGET)
    assert torch.allclose(control.captured[name].sum(-1), torch.ones(()), atol=1e-5)  # A*, before injection


def test_injection_leaves_the_other_rows_alone(pipe, inversion, record):
    alignment = align_tokens(pipe.tokenizer, SOURCE, TARGET)
    control = Inject(align_maps(record.cross, [alignment]), alignment.shared[None], record.self_qk)
    plain = run_control(pipe, inversion, None, TARGET, batch=2)
    injected = run_control(pipe, inversion, control, TARGET, batch=2)
    assert torch.allclose(plain[0], injected[0], atol=1e-4)
    assert (plain[1] - injected[1]).abs().max() > 1e-2


def test_a_pass_ends_where_it_is_told(pipe, inversion, record):
    name = list(record.cross)[3]
    control = Inject({}, torch.zeros(1, 77, dtype=torch.bool), {}, frozenset(record.cross), exit_after=name)
    with pytest.raises(UNetExit):
        run_control(pipe, inversion, control, TARGET)
    assert list(control.captured) == list(record.cross)[:4]


def test_a_model_without_cross_attention_is_refused(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe.unet), "attn_processors", {"mid_block.attentions.0.to_k.processor": None})
    with pytest.raises(ValueError, match="not of Stable Diffusion"):
        select_loss_layers(attention_layers(pipe.unet, LATENTS))
    monkeypatch.setattr(type(pipe.unet), "attn_processors", {})
    with pytest.raises(ValueError, match="has no cross-attention"):
        select_loss_layers(attention_layers(pipe.unet, LATENTS))


def test_the_loss_level_is_the_coarsest_with_sixteen_cells(pipe):
    side = lambda size, r=None: min(select_loss_layers(attention_layers(pipe.unet, size), r)[0].size)  # noqa: E731
    assert side((64, 64)) == 16 and side((96, 64)) == 16 and side((16, 24)) == 16
    assert side((8, 12)) == 8  # nothing has sixteen: the finest
    assert side((64, 64), 32) == 32
