"""The command line on the embedded model, few steps."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from mde_edit.tools.cli import main, read_arguments
from mde_edit.tools.measure import as_array, psnr


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


def test_edit_writes_its_four_files(tmp_path, capsys):
    assert main(["edit", "--config", str(CASE / "edit.json"), *FAST, "--method", "direct", "--out", str(tmp_path)]) == 0
    assert "edited.png" in capsys.readouterr().out
    edited = PIL.Image.open(tmp_path / "edited.png")
    assert (
        edited.size == PIL.Image.open(CASE / "image.png").size == PIL.Image.open(tmp_path / "reconstruction.png").size
    )
    sheet = np.asarray(PIL.Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert min(sheet.shape[:2]) > 300 and sheet.std() > 20
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["inversion"]["forwards"] == 4 and run["guidance_iterations"] == 2
    assert run["edit"]["forwards"] == 3 + 2 + 4 and run["edit"]["rows"] == 3 + 2 + 8 and run["edit"]["whole"] == 3 + 4
    assert run["settings"]["optimization_iterations"] == 1 and run["settings"]["steps"] == 4
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
    model = FAST[:4]
    assert main(["invert", *model, *image, "--method", "direct", "--out", str(file)]) == 0
    mask = f"dog={CASE / 'dog.png'}"
    edit = ["edit", *FAST, "--prompt", "a dog wearing a straw hat", "--object", mask]
    assert main([*edit, "--inversion", str(file), "--out", str(tmp_path / "again")]) == 0
    assert main([*edit, *image, "--method", "direct", "--out", str(tmp_path / "once")]) == 0
    again, once = (PIL.Image.open(tmp_path / name / "edited.png").tobytes() for name in ("again", "once"))
    assert again == once
    assert json.loads((tmp_path / "again" / "run.json").read_text())["inversion"] is None


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


def test_a_mistake_is_one_line_and_exit_code_one(tmp_path, capsys):
    bad = [
        "edit",
        "--config",
        str(CASE / "edit.json"),
        *FAST,
        "--method",
        "direct",
        "--prompt",
        "a tiger",
        "--out",
        str(tmp_path),
    ]
    assert main(bad) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mde-edit: 'dog' is not in the prompt 'a tiger'")
    assert not (tmp_path / "edited.png").exists()


def test_flags_override_the_config_and_paths_are_relative_to_it(tmp_path):
    args = read_arguments(
        ["edit", "--config", str(CASE / "edit.json"), "--out", "x", "--guidance-scale", "3", "--object", "dog:1=m.png"]
    )
    assert args.guidance_scale == 3 and args.image == str(CASE / "image.png") and args.steps == 50
    assert args.object == {"dog:1": "m.png"} and args.attribute == {"red": str(CASE / "red.png")}


@pytest.mark.parametrize(
    "argv,message",
    [
        (["edit", "--out", "x"], "missing --image, --source-prompt, --prompt"),
        (["invert", "--image", "x"], "missing --out, --source-prompt"),
        (["edit", "--object", "dog"], "write WORD=MASK.png"),
        (["edit", "--ccl-form", "eq6"], "invalid choice"),
    ],
)
def test_incomplete_commands_say_what_is_missing(argv, message, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    assert message in capsys.readouterr().err


def test_an_unknown_setting_in_the_config_is_refused(tmp_path, capsys):
    (tmp_path / "edit.json").write_text('{"promt": "a dog"}')
    with pytest.raises(SystemExit):
        main(["edit", "--config", str(tmp_path / "edit.json")])
    assert "unknown settings: promt" in capsys.readouterr().err
