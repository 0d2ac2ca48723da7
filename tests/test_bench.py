"""The benchmark: cases, metrics, runner, tables and converters, on real but tiny parts."""

import copy
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mde_edit.attention_processors import Record, attention_control
from mde_edit.tools.rows import read_rows
from PIL import Image

from benchmarks import attention, convert, draw, metrics, run, softness, tables, tradeoff, tune
from benchmarks.cases import Case, Region, load_cases, save_cases, touching
from benchmarks.methods import METHODS
from benchmarks.methods.base import Method
from benchmarks.methods.ours import with_found_masks
from benchmarks.perceptual import STLPIPS
from training import judge as judging
from training.tokenizer import write_tokenizer


ROOT = Path(__file__).parent.parent
SLOW_TASKS = settings(max_examples=12, deadline=None)


@pytest.fixture(scope="module")
def perceptual():
    return STLPIPS()


@pytest.fixture(scope="module")
def case():
    return draw.draw_case("dev", "overlap", "twin", 0, size=64)


@pytest.fixture(scope="module")
def random_judge(tmp_path_factory):
    """A folder with a judge that knows nothing."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    judging.build(len(write_tokenizer(folder))).save_pretrained(folder)
    return folder


# Cases


@SLOW_TASKS
@given(st.sampled_from(draw.SPLITS), st.sampled_from(list(draw.TASKS)), st.integers(0, 30))
def test_a_drawn_case_is_what_it_says(split, task, number):
    case = draw.draw_case("dev", split, task, number, size=64)
    words = case.target_prompt.replace(",", "").split()
    assert 2 <= len(case.regions) <= 4
    for region in case.regions:
        assert region.source in case.source_prompt.replace(",", "")
        assert region.target in case.target_prompt.replace(",", "")
        assert region.object or region.attributes  # something is asked for
        for word, occurrence in (*((region.object,) if region.object else ()), *region.attributes):
            assert words.count(word) > occurrence
            assert word in region.target.split()
        assert region.mask.any()
    edited = [one for one in case.expected if one.region]
    assert {one.region for one in edited} == {region.name for region in case.regions}
    for one in edited:
        target = next(region.target for region in case.regions if region.name == one.region)
        assert target.split()[-1] == one.kind
        assert one.color is None or one.color in target
    # Nothing but the edited objects differs between the source and its ideal.
    changed = np.abs(metrics.as_array(case.image) - metrics.as_array(case.ideal)).max(-1) > 0.02
    assert changed.any()


def test_cases_depend_on_set_split_task_and_number_alone():
    one, same, other, test = (
        draw.draw_case(seed, "overlap", "swap", number, size=32)
        for seed, number in (("dev", 1), ("dev", 1), ("dev", 2), ("test", 1))
    )
    assert one.image.tobytes() == same.image.tobytes() and one.target_prompt == same.target_prompt
    assert one.image.tobytes() != other.image.tobytes()
    assert one.image.tobytes() != test.image.tobytes()


def test_the_test_set_has_a_hundred_cases_per_split_and_quick_sixteen():
    for name, least in (("test", 100), ("quick", 16)):
        assert draw.SETS[name][1] * len(draw.TASKS) >= least


def test_tasks_ask_for_what_their_names_say():
    chain = draw.draw_case("dev", "non_overlap", "chain", 0)
    kinds = [(region.source.split()[-1], region.target.split()[-1]) for region in chain.regions]
    assert any(new == other_old for _, new in kinds for other_old, _ in kinds if new == other_old)
    swap = draw.draw_case("dev", "non_overlap", "swap", 0)
    assert {region.source.split()[0] for region in swap.regions} == {r.target.split()[0] for r in swap.regions}
    twin = draw.draw_case("dev", "non_overlap", "twin", 0)
    replaced = next(region for region in twin.regions if region.object)
    assert replaced.source.split()[-1] in [one.kind for one in twin.expected if one.region is None]
    both = draw.draw_case("dev", "overlap", "object+color", 0)
    assert all(region.object and region.attributes for region in both.regions)


def test_union_masks_hold_the_ideal_too():
    visible, union = (draw.draw_case("dev", "overlap", "object", 0, size=64, union=flag) for flag in (False, True))
    assert (union.union & visible.union == visible.union).all()
    assert union.union.sum() > visible.union.sum()


def test_cases_come_back_from_disk(tmp_path, case):
    save_cases([case], tmp_path)
    (back,) = load_cases(tmp_path)
    assert back.object_masks.keys() == case.object_masks.keys()
    assert all((back.object_masks[word] == mask).all() for word, mask in case.object_masks.items())
    assert back.expected == case.expected
    assert back.image.tobytes() == case.image.tobytes() and back.ideal.tobytes() == case.ideal.tobytes()


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda e: e.update(image="none.png"), "no file 'none.png'"),
        (lambda e: e["regions"][0].update(object=["zebra", 0]), "no 'zebra' number 1"),
        (lambda e: e["regions"][0].update(mask="small.png"), "mask 'small.png' is"),
    ],
)
def test_a_broken_set_is_refused_by_file_and_line(tmp_path, case, change, message):
    save_cases([case], tmp_path)
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    entry = json.loads((tmp_path / "cases.jsonl").read_text())
    change(entry)
    (tmp_path / "cases.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(ValueError, match=f"line 1.*{message}"):
        load_cases(tmp_path)


def test_touching_masks():
    left, right = np.zeros((2, 50, 50), bool)
    left[:, :20] = True
    right[:, 25:] = True
    assert not touching([left, right])
    right[:, 20:] = True
    assert touching([left, right])


# Metrics


def box_case(size=48):
    rng = np.random.default_rng(0)
    pixels = (rng.random((size, size, 3)) * 255).astype(np.uint8)
    ideal = pixels.copy()
    mask = np.zeros((size, size), bool)
    mask[4:14, 4:14] = True
    ideal[mask] = 255 - ideal[mask]
    region = Region("object0", mask, "cat", "dog", ("dog", 0))
    image, ideal = Image.fromarray(pixels), Image.fromarray(ideal)
    return Case("box", "overlap", "object", image, "a cat", "a dog", (region,), ideal)


def test_the_ideal_and_the_source_bound_every_figure(perceptual):
    case = box_case()
    meter = metrics.Meter(perceptual, cell=4)
    ideal, source = meter(case, case.ideal), meter(case, case.image)
    assert ideal["in_psnr"] == 100 and ideal["in_ssim"] == pytest.approx(1)
    assert ideal["leak"] == 0 and np.isnan(source["leak"])
    for figures in (ideal, source):
        assert figures["bg_psnr"] == 100
        assert figures["bg_ssim"] == pytest.approx(1) and figures["bg_ssim_zf"] == pytest.approx(1)
        assert figures["bg_st_lpips"] == pytest.approx(0, abs=1e-6)
        assert figures["bg_st_lpips_zf"] == pytest.approx(0, abs=1e-6)
    assert source["in_psnr"] < 15
    assert all(np.isnan(ideal[name]) for name in ("success", "bystanders", "clip"))


def test_background_figures_see_the_background_alone(perceptual):
    case = box_case()
    meter = metrics.Meter(perceptual, cell=4)
    clean = meter(case, case.ideal)
    pixels = np.asarray(case.ideal).copy()
    pixels[30:40, 30:40] = 0
    dirty = meter(case, Image.fromarray(pixels))
    assert dirty["bg_psnr"] < clean["bg_psnr"] and dirty["bg_ssim"] < clean["bg_ssim"]
    assert dirty["bg_st_lpips"] > clean["bg_st_lpips"] and dirty["bg_st_lpips_zf"] > clean["bg_st_lpips_zf"]
    assert dirty["bg_ssim_zf"] < clean["bg_ssim_zf"] and dirty["leak"] > 0
    assert dirty["in_psnr"] == clean["in_psnr"]


def test_a_mask_that_leaves_no_background_gives_nan():
    one, other = np.zeros((8, 8, 3)), np.ones((8, 8, 3))
    assert np.isnan(metrics.psnr(one, other, np.zeros((8, 8), bool)))
    assert metrics.psnr(one, other, np.ones((8, 8), bool)) == 0


def test_psnr_and_ssim_against_their_definitions():
    rng = np.random.default_rng(1)
    one, other = rng.random((2, 24, 24, 3))
    mask = rng.random((24, 24)) < 0.5
    by_hand = -10 * np.log10(sum((one[y, x] - other[y, x]) ** 2 for y, x in np.argwhere(mask)).sum() / (3 * mask.sum()))
    assert metrics.psnr(one, other, mask) == pytest.approx(by_hand)
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(weights, weights) / np.outer(weights, weights).sum()

    def ssim(a, b):  # of the window around pixel (12, 12)
        a, b = a[7:18, 7:18], b[7:18, 7:18]
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        var_a, var_b = (weights * a * a).sum() - mean_a**2, (weights * b * b).sum() - mean_b**2
        both = (weights * a * b).sum() - mean_a * mean_b
        c1, c2 = 0.01**2, 0.03**2
        return (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))

    expected = np.mean([ssim(one[..., c], other[..., c]) for c in range(3)])
    assert metrics.ssim_map(one, other)[12, 12] == pytest.approx(expected, abs=1e-4)


def test_st_lpips_is_a_distance_that_forgives_small_shifts(perceptual):
    scene = metrics.as_array(draw.draw_case("dev", "overlap", "color", 0, size=64).image)
    image = torch.from_numpy(scene).permute(2, 0, 1)[None].float() * 2 - 1
    assert perceptual(image, image).item() == pytest.approx(0, abs=1e-6)
    shifted, blurred = image.roll(1, -1), torch.nn.functional.avg_pool2d(image, 5, 1, 2)
    assert perceptual(image, shifted) == perceptual(shifted, image)
    noisy = image + 0.3 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    assert 0 < perceptual(image, shifted) < perceptual(image, noisy)
    assert perceptual(image, shifted) < perceptual(image, blurred)


def test_edit_success_reads_each_region_with_the_judge(perceptual, case, monkeypatch):
    """The share of edited objects, and of bystanders, that the judge finds right."""
    asked = []

    def right(judge, feature, expected):
        asked.append(expected)
        return expected.region == case.regions[0].name or expected.region is None

    class Blank:
        def encode(self, windows):
            return torch.ones(len(windows), 4) / 2

        encode_text = encode

    monkeypatch.setattr(metrics, "is_right", right)
    figures = metrics.Meter(perceptual, Blank()).judged(case, case.image)
    assert asked == list(case.expected)
    edits = {region.name: region is case.regions[0] for region in case.regions}
    assert figures == {"success": 1 / len(case.regions), "bystanders": 1.0, "clip": 1.0, "edits": edits}


def test_a_verdict_needs_kind_color_and_texture():
    from training.scenes import COLORS, KINDS, TEXTURES

    def one_hot(size, index):
        return torch.eye(size)[index][None]

    class Says:
        def __init__(self, kind, color, texture):
            self.values = kind, color, texture

        def kind(self, _):
            return one_hot(len(KINDS) + 1, KINDS.index(self.values[0]) if self.values[0] else len(KINDS))

        def color(self, _, kind):
            return one_hot(len(COLORS), list(COLORS).index(self.values[1]))

        def texture(self, _, color, kind):
            return one_hot(1 + len(TEXTURES), (None, *TEXTURES).index(self.values[2]))

    from benchmarks.cases import Expected

    expected = Expected("object0", "hat", "red", "striped", (0, 0, 1))
    assert metrics.is_right(Says("hat", "red", "striped"), None, expected)
    assert not metrics.is_right(Says("cap", "red", "striped"), None, expected)
    assert not metrics.is_right(Says("hat", "blue", "striped"), None, expected)
    assert not metrics.is_right(Says("hat", "red", None), None, expected)
    assert not metrics.is_right(Says(None, "red", "striped"), None, expected)
    assert metrics.is_right(Says("hat", "red", "striped"), None, Expected(None, "hat", None, None, (0, 0, 1)))


# Runner, tables, tuning


@pytest.fixture
def tiny(pipe, monkeypatch):
    """The runner on the tiny random pipeline."""
    monkeypatch.setattr(run, "load_pipe", lambda *_: pipe)
    for module in (softness, tune):
        monkeypatch.setattr(module, "load_pipe", lambda *_: pipe)
    return pipe


@pytest.fixture(scope="module")
def tiny_cases(tmp_path_factory):
    """Two cases whose words the tiny pipeline knows."""
    folder = tmp_path_factory.mktemp("cases")
    cases = []
    for index, split in enumerate(draw.SPLITS):
        case = draw.draw_case("dev", split, "object", index, size=64)
        region = Region("object0", case.regions[0].mask, "cat", "dog", ("dog", 0))
        hat = Region("object1", case.regions[1].mask, "straw hat", "red hat", None, (("red", 0),))
        prompts = "a cat wearing a straw hat", "a dog wearing a red hat"
        cases.append(Case(f"case{index}", split, "object", case.image, *prompts, (region, hat), case.ideal))
    save_cases(cases, folder)
    return folder


ONCE = "mde:optimization_iterations=1"
ONCE_FOLDER = ONCE.replace(":", "__")


def arguments(cases, out, *more):
    return ["--cases", str(cases), "--out", str(out), "--judge", "", "--steps", "4", *more]


def test_masks_may_be_found_by_the_source_words(tiny, tiny_cases, tmp_path):
    """Each region's mask is its source words'; of twins, which one word does not tell apart, it stays as drawn."""
    case = load_cases(tiny_cases)[0]
    inversion = tiny.invert(case.image, case.source_prompt, 2, method="direct")
    found = with_found_masks(tiny, case, inversion)
    for region, drawn in zip(found.regions, case.regions):
        assert np.array_equal(region.mask, tiny.generate_mask(inversion, drawn.source)) and region.name == drawn.name
    assert not np.array_equal(found.regions[0].mask, case.regions[0].mask)
    twins = replace(case, regions=tuple(replace(region, source="a") for region in case.regions))
    assert with_found_masks(tiny, twins, inversion).regions[0].mask is case.regions[0].mask
    run.main(arguments(tiny_cases, tmp_path, "--methods", ONCE, f"{ONCE},masks=found"))
    drawn, found = (
        (tmp_path / label / "case0.png").read_bytes() for label in (ONCE_FOLDER, f"{ONCE_FOLDER}_masks=found")
    )
    assert drawn != found


def test_run_then_tables(tiny, tiny_cases, tmp_path):
    variants = ["source", "vae", "none", "both", "both:optimization_iterations=1", "p2p:inversion=direct"]
    run.main(arguments(tiny_cases, tmp_path / "r", "--methods", *variants))
    results = tables.read_results(tmp_path / "r")
    assert len(results) == 2 * len(variants)
    by_label = {entry["label"]: entry for entry in results if entry["case"] == "case0"}
    assert by_label["source"]["unet_calls"] == by_label["vae"]["unet_calls"] == 0
    guided = max(1, round(0.4 * 4))
    assert by_label["both"]["unet_calls"] - by_label["none"]["unet_calls"] >= guided * 5
    fewer = by_label["both__optimization_iterations=1"]
    assert by_label["both"]["unet_calls"] - fewer["unet_calls"] == guided * 4
    assert by_label["both"]["machine"]["torch"] == torch.__version__

    tables.main(["--cases", str(tiny_cases), "--results", str(tmp_path / "r"), "--out", str(tmp_path)])
    text = (tmp_path / "tables.md").read_text()
    assert all(f"| {label} | 1 |" in text for label in by_label)
    assert {path.name for path in tmp_path.glob("*.png")} == {"grid_overlap.png", "grid_non_overlap.png", "cost.png"}
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(results)


def test_a_second_run_does_nothing_unless_settings_change(tiny, tiny_cases, tmp_path, monkeypatch):
    edits = []
    whole = run.edit
    monkeypatch.setattr(run, "edit", lambda *args: edits.append(args[1]) or whole(*args))
    cases = shutil.copytree(tiny_cases, tmp_path / "cases")
    for changed, expected in (([], 2), ([], 0), (["--steps", "5"], 2), (["--dtype", "bfloat16"], 2), ([], 2)):
        edits.clear()
        run.main(arguments(cases, tmp_path / "out", "--methods", "vae", *changed))
        assert len(edits) == expected
    Image.open(cases / "case1.png").rotate(180).save(cases / "case1.png")  # a case drawn anew
    edits.clear()
    run.main(arguments(cases, tmp_path / "out", "--methods", "vae"))
    assert len(edits) == 1


def test_a_changed_default_of_a_method_is_run_again(tiny, tiny_cases, tmp_path, monkeypatch):
    """Records carry all settings, not only those that differ from the method's own."""
    run.main(arguments(tiny_cases, tmp_path, "--methods", "none"))
    method = METHODS["none"]
    monkeypatch.setitem(METHODS, "none", replace(method, settings={**method.settings, "self_replace_steps": 0.0}))
    run.main(arguments(tiny_cases, tmp_path, "--methods", "none"))
    assert {entry["settings"]["self_replace_steps"] for entry in tables.read_results(tmp_path)} == {0.0}


