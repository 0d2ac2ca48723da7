"""Every way in: each test loads the pipeline as a user would, through diffusers' own loading code, and edits a picture.
An edit is deterministic, so every door must give the same bytes."""

import ast
import copy
import json
import os
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from mde_edit import MDEEditPipeline
from mde_edit.bundle import imported_modules, self_contained_source
from mde_edit.tools import cli
from mde_edit.tools.publish import files_to_push

from .conftest import make_pipe
from .door_kit import ROOT, clone, run_script, short_edit
from .loopback_hub import Hub


RELEASE = tuple(int(number) for number in diffusers.__version__.split(".")[:2])
GATED = RELEASE >= (0, 38)  # from then on local code needs trust too
gated_only = pytest.mark.skipif(not GATED, reason="diffusers gates local code from 0.38 on")


@pytest.fixture(scope="session")
def model(components, tmp_path_factory):
    """A Stable Diffusion model as anyone saves one."""
    folder = tmp_path_factory.mktemp("hub") / "stable-diffusion"
    parts = make_pipe(components).components
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def expected(model):
    """The edit through the first door: the installed package."""
    return short_edit(MDEEditPipeline.from_pretrained(model))


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    return clone(tmp_path_factory.mktemp("clone") / "mde_edit")


@pytest.fixture(scope="module")
def hub(model):
    """A Hub with the model at user/sd and the pipeline, as it is pushed, at user/mde-edit."""
    hub = Hub()
    hub.add("user/sd", model)
    hub.add("user/mde-edit", files_to_push(ROOT))
    with hub.running():
        yield hub


# 1. The package


def test_from_pipe_shares_the_weights_and_leaves_the_source_pipe_alone(model, expected):
    source = StableDiffusionPipeline.from_pretrained(model)
    source.enable_attention_slicing()
    processors = dict(source.unet.attn_processors)
    pipe = MDEEditPipeline.from_pipe(source)
    assert pipe.unet is source.unet and pipe.vae is source.vae
    assert dict(source.unet.attn_processors) == processors
    source.disable_attention_slicing()
    assert short_edit(pipe) == expected
    assert (
        type(source) is StableDiffusionPipeline and source("a cat", num_inference_steps=1, output_type="np").images.size
    )


def test_from_pipe_keeps_every_component_in_its_dtype(model):
    source = StableDiffusionPipeline.from_pretrained(model)
    source.unet.to(torch.bfloat16)  # mixed on purpose: a half-precision U-Net with a full-precision VAE
    before = {name: {p.dtype for p in getattr(source, name).parameters()} for name in ("unet", "vae", "text_encoder")}
    pipe = MDEEditPipeline.from_pipe(source)
    assert before == {name: {p.dtype for p in getattr(pipe, name).parameters()} for name in before}
    for name in ("torch_dtype", "dtype")[: 1 + (RELEASE >= (0, 40))]:
        halved = MDEEditPipeline.from_pipe(copy.deepcopy(source), **{name: torch.bfloat16})
        assert halved.vae.dtype == halved.unet.dtype == torch.bfloat16


# 2. Local code


TRUST = ", trust_remote_code=True" if GATED else ""  # `from_pipe` of older releases does not know it
LOCAL = {
    "folder": f"pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline=str(repository){TRUST})",
    "file": (
        "file = str(repository / 'mde_pipeline.py')\n"
        f"pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline=file{TRUST})"
    ),
    "name": f"pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline='mde_edit'{TRUST})",
    "from_pipe": (
        "base = StableDiffusionPipeline.from_pretrained(model)\n"
        f"pipe = DiffusionPipeline.from_pipe(base, custom_pipeline=str(repository), torch_dtype=torch.float32{TRUST})"
    ),
}


