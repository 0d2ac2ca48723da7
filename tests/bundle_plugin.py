"""`pytest -p tests.bundle_plugin`: the same tests against the self-contained file, which stands in for every module."""

import importlib.util
import os
import sys
from pathlib import Path


def install(path):
    spec = importlib.util.spec_from_file_location("mde_edit", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mde_edit"] = module
    spec.loader.exec_module(module)
    for file in Path(__file__).resolve().parents[1].glob("*.py"):
        sys.modules[f"mde_edit.{file.stem}"] = module


install(os.environ["MDE_EDIT_BUNDLE"])