@pytest.mark.slow
def test_tradeoff_counts_the_inversion_and_goes_on(tiny, tiny_cases, tmp_path, monkeypatch):
    command = ["--cases", str(tiny_cases), "--out", str(tmp_path), "--judge", "", "--steps", "5"]
    tradeoff.main([*command, "--iterations", "0", "2"])
    entries = json.loads((tmp_path / "case0.json").read_text())["entries"]
    calls = {(e["inversion"], e["steps"], e["iterations"]): e["unet_calls"] for e in entries}
    assert len(calls) == 3 * 2
    guided, source_passes, probes = 2, 4, 4  # of 5 steps: 0.4 and 0.8; the fingerprint's in inversion and edit
    assert calls["direct", 5, 0] == 5 + source_passes + 5 + probes
    assert calls["direct", 5, 2] == calls["direct", 5, 0] + 2 * guided
    assert calls["null_text", 5, 2] > calls["direct", 5, 2]
    rows = (tmp_path / "tradeoff.md").read_text().splitlines()
    assert len(rows) == 2 + len(calls) and all(row.split(" | ")[3:5] == ["2", "–"] for row in rows[2:])
    assert Image.open(tmp_path / "tradeoff.png").width > 0

    monkeypatch.setattr(tradeoff, "measure", lambda *args: pytest.fail("measured again"))
    tradeoff.main([*command, "--iterations", "0", "2"])


