"""The settings of an edit: ranges that check themselves, and defaults that are told once."""

import ast
import inspect
import re
from dataclasses import asdict, fields

import numpy as np
import pytest
from mde_edit import MDEEditPipeline
from mde_edit.denoise import Settings
from mde_edit.tools.options import build_parser

from benchmarks.methods import METHODS


def test_a_default_is_told_once():
    """Signature, docstring, command line and benchmark say what `Settings` says, and know no other setting."""
    defaults = asdict(Settings())
    parameters = inspect.signature(MDEEditPipeline.__call__).parameters
    assert {name: parameters[name].default for name in defaults} == defaults
    entry = r"^ +(\w+) \(`\w+`(?:, \*optional\*)?(?:, defaults to `?(.+?)`?)?\):"
    told = re.findall(entry, MDEEditPipeline.__call__.__doc__, flags=re.MULTILINE)
    told = {name: ast.literal_eval(value) if value else None for name, value in told if name in defaults}
    assert told == defaults
    (commands,) = (action for action in build_parser()._actions if action.dest == "command")
    flags = {action.dest: action for action in commands.choices["edit"]._actions}
    assert {name: flags[name].help for name in defaults} == {n: f"(default: {v})".lower() for n, v in defaults.items()}
    own = {"inversion": "direct", "guidance_scale": 2.5, "masks": "drawn"}
    assert METHODS["mde"].settings == {**defaults, **own}


@pytest.mark.parametrize("setting", fields(Settings), ids=lambda setting: setting.name)
def test_a_setting_checks_itself(setting):
    low, high = setting.metadata["low"], setting.metadata["high"]
    wrong = ["x", float("nan")] + ([low - 1] if low is not None else []) + ([high + 1] if high is not None else [])
    for value in wrong:
        with pytest.raises(ValueError, match=f"`{setting.name}` is {value!r}: (use|choose)"):
            Settings(**{setting.name: value})
    right = [value for value in (low, high, *setting.metadata["choices"]) if value is not None]
    assert all(getattr(Settings(**{setting.name: value}), setting.name) == value for value in right)


def test_numbers_of_any_library_are_numbers_and_true_is_none():
    settings = Settings(
        optimization_iterations=np.int64(5), mask_dilation=2.0, oal_weight=np.float32(0.5), max_update=1
    )
    assert settings == Settings(optimization_iterations=5, mask_dilation=2, oal_weight=0.5, max_update=1.0)
    assert [type(v) for v in (settings.optimization_iterations, settings.mask_dilation)] == [int, int]
    for name, value in (("optimization_iterations", True), ("oal_weight", True), ("step_size", 10**30), ("eta", [0.5])):
        with pytest.raises(ValueError, match=f"`{name}` is"):
            Settings(**{name: value})
