# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""The page of `mde-edit app` (gradio): from a picture to an edit, in a browser.

What it does is in `studio.py`. What belongs to a user is in that user's [`Session`]; the model serves one at a time.
"""

import argparse
import json
import shutil
import tempfile
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import PIL.Image
from matplotlib.figure import Figure

from ..checks import check_setting, told_of
from ..denoise import PRESETS
from ..inversion import Inversion
from ..masks import as_binary_mask
from ..mde_pipeline import MDEEditPipeline
from .edit import Edited, Request, as_rgb, report
from .edit import Regions as CommandRegions
from .measure import as_array, psnr
from .options import OPTIONS, parse_region
from .sheet import UNGUIDED, attention_panels, plot_losses
from .studio import (
    ATTRIBUTE,
    OBJECT,
    PICTURE,
    SHOWN,
    Progress,
    Regions,
    Studio,
    as_command,
    as_python,
    check_settings,
    write_regions,
)


ROOT = Path(__file__).resolve().parents[1]
SLOTS = 8  # words of one edit; the page's parts have to be there before anybody names them
DRAWN_AT = 512  # pixels of the longer side, at least: smaller pictures are enlarged to be painted on
COLORS = ("#e6194b", "#4363d8", "#3cb44b", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")
OPACITY = 0.6
REFUSALS = (ValueError, FloatingPointError, OSError, RuntimeError)

# Of one width however many are shown: an editor that is resized while it opens shows its picture out of place.
CSS = "#slots {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr))}"
PROGRESS = gr.Progress(track_tqdm=True)  # gradio looks for it among a function's defaults

Word = tuple[str, str]  # role and word


@dataclass
class Session:
    """One user's work. `drawn` keeps what was painted for words that are not shown at the moment, too."""

    picture: PIL.Image.Image | None = None  # as it is inverted
    inversion: Inversion | None = None
    inverted: tuple | None = None  # what it was made from
    reconstruction: PIL.Image.Image | None = None
    slots: list[Word | None] = field(default_factory=lambda: [None] * SLOTS)
    drawn: dict[Word, np.ndarray] = field(default_factory=dict)  # (height, width) bool of any size
    folder: Path | None = None
    stopping: bool | None = None  # whether the edit at work shall end; None without one

    def show(self, words: list[Word]) -> list[int]:
        """Give every word a slot, those that had one theirs; the slots that changed.

        Raises:
            ValueError: more words than slots.
        """
        if len(words) > SLOTS:
            raise ValueError(f"This page edits at most {SLOTS} words at once and {len(words)} are chosen.")
        slots = [word if word in words else None for word in self.slots]
        for word in words:
            if word not in slots:
                slots[slots.index(None)] = word
        changed = [i for i, (new, old) in enumerate(zip(slots, self.slots)) if new != old]
        self.slots = slots
        return changed

    @contextmanager
    def at_work(self):
        """An edit is made inside, which `stopping` can end."""
        self.stopping = False
        try:
            yield
        finally:
            self.stopping = None

    def close(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class Slot:
    """The parts of one word's region."""

    column: gr.Column
    title: gr.Markdown
    editor: gr.ImageEditor
    source: gr.Dropdown
    find: gr.Button
    clear: gr.Button
    upload: gr.UploadButton
    click: gr.Image
    refusal: gr.Markdown


def drawing_size(picture: PIL.Image.Image) -> tuple[int, int]:
    """(width, height) that the picture is painted on at: a whole multiple of its own."""
    factor = -(-DRAWN_AT // max(picture.size))
    return picture.width * factor, picture.height * factor


def side_by_side(*pictures: PIL.Image.Image) -> tuple[PIL.Image.Image, ...]:
    """Pictures of one size, large enough to look at."""
    return tuple(picture.resize(drawing_size(picture), PIL.Image.Resampling.LANCZOS) for picture in pictures)


def read_layers(value: dict | None) -> np.ndarray | None:
    """(height, width) bool: what is painted in an editor; None where nothing is."""
    layers = [np.asarray(layer)[..., 3] for layer in (value or {}).get("layers", []) if layer is not None]
    # half of what one stroke covers; its rim is softer
    painted = np.any([layer >= 255 * OPACITY / 2 for layer in layers], axis=0) if layers else np.zeros((1, 1), bool)
    return painted if painted.any() else None


def as_editor(picture: PIL.Image.Image, drawn: np.ndarray | None, color: str) -> dict[str, Any]:
    """What an editor shows: the picture, and over it a layer of one color.

    drawn: (height, width) bool of any size; None for nothing.
    """
    size = drawing_size(picture)
    background = picture.resize(size, PIL.Image.Resampling.LANCZOS)
    if drawn is None:
        return {"background": background, "layers": [], "composite": None}
    shape = resized(drawn, size) * np.uint8(round(255 * OPACITY))
    red, green, blue = (np.full_like(shape, int(color[i : i + 2], 16)) for i in (1, 3, 5))
    layer = PIL.Image.fromarray(np.stack([red, green, blue, shape], axis=-1))
    return {"background": background, "layers": [layer], "composite": None}


def explain(name: str) -> str:
    """What a setting does, in the words of the pipeline's own documentation."""
    argument = {"steps": "num_inference_steps"}.get(name, name)
    documents = (MDEEditPipeline.invert.__doc__, MDEEditPipeline.__call__.__doc__)
    return next(filter(None, (told_of(argument, document) for document in documents)), OPTIONS["edit"][name].help)


def presets(embedded: bool) -> dict[str, dict[str, Any]]:
    """Settings by name. The embedded model is small and wants fewer steps and less guidance (benchmarks/tuning.md)."""
    usual = {name: OPTIONS["edit"][name].default for name in SHOWN} | {"method": "direct", "guidance_scale": 7.5}
    if embedded:
        usual |= {"steps": 20, "guidance_scale": 2.5}
    null_text = {"method": "null_text", "steps": 50} | ({"guidance_scale": 1.5} if embedded else {})
    return {
        "usual": usual,
        "gentle": {**usual, **PRESETS["gentle"]},
        "fast": {**usual, "steps": 15, **PRESETS["fast"]},
        "paper": {**usual, **null_text, **PRESETS["paper"]},
        "released": {**usual, **null_text, **PRESETS["released"]},
    }


PRESET_HELP = (
    "usual: direct inversion, guidance of the words that look past their regions · gentle: of every word, in small"
    " steps · fast: fewer steps and iterations · paper: its text, null-text inversion included (minutes) · released:"
    " what the official code computes"
)


def judge_reconstruction(decibels: float) -> str:
    """What a PSNR means to somebody who looks."""
    if decibels >= 30:
        return "hardly to be told from your picture"
    return "close to your picture" if decibels >= 25 else "visibly different from your picture, and so will edits be"


class Page:
    """The parts of the page and what happens when they are used."""

    def __init__(self, studio: Studio, examples: list[Path], embedded: bool):
        self.studio = studio
        self.examples = [(folder, json.loads((folder / "edit.json").read_text())) for folder in examples]
        self.presets = presets(embedded)

    # -----------------------------------------------------------------------------------------------------------------
    # Layout
    # -----------------------------------------------------------------------------------------------------------------

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="MDE-Edit", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
            self.session = gr.State(Session(), time_to_live=3600, delete_callback=Session.close)
            gr.Markdown(
                "# MDE-Edit\nChange several things of one picture at once, each inside its own mask; the rest stays."
            )
            self.lay_out_source()
            self.lay_out_words()
            self.lay_out_masks()
            self.lay_out_result()
            self.connect()
            self.offer_to_agents()
        return page

    def lay_out_source(self) -> None:
        gr.Markdown("## 1. The picture, and what it shows")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                self.image = gr.Image(
                    type="pil",
                    image_mode="RGBA",
                    format="png",
                    sources=["upload", "webcam", "clipboard"],
                    label="Picture",
                    height=300,
                )
            with gr.Column(scale=2, min_width=280):
                self.source_prompt = gr.Textbox(
                    label="It shows", placeholder="a cat wearing a straw hat", info="Name what you want to change."
                )
                self.preset = gr.Radio(list(self.presets), value="usual", label="Preset", info=PRESET_HELP)
                self.invert = gr.Button("Invert", variant="primary")
                self.source_status = gr.Markdown(elem_id="source-status")
                with gr.Accordion("Reconstruction", open=False):
                    self.reconstruction = gr.Image(type="pil", format="png", interactive=False, height=220)
                if self.examples:
                    self.dataset = gr.Dataset(
                        label="Examples, with words and masks",
                        components=[gr.Image(visible=False)],
                        samples=[[str(folder / "image.png")] for folder, _ in self.examples],
                        type="index",
                        elem_id="examples",
                    )

    def lay_out_words(self) -> None:
        gr.Markdown("## 2. What it should show, and which words are new")
        with gr.Row():
            self.prompt = gr.Textbox(
                label="It should show", placeholder="a dog wearing a red hat", scale=2, min_width=280
            )
            chips = {"multiselect": True, "allow_custom_value": True, "min_width": 200}
            self.objects = gr.Dropdown([], label="New objects", info="dog, or a phrase: polar bear", **chips)
            self.attributes = gr.Dropdown([], label="New colors, textures, ...", info="red, striped", **chips)
        self.words_status = gr.Markdown(elem_id="words-status")

    def lay_out_masks(self) -> None:
        gr.Markdown("## 3. Where each of them goes")
        self.hint = gr.Markdown("*Choose a picture and new words first.*")
        with gr.Row(elem_id="slots"):
            self.slots = [self.lay_out_slot(i) for i in range(SLOTS)]

    def lay_out_slot(self, i: int) -> Slot:
        clicks = self.studio.segmenter is not None
        with gr.Column(visible=False, min_width=300, elem_id=f"slot-{i}") as column:
            title = gr.Markdown()
            editor = gr.ImageEditor(
                type="pil",
                format="png",
                label="Paint over it",
                sources=(),
                transforms=(),
                layers=gr.LayerOptions(disabled=True),
                brush=gr.Brush(
                    colors=[(COLORS[i], OPACITY)],
                    default_color=(COLORS[i], OPACITY),
                    color_mode="fixed",
                    default_size=DRAWN_AT // 16,
                ),
                eraser=gr.Eraser(default_size=DRAWN_AT // 16),
                canvas_size=(DRAWN_AT, DRAWN_AT),
                height=480,
                elem_id=f"editor-{i}",
            )
            with gr.Row():
                source = gr.Dropdown(
                    [], label="Now it is", info="in the picture's own words", allow_custom_value=True, min_width=120
                )
                find = gr.Button("Find it", min_width=90, size="md")
            with gr.Row():
                clear = gr.Button("Clear", min_width=80, size="sm")
                upload = gr.UploadButton("Upload a mask", file_types=["image"], min_width=80, size="sm")
            click = gr.Image(
                label="Or click on it",
                type="pil",
                interactive=False,
                visible=clicks,
                height=220,
                elem_id=f"click-{i}",
            )
            refusal = gr.Markdown(elem_id=f"slot-status-{i}")
        return Slot(column, title, editor, source, find, clear, upload, click, refusal)

    def lay_out_result(self) -> None:
        gr.Markdown("## 4. The edit")
        with gr.Accordion("Advanced", open=False), gr.Row():
            self.settings = {name: self.lay_out_setting(name) for name in SHOWN}
        with gr.Row():
            self.run = gr.Button("Edit", variant="primary", scale=3)
            self.stop = gr.Button("Stop", scale=1, min_width=80)
        self.edit_status = gr.Markdown(elem_id="edit-status")
        with gr.Row():
            self.result = gr.ImageSlider(
                type="pil", format="png", label="Before and after", interactive=False, min_width=300, max_height=520
            )
            with gr.Column(min_width=300):
                self.maps = gr.Gallery(label="Where each word looks", columns=2, height=420, object_fit="contain")
                self.losses = gr.Plot(label="Losses of the guidance", visible=False)
        gr.Markdown("## 5. This edit elsewhere")
        with gr.Row():
            with gr.Column(min_width=300), gr.Tabs():
                with gr.Tab("Python"):
                    self.python = gr.Code(language="python", label="beside the files", elem_id="as-python")
                with gr.Tab("Command"):
                    self.command = gr.Code(language="shell", label="beside the files", elem_id="as-command")
            with gr.Column(min_width=300):
                self.files = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="files")

    def lay_out_setting(self, name: str):
        option, value = OPTIONS["edit"][name], self.presets["usual"][name]
        shared = {"label": name, "info": explain(name), "value": value, "min_width": 240}
        shared["elem_id"] = f"setting-{name}"
        if option.choices:
            return gr.Dropdown(list(option.choices), **shared)
        if option.kind is str:
            return gr.Textbox(**shared)
        if option.high == 1:
            return gr.Slider(option.low, option.high, step=0.01, **shared)
        return gr.Number(**shared)

    # -----------------------------------------------------------------------------------------------------------------
    # Events
    # -----------------------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        private = {"api_visibility": "private"}
        computing = {**private, "concurrency_limit": 1, "concurrency_id": "model"}
        editors = [slot.editor for slot in self.slots]
        words = [self.prompt, self.source_prompt, self.objects, self.attributes]
        settings = list(self.settings.values())
        told = [self.source_status, self.edit_status]
        shown = [self.session, self.words_status, self.hint]
        for slot in self.slots:
            shown += [slot.column, slot.title, slot.editor, slot.source, slot.click]

        self.image.input(self.take_picture, [self.session, self.image, *words], [*shown, *told], **private)
        if self.examples:
            self.dataset.click(
                self.take_example, [self.session, self.dataset], [*shown, *told, self.image, *words], **private
            )
        self.preset.input(self.take_preset, self.preset, settings, **private)
        for box in (self.prompt, self.source_prompt):
            for event in (box.blur, box.submit):
                event(
                    self.take_prompt,
                    [self.session, *words, *editors],
                    [*shown, self.objects, self.attributes],
                    **private,
                )
        for chips in (self.objects, self.attributes):
            for event in (chips.input, chips.blur):  # a word that is typed is no input
                event(self.take_words, [self.session, *words, *editors], shown, **private)
        self.invert.click(
            self.on_invert,
            [self.session, self.image, self.source_prompt, *settings],
            [self.session, self.source_status, self.reconstruction],
            show_progress_on=self.source_status,
            **computing,
        )
        for i, slot in enumerate(self.slots):
            slot.find.click(
                partial(self.on_find, i),
                [self.session, self.image, self.source_prompt, slot.source, *settings],
                [self.session, self.source_status, self.reconstruction, slot.editor, slot.refusal],
                show_progress_on=[self.source_status, slot.refusal],
                **computing,
            )
            slot.clear.click(partial(self.on_clear, i), self.session, [slot.editor, slot.refusal], **private)
            slot.upload.upload(
                partial(self.on_upload, i), [self.session, slot.upload], [slot.editor, slot.refusal], **private
            )
            if self.studio.segmenter is not None:
                slot.click.select(self.on_click(i), self.session, [slot.editor, slot.refusal], **computing)
        results = [self.edit_status, self.result, self.maps, self.losses, self.python, self.command, self.files]
        self.run.click(
            self.on_edit,
            [self.session, self.image, *words, *settings, *editors],
            [self.session, self.source_status, self.reconstruction, *results],
            show_progress_on=self.edit_status,  # not over the previews
            **computing,
        )
        # Not by gradio's `cancels`: after one the page swallows the next click on what was cancelled.
        self.stop.click(self.on_stop, self.session, self.edit_status, **private)

    @contextmanager
    def telling(self, status: gr.Markdown, updates: dict):
        """What is refused inside is told at `status`, in the words of whoever refused it."""
        try:
            yield
        except REFUSALS as error:
            updates[status] = f"⚠️ **{' '.join(str(error).split())}**"

    def keep(self, session: Session, editors) -> None:
        """Remember what is painted."""
        for word, value in zip(session.slots, editors):
            if word is None:
                continue
            drawn = read_layers(value)
            session.drawn.pop(word, None)
            if drawn is not None:
                session.drawn[word] = drawn

    def show_words(self, session: Session, words, everything: bool = False) -> dict:
        """Updates that show the chosen words' editors; those of words that stay are left as they are."""
        prompt, source_prompt, objects, attributes = words
        updates: dict = {self.session: session, self.words_status: ""}
        with self.telling(self.words_status, updates):
            changed = session.show([(OBJECT, word) for word in objects] + [(ATTRIBUTE, word) for word in attributes])
            there = session.picture is not None and any(session.slots)
            updates[self.hint] = gr.Markdown(visible=not there)
            try:
                names = self.studio.words(source_prompt) if source_prompt else []
            except ValueError:
                names = []
            for i, (slot, word) in enumerate(zip(self.slots, session.slots)):
                if not everything and i not in changed:
                    continue
                updates[slot.column] = gr.Column(visible=there and word is not None)
                if not there or word is None:
                    continue
                kind = {OBJECT: "new object", ATTRIBUTE: "new color or texture"}[word[0]]
                updates[slot.title] = f"### {word[1]}\n{kind}"
                updates[slot.editor] = as_editor(session.picture, session.drawn.get(word), COLORS[i])
                guess = self.studio.propose_source(source_prompt, prompt, word[1]) if names else None
                choices = [*names, *([guess] if guess and guess not in names else [])]
                updates[slot.source] = gr.Dropdown(choices=choices, value=guess)
                updates[slot.click] = session.picture
        return updates

    def take_picture(self, session: Session, image, *words) -> dict:
        """A new picture: what was painted on the old one goes."""
        session.picture, session.inversion, session.drawn = None, None, {}
        updates: dict = {self.source_status: "", self.edit_status: ""}
        if image is not None:
            with self.telling(self.source_status, updates):
                session.picture = self.studio.fit(image)
                width, height = session.picture.size
                updates[self.source_status] = f"{image.width} × {image.height} pixels, edited at {width} × {height}."
        return {**self.show_words(session, words, everything=True), **updates}

    def take_example(self, session: Session, index: int) -> dict:
        folder, case = self.examples[index]
        image = PIL.Image.open(folder / case["image"]).convert("RGBA")
        session.picture, session.inversion, session.drawn = self.studio.fit(image), None, {}
        words = case["prompt"], case["source_prompt"], list(case["object"]), list(case["attribute"])
        for role in (OBJECT, ATTRIBUTE):
            for word, file in case[role].items():
                session.drawn[role, word] = self.read_mask(session, PIL.Image.open(folder / file))
        chips = {"choices": self.studio.words(case["prompt"])}
        return {
            **self.show_words(session, words, everything=True),
            self.image: image,
            self.prompt: words[0],
            self.source_prompt: words[1],
            self.objects: gr.Dropdown(value=words[2], **chips),
            self.attributes: gr.Dropdown(value=words[3], **chips),
            self.source_status: "",
            self.edit_status: "",
        }

    def take_preset(self, name: str) -> list:
        return list(self.presets[name].values())

    def take_prompt(self, session: Session, prompt, source_prompt, objects, attributes, *editors) -> dict:
        """New prompts: propose which words are new; words that were chosen and are still there stay."""
        updates: dict = {self.words_status: ""}
        if not (prompt or "").strip() or not (source_prompt or "").strip():
            return updates
        with self.telling(self.words_status, updates):
            for text, name in ((source_prompt, "source_prompt"), (prompt, "prompt")):
                self.studio.pipe.check_prompt(text, name)
            names = self.studio.words(prompt)
            proposed = self.studio.propose(source_prompt, prompt)
            known = set(objects) | set(attributes)
            chosen = []
            for own, new in zip((objects, attributes), proposed):
                stays = [word for word in own if self.names_word(prompt, word)]
                chosen.append(stays + [word for word in new if word not in known])
            self.keep(session, editors)
            updates |= self.show_words(session, (prompt, source_prompt, *chosen))
            updates[self.objects] = gr.Dropdown(choices=names, value=chosen[0])
            updates[self.attributes] = gr.Dropdown(choices=names, value=chosen[1])
        return updates

    def names_word(self, prompt: str, word: str) -> bool:
        try:
            self.studio.check_word(prompt, word)
        except ValueError:
            return False
        return True

    def take_words(self, session: Session, prompt, source_prompt, objects, attributes, *editors) -> dict:
        updates: dict = {}
        self.keep(session, editors)
        shown = self.show_words(session, (prompt, source_prompt, objects, attributes))
        with self.telling(self.words_status, updates):
            for word in (*objects, *attributes):
                self.studio.check_word(prompt, word)
        return {**shown, **updates}

    def on_clear(self, i: int, session: Session):
        if session.picture is None:
            return gr.skip(), ""
        return as_editor(session.picture, None, COLORS[i]), ""

    def on_upload(self, i: int, session: Session, file: str) -> dict:
        slot, updates = self.slots[i], {}
        updates[slot.refusal] = ""
        with self.telling(slot.refusal, updates):
            drawn = self.read_mask(session, PIL.Image.open(file))
            updates[slot.editor] = as_editor(session.picture, drawn, COLORS[i])
        return updates

    def read_mask(self, session: Session, mask: PIL.Image.Image) -> np.ndarray:
        """A mask's file, (height, width) bool in its own size."""
        return as_binary_mask(mask, "The mask", [session.picture.size[::-1]]).numpy() > 0

    def on_click(self, i: int):
        """What a click on a slot's picture does; gradio looks for the event in a plain function's annotations."""

        def click(session: Session, event: gr.SelectData) -> dict:
            slot, updates = self.slots[i], {}
            updates[slot.refusal] = ""
            with self.telling(slot.refusal, updates):
                mask = self.studio.segmenter(session.picture, points=[tuple(event.index)])
                updates[slot.editor] = as_editor(session.picture, mask, COLORS[i])
            return updates

        return click

    # -----------------------------------------------------------------------------------------------------------------
    # Computing
    # -----------------------------------------------------------------------------------------------------------------

    def read_settings(self, values) -> dict[str, Any]:
        return check_settings(dict(zip(SHOWN, values)))

    def inverted(self, session: Session, image, source_prompt: str, settings: dict[str, Any]) -> dict:
        """Make sure that the session's inversion is that of what is on the page; updates that say so."""
        if session.picture is None:
            session.picture = self.studio.fit(image)
        # the others hold for the guidance and the negative prompt that they were made with
        names = ("method", "steps") if settings["method"] == "direct" else SHOWN[:4]
        made_from = (source_prompt, *(settings[name] for name in names))
        if session.inversion is None or session.inverted != made_from:
            start = time.perf_counter()
            inverted = self.studio.invert(session.picture, source_prompt, settings)
            session.inversion, session.reconstruction = inverted
            session.inverted, seconds = made_from, time.perf_counter() - start
            how = f"Inverted in {seconds:.1f} s"
        else:
            how = "Already inverted"
        decibels = psnr(as_array(session.picture), as_array(session.reconstruction))
        status = f"{how}: the reconstruction is {judge_reconstruction(decibels)} ({decibels:.1f} dB)."
        return {self.session: session, self.source_status: status, self.reconstruction: session.reconstruction}

    def on_invert(self, session: Session, image, source_prompt, *values, progress=PROGRESS) -> dict:
        updates: dict = {self.session: session}
        with self.telling(self.source_status, updates):
            updates |= self.inverted(session, image, source_prompt, self.read_settings(values))
        return updates

    def on_find(self, i: int, session: Session, image, source_prompt, word, *values, progress=PROGRESS) -> dict:
        slot = self.slots[i]
        updates: dict = {self.session: session, slot.refusal: ""}
        with self.telling(slot.refusal, updates):
            if not word:
                raise ValueError("Say what it is now, in a word of the picture's own prompt.")
            self.studio.pipe.check_prompt(source_prompt, "source_prompt")
            self.studio.check_word(source_prompt, word)
            updates |= self.inverted(session, image, source_prompt, self.read_settings(values))
            mask = self.studio.find(session.inversion, word)
            updates[slot.editor] = as_editor(session.picture, mask, COLORS[i])
        return updates

    def on_edit(self, session: Session, image, prompt, source_prompt, objects, attributes, *rest):
        """Check, invert if that is still to do, edit; a generator of updates."""
        values, editors = rest[: len(SHOWN)], rest[len(SHOWN) :]
        updates: dict = {}
        with self.telling(self.edit_status, updates), session.at_work():
            self.keep(session, editors)
            if session.picture is None:
                session.picture = self.studio.fit(image)
            settings = self.read_settings(values)
            words = [(OBJECT, word) for word in objects] + [(ATTRIBUTE, word) for word in attributes]
            nothing = np.zeros(drawing_size(session.picture)[::-1], bool)
            regions = {word: session.drawn.get(word, nothing) for word in words}
            request = self.studio.request(session.picture, source_prompt, prompt, regions, settings)
            masks = self.studio.check(request)
            yield {self.edit_status: "Inverting the picture ..."}
            yield self.inverted(session, image, source_prompt, settings)
            start = time.perf_counter()
            with closing(self.studio.edit(request, session.inversion, masks)) as messages:
                for message in messages if not session.stopping else ():
                    if isinstance(message, Edited):
                        seconds = time.perf_counter() - start
                        updates = self.show_result(session, request, regions, message, seconds)
                    elif session.stopping:
                        break
                    else:
                        yield self.show_progress(session, message)
            updates = updates or {self.edit_status: "Stopped."}
        updates.setdefault(self.session, session)
        yield updates

    def show_progress(self, session: Session, progress: Progress) -> dict:
        shown = {self.edit_status: f"Step {progress.step} of {progress.steps} ..."}
        if progress.preview is not None:
            shown[self.result] = side_by_side(session.picture, progress.preview)
        return shown

    def on_stop(self, session: Session):
        """The edit at work sees it before its next step, or after its inversion."""
        if session.stopping is None:
            return gr.skip()
        session.stopping = True
        return "Stopping ..."

    def show_result(self, session: Session, request: Request, regions: Regions, outcome: Edited, seconds) -> dict:
        output = outcome.output
        edited = output.images[0]
        losses = Figure(figsize=(5, 2.2), layout="constrained") if output.losses[0] else None
        if losses is not None:
            plot_losses(losses.subplots(), output.losses[0])
        python, command = as_python(request.args), as_command(request.args)
        return {
            self.edit_status: f"Edited in {seconds:.1f} s." + ("" if output.losses[0] else f" {UNGUIDED}"),
            self.result: side_by_side(session.picture, edited),
            self.maps: attention_panels(session.picture, edited, output.attention_maps[0]),
            self.losses: gr.Plot(losses, visible=losses is not None),
            self.python: python,
            self.command: command,
            self.files: self.write(session, request, regions, outcome, python),
        }

    def write(self, session: Session, request: Request, regions: Regions, outcome: Edited, python: str) -> list[str]:
        """Everything that repeats this edit, as files of the user's own folder."""
        session.close()
        session.folder = Path(tempfile.mkdtemp(prefix="mde-edit-"))
        folder, output = session.folder, outcome.output
        session.picture.save(folder / PICTURE)
        output.images[0].save(folder / "edited.png")
        output.source_images[0].save(folder / "reconstruction.png")
        session.inversion.save(folder / "inversion.safetensors")
        (folder / "edit.py").write_text(python, encoding="utf-8")
        run = report(request, outcome, session.inversion)
        (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        write_regions(folder, regions)
        return sorted(str(path) for path in folder.iterdir())

    # -----------------------------------------------------------------------------------------------------------------
    # For agents and scripts
    # -----------------------------------------------------------------------------------------------------------------

    def offer_to_agents(self) -> None:
        """One endpoint, also a tool of the MCP server; the page's own events are of no use without it."""
        parts = [
            gr.Image(type="pil", image_mode="RGBA", visible=False),
            *(gr.Textbox(visible=False) for _ in range(4)),
            gr.Textbox("usual", visible=False),
        ]
        outcome = gr.Image(type="pil", format="png", visible=False)
        gr.Button(visible=False).click(
            self.edit_picture,
            parts,
            outcome,
            api_name="edit_picture",
            concurrency_limit=1,
            concurrency_id="model",
        )

    def edit_picture(
        self,
        image: PIL.Image.Image,
        source_prompt: str,
        prompt: str,
        objects: str,
        attributes: str,
        preset: str = "usual",
    ) -> PIL.Image.Image:
        """Change several things of a picture at once, each inside its own region; the rest of the picture stays.

        Args:
            image: The picture to edit.
            source_prompt: What the picture shows now, e.g. "a cat wearing a straw hat".
            prompt: What it should show, the same sentence with other words, e.g. "a dog wearing a red hat".
            objects: New objects and where each goes, "dog=word:cat; ball=box:10,20,90,120": where the cat is, or a box.
            attributes: New colors or textures, likewise, e.g. "red=word:straw hat".
            preset: "usual", "gentle", "fast", "paper" or "released".
        """
        try:
            check_setting("preset", preset, str, choices=tuple(self.presets))
            settings, picture = check_settings(self.presets[preset]), self.studio.fit(image)
            asked = [
                (role, *part.split("=", 1))
                for role, text in ((OBJECT, objects), (ATTRIBUTE, attributes))
                for part in (map(str.strip, (text or "").split(";")))
                if part
            ]
            if not all(len(entry) == 3 for entry in asked):
                raise ValueError('Write `objects` and `attributes` as "dog=word:cat; hat=word:straw hat".')
            upright = as_rgb(image)
            regions = {}
            for role, word, place in asked:
                regions[role, word] = self.place(f"{role}` `{word}", place, upright, picture.size)
            request = self.studio.request(picture, source_prompt, prompt, regions, settings)
            masks = self.studio.check(request)
            inversion, _ = self.studio.invert(picture, source_prompt, settings)
            *_, outcome = self.studio.edit(request, inversion, masks)
        except REFUSALS as error:
            raise gr.Error(str(error)) from error
        return outcome.output.images[0]

    def place(self, name: str, place: str, image: PIL.Image.Image, size: tuple[int, int]) -> np.ndarray | str:
        """A region that an agent tells: a source word as it is, what the segmenter draws as a mask of (width, height)
        `size`. No file: it would be one of this machine."""
        kind, _ = parse_region(name, place)
        if kind == "word":
            return place
        if kind == "file" or self.studio.segmenter is None:
            raise ValueError(f"`{name}` {place!r}: say word:cat (points and boxes need a --segmenter).")
        drawn = CommandRegions(argparse.Namespace(segmenter=True, detector=None, device=None), self.load_segmenter)
        return resized(np.asarray(drawn.draw(name, place, image)), size)

    def load_segmenter(self, *_):
        return self.studio.segmenter


def resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A boolean mask at (width, height), its nearest pixels."""
    return np.asarray(PIL.Image.fromarray(mask.astype(np.uint8) * 255).resize(size, PIL.Image.Resampling.NEAREST)) > 0


def serve(studio: Studio, port: int | None = None, share: bool = False, **launch):
    """Launch the page, with the examples of this repository where they are there, and wait unless `launch` says
    otherwise; what gradio's `launch` returns."""
    examples = sorted(path.parent for path in (ROOT / "examples").glob("*/edit.json"))
    page = Page(studio, examples, embedded=Path(studio.model).name == "emoji_ldm").build()
    return page.queue().launch(server_port=port, share=share, css=CSS, mcp_server=True, show_error=True, **launch)