def test_a_limit_takes_the_first_cases_of_each_task(tiny_cases):
    cases = load_cases(tiny_cases)
    assert run.limited(cases, None) == cases
    assert len(run.limited(cases * 3, 2)) == 4


@pytest.mark.parametrize(
    "text,message",
    [("nothing", "no method 'nothing'"), ("mde:sharpness=1", "no setting 'sharpness'"), ("vae:x=1", "it has none")],
)
def test_unknown_methods_and_settings_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        run.parse_variant(text)
    method = Method(lambda pipe, case, steps, seed: None, "floor", "nothing")
    with pytest.raises(ValueError, match="no setting x"):
        method(None, None, 1, 0, x=1)


def test_a_variant_may_hold_a_list():
    label, name, settings, steps = run.parse_variant("guide_and_rescale:ratio=[0.2,0.5],guidance_scale=4")
    assert (name, settings) == ("guide_and_rescale", {"ratio": [0.2, 0.5], "guidance_scale": 4})
    assert steps is None and "/" not in label


def test_a_variant_may_have_steps_of_its_own(tiny, tiny_cases, tmp_path):
    run.main(arguments(tiny_cases, tmp_path, "--methods", "none", "none:steps=2"))
    by_label = {entry["label"]: entry for entry in tables.read_results(tmp_path)}
    assert {label: entry["steps"] for label, entry in by_label.items()} == {"none": 4, "none__steps=2": 2}
    assert by_label["none__steps=2"]["unet_calls"] < by_label["none"]["unet_calls"]


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(tmp_path):
    """Launched as two processes on a CPU: the same results, file by file."""
    cases = tmp_path / "cases"
    save_cases([draw.draw_case("dev", split, "color", 0, size=64) for split in draw.SPLITS], cases)
    results = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command = [*launch, "-m", "benchmarks.run", *arguments(cases, out, "--methods", "vae", "source")]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # another number rounds a pixel here and there differently
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=240, env=one_thread)
        found = tables.read_results(out)
        for entry in found:
            entry.pop("seconds")
            entry["machine"].pop("threads")
            assert entry["machine"].pop("processes") == processes  # each really took its share
        results.append(json.dumps(found))
        assert len(found) == 4
    assert results[0] == results[1]


