"""The paper's rivals, written from their equations: CDS, Guide-and-Rescale and OIR, on the tiny pipeline."""

import json

import numpy as np
import pytest
import torch
from mde_edit.attention_processors import Record
from PIL import Image

from benchmarks import draw
from benchmarks.cases import Case, Region
from benchmarks.methods import cds, guide_and_rescale, oir
from tests.conftest import SOURCE, TARGET, count_unet_calls
from training import judge as judging
from training.tokenizer import write_tokenizer


METHODS = cds.METHODS | guide_and_rescale.METHODS | oir.METHODS
STEPS = 5
# Where the tiny pipeline shows what a setting does in few passes.
QUICK = {
    "cds": {"iterations": 2},
    "guide_and_rescale": {"ratio": (0.0, 1e9)},
    "oir": {"judge": None},
}
OTHER = {
    "cds": {"iterations": 1, "step_size": 0.5, "guidance_scale": 15.0, "contrast_weight": 3000.0},
    "guide_and_rescale": {
        "guidance_scale": 15.0,
        "self_attention_weight": 0.0,
        "feature_weight": 0.0,
        "guided_steps": 0.2,
        "ratio": (0.5, 0.5),
    },
    "oir": {"guidance_scale": 15.0, "reassembly": 0.6, "reinversion": 0.6, "fixed_depth": 1.0},
}


@pytest.fixture(scope="module")
def case():
    """A picture of two objects, named by words that the tiny pipeline knows; not square."""
    rows, columns = np.mgrid[0:48, 0:64]
    pixels = np.stack([np.sin(columns / 7), np.cos(rows / 5), np.sin((columns + rows) / 9)], -1) * 100 + 127
    animal, hat = np.zeros((2, 48, 64), bool)
    animal[20:44, 8:32], hat[4:20, 24:52] = True, True
    regions = (
        Region("object0", animal, "cat", "dog", ("dog", 0)),
        Region("object1", hat, "straw hat", "red hat", None, (("red", 0),)),
    )
    return Case("case", "overlap", "object", Image.fromarray(pixels.astype(np.uint8)), SOURCE, TARGET, regions)


