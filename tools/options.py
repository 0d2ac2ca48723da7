# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""What can be set on the command line: flags over a JSON config over the defaults, all checked by the same rules."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from ..checks import check_setting
from ..denoise import PRESETS, Settings
from ..inversion import INVERSION_METHODS


@dataclass(frozen=True)
class Option:
    """One setting of a command: a flag and a key of its config.

    kind: `str`, `int`, `float`, one of them `| None`, `bool`, or `dict` for masks by word. low, high: a number's range.
    several: a list of such values will do too, one per target prompt.
    """

    kind: Any
    help: str
    default: Any = None
    low: float | None = None
    high: float | None = None
    choices: Sequence[str] = ()
    metavar: str | None = None
    several: bool = False

    def check(self, name: str, value):
        """`value` as this option takes it; raises `ValueError` naming it."""
        if self.several and isinstance(value, list) and value:
            return [replace(self, several=False).check(name, one) for one in value]
        if self.kind is dict:
            return _check_masks(name, value)
        if self.kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"`{name}` is {value!r}: use true or false.")
            return value
        if self.kind is str and not self.choices:
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"`{name}` is {value!r}: use a text.")
            return value
        return check_setting(name, value, self.kind, self.low, self.high, self.choices)


_MODEL = {
    "model": Option(str, "folder or Hub name of a Stable Diffusion 1.x/2.x model", "emoji_ldm"),
    "device": Option(str, "cuda, mps, cpu (default: the best there is)"),
    "dtype": Option(str, "of the model", "float32", choices=("float32", "bfloat16", "float16")),
}
# What makes an inversion; a file of one brings these.
_INVERSION = {
    "image": Option(str, "the picture: file or URL"),
    "source_prompt": Option(str, "what the picture shows"),
    "method": Option(str, "inversion", "null_text", choices=INVERSION_METHODS),
    "steps": Option(int, "DDIM steps", 50, low=1),
    "height": Option(int, "resize the picture to this height", low=1),
    "width": Option(int, "resize the picture to this width", low=1),
}
_REGIONS = {
    "segmenter": Option(str, "model for points and boxes (facebook/sam-vit-base), or for words (a CLIPSeg)"),
    "detector": Option(str, "model that finds words for a --segmenter of points (google/owlv2-base-patch16-ensemble)"),
}
_GUIDANCE = {
    "guidance_scale": Option(float, "classifier-free guidance (default: 7.5, or the inversion's)", low=1),
    "negative_prompt": Option(str, "what guidance leads away from"),
}
_SETTINGS = {
    setting.name: Option(setting.type, "", setting.default, **setting.metadata) for setting in fields(Settings)
}
_FROM_INVERSION = {"inversion": Option(str, "file from `mde-edit invert`, instead of --image and --source-prompt")}
_REGION = "a picture's file, word:cat (of the source prompt), point:X,Y, box:X0,Y0,X1,Y1 or find:cat (--segmenter)"
_EDIT = {
    "prompt": Option(str, "what the picture should show"),
    "object": Option(dict, f"new object and its region: {_REGION}; again for another, or a union", metavar="WORD=MASK"),
    "attribute": Option(dict, "attribute and its region", metavar="WORD=MASK"),
    **_FROM_INVERSION,
    "seed": Option(int, "of the noise that --eta adds", low=0, high=2**63 - 1),
    "preset": Option(str, "named settings, which flags and the config override", choices=tuple(PRESETS)),
    **_SETTINGS,
}
_OUT = {"out": Option(str, "where to write: a folder (edit), a .safetensors file (invert) or a .png file (mask)")}
OPTIONS: dict[str, dict[str, Option]] = {
    "invert": {**_MODEL, **_INVERSION, **_GUIDANCE, **_OUT},
    "edit": {**_MODEL, **_INVERSION, **_GUIDANCE, **_EDIT, **_REGIONS, **_OUT},
    "mask": {
        **_MODEL,
        **{name: option for name, option in _INVERSION.items() if name != "method"},
        **_FROM_INVERSION,
        "region": Option(str, _REGION),
        **_REGIONS,
        **_OUT,
    },
    "app": {
        **_MODEL,
        **_REGIONS,
        "port": Option(int | None, "of the page (default: the first free one from 7860)", low=0, high=65535),
        "share": Option(bool, "give the page a public address for three days", False),
    },
}
# What a row of a batch can say: all that an edit can, and several prompts.
ROW = {
    "name": Option(str, "of the folder of its results"),
    **{
        name: replace(option, several=name in ("prompt", "object", "attribute"))
        for name, option in OPTIONS["edit"].items()
        if name not in _OUT
    },
}
_OF_ONE_ROW = ("name", "image", "source_prompt", "prompt", "object", "attribute", "inversion")
OPTIONS["batch"] = {
    "cache": Option(str, "folder that keeps inversions, for any number of batches (default: .inversions in --out)"),
    "cache_size": Option(float, "GB that --cache may hold; the one unused for longest goes first", 10.0, low=0),
    "edits_per_pass": Option(int | None, "of a row's prompts so many share the U-Net's passes (default: 4)", low=1),
    **{name: option for name, option in ROW.items() if name not in _OF_ONE_ROW},
    "out": Option(str, "folder to write to; what is there already is not done again"),
}
_HELP = {
    "invert": "invert a picture once, to edit it often",
    "edit": "edit a picture",
    "mask": "write a mask, and beside it a picture to look at",
    "app": "edit in a browser",
    "batch": "edit many pictures, the rows of a file or a folder (see docs/batch.md); what is set here holds for the"
    " rows that do not say it themselves; `accelerate launch -m mde_edit.tools.cli batch ...` spreads them over GPUs",
}
_PATHS = ("image", "inversion")