def test_bootstrap_intervals_hold_the_mean_and_skip_nan():
    values = np.array([1.0, 2.0, 3.0, np.nan])
    mean, low, high = tables.bootstrap(values)
    assert mean == 2 and 1 <= low < mean < high <= 3
    assert all(np.isnan(tables.bootstrap(np.array([np.nan]))))
    assert tables.bootstrap(np.full(9, 4.0)) == (4, 4, 4)


def test_parts_of_the_edits_are_those_the_ceiling_shows_and_each_size(case):
    a, b, *rest = (region.name for region in case.regions)
    small = np.zeros_like(case.regions[0].mask)
    small[:2, :2] = True
    case = replace(case, regions=(replace(case.regions[0], mask=small), *case.regions[1:]))
    others = dict.fromkeys(rest, False)
    rows = [
        {"label": label, "case": case.name, "edits": edits}
        for label, edits in (("ideal_vae", {a: False, b: True, **others}), ("mde", {a: True, b: True, **others}))
    ]
    ceiling, mde = tables.with_parts(rows, [case])
    assert mde["of_ceiling"] == ceiling["of_ceiling"] == 1
    assert (mde["small"], mde["larger"]) == (1, 1 / (len(rest) + 1)) and ceiling["small"] == 0
    assert np.isnan(tables.with_parts(rows[1:], [case])[0]["of_ceiling"])


