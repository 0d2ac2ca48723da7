"""Publishing: what goes to the Hub, and that it can be used from there."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard, RepoCard
from mde_edit import MDEEditPipeline
from mde_edit.tools import publish
from mde_edit.tools.cli import main
from mde_edit.tools.publish import files_to_push

from .conftest import make_pipe
from .door_kit import ROOT, clone, run_script, short_edit
from .loopback_hub import Hub


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = clone(tmp_path_factory.mktemp("clone") / "mde_edit")
    for name in ("LICENSE", "model_card.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_what_goes(repository):
    assert list(files_to_push(repository)) == ["LICENSE", "README.md", "mde_edit.py", "pipeline.py"]
    with_model = files_to_push(repository, ROOT / "emoji_ldm")
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= set(with_model)
    assert with_model["README.md"] == (repository / "model_card.md").read_bytes()  # the model's own does not replace it


def test_a_folder_that_is_no_clone_is_refused(repository, tmp_path):
    with pytest.raises(ValueError, match="model_card.md, .*mde_pipeline.py not found: push from a clone"):
        files_to_push(tmp_path)
    with pytest.raises(ValueError, match="model_index.json not found"):
        files_to_push(repository, tmp_path)


def test_push_and_load_what_was_pushed(repository, components, tmp_path):
    model = tmp_path / "model"
    make_pipe(components).save_pretrained(model)
    expected = short_edit(MDEEditPipeline.from_pretrained(model))
    (model / "mde_edit.py").unlink()
    hub = Hub()
    script = f"""
from mde_edit.tools import cli
assert cli.__file__.startswith({str(repository)!r})
assert cli.main(["push", "user/mde-edit", "--with-model", {str(model)!r}, "--message", "First"]) == 0
"""
    with hub.running():
        home = tmp_path / "home"
        run_script(script, home, repository.parent, hub, HF_TOKEN="hf_none")
        ((name, message, paths),) = hub.commits
        assert (name, message, paths) == ("user/mde-edit", "First", sorted(files_to_push(repository, model)))
        load = """
from diffusers import DiffusionPipeline
print("model", short_edit(DiffusionPipeline.from_pretrained("user/mde-edit", trust_remote_code=True)))
pipe = DiffusionPipeline.from_pretrained("user/mde-edit", custom_pipeline="user/mde-edit", trust_remote_code=True)
print("code", short_edit(pipe))
"""
        printed, _ = run_script(load, home, tmp_path, hub)
    assert printed == {"model": expected, "code": expected}


def test_a_space_goes_with_all_that_it_runs_on(monkeypatch, capsys):
    hub = Hub()
    with hub.running():
        hub.stand_in(monkeypatch)
        assert main(["push", "user/page", "--space", "--dry-run"]) == 0
        assert not hub.requests and "would go to user/page" in capsys.readouterr().out
        assert main(["push", "user/page", "--space", "--message", "Page"]) == 0
    files = publish.files_of_space(ROOT)
    assert hub.commits == [("user/page", "Page", sorted(files))]
    assert hub.repos["spaces", "user/page"] == files
    metadata = RepoCard(files["README.md"].decode()).data.to_dict()
    assert metadata["sdk"] == "gradio" and metadata["app_file"] in files
    pins = (ROOT / "constraints.txt").read_text().split()
    assert f"gradio=={metadata['sdk_version']}" in pins
    # torch is not the newest: ZeroGPU has none beyond 2.11
    assert {line for line in files["requirements.txt"].decode().split() if "torch" not in line} <= set(pins)
    case = json.loads(files["mde_edit/examples/cat_straw_hat/edit.json"])
    assert f"mde_edit/examples/cat_straw_hat/{case['object']['dog']}" in files


def test_a_space_needs_a_clone(tmp_path):
    with pytest.raises(ValueError, match="app.py, emoji_ldm/model_index.json, mde_edit/mde_pipeline.py not found"):
        publish.files_of_space(tmp_path)


def test_the_card_says_what_the_hub_asks():
    card = ModelCard.load(ROOT / "model_card.md")
    data = card.data.to_dict()
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "image-to-image"
    assert data["license"] == "apache-2.0" and data["base_model"]
    tags = {"image-editing", "training-free", "multi-object", "mask-guided", "prompt-to-prompt", "null-text-inversion"}
    assert tags | {"custom_pipeline"} <= set(data["tags"])
    assert "arxiv.org/abs/2505.05101" in card.text
