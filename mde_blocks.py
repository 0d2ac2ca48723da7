# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""MDE-Edit (arXiv 2505.05101) as blocks of Modular Diffusers: check, invert, mask, edit, to be mixed with others.

    blocks = ModularPipelineBlocks.from_pretrained("user/mde-edit-blocks", trust_remote_code=True)
    pipe = blocks.init_pipeline("CompVis/stable-diffusion-v1-4")
    pipe.load_components()
    image = pipe(image=..., source_prompt=..., prompt=..., object_masks={"dog": "cat"}, output="images")[0]

The blocks stand over the functions of [`MDEEditPipeline`] and give its results. Needs diffusers 0.37 or newer; nothing
else imports this file.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.modular_pipelines import (
    BlockState,
    ComponentSpec,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
)
from transformers import CLIPTextModel, CLIPTokenizer

from .attention_processors import Record, attention_control
from .bundle import self_contained_source
from .checks import check_setting, told_of
from .denoise import Edit, Run, Settings, edit_steps, join_steps, record_source
from .editing import per_prompt
from .inversion import INVERSION_METHODS, Inversion, check_inversion_settings
from .masks import Masks, each_mask, source_words, with_regions
from .mde_pipeline import MDEEditPipeline


if "metadata" not in {field.name for field in fields(InputParam)}:
    raise ImportError("The Modular Diffusers of this release of diffusers is another one: 0.37 or newer is needed.")

COMPONENTS = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "unet": UNet2DConditionModel,
    "scheduler": DDIMScheduler,
}
SEGMENTER = (
    "a callable `(image, points= | box= | word=) -> mask`, such as `mde_edit.tools.segment.load_segmenter` gives"
)


# ---------------------------------------------------------------------------------------------------------------------
# What blocks read and write
# ---------------------------------------------------------------------------------------------------------------------


def _read(name: str, kind: Any, default: Any = None, description: str = "", node: str | None = None) -> InputParam:
    """An input, described as the pipeline's documentation does it unless told otherwise. `node`: what a Mellon node
    shows for it; where there is a default, what goes with its type."""
    documents = (MDEEditPipeline.__call__.__doc__, MDEEditPipeline.invert.__doc__)
    description = description or next(filter(None, (told_of(name, document) for document in documents)), "")
    if node is None and default is not None:
        node = {str: "textbox", bool: "checkbox"}.get(type(default), "number")
    return InputParam(name, kind, default, description=description, metadata={"mellon": node} if node else None)


def _read_all() -> dict[str, InputParam]:
    """Everything that some block reads, by name. Those with a default of `None` that an inversion brings take it."""
    asked = (
        " Or what a `segmenter` is asked for: {'points': [(x, y)]}, {'box': (left, top, right, bottom)} or {'word':"
        " 'cat'}."
    )
    call = MDEEditPipeline.__call__.__doc__
    objects = told_of("object_masks", call).replace(" ([`~MDEEditPipeline.generate_mask`])", "")
    cap = told_of("max_update", call).replace("`None`: no cap", "1e9 (a block takes `None` for the default): no cap")
    inputs = [
        _read(
            "image",
            PIL.Image.Image,
            description="One picture: PIL in any mode, (H, W, 3) numpy or (3, H, W) torch. Beside an `inversion` it is"
            " only what the segmenter looks at.",
            node="image",
        ),
        _read("source_prompt", str, description="What the picture shows now, in words.", node="textbox"),
        _read("prompt", str | list[str], None, "The target prompt. A list edits the picture several ways.", "textbox"),
        _read(
            "inversion",
            Inversion,
            description="The picture, inverted. One from before takes the place of `source_prompt`, and nothing is"
            " inverted.",
        ),
        _read("object_masks", Masks | list[Masks], description=objects + asked),
        _read("attribute_masks", Masks | list[Masks], description=told_of("attribute_masks", call) + asked),
        _read("segmenter", Callable, description=f"What finds the masks that are asked of it: {SEGMENTER}."),
        _read("num_inference_steps", int, description="DDIM steps: 50, or the inversion's."),
        _read(
            "inversion_method",
            str,
            "null_text",
            f"One of {', '.join(INVERSION_METHODS)}. The first is the paper's; the others optimize nothing and are many"
            " times faster.",
        ),
        _read("num_inner_steps", int, 10),
        _read("early_stop_epsilon", float, 1e-5),
        _read("guidance_scale", float, description="Classifier-free guidance: 7.5, or the inversion's."),
        _read("height", int, description="Size to resize the picture to; its own by default."),
        _read("width", int, description="Size to resize the picture to; its own by default."),
        _read("negative_prompt", str | list[str]),
        _read("prompt_embeds", torch.Tensor),
        _read("source_prompt_embeds", torch.Tensor, description="(1, tokens, dim), the same for `source_prompt`."),
        _read("guidance_rescale", float),
        _read("cross_attention_kwargs", dict[str, Any]),
        _read("clip_skip", int),
        _read("generator", torch.Generator | list[torch.Generator]),
        _read("num_images_per_prompt", int, 1),
        _read("edits_per_pass", int),
        *(
            _read(setting.name, setting.type, setting.default, cap if setting.name == "max_update" else "")
            for setting in fields(Settings)
        ),
        _read("output_attention_maps", bool, False),
        _read("output_type", str, "pil"),
        _read("run", Run, description="What all steps share: inversion, scheduler, settings, attention layers."),
        _read("edits", list[Edit], description="Per edit: embedding, alignment, regions, mask."),
        _read("latents", torch.Tensor, description="(edits, channels, height, width) float32."),
        _read("source_record", Record, description="What the source prompt's pass of this step recorded, to inject."),
    ]
    return {param.name: param for param in inputs}


