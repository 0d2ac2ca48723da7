"""The Python blocks of the documents run as they stand, in order, one process per document.

The working directory looks like a clone that also holds a clone called `mde_edit`; the Hub is on loopback, with the
embedded model in Stable Diffusion's place, a small one in SDXL's, and this repository at user/mde-edit and
user/mde-edit-xl; "cuda" is read as "cpu", an inversion at the defaults as one of four steps, Stable Diffusion's and
SDXL's sizes as the small models'. A block that needs more than that is marked by a line `<!-- not executed: why -->`
right above it.
"""

import json
import re

import pytest
from diffusers import StableDiffusionXLPipeline
from mde_edit.tools.publish import files_of_blocks, files_to_push

from .door_kit import ROOT, clone, run_script
from .loopback_hub import Hub
from .tiny_xl import make_components, make_xl


DOCUMENTS = sorted(p.relative_to(ROOT).as_posix() for form in ("*.md", "[!.]*/*.md") for p in ROOT.glob(form))
BLOCK = re.compile(r"^(<!-- not executed: .+ -->\n+)?```(?:python|py)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def python_blocks(text):
    """The code of every Python block of a document that is not marked, in order."""
    return [code for skipped, code in BLOCK.findall(text) if not skipped]


def notebook_cells(text):
    """The code of a notebook's cells, in order, without what only a notebook can run."""
    cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return [re.sub(r"^[%!].*$", "", cell, flags=re.MULTILINE) for cell in cells]


def test_blocks_are_found_and_marked_ones_left_out():
    text = "```python\na\n```\ntext\n<!-- not executed: x -->\n```python\nb\n```\n```bash\nc\n```\n```py\nd\ne\n```\n"
    assert python_blocks(text) == ["a\n", "d\ne\n"]


def anchors(text):
    """What the headings of a document are called in links to it, as GitHub does it."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_files_of_the_repository_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tokenizer):
    from mde_edit import MDEEditPipeline, MDEEditXLPipeline

    carrier = tmp_path_factory.mktemp("carrier")
    MDEEditPipeline.from_pretrained(ROOT / "emoji_ldm").save_pretrained(carrier)
    sdxl = tmp_path_factory.mktemp("sdxl")
    make_xl(make_components(tokenizer), StableDiffusionXLPipeline).save_pretrained(sdxl)
    hub = Hub()
    hub.add("stabilityai/stable-diffusion-xl-base-1.0", sdxl)
    hub.add("user/mde-edit-xl", files_to_push(ROOT, editor=MDEEditXLPipeline))
    hub.add("CompVis/stable-diffusion-v1-4", ROOT / "emoji_ldm")
    hub.add("user/mde-edit", files_to_push(ROOT))
    hub.add("user/emoji-ldm-mde", carrier)
    hub.add("user/mde-edit-blocks", files_of_blocks(ROOT))
    with hub.running():
        yield hub


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    for entry in ("examples", "emoji_ldm"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    text = (ROOT / "examples" / "mde_edit.ipynb").read_text(encoding="utf-8")
    cells = notebook_cells(text.replace("num_inference_steps=10", "num_inference_steps=4"))
    assert len(cells) > 8 and "pip install" not in "".join(cells)
    check = "assert (np.asarray(edited.images[0]) != np.asarray(image)).any() and len(more.images) == 2"
    run_script("\n".join([*cells, check]), tmp_path / "home", tmp_path)
    assert (tmp_path / "cat.safetensors").stat().st_size > 10_000


@pytest.mark.parametrize(
    "document",
    [
        # the model cards say what README.md and docs/sdxl.md say, of a repository
        pytest.param(name, marks=pytest.mark.slow if name.startswith("model_card") else ())
        for name in DOCUMENTS
        if python_blocks((ROOT / name).read_text())
    ],
)
def test_the_documents_python_runs(document, hub, tmp_path):
    here = tmp_path / "clone"
    here.mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.startswith("."):
            (here / entry.name).symlink_to(entry)
    clone(here / "mde_edit")
    code = "\n".join(python_blocks((ROOT / document).read_text())).replace('"cuda"', '"cpu"')
    code = code.replace("height=1024, width=1024)", "height=64, width=64)")
    code = code.replace("height=512, width=512)", "height=128, width=128)")
    code = re.sub(r'(pipe\.invert\([^()]*straw hat"(, height=\d+, width=\d+)?)\)', r"\1, num_inference_steps=4)", code)
    run_script(code, tmp_path / "home", here, hub, HF_TOKEN="hf_none")