class Parser(argparse.ArgumentParser):
    """Refuses as everything here does: a `ValueError`, which becomes one line."""

    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")


def mask_key(word: str):
    """The pipeline's key for "dog" or "dog:1"."""
    name, separator, occurrence = word.rpartition(":")
    return (name, int(occurrence)) if separator and occurrence.isdecimal() else word


def parse_region(setting: str, text: str) -> tuple[str, Any]:
    """How a region is told, and what is told: "word" and its key, "points" [(x, y), ...], "box" (x0, y0, x1, y1),
    "find" and a text, "file" and its path.

    Raises:
        ValueError: names `setting`.
    """
    kind, _, rest = text.partition(":")
    if kind in ("word", "find"):
        if not rest:
            raise ValueError(f"`{setting}` {text!r}: name what it is, as in {kind}:cat.")
        return kind, mask_key(rest) if kind == "word" else rest
    if kind in ("point", "box"):
        numbers = [_number(part) for part in rest.split(",")]
        right = all(isinstance(number, (int, float)) for number in numbers)
        if not right or (len(numbers) % 2 if kind == "point" else len(numbers) != 4):
            raise ValueError(f"`{setting}` {text!r}: write pixels, as in point:120,80 or box:10,20,90,120.")
        return (kind, tuple(numbers)) if kind == "box" else ("points", list(zip(numbers[::2], numbers[1::2])))
    return "file", text


