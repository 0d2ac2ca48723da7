# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""What the page of `mde-edit app` does, without the page: fit a picture, propose words, find, invert, edit, write down.

A [`Studio`] holds the model and serves everybody; nothing of a user is kept in it.
"""

import argparse
import hashlib
import queue
import shlex
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..attention_processors import lock_of
from ..denoise import Settings
from ..inversion import Inversion
from ..mde_pipeline import MDEEditPipeline
from ..prompts import prompt_phrases
from .edit import (
    Edited,
    Request,
    as_rgb,
    edit,
    edit_settings,
    invert,
    prepare,
)
from .edit import Regions as CommandRegions
from .options import OPTIONS, complete, mask_key


OBJECT, ATTRIBUTE = "object", "attribute"
SETTING_NAMES = tuple(setting.name for setting in fields(Settings))
# What can be set on the page: of the inversion, then of the edit.
SHOWN = ("method", "steps", "guidance_scale", "negative_prompt", "seed", *SETTING_NAMES)
PICTURE = "picture.png"  # what the page calls its picture among the files that it offers
# A word's region as the page draws it, (height, width) bool, or as a command tells it ("word:cat"), by role and word.
Regions = dict[tuple[str, str], np.ndarray | str]


@dataclass(frozen=True)
class Progress:
    """How far an edit is, and now and then what it looks like there."""

    step: int
    steps: int
    preview: PIL.Image.Image | None


class Stopped(Exception):
    """Nobody waits for this edit any more."""


class Studio:
    """The model behind the page.

    Args:
        pipe: on its device.
        model: its folder or Hub name, for the code that repeats an edit.
        segmenter: a callable as [`load_segmenter`] makes it, for clicks.
        on_accelerator: wraps all that uses the models (`spaces.GPU`); it takes and returns what can be pickled.
    """

    def __init__(
        self,
        pipe: MDEEditPipeline,
        model: str,
        segmenter: Callable | None = None,
        on_accelerator: Callable[[Callable], Callable] = lambda function: function,
    ):
        self.pipe, self.model, self.segmenter = pipe, model, segmenter
        self.invert = on_accelerator(self._invert)
        self.find = on_accelerator(self._find)
        self.check = on_accelerator(self._check)
        self.edit = on_accelerator(self._edit)

    # -----------------------------------------------------------------------------------------------------------------
    # Pictures and words
    # -----------------------------------------------------------------------------------------------------------------

    def fit(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """The picture as it is inverted: upright, on white, of the area that the model was trained at.

        Raises:
            ValueError: no picture, or one that no proportion of sides fits.
        """
        if image is None:
            raise ValueError("There is no picture yet: upload one, or take an example.")
        picture = as_rgb(image)
        factor, trained = self.pipe.vae_scale_factor, self.pipe.unet.config.sample_size
        if trained is None:
            return picture
        height, width = trained if isinstance(trained, (list, tuple)) else (trained, trained)
        scale = factor * (height * width / (picture.height * picture.width)) ** 0.5
        size = [max(round(side * scale / factor), 1) * factor for side in picture.size]
        return picture.resize(size, PIL.Image.Resampling.LANCZOS)

    def words(self, prompt: str) -> list[str]:
        """What can be named in a prompt, as the command line writes it: "dog", or "dog:1" for the second."""
        words = self._split(prompt)
        return [_label(words, i, i + 1) for i in range(len(words)) if any(map(str.isalnum, words[i]))]

    def _split(self, prompt: str) -> list[str]:
        return [word for word, _ in self.pipe.tokens(prompt)]

    def check_word(self, prompt: str, word: str) -> None:
        """Raise `ValueError` unless `word` names a word or phrase of `prompt`."""
        self.pipe.word_indices(prompt, mask_key(word))

    def propose(self, source_prompt: str, prompt: str) -> tuple[list[str], list[str]]:
        """Which words of the target prompt are new: objects, and attributes (those that another word follows in their
        phrase: "red" in "a red hat"). A proposal: grammar knows better."""
        new, phrases = self._compare(source_prompt, prompt)[:2]
        words = self._split(prompt)
        named: tuple[list[str], list[str]] = ([], [])
        for first, last in phrases:
            for i in range(first, last):
                if i in new:
                    named[i + 1 < last].append(_label(words, i, i + 1))
        return named

    def propose_source(self, source_prompt: str, prompt: str, word: str) -> str | None:
        """What the source prompt calls the thing that `word` of the target is about."""
        _, phrases, counterparts, source_phrases = self._compare(source_prompt, prompt)
        words = self._split(prompt)
        places = {_label(words, i, i + 1): i for i in range(len(words))}
        text = word if word in places else word.split()[-1] if word.strip() else ""
        if text not in places:
            return None
        head = next((last - 1 for first, last in phrases if first <= places[text] < last), places[text])
        there = counterparts.get(head)
        source_words = self._split(source_prompt)
        for first, last in source_phrases:
            if there is not None and first <= there < last:
                return _label(source_words, first, last)
        return None

    def _compare(self, source_prompt: str, prompt: str):
        """New words of the target (indices), its phrases (spans of words), the place of its words in the source, and
        the source's phrases."""
        source, target = self._split(source_prompt), self._split(prompt)
        source_phrases, phrases = self._phrases(source_prompt), self._phrases(prompt)
        content = {i for first, last in source_phrases for i in range(first, last)}
        new: set[int] = set()
        counterparts: dict[int, int] = {}
        for kind, i0, i1, j0, j1 in SequenceMatcher(None, source, target, autojunk=False).get_opcodes():
            if kind == "equal":
                counterparts |= {j: i0 + j - j0 for j in range(j0, j1)}
            else:
                new |= set(range(j0, j1))
                there = [i for i in range(i0, i1) if i in content]
                counterparts |= {j: there[-1] for j in range(j0, j1) if there}
        return new, phrases, counterparts, source_phrases

    def _phrases(self, prompt: str) -> list[tuple[int, int]]:
        """Spans of words, (first, past the last)."""
        starts = {positions[0]: i for i, (_, positions) in enumerate(self.pipe.tokens(prompt))}
        with lock_of(self.pipe.tokenizer):
            phrases = prompt_phrases(self.pipe.tokenizer, self.pipe.spell_out(prompt))
        spans = [[starts[token] for token in phrase if token in starts] for phrase in phrases]
        return [(span[0], span[-1] + 1) for span in spans]

    # -----------------------------------------------------------------------------------------------------------------
    # An edit's request, as the command line makes it
    # -----------------------------------------------------------------------------------------------------------------

    def _arguments(self, command: str, given: dict[str, Any]) -> argparse.Namespace:
        dtype = str(self.pipe.unet.dtype).removeprefix("torch.")
        own = {"model": self.model, "dtype": dtype, "image": PICTURE}
        return argparse.Namespace(**complete(command, {**own, **given}, ", ".join, []))

    def request(
        self, picture: PIL.Image.Image, source_prompt: str, prompt: str, regions: Regions, settings: dict[str, Any]
    ) -> Request:
        """What an edit of the page asks for: the command of [`as_command`], but for files that are not read."""
        given = {"source_prompt": source_prompt, "prompt": prompt, **settings}
        files = {}
        for (role, word), region in regions.items():
            text = region if isinstance(region, str) else mask_file(role, word)
            given.setdefault(role, {})[word] = [text]
            if text is not region:
                files[text] = region
        args = self._arguments("edit", given)
        return Request(args, CommandRegions(args, None, files), edit_settings(args), picture, None)

    # -----------------------------------------------------------------------------------------------------------------
    # What computes
    # -----------------------------------------------------------------------------------------------------------------

    def _invert(
        self, picture: PIL.Image.Image, prompt: str, settings: dict[str, Any]
    ) -> tuple[Inversion, PIL.Image.Image]:
        """An inversion and its reconstruction. settings: `method`, `steps`, `guidance_scale`, `negative_prompt`."""
        given = {name: settings[name] for name in OPTIONS["invert"] if name in settings}
        args = self._arguments("invert", {**given, "source_prompt": prompt})
        inversion = invert(args, self.pipe, picture)
        return inversion.to("cpu"), self.pipe.decode_source(inversion, "pil")[0]

    def _find(self, inversion: Inversion, word: str) -> np.ndarray:
        return self.pipe.generate_mask(inversion, mask_key(word))

    def _edit(
        self, request: Request, inversion: Inversion, masks: list[list[dict]], previews: int = 4
    ) -> Iterator[Progress | Edited]:
        """An edit that tells after each step how far it is, `previews` times with a picture; its outcome comes last.
        Closed, it ends at its next step. masks: what `check` gave."""
        told: queue.SimpleQueue = queue.SimpleQueue()
        steps, stop = inversion.num_inference_steps, threading.Event()
        every = max(steps // (previews + 1), 1)

        def callback(pipe, i, t, tensors):
            if stop.is_set():
                raise Stopped
            shown = (i + 1) % every == 0 and i + 1 < steps
            preview = pipe.decode(tensors["latents"][:1], "pil")[0][0] if shown else None
            told.put(Progress(i + 1, steps, preview))
            return tensors

        def work():
            try:
                told.put(edit(request, self.pipe, inversion, masks, callback))
            except Stopped:
                pass
            except Exception as error:
                told.put(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            while True:
                message = told.get()
                if isinstance(message, Exception):
                    raise message
                yield message
                if not isinstance(message, Progress):
                    return
        finally:
            stop.set()
            thread.join()

    def _check(self, request: Request) -> list[list[dict]]:
        """The masks of a request; raises `ValueError` for what an edit would refuse, before its picture is inverted."""
        return prepare(request, self.pipe)


def check_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Settings of the page by the command line's rules; raises `ValueError` that names the setting."""
    options = OPTIONS["edit"]
    checked = {}
    for name, value in given.items():
        text = options[name].kind is str and not options[name].choices
        value = (value.strip() or None) if text and isinstance(value, str) else value
        # what is None by default may stay so
        same = value is None and options[name].default is None
        checked[name] = value if same else options[name].check(name, value)
    return checked


def _label(words: Sequence[str], first: int, last: int) -> str:
    """The words of a span as a mask's key names them: with their occurrence if they stand there several times."""
    span = list(words[first:last])
    starts = [i for i in range(len(words) - len(span) + 1) if list(words[i : i + len(span)]) == span]
    text = " ".join(span)
    return text if len(starts) == 1 else f"{text}:{starts.index(first)}"


# ---------------------------------------------------------------------------------------------------------------------
# This very edit elsewhere
# ---------------------------------------------------------------------------------------------------------------------


def mask_file(role: str, word: str) -> str:
    """The name under which a region is written, another for each word, also where case and Unicode's forms are one."""

    def spelled(letter: str) -> str:
        plain = letter.isalnum() and unicodedata.normalize("NFKD", letter.casefold()) == letter
        return letter if plain else "_" if letter == " " else f"-{ord(letter):x}-"

    name = "".join(map(spelled, word))
    if len(name.encode()) > 100:  # a file system's names end at 255
        name = f"{name[:20]}--{hashlib.sha256(word.encode(errors='surrogatepass')).hexdigest()[:40]}"
    return f"{role}_{name}.png"


def as_python(args: argparse.Namespace) -> str:
    """A script that makes this edit from the files that the page offers. args: of a request of the page."""
    inversion = {"num_inference_steps": args.steps, "method": args.method, "guidance_scale": args.guidance_scale}
    if args.negative_prompt is not None:
        inversion["negative_prompt"] = args.negative_prompt
    lines = [
        *(["import torch"] if args.seed is not None else []),
        "from diffusers.utils import load_image",
        "from mde_edit import MDEEditPipeline",
        "",
        f"pipe = MDEEditPipeline.from_pretrained({args.model!r})",
        f"inversion = pipe.invert(load_image({args.image!r}), {args.source_prompt!r}, {_keywords(inversion)})",
        "out = pipe(",
        f"    {args.prompt!r},",
        "    inversion=inversion,",
    ]
    for role in (OBJECT, ATTRIBUTE):
        told = getattr(args, role) or {}
        masks = [f"{mask_key(word)!r}: load_image({file!r})" for word, (file,) in told.items()]
        if masks:
            lines.append(f"    {role}_masks={{{', '.join(masks)}}},")
    if args.seed is not None:
        lines.append(f"    generator=torch.Generator().manual_seed({args.seed}),")
    lines += [f"    {name}={value!r}," for name, value in _changed(args, SETTING_NAMES).items()]
    return "\n".join([*lines, ")", 'out.images[0].save("edited.png")', ""])


def as_command(args: argparse.Namespace) -> str:
    """The same as a command line."""
    words = ["mde-edit", "edit"]
    for name in ("model", "image", "source_prompt", "prompt"):
        words += [f"--{name.replace('_', '-')}", getattr(args, name)]
    for role in (OBJECT, ATTRIBUTE):
        for word, (file,) in (getattr(args, role) or {}).items():
            words += [f"--{role}", f"{word}={file}"]
    for name, value in _changed(args, SHOWN).items():
        words += [f"--{name.replace('_', '-')}", str(value).lower() if value is None else str(value)]
    pairs = [shlex.join(words[i : i + 2]) for i in range(0, len(words), 2)]
    return " \\\n  ".join([*pairs, "--out edit"])


def _changed(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) != OPTIONS["edit"][name].default}


def _keywords(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def write_regions(folder: Path, regions: Regions) -> list[Path]:
    """Each region as a black and white PNG."""
    files = []
    for (role, word), mask in regions.items():
        files.append(folder / mask_file(role, word))
        PIL.Image.fromarray(mask.astype(np.uint8) * 255).save(files[-1])
    return files
