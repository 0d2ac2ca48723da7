"""Every way in to SDXL's pipeline, each beside Stable Diffusion's in one process where they could meet: an edit is
deterministic, so every door must give the same bytes."""

import json
import shutil

import pytest
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from mde_edit import MDEEditPipeline, MDEEditXLPipeline
from mde_edit.bundle import self_contained_source
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
    assert {"README.md", "LICENSE", "pipeline.py", "mde_pipeline_xl.py", "editing.py"} <= names
    assert not {"mde_pipeline.py", "mde_blocks.py"} & names
    assert (
        "SDXL" in (pushed / "README.md").read_text() and "MDEEditPipeline." not in (pushed / "pipeline.py").read_text()
    )


def test_local_code_and_what_is_saved_and_bundled(models, pushed, expected, tmp_path):
    bundle = tmp_path / "mde_edit_xl.py"
    assert cli.main(["bundle", "--xl", "--out", str(bundle)]) == 0
    assert bundle.read_text() == self_contained_source(ROOT / "mde_pipeline_xl.py")
    MDEEditXLPipeline.from_pretrained(models / "xl").save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == ["mde_edit_xl", "MDEEditXLPipeline"]
    assert (tmp_path / "saved" / "mde_edit_xl.py").read_text() == bundle.read_text()
    script = f"""
from diffusers import DiffusionPipeline
def load(name, model, code):
    pipe = DiffusionPipeline.from_pretrained({str(models)!r} + "/" + model, custom_pipeline=code{TRUST})
    print(name, short_edit(pipe))
load("file", "xl", {str(ROOT / "mde_pipeline_xl.py")!r})
load("sd", "sd", {str(ROOT)!r})
load("folder", "xl", {str(pushed)!r})
load("sd_again", "sd", {str(ROOT)!r})
load("bundle", "xl", {str(bundle)!r})
print("saved", short_edit(DiffusionPipeline.from_pretrained({str(tmp_path / "saved")!r}{TRUST})))
"""
    printed, _ = run_script(script, tmp_path / "home", tmp_path)
    assert {name: value for name, value in printed.items() if name.startswith("sd")} == {
        "sd": expected["sd"],
        "sd_again": expected["sd"],
    }
    assert {name: printed[name] for name in ("file", "folder", "bundle", "saved")} == dict.fromkeys(
        ("file", "folder", "bundle", "saved"), expected["xl"]
    )


def test_the_hub(models, pushed, expected, tmp_path):
    hub = Hub()
    hub.add("user/xl", models / "xl")
    hub.add("user/mde-edit-xl", pushed)
    hub.add("user/mde-edit", clone(tmp_path / "clone"))
    script = f"""
from diffusers import DiffusionPipeline
def load(code):
    return DiffusionPipeline.from_pretrained("user/xl", custom_pipeline=code{TRUST})
pipe = load("user/mde-edit-xl")
print("module", type(pipe).__module__.split(".")[-1])
print("edit", short_edit(pipe))
try:
    load("user/mde-edit")
except ValueError as error:
    print("other", error)
"""
    with hub.running():
        printed, _ = run_script(script, tmp_path / "home", tmp_path, hub)
    assert "use MDEEditXLPipeline" in printed.pop("other")
    assert printed == {"module": "mde_pipeline_xl", "edit": expected["xl"]}


def test_xl_is_not_for_blocks_or_a_page(capsys):
    assert cli.main(["push", "user/page", "--space", "--xl", "--dry-run"]) == 2
    assert "--xl goes with the pipeline" in capsys.readouterr().err
    assert cli.main(["push", "user/mde-edit-xl", "--xl", "--dry-run"]) == 0
    listing = capsys.readouterr().out
    assert "mde_pipeline_xl.py" in listing and "mde_pipeline.py" not in listing