def test_the_ideal_is_left_out_where_there_is_none(tiny, tiny_cases, tmp_path):
    cases = [replace(one, ideal=None) if i else one for i, one in enumerate(load_cases(tiny_cases))]
    save_cases(cases, tmp_path / "cases")
    run.main(arguments(tmp_path / "cases", tmp_path / "r", "--methods", "ideal", "ideal_vae", "vae"))
    found = [(entry["label"], entry["case"]) for entry in tables.read_results(tmp_path / "r")]
    assert sorted(found) == [("ideal", "case0"), ("ideal_vae", "case0"), ("vae", "case0"), ("vae", "case1")]
    ideal = Image.open(tmp_path / "r" / "ideal" / "case0.png")
    assert np.array_equal(np.asarray(ideal), np.asarray(cases[0].ideal))


def test_the_curve_has_a_point_per_softness(tiny, tiny_cases, tmp_path, capsys):
    folders = [tmp_path / "sharp", tmp_path / "soft"]
    for folder, factor in zip(folders, ("1", "0.5")):
        run.main(arguments(tiny_cases, folder, "--methods", "none", ONCE, "--soften", factor))
    command = ["--cases", str(tiny_cases), "--steps", "3", "--out", str(tmp_path), "--results"]
    softness.main([*command, *map(str, folders)])
    *_, sharp, soft = (tmp_path / "softness.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in (sharp, soft)] == ["| 1", "| 0.5"] and f" | {ONCE_FOLDER} | " in sharp
    assert Image.open(tmp_path / "softness.png").width > 0
    for path in (folders[1] / "none").glob("*"):
        path.replace(folders[0] / ONCE_FOLDER / f"soft_{path.name}")
    with pytest.raises(ValueError, match="sharp holds results of 2 models and softnesses"):
        softness.main([*command, str(folders[0])])


def test_a_gain_is_told_case_by_case():
    rows = [
        {"label": label, "case": case, "success": value, "in_psnr": 10 * value, "bg_psnr": 30.0}
        for label, case, value in (("none", "x", 0.0), ("mde", "x", 0.5), ("none", "y", 1.0), ("mde", "y", 1.0))
    ]
    found = softness.point([*rows, {**rows[0], "case": "z"}], ["mde"])
    assert found["n"] == 2 and found["base"][0] == 0.5
    assert found["gains"]["mde"]["success"][0] == 0.25 and found["gains"]["mde"]["in_psnr"][0] == 2.5


def test_paired_differences_use_shared_cases_alone():
    rows = [
        {"label": label, "case": case, "clip": value}
        for label, case, value in (("a", "x", 3.0), ("b", "x", 1.0), ("a", "y", 9.0))
    ]
    assert tables.paired(rows, "a", "b", "clip")[0] == 2


def test_methods_are_compared_on_the_cases_that_all_have():
    rows = [
        {"label": label, "case": case, "success": value, "clip": value, "in_psnr": value, "bg_psnr": float("nan")}
        for label, case, value in (("mde", "x", 1.0), ("none", "x", 0.25), ("mde", "y", 0.0), ("oal", "y", 0.0))
    ]
    assert [(row["label"], row["case"]) for row in tables.of_methods(rows, ["mde", "none"])] == [
        ("mde", "x"),
        ("none", "x"),
    ]
    text = tables.differences(rows, ["none", "oal"])
    assert "| none | 1 | +75.0 [+75.0, +75.0] | +0.750" in text and "| oal | 1 | +0.0" in text and "–" in text
    with pytest.raises(ValueError, match="no results of cds; there are mde, none, oal"):
        tables.of_methods(rows, ["mde", "cds"])
    with pytest.raises(ValueError, match="no case in common"):
        tables.of_methods(rows, ["none", "oal"])


def test_tuning_tries_its_own_settings_first_and_no_draw_twice():
    found = tune.trials("mde", 10)
    assert found[0] == {} and len(found) == 10
    assert all(one not in found[:index] for index, one in enumerate(found))
    assert all(value in METHODS["mde"].grid[key] for one in found for key, value in one.items())
    assert len(tune.trials("vae", 10)) == 1


def test_tuning_writes_its_trials_best_first(tiny, tiny_cases, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "score", lambda figures: figures[0]["bg_psnr"])
    more = ["--methods", "p2p_blend", "--trials", "2"]
    tune.main(arguments(tiny_cases, tmp_path, *more))
    found = json.loads((tmp_path / "p2p_blend.json").read_text())
    assert len(found) == 2 and found[0]["score"] >= found[1]["score"]


def test_every_setting_has_values_to_try_that_it_accepts():
    for name, method in METHODS.items():
        assert method.grid.keys() <= method.settings.keys(), name
        assert method.group in tables.GROUPS and method.source


def test_the_attention_figure(tiny, tiny_cases, tmp_path):
    attention.figure(tiny, load_cases(tiny_cases)[0], 4, tmp_path / "attention.png")
    assert Image.open(tmp_path / "attention.png").size[0] > 300


def test_shares_of_attention(tiny, tiny_cases):
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    assert attention.in_mask(np.ones((4, 4)), mask) == 0.5
    assert attention.in_mask(np.eye(4) * mask[::2, ::2], mask) == 1.0

    rows = attention.shares(tiny, load_cases(tiny_cases), 4).splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(attention.SETTINGS)
    table = [[float(cell) for cell in row.strip("| ").split(" | ")[1:]] for row in rows]
    none, both = table[0], table[-1]
    assert both[0] > none[0] and both[1] > none[1]  # what the losses are for, on any model


# Real data


def picture(path, size=(40, 30), value=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


def mask(path, box, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = Image.new("L", size)
    drawn.paste(255, box)
    drawn.save(path)


def test_lomoe_bench(tmp_path):
    picture(tmp_path / "images/0.png")
    mask(tmp_path / "masks/0_0.png", (6, 2, 14, 20))
    mask(tmp_path / "masks/0_1.png", (24, 2, 34, 20))
    record = {"image_path": "images/0.png", "mask_path": '"masks/0_0.png" "masks/0_1.png"'}
    record["fg_prompt"] = '"a red apple" "a silver mug"'
    (tmp_path / "LoMOE.json").write_text(json.dumps({"00": record}))
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils/mask_orig_prompts.txt").write_text('"an orange" "a mug"\n')
    (tmp_path / "utils/target_prompts.txt").write_text("a red apple beside a silver mug\n")
    convert.main(["lomoe", str(tmp_path), "--size", "32", "--out", str(tmp_path / "out")])
    (case,) = load_cases(tmp_path / "out")
    assert case.source_prompt == "an orange beside a mug"
    assert case.object_masks.keys() == {("apple", 0)}
    assert case.attribute_masks.keys() == {("red", 0), ("silver", 0)}
    assert case.image.size == (32, 32) and case.split == "non_overlap"
    (row,) = read_rows(str(tmp_path / "out" / "edits.jsonl"), {})  # the same for `mde-edit batch`
    assert row.error is None and row.name == case.name and row.args.prompt == case.target_prompt
    first, second = (str(tmp_path / "out" / f"lomoe_000_object{index}.png") for index in (0, 1))
    assert row.args.object == {"apple:0": [first]} and row.args.attribute == {"red:0": [first], "silver:0": [second]}
    record["fg_prompt"] = '"a red apple"'
    (tmp_path / "LoMOE.json").write_text(json.dumps({"00": record}))
    with pytest.raises(ValueError, match="2 masks, 2 source and 1 target"):
        list(convert.lomoe(tmp_path, 32))


def test_oir_bench(tmp_path):
    picture(tmp_path / "OIR/image.png", (30, 30))
    mask(tmp_path / "OIR/mask/dumplings.png", (2, 2, 14, 20), (30, 30))
    mask(tmp_path / "OIR/mask/chopsticks.png", (14, 2, 28, 20), (30, 30))
    entry = {
        "image_path": "OIR/image.png",
        "origin_prompt": "a bowl of dumplings and chopsticks",
        "target_prompt": "a bowl of rice and a silver knife",
        "origin_change": ["dumplings", "chopsticks"],
        "prompt_change": ["rice", "a silver knife"],
        "prompt_change_mask": ["OIR/mask/dumplings.png", "OIR/mask/chopsticks.png"],
    }
    (tmp_path / "OIR/configs").mkdir()
    path = tmp_path / "OIR/configs/multi_object.yaml"
    path.write_text(yaml.safe_dump({"multi_object": entry}))
    convert.main(["oir", str(path), "--size", "30", "--out", str(tmp_path / "out")])
    (case,) = load_cases(tmp_path / "out")
    assert case.split == "overlap" and case.object_masks.keys() == {("rice", 0), ("knife", 0)}
    assert case.attribute_masks.keys() == {("silver", 0)}
    entry["prompt_change"] = ["pasta", "a silver knife"]
    path.write_text(yaml.safe_dump({"multi_object": entry}))
    with pytest.raises(ValueError, match="'pasta' does not stand in the target prompt"):
        list(convert.oir(path, 30))


def test_pie_bench_pp():
    """Records as its parquet files hold them."""
    drawn = io.BytesIO()
    Image.new("RGB", (512, 512), "gray").save(drawn, "JPEG")
    runs = " ".join(f"{512 * y + 128} 256" for y in range(256))  # the upper middle
    record = {
        "id": "000000000000",
        "image": {"bytes": drawn.getvalue(), "path": None},
        "source_prompt": "a [slanted] mountain bicycle beside a cat",
        "target_prompt": "a [rusty] mountain bicycle beside a [big dog]",
        "blended_words": '["bicycle,bicycle", "slanted,rusty", "cat,big dog", "x,not there"]',
        "mask": runs,
    }
    case = convert.pie_case(record, "0_random_140", 64)
    assert case.source_prompt == "a slanted mountain bicycle beside a cat" and case.name == "pie_000000000000"
    assert case.object_masks.keys() == {("rusty", 0), ("dog", 0)} and case.attribute_masks.keys() == {("big", 0)}
    expected = np.zeros((64, 64), bool)
    expected[:32, 16:48] = True
    assert all((region.mask == expected).all() for region in case.regions) and case.image.size == (64, 64)
    colored = convert.pie_case({**record, "blended_words": '["slanted,rusty"]'}, "6_change_attribute_color_40", 64)
    assert not colored.object_masks and colored.attribute_masks.keys() == {("rusty", 0)}
    assert convert.pie_case({**record, "blended_words": "[]"}, "9_change_style_80", 64) is None


def test_pie_bench_pp_is_read_from_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    drawn = io.BytesIO()
    Image.new("RGB", (512, 512)).save(drawn, "PNG")
    record = {"id": "1", "image": {"bytes": drawn.getvalue()}, "source_prompt": "a cat", "target_prompt": "a [dog]"}
    record |= {"blended_words": '["cat,dog"]', "mask": "0 512"}
    (tmp_path / "1_change_object_80").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "1_change_object_80" / "V1-00000.parquet")
    convert.main(["pie", str(tmp_path), "--size", "64", "--out", str(tmp_path / "out")])
    (case,) = load_cases(tmp_path / "out")
    assert case.object_masks.keys() == {("dog", 0)}


def test_coco(tmp_path):
    picture(tmp_path / "images/1.png", (60, 40))
    categories = [
        {"id": index, "name": name, "supercategory": "animal"}
        for index, name in enumerate(("cat", "dog", "bear", "cow"))
    ]

    def annotation(category, left):
        box = [left, 5, left + 12, 5, left + 12, 25, left, 25]
        return {
            "image_id": 1,
            "category_id": category,
            "segmentation": [box],
            "area": 240,
            "bbox": [left, 5, 12, 20],
            "iscrowd": 0,
        }

    data = {
        "images": [{"id": 1, "file_name": "1.png", "width": 60, "height": 40}],
        "categories": categories,
        "annotations": [annotation(1, 40), annotation(0, 4)],
    }
    (tmp_path / "instances.json").write_text(json.dumps(data))
    command = ["coco", str(tmp_path / "instances.json"), "--images", str(tmp_path / "images"), "--size", "60"]
    convert.main([*command, "--out", str(tmp_path / "out")])
    (case,) = load_cases(tmp_path / "out")
    assert case.source_prompt == "a photo of a cat and a dog"
    assert {word for word, _ in case.object_masks} == {"bear", "cow"}
    left = case.regions[0]
    assert left.source == "cat" and np.nonzero(left.mask)[1].max() < 30


def test_softening_spreads_the_attention_of_words_and_is_recorded(tiny, tiny_cases, tmp_path, components):
    unet = copy.deepcopy(components["unet"])
    names = frozenset(name for name in unet.attn_processors if ".attn2." in name)

    def peak():
        record = Record(names, frozenset())
        with attention_control(unet), torch.no_grad():
            unet(torch.ones(1, 4, 8, 8), 1, tiny.embed("a cat"), cross_attention_kwargs={"control": record})
        return torch.stack([maps.amax(-1).mean() for maps in record.cross.values()]).mean().item()

    sharp = peak()
    run.soften(unet, 0.2)
    assert 1 / 77 < peak() < 0.8 * sharp
    run.soften(unet, 0.0)
    assert peak() == pytest.approx(1 / 77)
    run.main(arguments(tiny_cases, tmp_path / "out", "--methods", "vae", "--limit", "1", "--soften", "0.5"))
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/*.json")]
    assert records and all(record["soften"] == 0.5 for record in records)
