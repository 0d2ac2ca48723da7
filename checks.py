# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""What a number, a name or a text has to be; every refusal names the argument and says what would do. And what the
documentation says of an argument, for those who show it elsewhere."""

import numbers
import re
import textwrap
from collections.abc import Sequence
from typing import get_args

import numpy as np


def check_setting(name: str, value, kind, low=None, high=None, choices: Sequence[str] = ()):
    """`value` as what `kind` says (`int`, `float`, `str`, or one of them `| None`), numpy's numbers and 5.0 for 5 too.

    Raises:
        ValueError: another type (`True` is not a number), or out of range.
    """
    kinds = get_args(kind) or (kind,)
    if value is None and type(None) in kinds:
        return None
    if choices:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"`{name}` is {value!r}: choose one of {', '.join(map(repr, choices))}.")
        return value
    whole = int in kinds
    number = isinstance(value, (numbers.Real, np.number)) and not isinstance(value, (bool, np.bool_))
    if high is None:  # beyond this a number overflows where it is computed with
        limit = 1e9 if isinstance(value, numbers.Integral) else 1e38
    else:
        limit = high
    if not number or not low <= value <= limit or (whole and value != int(value)):
        span = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ValueError(f"`{name}` is {value!r}: use a {'whole ' if whole else ''}number {span}.")
    return int(value) if whole else float(value)


def check_text(name: str, value) -> None:
    """Raise `ValueError` unless `value` is text with something in it that can be encoded."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{name}` is {value!r}: describe the picture in words.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"`{name}` is {value!r}: it holds half a character (a lone surrogate); remove it.") from None


def told_of(name: str, document: str | None) -> str:
    """What a docstring of diffusers' form says of an argument, on one line; empty if nothing."""
    form = rf"^( +){name} \(.*?\):\n((?:\1 +.*\n|\n)+)"
    found = re.search(form, textwrap.dedent(document or ""), re.MULTILINE)
    return " ".join(found[2].split()) if found else ""