@pytest.mark.parametrize(
    "route",
    [route if route in ("folder", "from_pipe") else pytest.param(route, marks=pytest.mark.slow) for route in LOCAL],
)
def test_local_code(route, model, repository, expected, tmp_path):
    script = f"""
from pathlib import Path
from diffusers import DiffusionPipeline, StableDiffusionPipeline
model, repository = {str(model)!r}, Path({str(repository)!r})
{LOCAL[route]}
print("module", type(pipe).__module__)
print("edit", short_edit(pipe))
"""
    printed, _ = run_script(script, tmp_path / "home", cwd=repository.parent)
    assert printed == {"module": "diffusers_modules.local.mde_pipeline", "edit": expected}


OTHER = """
from diffusers import DiffusionPipeline
from .losses import NAME


class OtherPipeline(DiffusionPipeline):
    name = NAME

    def __init__(self, unet):
        super().__init__()
        self.register_modules(unet=unet)
"""


@pytest.mark.skipif(RELEASE < (0, 35), reason="older diffusers give the first plug-in's class again")
def test_two_local_plug_ins_in_one_process_in_any_order(model, repository, expected, tmp_path):
    """diffusers runs every local `pipeline.py` as one and the same module and puts every plug-in's helpers into one
    folder: another one with a `losses.py` of its own must neither see ours nor give us its own."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "pipeline.py").write_text(OTHER)
    (other / "losses.py").write_text("NAME = 'the other losses'\n")
    script = f"""
from diffusers import DiffusionPipeline
def load(folder):
    return DiffusionPipeline.from_pretrained({str(model)!r}, custom_pipeline=folder, trust_remote_code=True)
ours, other = {str(repository)!r}, {str(other)!r}
for turn, folder in enumerate((ours, other, other, ours, other)):
    pipe = load(folder)
    assert type(pipe).__name__ == ("MDEEditPipeline" if folder == ours else "OtherPipeline")
    assert folder == ours or pipe.name == "the other losses"
    if turn in (0, 3):
        print(f"edit{{turn}}", short_edit(pipe))
"""
    printed, _ = run_script(script, tmp_path / "home", cwd=tmp_path)
    assert printed == {"edit0": expected, "edit3": expected}


# 3. The Hub


HUB_SCRIPT = """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("user/sd", custom_pipeline="user/mde-edit", trust_remote_code=True)
print("module", type(pipe).__module__)
print("edit", short_edit(pipe))
"""


def test_hub_code_and_then_from_the_cache(hub, expected, tmp_path):
    home = tmp_path / "home"
    first, _ = run_script(HUB_SCRIPT, home, tmp_path, hub)
    sha = hub.sha("models", "user/mde-edit")
    assert first == {"module": f"diffusers_modules.local.user--mde-edit.{sha}.mde_edit", "edit": expected}

    downloads = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert any(path.endswith("mde_edit.py") for path in downloads)
    # diffusers asks for a module once per way in which others lead to it: few modules
    assert len([path for _, path in hub.requests if "user/mde-edit" in path]) < 20
    hub.requests.clear()
    again, _ = run_script(HUB_SCRIPT, home, tmp_path, hub)
    assert again == first
    assert not [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]


OFFLINE_SCRIPT = """
from huggingface_hub import snapshot_download
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained("user/sd", custom_pipeline="user/mde-edit", trust_remote_code=True)
except Exception as error:
    print("repository", type(error).__name__)
folder = snapshot_download("user/mde-edit")
pipe = DiffusionPipeline.from_pretrained("user/sd", custom_pipeline=folder, trust_remote_code=True)
print("edit", short_edit(pipe))
pipe = DiffusionPipeline.from_pretrained(snapshot_download("user/carrier"), trust_remote_code=True)
print("carrier", short_edit(pipe))
from mde_edit import MDEEditPipeline
print("package", short_edit(MDEEditPipeline.from_pretrained("user/sd")))
"""


def test_offline_from_the_cache(hub, saved, expected, tmp_path):
    """diffusers asks the Hub for the commit of a `user/repository` at every load, so that form needs the network; the
    cached folder as a local path does not."""
    home = tmp_path / "home"
    hub.add("user/carrier", saved)
    names = ("user/sd", "user/mde-edit", "user/carrier")
    fill = f"from huggingface_hub import snapshot_download\nfor name in {names}: snapshot_download(name)"
    run_script(fill, home, tmp_path, hub)
    printed, _ = run_script(OFFLINE_SCRIPT, home, tmp_path, HF_HUB_OFFLINE="1")
    assert printed.pop("repository") == "OfflineModeIsEnabled"
    assert printed == {"edit": expected, "carrier": expected, "package": expected}


@gated_only
def test_without_trust_or_with_remote_code_disabled_only_the_package_loads(model, repository, expected, tmp_path):
    attempt = f"""
