"""The engine's benchmark counts what really runs."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from mde_edit import MDEEditPipeline
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import engine, latency

from .conftest import count_unet_calls


SIZE, STEPS, SETTINGS = (16, 16), 4, {"optimization_steps": 0.25, "optimization_iterations": 2}
UNET = {
    "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def small_model():
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4).requires_grad_(False)
    return UNet2DConditionModel(**UNET).eval(), vae


def small_scene() -> engine.Scene:
    return engine.make_scene(*small_model(), SIZE, STEPS, **SETTINGS)


@pytest.fixture(scope="module")
def scene():
    return small_scene()


def test_flops_of_a_small_layer_are_those_counted_by_hand():
    batch, pixels, tokens, dim, out = 2, 6, 5, 8, 3
    x = torch.randn(batch, pixels, dim, requires_grad=True)
    keys = torch.randn(batch, tokens, dim, requires_grad=True)
    weight = torch.randn(out, dim, requires_grad=True)
    product = 2 * batch * pixels * tokens * dim
    linear = 2 * batch * pixels * dim * out
    with engine.flop_counter() as counter:
        y = F.linear(x, weight)
        assert counter.get_total_flops() == linear
        maps = torch.bmm(x, keys.transpose(1, 2)).softmax(-1)
        assert counter.get_total_flops() == linear + product
        (y.sum() + maps.square().sum()).backward()
    assert counter.get_total_flops() == 3 * (linear + product)  # a backward product per operand
    query, key, value = (t[:, None].detach().requires_grad_() for t in (x, keys, keys))
    with engine.flop_counter() as counter:
        attended = F.scaled_dot_product_attention(query, key, value)
        assert counter.get_total_flops() == 2 * product
        attended.sum().backward()
    assert counter.get_total_flops() == 7 * product  # the backward pass makes the map again: five products


def test_peak_is_of_what_is_held_and_not_of_what_was_there():
    weight = torch.ones(1000)  # 4000 bytes, not counted
    with engine.LiveBytes() as memory:
        x = weight * 2
        x += 1  # in place, and a view: nothing new
        for _ in range(3):
            y = x[:500] * weight[:500]  # the old y is held until the new one is there
        assert memory.now == 6000 and memory.peak == 8000
        del x, y
        assert memory.now == 0
        leaf = torch.ones(1000, requires_grad=True)
        z = leaf.exp().exp()  # both results are saved for the backward pass
        assert memory.now == 12000
        del z
        assert memory.now == 4000


@pytest.mark.parametrize(
    "program",
    [pytest.param(name, marks=pytest.mark.slow) if name == "naive null_text" else name for name in engine.PROGRAMS],
)
def test_a_program_is_its_passes(scene, program, monkeypatch):
    """FLOPs of a whole run = those of each kind of pass, times how many the formula says."""
    monkeypatch.setattr(engine, "INNER_STEPS", 2)
    passes = engine.passes_of(scene, program)
    with count_unet_calls(scene.unet) as calls, engine.flop_counter() as counter:
        engine.run_program(scene, program)
    assert counter.get_total_flops() == sum(n * engine.cost_of(scene, kind).flops for kind, n in passes.items())
    twice = passes[engine.Pass("naive iteration")]  # source and target
    assert calls["forward"] == twice + sum(n for kind, n in passes.items() if kind.name not in ("encode", "decode"))


def test_costs_without_data_are_those_with_data(scene):
    kind = engine.Pass("iteration", True, True)
    with FakeTensorMode():
        expected = engine.cost_of(small_scene(), kind)
    cost = engine.cost_of(scene, kind)
    assert cost.flops == expected.flops
    assert cost.peak == pytest.approx(expected.peak, rel=0.05)  # kernels differ in what they save aside


def test_the_table_says_what_is_met(tmp_path, monkeypatch):
    """Where all passes cost the same, the iterations' ratio is 1 and an edit's that of the numbers of its passes."""
    monkeypatch.setattr(engine, "sd14", small_model)
    monkeypatch.setattr(engine, "LATENT_SIZE", SIZE)
    monkeypatch.setattr(engine, "count_passes", lambda kinds: {kind: engine.Cost(10**12, 2**30) for kind in kinds})
    monkeypatch.setattr(engine, "seconds_of", lambda scene, kind, repeats: 2.0)
    engine.main(["--out", str(tmp_path / "engine.md")])
    text = (tmp_path / "engine.md").read_text()
    for loop, ratio, met in (("guidance loop", "0.333", "yes"), ("guidance loop, 15 iterations", "1.000", "**no**")):
        met = f"FLOPs {met}, peak **no**, seconds yes"
        assert f"| {loop} | {ratio} | {ratio} | 1.000 | 0.40, 0.5 | {met} |" in text
    assert f"| an edit, inverted before | {191 / 451:.3f} | " in text
    assert f"| an edit, inverted before, 15 iterations | {391 / 451:.3f} | " in text
    assert f"| an edit, inverted before, 15 iterations, official | {391 / 501:.3f} | " in text
    assert "| naive edit | 451.0 | 902.0 | 1.00 | 300 naive iteration, 150 naive pass, 1 decode |" in text


def test_what_a_user_waits_for(tmp_path, monkeypatch):
    """Each wait is a call of the pipeline: the first edit inverts, another edit of the picture does not."""
    monkeypatch.setattr(latency, "sd14", small_model)
    monkeypatch.setattr(latency, "STEPS", 3)
    monkeypatch.setattr(latency, "FAST_STEPS", 2)
    inverted = []
    invert = MDEEditPipeline.invert
    monkeypatch.setattr(MDEEditPipeline, "invert", lambda *a, **k: inverted.append(k) or invert(*a, **k))
    latency.main(["--out", str(tmp_path / "latency.md"), "--dtype", "float32", "--repeats", "1"])
    rows = [line for line in (tmp_path / "latency.md").read_text().splitlines() if " edit" in line or "sample" in line]
    assert len(rows) == 5 + len(latency.PER_PASS) and [k["num_inference_steps"] for k in inverted] == [3, 3, 2, 2]