INPUTS = _read_all()
OUTPUTS = {
    param.name: param
    for param in (
        OutputParam("inversion", Inversion, "The picture, inverted: for any number of edits."),
        OutputParam("object_masks", Masks | list[Masks], "All as drawn masks."),
        OutputParam("attribute_masks", Masks | list[Masks], "All as drawn masks."),
        OutputParam("run", Run, INPUTS["run"].description),
        OutputParam("edits", list[Edit], INPUTS["edits"].description),
        OutputParam("latents", torch.Tensor, INPUTS["latents"].description),
        OutputParam("source_record", Record, INPUTS["source_record"].description),
        OutputParam("losses", list[list[dict]], "Per edit, one entry per iteration of the latent guidance."),
        OutputParam(
            "attention_maps",
            list[dict],
            "With `output_attention_maps`: per edit, of each word (guided steps, 2, height, width), before and after"
            " the latent guidance.",
        ),
        OutputParam(
            "images", list[PIL.Image.Image], "One per edit, in the form of `output_type`.", metadata={"mellon": "image"}
        ),
        OutputParam(
            "source_images",
            list[PIL.Image.Image],
            "The reconstruction: what the edit would be without an edit.",
            metadata={"mellon": "image"},
        ),
    )
}
SETTINGS = tuple(setting.name for setting in fields(Settings))
TOLD = ("guidance_scale", "guidance_rescale", "cross_attention_kwargs", "clip_skip")  # of an inversion and of its edits
INVERTED = (
    *("image", "source_prompt", "num_inference_steps", "inversion_method", "height", "width", "negative_prompt"),
    *("source_prompt_embeds", *TOLD),
)
EDITED = (
    *("prompt", "object_masks", "attribute_masks", "num_inference_steps", "negative_prompt", "prompt_embeds"),
    *("generator", "num_images_per_prompt", "edits_per_pass", *TOLD),
)


class SavesItsCode(ModularPipelineBlocks):
    """Blocks whose `save_pretrained` and `push_to_hub` bring the code that the saved `auto_map` names."""

    def save_config(self, save_directory, **kwargs) -> None:
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        code = self_contained_source(Path(__file__))
        Path(save_directory, Path(__file__).name).write_text(code, encoding="utf-8")
        super().save_config(save_directory, **kwargs)