import diffusers
from mde_edit import MDEEditPipeline
for name, source in (("folder", {str(repository)!r}), ("file", {str(repository / "mde_pipeline.py")!r})):
    for trust in (False, True):
        try:
            diffusers.DiffusionPipeline.from_pretrained({str(model)!r}, custom_pipeline=source, trust_remote_code=trust)
        except ValueError as error:
            print(f"{{name}}_{{trust}}", str(error).splitlines()[-1])
print("package", short_edit(MDEEditPipeline.from_pretrained({str(model)!r})))
"""
    printed, _ = run_script(attempt, tmp_path / "home", tmp_path)
    advice = "Pass `trust_remote_code=True` to allow loading remote code modules."
    assert printed == {"folder_False": advice, "file_False": advice, "package": expected}
    printed, _ = run_script(attempt, tmp_path / "home", tmp_path, DIFFUSERS_DISABLE_REMOTE_CODE="1")
    assert printed.pop("package") == expected and len(printed) == 4
    assert all("disabled globally via the DIFFUSERS_DISABLE_REMOTE_CODE" in message for message in printed.values())


# 4. A model that carries its code


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """What our `save_pretrained` writes."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    MDEEditPipeline.from_pretrained(model).save_pretrained(folder)
    return folder


def test_a_saved_pipeline_brings_its_code(saved, model):
    assert json.loads((saved / "model_index.json").read_text())["_class_name"] == ["mde_edit", "MDEEditPipeline"]
    assert {p.name for p in saved.iterdir()} - {p.name for p in model.iterdir()} == {"mde_edit.py"}
    assert get_relative_imports(saved / "mde_edit.py") == []  # as diffusers reads them, by pattern


def test_a_saved_pipeline_loads_through_the_package_without_trust(saved, expected):
    pipe = MDEEditPipeline.from_pretrained(saved)
    assert type(pipe) is MDEEditPipeline and short_edit(pipe) == expected


BY_NAME = ', custom_pipeline="mde_edit"'


@pytest.mark.parametrize(
    "place, form",
    [
        pytest.param("hub", "", id="hub-index"),
        pytest.param("folder", BY_NAME, id="folder-name"),
        pytest.param("hub", BY_NAME, id="hub-name", marks=pytest.mark.slow),
        pytest.param("folder", "", id="folder-index", marks=pytest.mark.slow),
    ],
)
def test_a_model_repository_with_its_code(place, form, saved, hub, expected, tmp_path):
    hub.add("user/carrier", saved)
    name = "user/carrier" if place == "hub" else str(saved)
    script = f"""
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained({name!r}{form})
except ValueError as error:
    print("refused", "trust_remote_code=True" in str(error))
pipe = DiffusionPipeline.from_pretrained({name!r}{form}, trust_remote_code=True)
print("module", type(pipe).__module__.split(".")[-1])
print("edit", short_edit(pipe))
pipe.save_pretrained("again")  # the single file saves as the package does
print("again", short_edit(DiffusionPipeline.from_pretrained("again", trust_remote_code=True)))
"""
    printed, _ = run_script(script, tmp_path / "home", tmp_path, hub)
    assert GATED or place == "hub" or printed.setdefault("refused", "True")
    assert printed == {"refused": "True", "module": "mde_edit", "edit": expected, "again": expected}
    assert (tmp_path / "again" / "mde_edit.py").read_text() == (saved / "mde_edit.py").read_text()


