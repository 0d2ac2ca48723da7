"""Every way in to SDXL's pipeline, each beside Stable Diffusion's in one process where they could meet: an edit is
deterministic, so every door must give the same bytes."""

import json
import shutil

import pytest
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from mde_edit import MDEEditPipeline, MDEEditXLPipeline
from mde_edit.tools import cli
from mde_edit.tools.publish import files_to_push

from .conftest import make_pipe
from .door_kit import ROOT, clone, run_script, short_edit
from .loopback_hub import Hub
from .test_doors import TRUST
from .tiny_xl import make_components, make_xl


@pytest.fixture(scope="module")
def models(tokenizer, components, tmp_path_factory):
    """A model of each family as anyone saves one."""
    folder = tmp_path_factory.mktemp("models")
    StableDiffusionPipeline(**make_pipe(components).components, requires_safety_checker=False).save_pretrained(
        folder / "sd"
    )
    make_xl(make_components(tokenizer), StableDiffusionXLPipeline).save_pretrained(folder / "xl")
    return folder


@pytest.fixture(scope="module")
def expected(models):
    """The edit of each family through the first door: the installed package."""
    return {
        "sd": short_edit(MDEEditPipeline.from_pretrained(models / "sd")),
        "xl": short_edit(MDEEditXLPipeline.from_pretrained(models / "xl")),
    }


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The folder of a repository with SDXL's pipeline, as `mde-edit push --xl` makes one."""
    folder = clone(tmp_path_factory.mktemp("clone") / "mde_edit")
    for name in ("LICENSE", "model_card_xl.md"):
        shutil.copy(ROOT / name, folder)
    out = tmp_path_factory.mktemp("pushed")
    for name, data in files_to_push(folder, editor=MDEEditXLPipeline).items():
        (out / name).write_bytes(data)
    return out


def test_what_goes_is_one_pipeline(pushed):
    names = {path.name for path in pushed.iterdir()}
    assert names == {"README.md", "LICENSE", "pipeline.py", "mde_edit_xl.py"}
    assert (
        "SDXL" in (pushed / "README.md").read_text() and "MDEEditPipeline." not in (pushed / "pipeline.py").read_text()
    )


@pytest.mark.slow  # the default suite has most of them in docs/sdxl.md, which tests/test_docs.py runs
def test_every_door(models, pushed, expected, tmp_path):
    bundle = tmp_path / "mde_edit_xl.py"
    assert cli.main(["bundle", "--xl", "--out", str(bundle)]) == 0
    MDEEditXLPipeline.from_pretrained(models / "xl").save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == ["mde_edit_xl", "MDEEditXLPipeline"]
    assert (tmp_path / "saved" / "mde_edit_xl.py").read_text() == bundle.read_text()
    hub = Hub()
    hub.add("user/xl", models / "xl")
    hub.add("user/mde-edit-xl", pushed)
    hub.add("user/mde-edit", files_to_push(ROOT))
    script = f"""
from diffusers import DiffusionPipeline
def load(name, code, model={str(models / "xl")!r}):
    pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline=code{TRUST})
    print(name, short_edit(pipe))
    return pipe
load("file", {str(ROOT / "mde_pipeline_xl.py")!r})
load("other", {str(ROOT)!r}, {str(models / "sd")!r})
load("folder", {str(pushed)!r})
load("other_again", {str(ROOT)!r}, {str(models / "sd")!r})
load("bundle", {str(bundle)!r})
print("module", type(load("hub", "user/mde-edit-xl", "user/xl")).__module__.split(".")[-1])
print("saved", short_edit(DiffusionPipeline.from_pretrained({str(tmp_path / "saved")!r}{TRUST})))
try:
    load("never", "user/mde-edit", "user/xl")
except ValueError as error:
    print("refused", error)
"""
    with hub.running():
        printed, _ = run_script(script, tmp_path / "home", tmp_path, hub)
    assert "use MDEEditXLPipeline" in printed.pop("refused")
    assert printed.pop("module") == "mde_edit_xl"
    assert printed == {
        **dict.fromkeys(("file", "folder", "bundle", "hub", "saved"), expected["xl"]),
        **dict.fromkeys(("other", "other_again"), expected["sd"]),
    }


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("diffusers.UNet2DConditionModel.from_pretrained", load)
    monkeypatch.setattr("transformers.CLIPTextModel.from_pretrained", load)


def test_the_commands_name_the_class_before_anything_is_loaded(models, nothing_is_loaded, tmp_path, capsys):
    case, out = ROOT / "examples" / "cat_straw_hat", tmp_path / "out"
    model = ["--model", str(models / "xl"), "--out", str(out)]
    one = ["--image", str(case / "image.png"), "--source-prompt", "a cat"]
    row = {"image": str(case / "image.png"), "source_prompt": "a cat", "prompt": "a dog"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    for argv in (
        ["edit", "--config", str(case / "edit.json")],
        ["invert", *one],
        ["mask", *one, "--region", "word:cat"],
        ["batch", "--fail-fast", str(tmp_path / "rows.jsonl")],
    ):
        assert cli.main([*argv, *model]) == 2
        assert "MDEEditPipeline is not: use MDEEditXLPipeline" in capsys.readouterr().err
    assert not out.exists() or not list(out.glob("*.png"))


def test_blocks_name_the_class(models, image):
    modular = (
        pytest.importorskip("mde_edit.mde_blocks", exc_type=ImportError)
        .MDEEditBlocks()
        .init_pipeline(str(models / "xl"))
    )
    modular.load_components()
    with pytest.raises(ValueError, match="use MDEEditXLPipeline"):
        modular(image=image, source_prompt="a cat", prompt="a dog")


def test_a_model_goes_with_the_pipeline_of_its_family(models, capsys):
    push = ["push", "user/name", "--dry-run", "--with-model"]
    assert cli.main([*push, str(models / "sd"), "--xl"]) == 2
    assert "use MDEEditPipeline. Push it without --xl" in capsys.readouterr().err
    assert cli.main([*push, str(models / "xl")]) == 2
    assert "use MDEEditXLPipeline. Push it with --xl" in capsys.readouterr().err
    assert cli.main([*push, str(models / "xl"), "--xl"]) == 0


def test_xl_is_not_for_blocks_or_a_page(capsys):
    assert cli.main(["push", "user/page", "--space", "--xl", "--dry-run"]) == 2
    assert "--xl goes with the pipeline" in capsys.readouterr().err
    assert cli.main(["push", "user/mde-edit-xl", "--xl", "--dry-run"]) == 0
    listing = capsys.readouterr().out
    assert "mde_edit_xl.py" in listing and "mde_edit.py" not in listing