class MDEBlock(SavesItsCode):
    """A block that states what it reads, writes and uses by name."""

    model_name = "mde-edit"
    _requirements = {"diffusers": ">=0.37"}
    about: str
    uses: tuple[str, ...] = tuple(COMPONENTS)
    reads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    def __init__(self):
        super().__init__()
        self._progress_bar_config: dict[str, Any] = {}

    @property
    def description(self) -> str:
        return self.about

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec(name, COMPONENTS[name]) for name in self.uses]

    @property
    def inputs(self) -> list[InputParam]:
        # copies: loops set `required` on what they are given
        return [replace(INPUTS[name], required=name in self.needs) for name in dict.fromkeys(self.needs + self.reads)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OUTPUTS[name] for name in self.writes]

    def set_progress_bar_config(self, **kwargs) -> None:
        self._progress_bar_config = kwargs

    def pipeline(self, components) -> MDEEditPipeline:
        """The pipeline with these components, whose methods this block calls.

        Raises:
            ValueError: one that this block uses is not loaded.
        """
        missing = [name for name in self.uses if getattr(components, name, None) is None]
        if missing:
            raise ValueError(
                f"{type(self).__name__} uses {', '.join(missing)}, not loaded yet: call `pipe.load_components()`, or"
                f" `pipe.update_components({missing[0]}=...)`."
            )
        parts = {name: getattr(components, name, None) for name in COMPONENTS}
        parts |= {"safety_checker": None, "feature_extractor": None}
        pipeline = MDEEditPipeline(**parts, requires_safety_checker=False)
        pipeline.set_progress_bar_config(**self._progress_bar_config)
        return pipeline


# ---------------------------------------------------------------------------------------------------------------------
# Check, invert, mask
# ---------------------------------------------------------------------------------------------------------------------


def _given(block_state: BlockState, names) -> dict[str, Any]:
    return {name: getattr(block_state, name) for name in names}


def _check_start(block_state: BlockState) -> None:
    """Raise `ValueError` unless it is clear whether to invert: an inversion may still be there from the last call."""
    if block_state.inversion is not None and block_state.source_prompt is not None:
        raise ValueError(
            "`source_prompt` goes with an `image` to invert, and there is an `inversion`: pass `source_prompt=None` to"
            " edit that one, or `inversion=None` to invert the picture."
        )


def _mask_lists(block_state: BlockState) -> list[list[Masks | None]]:
    """Object masks and attribute masks, each as one dict per prompt, or one for all."""
    given = _given(block_state, ("object_masks", "attribute_masks"))
    return [per_prompt(m, len(m) if isinstance(m, (list, tuple)) else 1, name) for name, m in given.items()]


def _as_given(masks: list[list[Masks | None]], block_state: BlockState) -> dict[str, Any]:
    """Lists of masks in the form in which the user gave them: one dict for all prompts, or a list."""
    given = _given(block_state, ("object_masks", "attribute_masks"))
    return {name: own if isinstance(m, (list, tuple)) else own[0] for (name, m), own in zip(given.items(), masks)}


def ask_segmenter(
    pipeline: MDEEditPipeline, masks: list[list[Masks | None]], segmenter, image, check_only: bool = False
) -> list[list[Masks | None]]:
    """`masks` with the segmenter's in the place of what is asked of it; with `check_only`, masks of everything.

    Raises:
        ValueError: a request that cannot be made; names its word.
    """

    def answer(value, name: str):
        if not isinstance(value, dict):
            return value
        if len(value) != 1 or not value.keys() <= {"points", "box", "word"}:
            raise ValueError(
                f"{name} is {value!r}: ask the segmenter by one of 'points' [(x, y)], 'box' (left, top, right, bottom)"
                " and 'word'."
            )
        if not callable(segmenter):
            raise ValueError(f"{name} is {value!r} and `segmenter` is {segmenter!r}: pass {SEGMENTER}.")
        if image is None:
            raise ValueError(f"{name} is {value!r}: pass `image`, at which the segmenter looks.")
        pixels = pipeline.read_image(image)  # (height, width, 3) in [0, 1]
        if check_only:
            return np.ones(pixels.shape[:2], bool)
        return segmenter(PIL.Image.fromarray((pixels * 255).round().to(torch.uint8).numpy()), **value)

    return each_mask(masks, answer)


class MDECheckStep(MDEBlock):
    about = (
        "Checks all inputs of an edit before anything takes long. Leave it out where a later block makes the prompt or"
        " the masks."
    )
    reads = (*INVERTED, "inversion", *EDITED, "segmenter", *SETTINGS, "output_type")
    needs = ("prompt",)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        pipeline = self.pipeline(components)
        _check_output_type(block_state.output_type)
        _check_start(block_state)
        settings = Settings(**_given(block_state, SETTINGS))
        masks = ask_segmenter(
            pipeline, _mask_lists(block_state), block_state.segmenter, block_state.image, check_only=True
        )
        given = _given(block_state, dict.fromkeys((*INVERTED, "inversion", *EDITED)))
        if block_state.inversion is not None:
            given |= {"image": None, "height": None, "width": None}
        pipeline.plan(settings, **given | _as_given(masks, block_state))
        return components, state