def build_parser() -> Parser:
    parser = Parser(prog="mde-edit", description="Mask-guided editing of several objects of one picture.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, options in OPTIONS.items():
        sub = commands.add_parser(
            command, help=_HELP[command], description=_HELP[command], argument_default=argparse.SUPPRESS
        )
        sub.add_argument(
            "--config", help="JSON file with any of these settings; flags override it, paths are relative to it"
        )
        if command == "batch":
            sub.add_argument("rows", help="a .jsonl file, one edit per line, or a folder of pictures, masks and .json")
            sub.add_argument("--fail-fast", action="store_true", help="stop at the first row that cannot be edited")
        for name, option in options.items():
            add_flag(sub, name, option)
    bundle = commands.add_parser("bundle", help="write the pipeline as one self-contained file")
    bundle.add_argument("--out", required=True, help="the file to write; diffusers finds it by its name, mde_edit.py")
    form = bundle.add_mutually_exclusive_group()
    form.add_argument("--xl", action="store_true", help="SDXL's pipeline instead, mde_edit_xl.py")
    form.add_argument(
        "--blocks", action="store_true", help="the blocks for Modular Diffusers instead, as a folder, which --out names"
    )
    hub = commands.add_parser("push", help="upload the pipeline's code and card to the Hugging Face Hub")
    hub.add_argument("repo", help="user/name; made if there is none")
    what = hub.add_mutually_exclusive_group()
    what.add_argument("--with-model", metavar="FOLDER", help="a saved pipeline that goes there too, such as emoji_ldm")
    what.add_argument("--blocks", action="store_true", help="the blocks for Modular Diffusers instead")
    what.add_argument("--space", action="store_true", help="a Space with the page of `mde-edit app` instead")
    hub.add_argument("--xl", action="store_true", help="the pipeline of SDXL, which has a repository of its own")
    hub.add_argument("--dry-run", action="store_true", help="only list what would go")
    hub.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    hub.add_argument("--message", default="Upload MDE-Edit", help="of the commit")
    return parser


def add_flag(parser: argparse.ArgumentParser, name: str, option: Option) -> None:
    flag, shown = f"--{name.replace('_', '-')}", option.help
    if "default:" not in shown and (option.default is not None or name in _SETTINGS):
        shown = f"{shown} (default: {str(option.default).lower()})".lstrip()
    if option.kind is dict:
        parser.add_argument(flag, action="append", type=_word_and_mask, metavar=option.metavar, help=shown)
    elif option.kind is bool:
        parser.add_argument(flag, action="store_true", help=shown)
    elif option.choices:
        parser.add_argument(flag, choices=option.choices, help=shown)
    else:
        numeric = option.kind is not str
        parser.add_argument(flag, type=_number if numeric else str, metavar="N" if numeric else None, help=shown)


def _word_and_mask(text: str) -> tuple[str, str]:
    """ "dog=mask.png" or, for the second "dog", "dog:1=mask.png"."""
    word, separator, path = text.partition("=")
    if not separator or not word or not path:
        raise argparse.ArgumentTypeError(f"{text!r}: write WORD=MASK.png, or WORD:1=MASK.png for its second occurrence")
    return word, path


def _number(text: str):
    """The number that a flag's text stands for, or the text, which its option then refuses by name."""
    if text.lower() == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _check_masks(name: str, value) -> dict[str, list[str]]:
    """{word: regions} from {word: region or list of regions}, each as text."""
    masks = {word: [files] if isinstance(files, str) else files for word, files in _items(name, value)}
    for word, files in masks.items():
        if not isinstance(files, list) or not files or not all(isinstance(file, str) and file for file in files):
            raise ValueError(f"`{name}` has {files!r} for {word!r}: give the file of a mask, or a list of files.")
        for file in files:
            parse_region(f"{name}` `{word}", file)
    return masks


def _items(name: str, value):
    if not isinstance(value, dict):
        raise ValueError(f'`{name}` is {value!r}: use words and masks, as in {{"dog": "dog.png"}}.')
    return value.items()


def read_config(file: str, options: dict[str, Option]) -> dict[str, Any]:
    """The settings of a JSON file, paths relative to it.

    Raises:
        ValueError: no such file, no JSON object in it, or a setting that is unknown or stands there twice.
    """
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"`config` {file!r} cannot be read: {error}.") from error
    return check_config(config, options, f"`config` {file!r}", Path(file).parent)