def test_push_to_hub_makes_such_a_repository(hub, model, expected, tmp_path):
    push = f"""
from diffusers import DiffusionPipeline
from mde_edit import MDEEditPipeline
pipe = MDEEditPipeline.from_pretrained({str(model)!r})
pipe.push_to_hub("user/pushed", token="hf_none")
pipe.save_pretrained("saved", push_to_hub=True, repo_id="user/saved", token="hf_none")
print("edit", short_edit(DiffusionPipeline.from_pretrained("user/pushed", trust_remote_code=True)))
"""
    printed, _ = run_script(push, tmp_path / "home", tmp_path, hub)
    assert printed == {"edit": expected}
    for name, _, paths in hub.commits[-2:]:
        assert name in ("user/pushed", "user/saved")
        assert {"mde_edit.py", "model_index.json", "README.md", "unet/diffusion_pytorch_model.safetensors"} <= set(
            paths
        )


# 5. The community file


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """The file as `make bundle` writes it."""
    path = tmp_path_factory.mktemp("community") / "mde_edit.py"
    assert cli.main(["bundle", "--out", str(path)]) == 0
    return path


def test_the_community_file_is_deterministic_complete_and_one_pipeline(bundle, tmp_path):
    again = tmp_path / "mde_edit.py"
    cli.main(["bundle", "--out", str(again)])
    text = bundle.read_text()
    assert again.read_text() == text and self_contained_source(bundle) == text
    assert text.startswith("# Copyright") and get_relative_imports(bundle) == []
    for module, tree in imported_modules(ROOT / "mde_pipeline.py").items():
        for node in tree.body:  # not a line of a function or class is lost or changed
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert ast.get_source_segment(module.read_text(), node) in text
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "F,E9", str(bundle)], capture_output=True
    )
    assert checked.returncode == 0, checked.stdout  # nothing undefined, unused or defined twice


def test_modules_that_share_a_name_are_not_bundled(tmp_path):
    (tmp_path / "a.py").write_text('# c\n"""a"""\nfrom .b import f\n\nX = f\n')
    (tmp_path / "b.py").write_text('# c\n"""b"""\nX = 1\n\n\ndef f():\n    return X\n')
    with pytest.raises(ValueError, match="'X' is defined in b.py and in a.py"):
        self_contained_source(tmp_path / "a.py")


def test_the_community_route(bundle, hub, expected, tmp_path):
    """`custom_pipeline="mde_edit"`: one file in the folder of the installed version, in the mirror of the examples."""
    release = ".".join(diffusers.__version__.split(".")[:3])
    hub.index = {"releases": {release: []}}
    hub.add("diffusers/community-pipelines-mirror", {f"v{release}/mde_edit.py": bundle.read_bytes()}, kind="datasets")
    script = f"""
import urllib.request
class ToTheHub(urllib.request.HTTPSHandler):  # the index of releases has no variable that says where it is
    def https_open(self, request):
        return urllib.request.urlopen({hub.url!r} + request.selector)
urllib.request.install_opener(urllib.request.build_opener(ToTheHub))
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("user/sd", custom_pipeline="mde_edit")
print("module", type(pipe).__module__)
print("edit", short_edit(pipe))
"""
    printed, _ = run_script(script, tmp_path / "home", tmp_path, hub)
    assert printed == {"module": "diffusers_modules.git.mde_edit", "edit": expected}


def run_tests_on_the_bundle(bundle, *names):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.bundle_plugin", *(f"tests/{name}.py" for name in names)],
        cwd=ROOT,
        env={**os.environ, "MDE_EDIT_BUNDLE": str(bundle)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_community_file_passes_the_packages_tests(bundle):
    files = "prompts", "masks", "losses", "attention_processors", "inversion", "denoise", "mde_pipeline"
    done = run_tests_on_the_bundle(bundle, *(f"test_{file}" for file in files))
    assert done.returncode == 0, done.stdout[-4000:]