class MDEInvertStep(MDEBlock):
    about = "Inverts the picture, once for any number of edits. An `inversion` from before passes through."
    reads = (*INVERTED, "num_inner_steps", "early_stop_epsilon", "inversion")
    writes = ("inversion",)

    @torch.inference_mode(False)  # a tensor made in inference mode can have no gradient, and null-text needs one
    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        _check_start(block_state)
        if block_state.inversion is None:
            block_state.inversion = self.invert(self.pipeline(components), block_state)
        self.set_block_state(state, block_state)
        return components, state

    def invert(self, pipeline: MDEEditPipeline, block_state: BlockState) -> Inversion:
        method, negative = block_state.inversion_method, block_state.negative_prompt
        sources = pipeline.check_sources(
            None,
            *(block_state.image, block_state.source_prompt, block_state.num_inference_steps, method),
            _given(block_state, ("guidance_scale", "guidance_rescale")),
            _given(block_state, ("height", "width")),
            *(block_state.clip_skip, block_state.cross_attention_kwargs),
        )
        if len(sources) > 1:
            raise ValueError(f"`image` holds {len(sources)} pictures: blocks invert one picture at a time.")
        told = sources[0].told
        inner = _given(block_state, ("num_inner_steps", "early_stop_epsilon"))
        steps = (told["num_inference_steps"], told["guidance_scale"], pipeline.scheduler.config.num_train_timesteps)
        check_inversion_settings(method, *steps, **inner)
        if method == "direct" and isinstance(negative, (list, tuple)):
            negative = None  # one per prompt: the edits bring theirs
        embeds = (block_state.source_prompt_embeds, None, "source_prompt_embeds", told["lora_scale"])
        return pipeline.invert_pixels(**told, **inner, **pipeline.check_source_embeds(method, negative, *embeds))


class MDEMaskStep(MDEBlock):
    about = (
        "Draws the masks that are not drawn: a word of the source prompt is where the model's own attention finds it;"
        " points, a box or a word in a dict are what the segmenter makes of them."
    )
    reads = ("object_masks", "attribute_masks", "segmenter", "image")
    needs = ("inversion",)
    writes = ("object_masks", "attribute_masks")

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        pipeline = self.pipeline(components)
        block_state.inversion = pipeline.check_inversion(block_state.inversion)
        masks = _mask_lists(block_state)
        words = source_words(masks)
        for word, name in words.items():
            pipeline.check_source_word(block_state.inversion.prompt, word, name)
        masks = ask_segmenter(pipeline, masks, block_state.segmenter, block_state.image)
        if words:
            masks = with_regions(masks, pipeline.generate_masks(block_state.inversion, words.items()))
        for name, own in _as_given(masks, block_state).items():
            setattr(block_state, name, own)
        self.set_block_state(state, block_state)
        return components, state


# ---------------------------------------------------------------------------------------------------------------------
# Edit
# ---------------------------------------------------------------------------------------------------------------------


class MDEPrepareStep(MDEBlock):
    about = "Turns prompts, words and masks into what the steps read, and starts each edit where the inversion ended."
    reads = (*EDITED, *SETTINGS, "output_attention_maps")
    needs = ("inversion", "prompt")
    writes = ("run", "edits", "latents")

    @torch.inference_mode(False)  # a tensor made in inference mode can have no gradient, and Eq. 7 needs one
    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        pipeline = self.pipeline(components)
        settings = Settings(**_given(block_state, SETTINGS))
        plan = pipeline.plan(settings, inversion=block_state.inversion, **_given(block_state, EDITED))
        (run,), edits, latents = pipeline.prepare_runs(plan, block_state.output_attention_maps)
        # without the U-Net, which stays with the components: diffusers copies a state that a user goes on with
        block_state.run, block_state.edits, block_state.latents = replace(run, unet=None), edits, latents
        self.set_block_state(state, block_state)
        return components, state


class MDERecordStep(MDEBlock):
    about = "In the loop: one pass of the source prompt records the attention that this step injects (Eq. 2)."
    uses = ("unet",)
    needs = ("run", "edits")
    writes = ("source_record",)

    def __call__(self, components, block_state: BlockState, i: int, t: torch.Tensor):
        block_state.source_record = record_source(block_state.run, i, t, block_state.edits)
        return components, block_state


