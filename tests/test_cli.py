"""The command line on the embedded model, few steps."""

import json
import os
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mde_edit import MDEEditPipeline
from mde_edit.tools import cli
from mde_edit.tools.cli import main
from mde_edit.tools.measure import as_array, psnr
from mde_edit.tools.options import OPTIONS, read_arguments


ROOT = Path(__file__).parent.parent
CASE = ROOT / "examples" / "cat_straw_hat"
FAST = [
    "--model",
    str(ROOT / "emoji_ldm"),
    "--steps",
    "4",
    "--optimization-iterations",
    "1",
    "--optimization-steps",
    "0.5",
]


def test_edit_writes_its_four_files(tmp_path, capsys, caplog):
    assert main(["edit", "--config", str(CASE / "edit.json"), *FAST, "--method", "direct", "--out", str(tmp_path)]) == 0
    assert "edited.png" in capsys.readouterr().out
    assert "float32" not in caplog.text  # diffusers warns where a model is cast
    edited = PIL.Image.open(tmp_path / "edited.png")
    assert (
        edited.size == PIL.Image.open(CASE / "image.png").size == PIL.Image.open(tmp_path / "reconstruction.png").size
    )
    sheet = np.asarray(PIL.Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert min(sheet.shape[:2]) > 300 and sheet.std() > 20
    run = json.loads((tmp_path / "run.json").read_text())
    probe = 2  # small passes that tell the model, in each
    assert run["inversion"]["forwards"] == probe + 4 and run["guidance_iterations"] == 2
    edit = {"forwards": probe + 3 + 2 + 4, "rows": probe + 3 + 2 + 8, "whole": probe + 3 + 4}
    assert edit.items() <= run["edit"].items()
    assert run["settings"]["optimization_iterations"] == 1 and run["settings"]["steps"] == 4
    assert run["settings"]["max_update"] == 0.02 and run["settings"]["object"] == {"dog": [str(CASE / "dog.png")]}
    x, y = (as_array(PIL.Image.open(f)) for f in (CASE / "image.png", tmp_path / "edited.png"))
    outside = np.ones(x.shape[:2], bool)
    for name in ("dog", "red"):
        outside &= np.asarray(PIL.Image.open(CASE / f"{name}.png")) < 128
    assert run["background_psnr"] == round(psnr(x, y, outside), 2)
    assert run["background_psnr_strict"] > run["background_psnr"]


def test_a_word_with_an_object_and_an_attribute_mask_keeps_both(tmp_path, capsys):
    masks = ["--object", f"dog={CASE / 'dog.png'}", "--attribute", f"dog={CASE / 'red.png'}"]
    image = ["--image", str(CASE / "image.png"), "--source-prompt", "a cat", "--prompt", "a dog"]
    assert main(["edit", *FAST, *image, *masks, "--method", "direct", "--out", str(tmp_path)]) == 0
    x, y = (as_array(PIL.Image.open(f)) for f in (CASE / "image.png", tmp_path / "edited.png"))
    outside = np.all([np.asarray(PIL.Image.open(CASE / f"{name}.png")) < 128 for name in ("dog", "red")], axis=0)
    assert json.loads((tmp_path / "run.json").read_text())["background_psnr"] == round(psnr(x, y, outside), 2)


def test_an_inversion_is_made_once_and_used_again(tmp_path, capsys):
    image = ["--image", str(CASE / "image.png"), "--source-prompt", "a cat wearing a straw hat"]
    file = tmp_path / "cat.safetensors"
    assert main(["invert", *FAST[:4], *image, "--method", "direct", "--out", str(file)]) == 0
    mask = f"dog={CASE / 'dog.png'}"
    edit = ["edit", *FAST[:2], *FAST[4:], "--prompt", "a dog wearing a straw hat", "--object", mask]
    assert main([*edit, "--inversion", str(file), "--out", str(tmp_path / "again")]) == 0
    assert main([*edit, *FAST[2:4], *image, "--method", "direct", "--out", str(tmp_path / "once")]) == 0
    again, once = (PIL.Image.open(tmp_path / name / "edited.png").tobytes() for name in ("again", "once"))
    assert again == once
    run = json.loads((tmp_path / "again" / "run.json").read_text())
    assert run["inversion"] is None and run["reconstruction_psnr"] is None
    # the record is of what was used, which the file brought
    used = {"method": "direct", "steps": 4, "guidance_scale": 7.5, "source_prompt": image[3]}
    assert used.items() <= run["settings"].items()
    scaled = [*edit, "--inversion", str(file), "--guidance-scale", "3", "--out", str(tmp_path / "scaled")]
    assert main(scaled) == 0
    assert PIL.Image.open(tmp_path / "scaled" / "edited.png").tobytes() != again
    assert json.loads((tmp_path / "scaled" / "run.json").read_text())["settings"]["guidance_scale"] == 3
    # a flag overrides what the config says of the picture
    config = ["edit", "--config", str(CASE / "edit.json"), "--model", FAST[1], "--out", str(tmp_path / "config")]
    assert main([*config, "--inversion", str(file), "--guidance-scale", "7.5", *FAST[4:]]) == 0


def test_a_preset_is_overridden_by_flags(tmp_path, capsys):
    edit = ["edit", "--config", str(CASE / "edit.json"), *FAST, "--method", "direct"]
    variants = {
        "preset": ["--preset", "released"],
        "spelled_out": ["--oal-weight", "0", "--ccl-form", "spatial_ratio", "--ccl-weight", "1.5"],
        "overridden": ["--preset", "released", "--ccl-weight", "0"],
    }
    for name, flags in variants.items():
        assert main([*edit, *flags, "--out", str(tmp_path / name)]) == 0
    last = {name: json.loads((tmp_path / name / "run.json").read_text())["losses"][-1:] for name in variants}
    assert last["preset"][0]["capped"] == 0 and "oal" not in last["preset"][0]
    assert last["preset"][0]["loss"] == pytest.approx(1.5 * last["preset"][0]["ccl"])
    assert last["spelled_out"][0]["capped"] > 0  # the preset takes the cap away as well
    assert last["overridden"] == []


def test_several_masks_for_one_word_are_their_union(tmp_path, capsys):
    edit = ["edit", "--config", str(CASE / "edit.json"), *FAST, "--method", "direct"]
    dog, red = (PIL.Image.open(CASE / f"{name}.png").convert("L") for name in ("dog", "red"))
    PIL.Image.fromarray(np.maximum(dog, red)).save(tmp_path / "dog=both.png")  # the first "=" ends the word
    assert main([*edit, "--object", f"dog={tmp_path / 'dog=both.png'}", "--out", str(tmp_path / "drawn")]) == 0
    both = ["--object", f"dog={CASE / 'dog.png'}", "--object", f"dog={CASE / 'red.png'}"]
    assert main([*edit, *both, "--out", str(tmp_path / "listed")]) == 0
    drawn, listed = (PIL.Image.open(tmp_path / name / "edited.png").tobytes() for name in ("drawn", "listed"))
    assert drawn == listed


def test_a_region_can_be_a_word_of_the_source_prompt(tmp_path, capsys):
    config = ["--config", str(CASE / "edit.json"), *FAST, "--method", "direct"]
    assert main(["edit", *config, "--object", "dog=word:cat", "--out", str(tmp_path / "word")]) == 0
    file = tmp_path / "cat.safetensors"
    picture = ["--image", str(CASE / "image.png"), "--source-prompt", "a cat wearing a straw hat"]
    assert main(["invert", *FAST[:4], *picture, "--method", "direct", "--out", str(file)]) == 0
    mask, again = tmp_path / "masks" / "cat.png", tmp_path / "masks" / "again.png"
    assert main(["mask", *FAST[:4], *picture, "--region", "word:cat", "--out", str(mask)]) == 0
    assert main(["mask", *FAST[:2], "--inversion", str(file), "--region", "word:cat:0", "--out", str(again)]) == 0
    pipe = MDEEditPipeline.from_pretrained(FAST[1])
    expected = pipe.generate_mask(pipe.load_inversion(file), "cat")
    assert np.array_equal(np.asarray(PIL.Image.open(mask)) > 127, expected) and 0 < expected.mean() < 1
    assert mask.read_bytes() == again.read_bytes()
    marked = np.asarray(PIL.Image.open(mask.with_name("cat_overlay.png"))).astype(float)
    assert marked[expected].mean() > marked[~expected].mean() + 20
    assert main(["edit", *config, "--object", f"dog={mask}", "--out", str(tmp_path / "drawn")]) == 0
    word, drawn = (PIL.Image.open(tmp_path / name / "edited.png").tobytes() for name in ("word", "drawn"))
    assert word == drawn


def test_a_region_can_be_points_a_box_or_what_a_segmenter_finds(tmp_path, monkeypatch, capsys):
    asked = []

    def segmenter(image, **given):
        asked.append((image.size, image.mode, given))
        mask = np.zeros(image.size[::-1], bool)
        mask[40:90, 30:80] = True
        return mask

    monkeypatch.setattr(
        cli, "load_segmenter", lambda name, detector, device: asked.append((name, detector)) or segmenter
    )
    picture = ["--image", str(CASE / "image.png"), "--segmenter", "sam", "--detector", "owl"]
    for region in ("point:12,80", "point:12,80,50,60.5", "box:1,2,30,40", "find:straw hat"):
        assert main(["mask", *picture, "--region", region, "--out", str(tmp_path / "mask.png")]) == 0
    size = PIL.Image.open(CASE / "image.png").size
    given = [entry[2] for entry in asked if len(entry) == 3]
    assert given == [
        {"points": [(12, 80)]},
        {"points": [(12, 80), (50, 60.5)]},
        {"box": (1, 2, 30, 40)},
        {"word": "straw hat"},
    ]
    assert asked[0] == ("sam", "owl") and asked[1][:2] == (size, "RGB")
    asked.clear()
    edit = ["edit", "--config", str(CASE / "edit.json"), *FAST, "--method", "direct", "--segmenter", "sam"]
    both = ["--object", "dog=point:12,80", "--object", "dog=box:1,2,30,40"]
    assert main([*edit, *both, "--out", str(tmp_path / "clicked")]) == 0
    assert main([*edit, "--object", f"dog={tmp_path / 'mask.png'}", "--out", str(tmp_path / "drawn")]) == 0
    clicked, drawn = (PIL.Image.open(tmp_path / name / "edited.png").tobytes() for name in ("clicked", "drawn"))
    assert clicked == drawn and [len(entry) for entry in asked] == [2, 3, 3]  # loaded once


def test_a_transparent_picture_is_put_on_white(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    PIL.Image.fromarray(pixels, "RGBA").save(tmp_path / "x.png")
    image = cli.read_picture("image", str(tmp_path / "x.png"))
    pipe = MDEEditPipeline.from_pretrained(FAST[1])
    assert (pipe.read_image(image) == 1).all()


def test_flags_override_the_config_and_paths_are_relative_to_it(tmp_path):
    args = read_arguments(
        ["edit", "--config", str(CASE / "edit.json"), "--out", "x", "--guidance-scale", "3", "--object", "dog:1=m.png"]
    )
    assert args.guidance_scale == 3 and args.image == str(CASE / "image.png") and args.steps == 50
    assert args.object == {"dog:1": ["m.png"]} and args.attribute == {"red": [str(CASE / "red.png")]}


def test_null_in_a_config_is_none_where_none_means_something(tmp_path):
    config = tmp_path / "edit.json"
    base = {"image": "https://example.org/cat.png", "source_prompt": "a cat", "prompt": "a dog", "out": "x"}
    config.write_text(json.dumps({**base, "max_update": None, "height": None}), encoding="utf-8-sig")
    args = read_arguments(["edit", "--config", str(config)])
    assert args.max_update is None and args.height is None and args.image == "https://example.org/cat.png"
    assert read_arguments(["edit", "--config", str(config), "--max-update", "0.1"]).max_update == 0.1
    config.write_text(json.dumps({**base, "preset": "paper", "ccl_weight": 1}))
    args = read_arguments(["edit", "--config", str(config), "--max-update", "0.1", "--oal-weight", "2.0"])
    assert (args.ccl_form, args.ccl_weight, args.max_update, args.oal_weight) == ("token_ratio", 1, 0.1, 2)
    config.write_text(json.dumps(base))
    assert read_arguments(["edit", "--config", str(config), "--max-update", "none"]).max_update is None


# Mistakes: one line that names the setting, exit code 2, before the model is loaded or at least before any pass


class Reached(Exception):
    """The command got as far as the model."""


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Runs a command that is to be refused; gives the line."""

    def load(args):
        raise Reached

    def refused(argv, loads_the_model=False, code=2):
        if not loads_the_model:
            monkeypatch.setattr(cli, "load_pipeline", load)
        capsys.readouterr()
        assert main([str(word) for word in argv]) == code
        line = capsys.readouterr().err.strip().splitlines()[-1]  # before it, what loading a model shows
        assert line.startswith("mde-edit: ") and len(line) < 600
        return line

    return refused


EDIT = ["edit", "--config", CASE / "edit.json", "--out", "x"]


@pytest.mark.parametrize(
    "argv,message",
    [
        (["edit", "--out", "x"], "missing --prompt, --image, --source-prompt"),
        (["invert", "--image", "x"], "missing --out, --source-prompt"),
        (["edit", "--object", "dog"], "write WORD=MASK.png"),
        (["edit", "--object", "=dog.png"], "write WORD=MASK.png"),
        (["edit", "--ccl-form", "eq6"], "--ccl-form: invalid choice: 'eq6'"),
        (["edit", "--dtype", "fp16"], "--dtype: invalid choice: 'fp16'"),
        (["edit", "--preset", "Paper"], "--preset: invalid choice: 'Paper'"),
        ([], "the following arguments are required: command"),
        (["paint"], "invalid choice: 'paint'"),
        ([*EDIT, "--steps", "many"], "`steps` is 'many': use a whole number of at least 1"),
        ([*EDIT, "--steps", "2.5"], "`steps` is 2.5"),
        ([*EDIT, "--steps", "0"], "`steps` is 0"),
        ([*EDIT, "--steps", "none"], "`steps` is None"),
        ([*EDIT, "--oal-weight", "-1"], "`oal_weight` is -1"),
        ([*EDIT, "--max-update", "nan"], "`max_update` is nan"),
        ([*EDIT, "--seed", "-1"], "`seed` is -1"),
        ([*EDIT, "--seed", str(2**64)], "`seed` is 18446744073709551616"),
        ([*EDIT, "--height", "0"], "`height` is 0"),
        ([*EDIT, "--image", ""], "`image` is '': use a text"),
        ([*EDIT, "--image", "missing.png"], "`image` 'missing.png'"),
        ([*EDIT, "--image", CASE / "edit.json"], "`image` .*cannot identify"),
        ([*EDIT, "--object", "dog=missing.png"], "`object` `dog` 'missing.png'"),
        ([*EDIT, "--attribute", f"red={CASE / 'edit.json'}"], "`attribute` `red`.*cannot identify"),
        ([*EDIT, "--inversion", "missing.safetensors"], "`inversion` 'missing.safetensors': .*[Nn]o such file"),
        ([*EDIT, "--inversion", CASE / "image.png"], "`inversion` .*is not an inversion"),
        ([*EDIT, "--inversion", "x", "--steps", "4"], "--steps: the file of --inversion has its own"),
        ([*EDIT, "--inversion", "x", "--image", "y", "--width", "8"], "--image, --width: the file of --inversion"),
        ([*EDIT, "--object", "dog=word:"], "`object` `dog` 'word:': name what it is, as in word:cat"),
        ([*EDIT, "--object", "dog=point:1"], "`object` `dog` 'point:1': write pixels, as in point:120,80"),
        ([*EDIT, "--object", "dog=point:1,x"], "`object` `dog` 'point:1,x': write pixels"),
        ([*EDIT, "--attribute", "red=box:1,2,3"], "`attribute` `red` 'box:1,2,3': write pixels"),
        ([*EDIT, "--object", "dog=point:1,2"], "`object` `dog` 'point:1,2' needs --segmenter"),
        (
            ["mask", "--image", CASE / "image.png", "--region", "box:1,2,3,4", "--out", "x"],
            "'box:1,2,3,4' needs --segm",
        ),
        (["mask", "--image", CASE / "image.png", "--region", "word:cat", "--out", "x"], "missing --source-prompt"),
        (["mask", "--out", "x"], "missing --region, --image, --source-prompt"),
        ([*EDIT, "--out", CASE / "image.png"], "`out` .*image.png is no folder"),
        ([*EDIT, "--out", CASE / "image.png" / "x"], "`out` .*image.png is no folder"),
        (["invert", "--image", CASE / "image.png", "--source-prompt", "a", "--out", CASE], "`out` .*is a folder"),
        (["edit", "--config", "missing.json"], "`config` 'missing.json' cannot be read: .*[Nn]o such file"),
        (["edit", "--config", CASE / "image.png"], "`config` .*image.png' cannot be read"),
    ],
    ids=lambda value: " ".join(map(str, value[-2:])) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_two(refused, argv, message):
    assert re.search(message, refused(argv))


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--prompt", "a tiger"], "'dog' is not in the prompt 'a tiger'"),
        (["--object", "dog=word:lion"], r"object_masks\['dog'\] names no word of the source prompt: 'lion' is not in"),
        (["--source-prompt", "cat " * 90], "has 90 tokens"),
        (["--object", f"dog={ROOT / 'examples' / 'strip.png'}"], "object_masks.'dog'"),
        (["--height", "3"], "`height` is 3"),
        (["--steps", "1001"], "from 1 to 1000"),
        (["--attention-resolution", "7"], "`attention_resolution` is 7"),
        (["--device", "toaster"], "`device` 'toaster'"),
        (["--device", "meta"], "`device` 'meta'"),
        (["--model", "no_such_folder/at_all/here"], "`model` 'no_such_folder/at_all/here'"),
        (["--model", CASE], "`model` .*cat_straw_hat"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_only_the_model_can_tell_is_refused_before_any_pass(refused, tmp_path, monkeypatch, argv, message):
    def no_pass(*_, **__):
        raise AssertionError("a pass was made")

    monkeypatch.setattr("diffusers.UNet2DConditionModel.forward", no_pass)
    line = refused(["edit", "--config", CASE / "edit.json", *FAST, *argv, "--out", tmp_path / "out"], True)
    assert re.search(message, line) and not (tmp_path / "out").exists()


def test_a_missing_matplotlib_is_told_before_the_inversion(refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'mde-edit[demo]'" in refused(EDIT)


@pytest.mark.parametrize(
    "text,message",
    [
        ('{"promt": "a dog"}', "unknown settings: promt"),
        ('{"config": "x"}', "unknown settings: config"),
        ('{"command": "edit"}', "unknown settings: command"),
        ("{", "cannot be read: Expecting property name"),
        ("[" * 100_000, "cannot be read"),
        ('{"steps": ' + "9" * 5000 + "}", "cannot be read"),
        ("[1]", r"holds \[1\], not settings by name"),
        ("null", "holds None"),
        ('{"steps": "4"}', "`steps` is '4'"),
        ('{"steps": true}', "`steps` is True"),
        ('{"steps": 1e999}', "`steps` is inf"),
        ('{"prompt": 5}', "`prompt` is 5: use a text"),
        ('{"prompt": ["a"]}', r"`prompt` is \['a'\]"),
        ('{"preset": "Paper"}', "`preset` is 'Paper': choose one of 'paper'"),
        ('{"dtype": "fp16"}', "`dtype` is 'fp16': choose one of 'float32'"),
        ('{"object": "dog.png"}', "`object` is 'dog.png': use words and masks"),
        ('{"object": {"dog": 5}}', "`object` has 5 for 'dog'"),
        ('{"object": {"dog": []}}', r"`object` has \[\] for 'dog'"),
        ('{"object": {"dog": "a.png", "dog": "b.png"}}', "'dog' stands there twice"),
        ('{"inversion": "a", "image": "b", "prompt": "c", "out": "d"}', "--image: the file of --inversion has its own"),
    ],
    ids=lambda text: text[:30],
)
def test_a_wrong_config_is_one_line(refused, tmp_path, text, message):
    (tmp_path / "edit.json").write_text(text)
    assert re.search(message, refused(["edit", "--config", tmp_path / "edit.json"]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(
    st.dictionaries(st.sampled_from(sorted(OPTIONS["edit"])) | st.text(max_size=5), JSON, max_size=3),
    st.none() | st.integers(0, 200),
)
@settings(
    max_examples=int(os.environ.get("FUZZ", 150)),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_config_is_used_or_refused_by_name(refused, tmp_path, config, cut):
    """`make fuzz` reads ten thousand."""
    base = json.loads((CASE / "edit.json").read_text()) | {"out": str(tmp_path / "out")}
    for name in ("image", "object", "attribute"):
        value = base[name]
        base[name] = {k: str(CASE / v) for k, v in value.items()} if isinstance(value, dict) else str(CASE / value)
    text = json.dumps(base | config)
    (tmp_path / "edit.json").write_text(text[:cut])
    try:
        line = refused(["edit", "--config", tmp_path / "edit.json"])
    except Reached:
        return
    assert (
        "cannot be read" in line
        if cut is not None
        else any(name.replace("_", "-") in line.replace("_", "-") for name in [*config, "unknown settings"])
    )