def check_config(config, options: dict[str, Option], where: str, folder: Path) -> dict[str, Any]:
    """The settings of what was read from JSON, paths relative to `folder`; `where` says in an error what was read.

    Raises:
        ValueError: no JSON object, an unknown setting, or a value that its option does not take.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{where} holds {config!r}, not settings by name: {{...}}.")
    unknown = sorted(set(config) - set(options))
    if unknown:
        raise ValueError(f"{where} has unknown settings: {', '.join(unknown)}.")
    # what is null in a config is at its default, unless null means something
    config = {k: v for k, v in config.items() if v is not None or type(None) in get_args(options[k].kind)}
    checked = {name: options[name].check(name, value) for name, value in config.items()}

    def beside(told):
        if isinstance(told, list):
            return [beside(one) for one in told]
        if isinstance(told, dict):
            return {word: beside(one) for word, one in told.items()}
        here = told.startswith(("http://", "https://")) or parse_region("config", told)[0] != "file"
        return told if here else str(folder / told)

    placed = {name for name in checked if name in _PATHS or options[name].kind is dict}
    return {name: beside(value) if name in placed else value for name, value in checked.items()}


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`json`'s `object_pairs_hook` that refuses a name which stands there twice."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(map(repr, twice))} stands there twice (a list of masks is their union)")
    return dict(pairs)


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """A command and all of its settings: flags over the config's over the preset's over the defaults.

    Raises:
        ValueError: a setting that is missing, unknown, of a wrong type or out of range, or that another contradicts.
    """
    flags = vars(build_parser().parse_args(argv))
    command = flags.pop("command")
    if command not in OPTIONS:
        return argparse.Namespace(command=command, **flags)
    options = OPTIONS[command]
    config = read_config(flags.pop("config"), options) if "config" in flags else {}
    for name in ("object", "attribute"):
        if name in flags:
            masks: dict[str, list[str]] = {}
            for word, path in flags[name]:
                masks.setdefault(word, []).append(path)
            flags[name] = masks
    beside = {name: flags.pop(name) for name in ("rows", "fail_fast") if name in flags}  # a batch's, never its rows'
    flags = {name: options[name].check(name, value) for name, value in flags.items()}
    # flags override the config: an inversion takes the place of what one is made from, a picture that of an inversion
    replaced = _INVERSION if "inversion" in flags else {"inversion"} if "image" in flags else {}
    given = {**{name: value for name, value in config.items() if name not in replaced}, **flags}

    if command == "batch":
        return argparse.Namespace(command=command, **{"fail_fast": False, **beside}, **_batch(given))
    return argparse.Namespace(
        command=command, **complete(command, given, _flags, [name for name in _OUT if name in OPTIONS[command]])
    )


def _batch(given: dict[str, Any]) -> dict[str, Any]:
    """A batch's own settings; under `shared`, those for all of its rows, still without defaults."""
    if "out" not in given:
        raise ValueError("missing --out (see mde-edit batch --help)")
    names = ("out", "cache", "cache_size", "edits_per_pass")
    own = {name: given.pop(name, OPTIONS["batch"][name].default) for name in names}
    return {**own, "shared": given}


def complete(
    command: str, given: dict[str, Any], shown: Callable[[Sequence[str]], str], needed: Sequence[str]
) -> dict[str, Any]:
    """All settings of a command: the given ones over the preset's over the defaults.

    Args:
        shown: how an error names settings.
        needed: what has to be given beside what the command always needs.

    Raises:
        ValueError: a setting that is missing, or that another contradicts.
    """
    options, inverted = OPTIONS[command], "inversion" in given
    contradicting = [name for name in _INVERSION if inverted and name in given]
    if contradicting:
        raise ValueError(f"{shown(contradicting)}: the file of --inversion has its own; leave it out.")
    needed = [*needed, *{"invert": [], "edit": ["prompt"], "mask": ["region"], "app": []}[command]]
    if not inverted and "image" in options:
        drawn = command == "mask" and parse_region("region", given.get("region", "word:any"))[0] != "word"
        needed += ["image"] if drawn else ["image", "source_prompt"]
    missing = [name for name in needed if name not in given]
    if missing:
        raise ValueError(f"missing {shown(missing)} (see mde-edit {command} --help)")
    settings = {name: option.default for name, option in options.items() if not (inverted and name in _INVERSION)}
    if not inverted and "guidance_scale" in options:
        settings["guidance_scale"] = 7.5
    return {**settings, **PRESETS.get(given.get("preset"), {}), **given}


def row_settings(row: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """All settings of a row, as `edit` has them: its own over the batch's over the preset's over the defaults.

    Args:
        row, shared: checked settings.

    Raises:
        ValueError: see [`complete`].
    """
    # an inversion takes the place of what one is made from
    shared = {name: value for name, value in shared.items() if not ("inversion" in row and name in _INVERSION)}
    settings = complete("edit", {**shared, **row}, lambda names: ", ".join(f"`{name}`" for name in names), [])
    return {name: value for name, value in settings.items() if name not in _OUT}


def _flags(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