class MDEGuideStep(MDEBlock):
    about = "In the loop: one step of each edit: injection (Eq. 3), latent guidance (Eq. 4-7), blending (Eq. 8)."
    uses = ("unet",)
    needs = ("run", "edits", "latents", "source_record")
    writes = ("latents", "losses", "attention_maps")

    def __call__(self, components, block_state: BlockState, i: int, t: torch.Tensor):
        state = block_state
        done = edit_steps(state.run, i, t, state.latents, state.edits, state.source_record)
        state.latents = join_steps(i, done, state.losses, state.attention_maps)
        return components, block_state


class MDEDenoiseStep(LoopSequentialPipelineBlocks, SavesItsCode):
    """The loop. A block put into `sub_blocks` is called as `block(components, block_state, i, t)` and may change
    `block_state.latents`, `.edits` and `.run`."""

    model_name = MDEBlock.model_name
    block_classes = [MDERecordStep, MDEGuideStep]
    block_names = ["record", "guide"]

    @property
    def description(self) -> str:
        return "Denoises the edits over the inversion's steps; blocks can be put between those of a step."

    @property
    def loop_inputs(self) -> list[InputParam]:
        return [replace(INPUTS[name], required=True) for name in ("run", "edits", "latents")]

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.run = replace(block_state.run, unet=components.unet)
        block_state.losses = [[] for _ in block_state.edits]
        block_state.attention_maps = [{} for _ in block_state.edits]
        timesteps = block_state.run.scheduler.timesteps
        with attention_control(components.unet), self.progress_bar(total=len(timesteps)) as progress:
            for i, t in enumerate(timesteps):
                components, block_state = self.loop_step(components, block_state, i=i, t=t)
                progress.update()
        captured = block_state.run.capture_maps
        stacked = [{key: torch.stack(pairs) for key, pairs in own.items()} for own in block_state.attention_maps]
        block_state.attention_maps = stacked if captured else None
        block_state.run = replace(block_state.run, unet=None)
        block_state.source_record = None  # the last step's, as large as all attention of a pass
        self.set_block_state(state, block_state)
        return components, state


class MDEDecodeStep(MDEBlock):
    about = "Decodes the edits, and the reconstruction to compare them with. No safety checker runs."
    uses = ("vae",)
    reads = ("output_type",)
    needs = ("latents", "inversion")
    writes = ("images", "source_images")

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        _check_output_type(block_state.output_type)
        pipeline = self.pipeline(components)
        inversion = block_state.inversion.to(pipeline._execution_device)
        block_state.images, _ = pipeline.decode(block_state.latents, block_state.output_type)
        block_state.source_images = pipeline.decode_source(inversion, block_state.output_type)
        self.set_block_state(state, block_state)
        return components, state


def _check_output_type(output_type) -> None:
    check_setting("output_type", output_type, str, choices=("pil", "np", "pt", "latent"))


class MDEEditStep(SequentialPipelineBlocks, SavesItsCode):
    block_classes = [MDEPrepareStep, MDEDenoiseStep, MDEDecodeStep]
    block_names = ["prepare", "denoise", "decode"]

    @property
    def description(self) -> str:
        return "Edits an inverted picture: each change inside its own mask, the rest as it was."

    @property
    def outputs(self) -> list[OutputParam]:
        return [OUTPUTS[name] for name in ("images", "source_images", "losses", "attention_maps")]

    def set_progress_bar_config(self, **kwargs) -> None:
        self.sub_blocks["denoise"].set_progress_bar_config(**kwargs)


class MDEEditBlocks(SequentialPipelineBlocks, SavesItsCode):
    block_classes = [MDECheckStep, MDEInvertStep, MDEMaskStep, MDEEditStep]
    block_names = ["check", "invert", "mask", "edit"]

    @property
    def description(self) -> str:
        return (
            "MDE-Edit (arXiv 2505.05101): training-free, mask-guided editing of several objects of a real picture at"
            " once, with any Stable Diffusion 1.x/2.x model. Inverts the picture, finds the masks that are not drawn,"
            " edits."
        )

    @property
    def outputs(self) -> list[OutputParam]:
        return [OUTPUTS["inversion"], *self.sub_blocks["edit"].outputs]
