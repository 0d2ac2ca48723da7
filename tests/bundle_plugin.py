"""`pytest -p tests.bundle_plugin`: the same tests against the self-contained file, which stands in for every module."""

import importlib.util
import os
import sys


def install(path):
    spec = importlib.util.spec_from_file_location("mde_edit", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mde_edit"] = module
    spec.loader.exec_module(module)
    for name in ("attention_processors", "bundle", "inversion", "losses", "mde_pipeline"):
        sys.modules[f"mde_edit.{name}"] = module


install(os.environ["MDE_EDIT_BUNDLE"])