@pytest.fixture(scope="module")
def random_judge(tmp_path_factory):
    """A folder with a judge that knows nothing."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    judging.build(len(write_tokenizer(folder))).save_pretrained(folder)
    return str(folder)


def run(pipe, case, name, seed=0, **settings):
    return np.asarray(METHODS[name](pipe, case, STEPS, seed, **{**QUICK[name], **settings})).astype(int)


def unedited(case):
    """The case with the source prompt as its target."""
    return Case(**{**vars(case), "target_prompt": case.source_prompt})


def roundtrip(pipe, case):
    with torch.no_grad():
        return np.asarray(pipe.decode(cds.encode(pipe, case.image), "pil")[0][0]).astype(int)


# All three


@pytest.mark.parametrize("name", METHODS)
def test_a_method_edits_is_deterministic_and_leaves_the_pipe_as_it_was(pipe, case, name):
    def state():
        scheduler = pipe.scheduler
        return (
            dict(pipe.unet.attn_processors),
            {key: weight.requires_grad for key, weight in pipe.unet.named_parameters()},
            [weight.grad for weight in pipe.unet.parameters()],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipe.unet.modules()],
            scheduler,
            dict(scheduler.config),
            scheduler.timesteps.tolist(),
            pipe.unet.training,
        )

    pipe.scheduler.set_timesteps(7)
    next(pipe.unet.parameters()).requires_grad_(False)  # a mixture that must come back as such
    before, random_state = state(), torch.get_rng_state()
    try:
        first = run(pipe, case, name)
        assert state() == before and torch.equal(torch.get_rng_state(), random_state)
    finally:
        next(pipe.unet.parameters()).requires_grad_(True)
    assert first.shape == (48, 64, 3)
    assert (first == run(pipe, case, name)).all()
    assert (first != roundtrip(pipe, case)).any()
    assert (first != run(pipe, case, name, seed=1)).any() == (name == "cds")


@pytest.mark.parametrize("name", METHODS)
def test_a_failing_edit_leaves_the_pipe_as_it_was_too(pipe, case, name, monkeypatch):
    processors, grads = dict(pipe.unet.attn_processors), [w.requires_grad for w in pipe.unet.parameters()]

    def fail(module, args):
        raise RuntimeError("stop")

    hook = pipe.unet.conv_out.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="stop"):
            run(pipe, case, name)
    finally:
        hook.remove()
    assert dict(pipe.unet.attn_processors) == processors
    assert [w.requires_grad for w in pipe.unet.parameters()] == grads
    assert not any(module._forward_hooks for module in pipe.unet.modules())


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_changes_the_picture(pipe, case, name):
    usual = run(pipe, case, name)
    for setting, value in OTHER[name].items():
        assert (run(pipe, case, name, **{setting: value}) != usual).any(), setting
    tested_below = {"judge", "search_every"} if name == "oir" else set()
    assert OTHER[name].keys() | tested_below == METHODS[name].settings.keys()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_states_itself(name):
    method = METHODS[name]
    assert method.group == ("masks" if name == "oir" else "prompt") and method.source
    assert method.grid.keys() <= method.settings.keys()
    for setting, values in method.grid.items():
        assert method.settings[setting] in values
    assert json.loads(json.dumps(method.settings)).keys() == method.settings.keys()


# CDS


def test_cds_without_iterations_is_the_round_trip(pipe, case):
    assert (run(pipe, case, "cds", iterations=0) == roundtrip(pipe, case)).all()


def test_cds_moves_nothing_between_equal_prompts_unless_the_contrast_does(pipe, case):
    same = unedited(case)
    still = run(pipe, same, "cds", contrast_weight=0.0)
    assert np.abs(still - roundtrip(pipe, case)).max() <= 1  # batches of other sizes round differently
    assert (run(pipe, same, "cds", contrast_weight=3000.0) != still).any()


def test_cds_takes_two_passes_of_four_rows_an_iteration(pipe, case):
    with count_unet_calls(pipe.unet) as calls:
        run(pipe, case, "cds", iterations=3)
    assert calls["batch 3"] == calls["batch 1"] == 3 and calls["forward"] == 6


def test_the_delta_is_the_guided_difference():
    values = torch.arange(8.0).reshape(2, 1, 2, 2)
    other = torch.ones(2, 1, 2, 2)
    assert torch.equal(cds.delta(values, other, 3.0), (values[:1] + 3 * (values[1:] - values[:1])) - 1)


def test_patch_nce_is_least_where_every_patch_finds_its_own_place():
    torch.manual_seed(0)
    features, places = torch.randn(16, 4, 4), torch.arange(16)
    own = cds.patch_nce(features, features, places)
    assert own < cds.patch_nce(features.flip(1), features, places)
    assert torch.allclose(own, cds.patch_nce(3 * features, features, places))  # cosine: length does not count
    target = features.flip(1).requires_grad_()
    loss = cds.patch_nce(target, features, places)
    (gradient,) = torch.autograd.grad(loss, target)
    assert cds.patch_nce(target - 0.1 * gradient, features, places) < loss


def test_noise_is_read_from_a_model_that_predicts_v(components):
    from tests.conftest import make_pipe

    pipe = make_pipe(components, prediction_type="v_prediction")
    scheduler, t = pipe.ddim_scheduler(1), torch.tensor([300])
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy, velocity = scheduler.add_noise(clean, noise, t), scheduler.get_velocity(clean, noise, t)

    class Exact(torch.nn.Module):
        dtype = torch.float32

        def forward(self, *args, **kwargs):
            return (velocity,)

    assert torch.allclose(cds.predict_noise(Exact(), scheduler, noisy, t, torch.zeros(1, 1, 1)), noise, atol=1e-5)


# Guide-and-Rescale


def test_unguided_with_the_source_prompt_it_is_ddim_reconstruction(pipe, case):
    result = run(pipe, unedited(case), "guide_and_rescale", guidance_scale=1.0, guided_steps=0.0)
    scheduler, embeds = pipe.ddim_scheduler(STEPS), pipe.embed(SOURCE)
    inversion = pipe.invert(case.image, SOURCE, STEPS, method="direct", guidance_scale=1.0)
    latents = inversion.latents[:1]
    with torch.no_grad():
        for t in scheduler.timesteps:
            noise = pipe.unet(latents, t, embeds).sample
            latents = scheduler.step(noise, t, latents).prev_sample
        expected = np.asarray(pipe.decode(latents, "pil")[0][0]).astype(int)
    assert np.abs(result - expected).max() <= 1


def test_the_energies_are_as_computed_by_hand_and_zero_at_no_change():
    torch.manual_seed(0)
    edited, inverted = Record(frozenset(), frozenset()), Record(frozenset(), frozenset())
    for record in (edited, inverted):
        record.self_qk.update({name: tuple(torch.randn(2, 1, 2, 9, 4)) for name in ("one", "two")})
    expected = 0.0
    for name in ("one", "two"):
        maps = [(q @ k.transpose(-1, -2) / 2).softmax(-1) for q, k in (r.self_qk[name] for r in (edited, inverted))]
        expected += ((maps[0] - maps[1]) ** 2).mean()
    assert torch.isclose(guide_and_rescale.self_attention_energy(edited, inverted), expected)
    assert guide_and_rescale.self_attention_energy(edited, edited) == 0
    features = torch.randn(2, 1, 4, 3, 3)
    assert torch.isclose(guide_and_rescale.feature_energy(*features), (features[0] - features[1]).abs().mean())
    assert guide_and_rescale.feature_energy(features[0], features[0]) == 0


def test_rescaling_clips_the_ratio_of_norms_and_keeps_the_direction():
    torch.manual_seed(0)
    guider, cfg = torch.randn(2, 1, 4, 6, 6)
    for scale, expected in ((1e-6, 0.33), (1e6, 3.0)):
        found = guide_and_rescale.rescale(scale * guider, cfg, (0.33, 3.0))
        assert torch.isclose(found.norm() / cfg.norm(), torch.tensor(expected))
        assert torch.isclose(torch.cosine_similarity(found.flatten(), guider.flatten(), 0), torch.tensor(1.0))
    within = guider * cfg.norm() / guider.norm()
    assert torch.allclose(guide_and_rescale.rescale(within, cfg, (0.33, 3.0)), within)
    assert not guide_and_rescale.rescale(torch.zeros_like(guider), cfg, (0.33, 3.0)).any()


def test_guidance_begins_at_the_second_step_and_adds_two_passes(pipe, case):
    guided = round(0.6 * STEPS) - 1  # at the first, the latents are the inverted ones
    with count_unet_calls(pipe.unet) as calls:
        run(pipe, case, "guide_and_rescale", guided_steps=0.6)
    assert calls["batch 2"] == STEPS and calls["batch 1"] == STEPS + 2 * guided


# OIR


def prompts(source, target, *pairs):
    mask = np.ones((4, 4), bool)
    regions = tuple(Region(f"object{index}", mask, *pair) for index, pair in enumerate(pairs))
    return oir.guided_prompts(Case("case", "overlap", "object", None, source, target, regions))


def test_guided_prompts_change_one_region_each():
    assert prompts(SOURCE, TARGET, ("cat", "dog"), ("straw hat", "red hat")) == [
        "a dog wearing a straw hat",
        "a cat wearing a red hat",
    ]
    assert prompts("an apple and a star", "a cake and an umbrella", ("apple", "cake"), ("star", "umbrella")) == [
        "a cake and a star",
        "an apple and an umbrella",
    ]


def test_guided_prompts_find_which_of_equal_words_is_meant():
    """The target prompt tells: the second penguin changes, the first stays."""
    source, target = "a penguin in a hat and a penguin", "a penguin in a cap and a rabbit"
    assert prompts(source, target, ("penguin", "rabbit"), ("hat", "cap")) == [
        "a penguin in a hat and a rabbit",
        "a penguin in a cap and a penguin",
    ]
    with pytest.raises(ValueError, match="does not hold 'dog'"):
        prompts(source, target, ("dog", "rabbit"))
    with pytest.raises(ValueError, match="lie over each other"):
        prompts("a hat", "a cap", ("hat", "cap"), ("hat", "cap"))


@pytest.mark.parametrize("task", draw.TASKS)
def test_guided_prompts_of_drawn_cases_hold_the_new_words(task):
    for split in draw.SPLITS:
        case = draw.draw_case("dev", split, task, 3, size=32)
        found = oir.guided_prompts(case)
        assert len(set(found)) == len(case.regions)
        for region, prompt in zip(case.regions, found):
            assert region.target in prompt and prompt != case.source_prompt


def test_the_best_depth_weighs_both_criteria_scaled():
    similarity, error = torch.tensor([0.30, 0.31, 0.20]), torch.tensor([0.9, 0.2, 0.1])
    assert torch.equal(oir.minmax(torch.tensor([2.0, 4.0, 3.0])), torch.tensor([0.0, 1.0, 0.5]))
    assert not oir.minmax(torch.ones(3)).any()
    assert oir.best(similarity, error) == 1
    assert oir.best(torch.ones(3), error) == 2 and oir.best(similarity, torch.ones(3)) == 1


def test_the_error_is_read_outside_the_mask(case):
    mask = case.regions[0].mask
    changed = np.array(case.image)
    changed[mask] = 0
    other = np.array(case.image)
    other[~mask] ^= 255
    found = oir.outside_error([Image.fromarray(changed), Image.fromarray(other)], case.image, mask)
    assert found[0] == 0 and found[1] > 0


def test_batched_denoising_is_each_alone(pipe):
    """Latents from three depths, in one growing batch or one by one; chunks of the batch make no difference."""
    scheduler, generator = pipe.ddim_scheduler(STEPS), torch.Generator().manual_seed(0)
    latents, depths = torch.randn(3, 4, 16, 16, generator=generator), [5, 3, 2]
    embeds = torch.cat([pipe.embed(SOURCE), pipe.embed(TARGET)]).detach()
    with torch.no_grad():
        together = oir.denoise(pipe, scheduler, latents, depths, 1, embeds, 3.0)
        alone = [oir.denoise(pipe, scheduler, z[None], [d], 1, embeds, 3.0) for z, d in zip(latents, depths)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_the_search_takes_what_the_judge_likes_and_a_call_per_depth(pipe, case, random_judge, monkeypatch):
    chosen = []
    pictures = []
    for index, depth in ((0, 1.0), (1, 0.8)):
        monkeypatch.setattr(oir, "best", lambda similarity, _, index=index: chosen.append(len(similarity)) or index)
        with count_unet_calls(pipe.unet) as calls:
            pictures.append(run(pipe, case, "oir", judge=random_judge, search_every=1))
        fixed = run(pipe, case, "oir", fixed_depth=depth)
        assert np.abs(pictures[-1] - fixed).max() <= 2
        # inversion, two searches down to the picture, re-inversion by one step and two steps of denoising
        assert calls["forward"] == STEPS + 2 * STEPS + 1 + 2
    assert (pictures[0] != pictures[1]).any()
    assert chosen == [5] * 4  # depths 5 to 1


def test_without_a_judge_the_depth_is_fixed_and_with_one_the_spacing_counts(
    pipe, case, random_judge, tmp_path, monkeypatch
):
    fixed = run(pipe, case, "oir")
    with pytest.raises(ValueError, match="no judge in"):
        run(pipe, case, "oir", judge=str(tmp_path / "none"))
    monkeypatch.setattr(oir, "best", lambda similarity, error: 1)  # the second depth tried: 3 of 5, or 1
    near, far = (run(pipe, case, "oir", judge=random_judge, search_every=every) for every in (2, 4))
    assert np.abs(near - fixed).max() <= 2 < np.abs(far - fixed).max()


def test_masks_say_where_an_object_is_edited(pipe, case):
    """Without denoising of the whole afterwards, what lies outside the masks is the inverted picture's."""
    target, settings = roundtrip(pipe, case), {"reassembly": 0.2, "reinversion": 0.0, "guidance_scale": 8.0}
    change = np.abs(run(pipe, case, "oir", fixed_depth=1.0, **settings) - target).mean(-1)
    outside = ~np.any([region.mask for region in case.regions], axis=0)
    assert change[outside].mean() < change[~outside].mean()
