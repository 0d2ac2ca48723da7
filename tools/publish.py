# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""What `mde-edit push` uploads: the pipeline's code and card and, on request, a model that brings this code with it; or
the blocks for Modular Diffusers; or a Space."""

import json
import re
import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from ..bundle import self_contained_source
from ..mde_pipeline import MDEEditPipeline


# The card of each pipeline's repository.
CARDS = {"MDEEditPipeline": "model_card.md", "MDEEditXLPipeline": "model_card_xl.md"}


def files_to_push(root: Path, model: Path | None = None, editor: type = MDEEditPipeline) -> dict[str, bytes]:
    """The repository's content, {path: bytes}, such that `custom_pipeline="user/name"` finds the code.

    The pipeline goes in one file beside its entry: diffusers asks the Hub for a module once per way in which the others
    lead to it, which for ours as they are is 900 requests at every load.

    Args:
        root: a clone of this repository. One of its `CARDS` becomes the repository's `README.md`.
        model: folder of a saved pipeline. It goes to the root of the repository, so that
            `from_pretrained("user/name", trust_remote_code=True)` loads both.
        editor: the class of pipeline, of which diffusers wants one per repository.

    Raises:
        ValueError: `root` or `model` lacks a file that has to go, or `model` is of another family than `editor`.
    """
    entry, code = root / "pipeline.py", root / editor.source_file.name
    sources = {entry.name: entry, "LICENSE": root / "LICENSE", "README.md": root / CARDS[editor.__name__]}
    sources[f"{editor.module_name}.py"] = code
    if model is not None:
        sources["model_index.json"] = model / "model_index.json"
        for path in sorted(p for p in model.glob("*/*") if p.is_file()):
            sources[path.relative_to(model).as_posix()] = path
    missing = [str(path) for path in sources.values() if not path.is_file()]
    if missing:
        raise ValueError(f"{', '.join(missing)} not found: push from a clone of the repository, and a saved pipeline.")
    files = {name: path.read_bytes() for name, path in sources.items()}
    files[f"{editor.module_name}.py"] = self_contained_source(code).encode()
    files[entry.name] = _entry_of_one_file(entry.read_text(encoding="utf-8"), editor).encode()
    if model is not None:
        index = json.loads(files["model_index.json"])
        try:
            editor.check_index(index)
        except ValueError as error:
            flag = "without" if editor.family == "sdxl" else "with"
            raise ValueError(f"`with_model` '{model}': {error} Push it {flag} --xl.") from error
        index["_class_name"] = editor._index_name()
        files["model_index.json"] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    return dict(sorted(files.items()))


def _entry_of_one_file(entry: str, editor: type) -> str:
    """`pipeline.py` for a folder in which all that it imports is in `editor`'s one file."""
    entry = re.sub(r"\bMDEEditPipeline\b", editor.__name__, entry).replace('"mde_pipeline"', f'"{editor.module_name}"')
    own = f"from .{editor.module_name} import {editor.__name__}, Inversion, MDEEditPipelineOutput  # noqa: E402\n"
    before, *_, after = re.split(r"^(?:from \..*\n)+", entry, flags=re.MULTILINE)
    return before + own + after


def files_of_blocks(root: Path) -> dict[str, bytes]:
    """What `ModularPipelineBlocks.from_pretrained(name, trust_remote_code=True)` loads, {path: bytes}: the blocks in
    one file, the config that names them, card and license.

    Args:
        root: a clone of this repository. Its `blocks_card.md` becomes the repository's `README.md`.

    Raises:
        ValueError: `root` lacks a file, or diffusers has no Modular Diffusers to write the config.
    """
    try:
        from ..mde_blocks import MDEEditBlocks
    except ImportError as error:
        raise ValueError(f"The blocks need diffusers 0.37 or newer ({error}).") from error

    sources = {"LICENSE": root / "LICENSE", "README.md": root / "blocks_card.md"}
    missing = [str(path) for path in sources.values() if not path.is_file()]
    if missing:
        raise ValueError(f"{', '.join(missing)} not found: write the blocks from a clone of the repository.")
    files = {name: path.read_bytes() for name, path in sources.items()}
    with tempfile.TemporaryDirectory() as folder:
        MDEEditBlocks().save_pretrained(folder)
        files |= {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return dict(sorted(files.items()))


def files_of_space(root: Path) -> dict[str, bytes]:
    """A Space that needs nothing but its requirements, {path: bytes}: the page, the package, the embedded model, the
    examples.

    Args:
        root: a clone of this repository.

    Raises:
        ValueError: `root` is none.
    """
    examples = [path for path in root.glob("examples/*/*") if path.name in _EXAMPLE or path.stem in _masks(path.parent)]
    sources = {f"mde_edit/{path.relative_to(root)}": path for path in [*root.glob("*.py"), *root.glob("tools/*.py")]}
    sources |= {f"mde_edit/{path.relative_to(root)}": path for path in examples}
    sources |= {path.name: path for path in (root / "space").glob("*.*")}
    sources |= {str(path.relative_to(root)): path for path in root.glob("emoji_ldm/**/*") if path.is_file()}
    sources["LICENSE"] = root / "LICENSE"
    missing = [
        name for name in ("app.py", "emoji_ldm/model_index.json", "mde_edit/mde_pipeline.py") if name not in sources
    ]
    if missing:
        raise ValueError(f"{', '.join(missing)} not found below {root}: push a Space from a clone of the repository.")
    return {name: path.read_bytes() for name, path in sorted(sources.items())}


_EXAMPLE = ("edit.json", "image.png")


def _masks(folder: Path) -> list[str]:
    """The stems of an example's masks, which are named after their words."""
    case = json.loads((folder / "edit.json").read_text())
    return [Path(file).stem for role in ("object", "attribute") for file in case[role].values()]


def push(repo_id: str, files: dict[str, bytes], message: str, private: bool, space: bool = False) -> str:
    """Create the repository (of a model, or a gradio Space) if there is none and put `files` into it as one commit;
    returns the commit's address."""
    api, kind = HfApi(), {"repo_type": "space"} if space else {}
    sdk = {"space_sdk": "gradio"} if space else {}
    name = api.create_repo(repo_id, private=private, exist_ok=True, **kind, **sdk).repo_id
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return api.create_commit(name, operations, commit_message=message, **kind).commit_url
