# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""What the pipelines of all families do: check, prepare, invert, loop, decode.

A mixin of the pipeline classes, which say what their family does otherwise. The paper is in `denoise.py` (a step, Eq.
2-8), `losses.py` (Eq. 4-6), `attention_processors.py` (attention control) and `inversion.py`.
"""

import functools
import inspect
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import BaseOutput, logging

from .attention_processors import (
    AttentionLayer,
    attention_control,
    attention_layers,
    check_untouched,
    lock_of,
    select_loss_layers,
)
from .checks import check_setting
from .conditioning import TENSOR_INPUTS, Conditioning, join_conditioning
from .denoise import PRESETS, Edit, Region, Run, Settings, join_steps, picture_step
from .inversion import (
    FAMILIES,
    INVERSION_METHODS,
    Inversion,
    check_inversion_settings,
    invert_latents,
    model_fingerprint,
    probe_noise,
)
from .localize import source_attention, word_region
from .masks import Masks, as_binary_mask, binarize_mask, edit_mask, resize_mask, source_words, with_regions
from .pictures import as_pictures, on_white, read_pixels
from .prompts import WordKey, align_tokens, find_token_indices, prompt_phrases
from .texts import ReadsPrompts


logger = logging.get_logger(__name__)

# Arguments of diffusers' pipelines that mean nothing here: why, and what to do instead.
REFUSED = {
    "ip_adapter_image": "image prompts have no words whose attention could be steered",
    "ip_adapter_image_embeds": "image prompts have no words whose attention could be steered",
    "latents": "every edit starts where the inversion ended",
    "timesteps": "an edit takes the inversion's: pass `num_inference_steps` to `pipe.invert`",
    "sigmas": "an edit takes the inversion's: pass `num_inference_steps` to `pipe.invert`",
}


@dataclass
class MDEEditPipelineOutput(BaseOutput):
    """Output of [`MDEEditPipeline`] and [`MDEEditXLPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            One edited picture per target prompt, in the form `output_type` asked for ("latent": the final latents).
        source_images (same form):
            The reconstruction branch's picture, one per picture: what the edit would be without an edit.
        nsfw_content_detected (`list[bool]`, *optional*):
            The safety checker's verdict per edited picture; `None` without one.
        attention_maps (`list[dict]`, *optional*):
            With `output_attention_maps`: per prompt, for each edited word (the mask's key) a tensor
            `(guided steps, 2, h, w)`: its aggregated map (Eq. 4) before and after each step's latent guidance.
        losses (`list[list[dict]]`):
            Per prompt, one entry per iteration of the latent guidance: `step`, `iteration`, the weighted `loss`, the
            bare `oal` and `ccl` of the words it guides, and `capped`, the share of latent values whose update the trust
            cap cut. A step that guides no word has no entry.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    source_images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    nsfw_content_detected: list[bool] | None
    attention_maps: list[dict[WordKey, torch.Tensor]] | None
    losses: list[list[dict[str, float]]]


@dataclass(frozen=True)
class Source:
    """What the edits of one picture start from, checked: an inversion, or what [`~MDEEditPipeline.invert_pixels`] is
    told of a picture.

    prompt: the source prompt. image_size: (height, width) of the picture, where it is known. latent_size: (h, w).
    guidance_scale, guidance_rescale: of the edits. reading: how prompts are read, see [`~MDEEditPipeline.condition`].
    inversion: or None. told: the arguments of `invert_pixels`, without an inversion.
    """

    prompt: str
    image_size: tuple[int, int] | None
    latent_size: tuple[int, int]
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    reading: dict[str, Any]
    inversion: Inversion | None = None
    told: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The edits of one or several pictures, checked and not begun: what [`~MDEEditPipeline.plan`] gives.

    edits_per_pass: see [`Run`]. sources: what the edits of each picture start from. parts: of each picture, its edits'
    prompts, generators, object masks, attribute masks, conditioning of prompt and negative prompt where the user gives
    it (or `None`), each one per edit. checked: of each picture, what [`~MDEEditPipeline.check_edits`] gives.
    """

    settings: Settings
    edits_per_pass: int
    sources: list[Source]
    parts: list[tuple[list, ...]]
    checked: list[tuple[dict, tuple]]


# What of `__call__`'s arguments [`~MDEEditPipeline.plan`] takes beside the settings.
PLANNED = (
    *("prompt", "inversion", "image", "source_prompt", "object_masks", "attribute_masks", "num_inference_steps"),
    *("inversion_method", "guidance_scale", "generator", "negative_prompt", "prompt_embeds", "negative_prompt_embeds"),
    *("source_prompt_embeds", "height", "width", "num_images_per_prompt", "guidance_rescale", "cross_attention_kwargs"),
    *("clip_skip", "edits_per_pass"),
)


class EditsPictures(ReadsPrompts):
    """Mixin of a Stable Diffusion pipeline: everything that [`MDEEditPipeline`] and [`MDEEditXLPipeline`] do alike.

    A class states its `family`, one of `FAMILIES`, how many edits share a pass where a call does not say, and the
    arguments that it refuses with a reason.
    """

    family: str
    edits_per_pass: int
    refused = REFUSED
    presets = PRESETS

    # -----------------------------------------------------------------------------------------------------------------
    # What families do otherwise, beside reading prompts
    # -----------------------------------------------------------------------------------------------------------------

    def time_ids(self, image_size: tuple[int, int], size: tuple[int, int]) -> torch.Tensor | None:
        """What the U-Net is told of a picture's size.

        Args:
            image_size, size: (height, width) of the picture, and to what it was resized.

        Returns:
            (1, 6) as in [`Conditioning`], or `None` if nothing.
        """
        return None

    def working_vae(self):
        """A context in which the VAE computes finite numbers."""
        return nullcontext()

    def latent_statistics(self) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """Mean and deviation of the VAE's latents, (1, channels, 1, 1) each, that the model's are without; numbers
        where it is the same for all channels."""
        return 0.0, 1.0

    def screen(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
        """(n, 3, height, width) as they may be shown, and the safety checker's verdicts; `None` without one."""
        return pixels, None

    # -----------------------------------------------------------------------------------------------------------------
    # Check and prepare
    # -----------------------------------------------------------------------------------------------------------------

    @classmethod
    def check_parts(cls, pipeline, fault: str | None = None) -> None:
        """Raise `ValueError` for a `pipeline` of another family, whose parts this class cannot take, or for a `fault`
        that they have."""
        cls.check_unet(pipeline.components.get("unet"))
        if fault is None and ("text_encoder_2" in pipeline.components) != (cls.family == "sdxl"):
            fault = f"it has {'one text encoder' if cls.family == 'sdxl' else 'two text encoders'}"
        if fault is not None:
            raise ValueError(
                f"A {type(pipeline).__name__} is not of {FAMILIES[cls.family][0]}'s kind ({fault}): {cls.__name__}"
                " cannot edit with its parts."
            )

    def register_modules(self, **modules) -> None:
        self.check_unet(modules.get("unet"))
        super().register_modules(**modules)

    @classmethod
    def check_unet(cls, unet) -> None:
        """Raise `ValueError`, naming the class to use, for a U-Net of another family."""
        config = getattr(unet, "config", {})  # diffusers registers what is not there, too
        if config:
            cls.check_family("U-Net", "sdxl" if config.get("addition_embed_type") == "text_time" else "sd")

    @classmethod
    def check_index(cls, index: dict) -> None:
        """Raise `ValueError`, naming the class to use, for the `model_index.json` of a model of another family."""
        if "unet" in index:
            cls.check_family("model", "sdxl" if "text_encoder_2" in index else "sd")

    @classmethod
    def check_family(cls, what: str, family: str) -> None:
        if family != cls.family:
            models, editor = FAMILIES[family]
            raise ValueError(f"This {what} is of {models}'s kind and {cls.__name__} is not: use {editor}.")

    @staticmethod
    def load_inversion(path) -> Inversion:
        """[`Inversion.load`], for scripts that loaded this pipeline by `custom_pipeline` and have nothing to import."""
        return Inversion.load(path)

    def ddim_scheduler(self, num_inference_steps: int, inverse: bool = False):
        """A DDIM scheduler (or its inverse) for the noise schedule this model was trained with, timesteps set.

        Made from the config of whatever scheduler the pipeline holds: its betas and prediction type. Clipping and
        thresholding stay off (they cannot be inverted), and "linspace" spacing, which DDIM steps do not retrace,
        becomes "leading".
        """
        config = self.scheduler.config
        if "beta_start" not in config and config.get("trained_betas") is None:
            raise ValueError(
                f"The pipeline's scheduler is a {type(self.scheduler).__name__}, whose noise schedule has no betas:"
                " give it the one that the model was trained with (`DDIMScheduler.from_pretrained(model,"
                " subfolder='scheduler')`)."
            )
        if config.get("prediction_type", "epsilon") == "epsilon" and config.get("rescale_betas_zero_snr"):
            raise ValueError(
                "The pipeline's scheduler has `rescale_betas_zero_snr` and predicts epsilon, which says nothing where"
                " no signal is left. Turn the rescaling off, or use a v-prediction model."
            )
        schedule = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        trailing = config.get("timestep_spacing") == "trailing"
        scheduler_class = DDIMInverseScheduler if inverse else DDIMScheduler
        scheduler = scheduler_class(
            **{k: config[k] for k in (*schedule, "prediction_type", "rescale_betas_zero_snr") if k in config},
            clip_sample=False,
            set_alpha_to_one=config.get("set_alpha_to_one", False),
            timestep_spacing="trailing" if trailing else "leading",
            steps_offset=0 if trailing else 1,
        )
        scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        if scheduler.timesteps.max() >= config["num_train_timesteps"]:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}: with this scheduler's spacing the first of them lies"
                f" past the {config['num_train_timesteps']} timesteps of the training; use fewer."
            )
        return scheduler

    def prepare_image(
        self, image: PipelineImageInput, height: int | None = None, width: int | None = None
    ) -> torch.Tensor:
        """One picture, upright and on white, as (1, 3, height, width) fp32 in [-1, 1].

        Args:
            image: what [`read_pixels`] reads, or a list of one.
            height, width: to resize it to; its own by default. Sides are rounded down to what the VAE accepts.

        Raises:
            ValueError: not one picture of three channels, or no size that the VAE accepts.
        """
        return self.fit_image(self.read_image(image), height, width)

    def read_image(self, image: PipelineImageInput, name: str = "`image`") -> torch.Tensor:
        """One picture in its own size, upright and on white: (height, width, 3) fp32 in [0, 1]."""
        if isinstance(image, (list, tuple)):
            if len(image) != 1:
                raise ValueError(f"{name} is a list of {len(image)}: invert one picture at a time.")
            image = image[0]
        pixels = on_white(read_pixels(image, name, signed=True))
        if isinstance(image, PIL.Image.Image):
            pixels = pixels.expand(*pixels.shape[:2], 3)
        elif image.ndim == 2:
            raise ValueError(
                f"{name} has shape {tuple(image.shape)}: pass one picture, (H, W, 3) numpy or (3, H, W) torch."
            )
        channels = self.vae.config.get("in_channels", 3)  # `ConsistencyDecoderVAE` does not say
        if pixels.shape[-1] != channels:
            raise ValueError(f"{name} has {pixels.shape[-1]} channels and the VAE reads {channels}.")
        return pixels

    def fit_image(self, pixels: torch.Tensor, height: int | None, width: int | None) -> torch.Tensor:
        """(height, width, 3) in [0, 1] to (1, 3, height, width) in [-1, 1], sides rounded down for the VAE."""
        sizes, factor = [], self.vae_scale_factor
        for name, wanted, own in zip(("height", "width"), (height, width), pixels.shape):
            if wanted is not None:
                check_setting(name, wanted, int, low=factor)
            elif own < factor:
                raise ValueError(
                    f"`image` is {pixels.shape[1]}x{pixels.shape[0]} (width x height), smaller than one latent"
                    f" ({factor}x{factor} pixels): pass a larger picture, or `height` and `width`."
                )
            sizes.append((own if wanted is None else int(wanted)) // factor * factor)
        most = PIL.Image.MAX_IMAGE_PIXELS or math.inf  # beyond it PIL holds a file for an attack
        if (height or width) and sizes[0] * sizes[1] > most:
            raise ValueError(
                f"`height` and `width` make a picture of {sizes[1]}x{sizes[0]}: use {most} pixels at most."
            )
        if tuple(sizes) == tuple(pixels.shape[:2]):
            tensor = self.image_processor.preprocess(pixels.movedim(-1, 0)[None])
            # in the memory order that the processor gives PIL pictures: convolutions round by it
            return tensor.contiguous(memory_format=torch.channels_last)
        # In PIL's eight bits, whatever the picture came as: the processor resizes tensors without smoothing.
        picture = PIL.Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
        return self.image_processor.preprocess(picture, *sizes)

    def check_model(self) -> None:
        """Raise `ValueError` for a model, or an add-on to it, that does not take the passes of this method."""
        check_untouched(self.unet)
        config = self.unet.config
        if any(parameter.is_inference() for parameter in self.unet.parameters()):
            raise ValueError(
                "The U-Net was loaded inside `torch.inference_mode`, and no gradient runs through such weights: load"
                " the pipeline outside of it. (Calls inside of it are fine.)"
            )
        if config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                "This U-Net was distilled to take its guidance as an input (`time_cond_proj_dim`, as LCM's are) and"
                " cannot be inverted at another: use the model that it was distilled from."
            )
        if getattr(self.unet, "encoder_hid_proj", None) is not None:
            raise ValueError(
                "An IP-Adapter is loaded: call `pipe.unload_ip_adapter()` (a picture has no words to steer)."
            )
        added = config.get("addition_embed_type")
        if config.in_channels != self.vae.config.latent_channels or added not in (None, "text_time"):
            raise ValueError(
                f"This U-Net reads {config.in_channels} channels and `addition_embed_type` {added!r}: it is an"
                f" inpainting or an image-conditioned model. Use a text-to-image model of {FAMILIES[self.family][0]}."
            )
        self.check_unet(self.unet)

    def prepare_edit(
        self,
        prompt: str,
        source_prompt: str,
        object_masks: Masks | None,
        attribute_masks: Masks | None,
        mask_sizes: Sequence[tuple[int, int]],
        latent_size: tuple[int, int],
        loss_size: tuple[int, int],
        cross_sizes: Collection[tuple[int, int]],
        mask_dilation: int | None,
        **reading: Any,
    ) -> Edit:
        """Words to token positions, masks to every resolution, prompts to an alignment and what conditions the U-Net.

        Args:
            mask_sizes: (height, width), each up to a factor, whose proportions a mask may have.
            latent_size, loss_size: (h, w) of the latents and of the level the losses read.
            cross_sizes: (h, w) of every level with cross-attention.
            reading: how the prompt is read, see [`~MDEEditPipeline.condition`].

        Raises:
            ValueError: a prompt, word or mask that cannot be used; names it.
        """
        device = self._execution_device
        self.check_prompt(prompt, "prompt")
        text, source_text = self.spell_out(prompt), self.spell_out(source_prompt)

        def regions_of(masks: Masks | None, name: str, form: Callable[[torch.Tensor], torch.Tensor]) -> list[Region]:
            keys: dict[tuple[int, ...], WordKey] = {}
            shares: dict[tuple[int, ...], dict[tuple[int, int], torch.Tensor]] = {}
            for key, value in (masks or {}).items():
                with lock_of(self.tokenizer):
                    indices = find_token_indices(self.tokenizer, text, self.spell_out_key(key))
                drawn.append(as_binary_mask(value, f"{name}[{key!r}]", mask_sizes))
                # Two masks for the same tokens are one region: as two, their targets would cancel where they differ.
                share = {size: resize_mask(drawn[-1], size).to(device) for size in cross_sizes}
                if indices in shares:
                    share = {size: torch.maximum(shares[indices][size], part) for size, part in share.items()}
                shares[indices] = share
                keys.setdefault(indices, key)
            return [
                Region(
                    key, i, form(shares[i][loss_size]).flatten(), {size: s.flatten() for size, s in shares[i].items()}
                )
                for i, key in keys.items()
            ]

        drawn: list[torch.Tensor] = []
        objects = regions_of(object_masks, "object_masks", lambda share: share)
        attributes = regions_of(attribute_masks, "attribute_masks", binarize_mask)
        mask = edit_mask(drawn, latent_size, mask_dilation)[None, None].to(device) if drawn else None
        edited = sorted({i for region in (*objects, *attributes) for i in region.token_indices})
        with lock_of(self.tokenizer):
            alignment = align_tokens(self.tokenizer, source_text, text).without(edited).to(device)
        return Edit(self.condition(prompt, **reading), alignment, objects, attributes, mask)

    def prepare_edits(
        self,
        prompts: Sequence[str],
        source_prompt: str,
        masks: Sequence[Sequence[Masks | None]],
        image_size: tuple[int, int] | None,
        latent_size: tuple[int, int],
        settings: Settings,
        generators: Sequence[torch.Generator | None],
        **reading: Any,
    ) -> tuple[list[AttentionLayer], list[AttentionLayer], list[Edit]]:
        """All target prompts by [`~MDEEditPipeline.prepare_edit`].

        Args:
            masks: object masks and attribute masks, each one dict per prompt.
            image_size: (height, width) of the picture that masks are drawn on, where it is known.
            reading: how the prompts are read, see [`~MDEEditPipeline.condition`].

        Returns:
            the U-Net's attention layers, those that the losses read, and an edit per prompt.
        """
        layers = attention_layers(self.unet, latent_size)
        loss_layers = select_loss_layers(layers, settings.attention_resolution)
        mask_sizes = [size for size in (image_size, latent_size) if size is not None]
        sizes = (mask_sizes, latent_size, loss_layers[0].size, {layer.size for layer in layers if layer.is_cross})
        edits = []
        for prompt, objects, attributes, generator in zip(prompts, *masks, generators):
            share = (objects, attributes, *sizes, settings.mask_dilation)
            edit = self.prepare_edit(prompt, source_prompt, *share, **reading)
            edits.append(replace(edit, generator=generator))
        return layers, loss_layers, edits

    def check_edits(self, prompts, source_prompt, masks, image_size, latent_size, settings, generators, **reading):
        """What [`~MDEEditPipeline.prepare_edits`] prepares, as far as it can be before an inversion.

        Returns:
            the words of the source prompt that stand in a mask's place ([`source_words`]), and what is prepared with
            masks of everything for them.
        """
        words = source_words(masks)
        for word, name in words.items():
            self.check_source_word(source_prompt, word, name)
        masks = with_regions(masks, dict.fromkeys(words, np.ones(image_size or latent_size, bool)))
        rest = (image_size, latent_size, settings, generators)
        return words, self.prepare_edits(prompts, source_prompt, masks, *rest, **reading)

    def check_inputs(self, guidance_scale, output_type, callback, callback_on_step_end_tensor_inputs, refused) -> None:
        """Raise for an argument of `__call__` that is not one of its [`Settings`] and cannot be used, naming it."""
        for name in refused:
            if name not in self.refused:
                raise TypeError(f"{type(self).__name__}.__call__() got an unexpected keyword argument {name!r}")
            raise ValueError(f"`{name}` has no place in MDE-Edit: {self.refused[name]}.")
        check_setting("guidance_scale", guidance_scale, float | None, low=1)
        check_setting("output_type", output_type, str, choices=("pil", "np", "pt", "latent"))
        if callback is not None and not callable(callback):
            raise ValueError(f"`callback_on_step_end` is {callback!r}: pass a function of (pipe, i, t, tensors).")
        names = callback_on_step_end_tensor_inputs
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"`callback_on_step_end_tensor_inputs` is {names!r}: pass a list of names.")
        unknown = set(names) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}: choose from"
                f" {self._callback_tensor_inputs}."
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Inversion
    # -----------------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # a tensor made in inference mode can have no gradient, and null-text needs one
    @torch.no_grad()
    def invert(
        self,
        image: PipelineImageInput,
        prompt: str,
        num_inference_steps: int = 50,
        method: str = "null_text",
        guidance_scale: float = 7.5,
        num_inner_steps: int = 10,
        early_stop_epsilon: float = 1e-5,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        guidance_rescale: float = 0.0,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
    ) -> Inversion:
        r"""
        Invert a real picture, once, for any number of edits.

        Args:
            image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
                One picture: PIL in any mode, (H, W, 3) or (3, H, W); integers, or floats in [0, 1]. It is turned
                upright and put on white where it is transparent; sides are rounded down to the VAE's multiple.
            prompt (`str`):
                The source prompt p: what the picture shows.
            num_inference_steps (`int`, defaults to 50):
                DDIM steps; edits use the same number.
            method (`str`, defaults to `"null_text"`):
                `"null_text"`: the paper's; null embeddings optimized so that guided sampling retraces the picture.
                `"negative_prompt"`: no optimization; the source prompt serves as null embedding.
                `"direct"`: no optimization; the source branch is read from the inversion trajectory, so the
                reconstruction is the VAE's.
            guidance_scale (`float`, defaults to 7.5):
                The scale of the edits to come. Null-text embeddings hold for this scale only.
            num_inner_steps (`int`, defaults to 10):
                Null-text only: at most so many Adam updates per step.
            early_stop_epsilon (`float`, defaults to 1e-5):
                Null-text only: a step's updates end when the latents' mean squared error falls below this (times 1 to
                101 from the first step to the last). Larger is faster and less exact.
            height, width (`int`, *optional*):
                Size to resize the picture to; its own by default.
            negative_prompt (`str`, *optional*):
                What guidance leads away from, empty by default: with `"direct"` that of the edits unless they bring
                their own, with `"null_text"` where the optimization starts.
            prompt_embeds (`torch.Tensor`, *optional*):
                (1, tokens, dim), the source prompt's embedding if it is not the text encoder's own (weighted words).
                `prompt` is needed beside it.
            negative_prompt_embeds (`torch.Tensor`, *optional*):
                (1, tokens, dim), instead of `negative_prompt`.
            guidance_rescale (`float`, defaults to 0.0):
                That of the edits to come, see there. Null-text embeddings hold for this one only.
            cross_attention_kwargs (`dict`, *optional*):
                `{"scale": s}`: LoRAs at `s` times their strength, here and in the edits to come.
            clip_skip (`int`, *optional*):
                How many of the text encoder's last layers to leave out, here and in the edits to come. As in diffusers,
                negative prompts are read by all layers.

        Returns:
            [`Inversion`]

        Raises:
            ValueError: bad picture, prompt or setting; before any pass on the picture.
            FloatingPointError: the optimization or the inversion left the finite numbers.
        """
        arguments = (prompt, num_inference_steps, method, guidance_scale, num_inner_steps, early_stop_epsilon)
        rescale = {"guidance_rescale": guidance_rescale}
        picture = self.check_picture(image, *arguments, height, width, **rescale)
        reading = self.check_reading(clip_skip, cross_attention_kwargs)
        embeds = (method, negative_prompt, prompt_embeds, negative_prompt_embeds)
        told = self.check_source_embeds(*embeds, lora_scale=reading["lora_scale"])
        return self.invert_pixels(*picture, *arguments, **told, **rescale, **reading)

    def check_source_embeds(
        self,
        method: str,
        negative_prompt,
        prompt_embeds,
        negative_prompt_embeds,
        name: str = "prompt_embeds",
        lora_scale: float = 1.0,
    ) -> dict[str, Any]:
        """What [`~MDEEditPipeline.invert_pixels`] is told of prompts beside the source's words; `name` is that of its
        embedding in an error."""
        if method == "negative_prompt" and not (negative_prompt is None and negative_prompt_embeds is None):
            raise ValueError(
                "`negative_prompt` has no place in method='negative_prompt', which takes the source prompt there: leave"
                " it out, or use 'direct' or 'null_text'."
            )
        if isinstance(negative_prompt, (list, tuple)):
            raise ValueError(f"`negative_prompt` is {negative_prompt!r}: an inversion has one, a text.")
        negative = self.check_negative(negative_prompt, negative_prompt_embeds, lora_scale=lora_scale)
        own = self.check_embeds(name, prompt_embeds)
        return {
            "negative_prompt": self.empty_prompt if negative is None else negative_prompt,
            "empty": negative and negative[0],
            "conditioning": own and own[0],
        }

    def check_picture(
        self,
        image: PipelineImageInput,
        prompt: str,
        num_inference_steps: int,
        method: str,
        guidance_scale: float,
        num_inner_steps: int = 10,
        early_stop_epsilon: float = 1e-5,
        height: int | None = None,
        width: int | None = None,
        prompt_name: str = "prompt",
        image_name: str = "`image`",
        guidance_rescale: float = 0.0,
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """All that [`~MDEEditPipeline.invert`] checks.

        Returns:
            the picture as [`~MDEEditPipeline.prepare_image`] gives it, and its own (height, width).
        """
        self.check_model()
        self.check_prompt(prompt, prompt_name)
        check_inversion_settings(
            method,
            num_inference_steps,
            guidance_scale,
            self.scheduler.config.num_train_timesteps,
            num_inner_steps,
            early_stop_epsilon,
            guidance_rescale,
        )
        self.ddim_scheduler(int(num_inference_steps))
        picture = self.read_image(image, image_name)
        pixels = self.fit_image(picture, height, width)
        sample_size = self.unet.config.sample_size  # a number, (height, width), or not stated
        trained = sample_size * self.vae_scale_factor if isinstance(sample_size, int) else None
        large = trained is not None and (pixels.numel() // 3) > 2 * trained**2
        if large or (trained is not None and 2 * min(pixels.shape[-2:]) < trained):
            expected = "repeated objects, and memory to match" if large else "pictures worse than the model's own"
            logger.warning(
                f"The picture is {pixels.shape[-1]}x{pixels.shape[-2]}, the model was trained at {trained}x{trained}:"
                f" expect {expected}. Pass `height` and `width` to resize it."
            )
        return pixels, tuple(picture.shape[:2])

    def invert_pixels(
        self,
        pixels: torch.Tensor,
        image_size: tuple[int, int],
        prompt: str,
        num_inference_steps: int,
        method: str,
        guidance_scale: float,
        num_inner_steps: int = 10,
        early_stop_epsilon: float = 1e-5,
        negative_prompt: str | None = "",
        empty: Conditioning | None = None,
        conditioning: Conditioning | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        lora_scale: float = 1.0,
    ) -> Inversion:
        """[`~MDEEditPipeline.invert`] after its checks, from what [`~MDEEditPipeline.check_picture`] and
        [`~MDEEditPipeline.check_source_embeds`] give."""
        num_inference_steps, num_inner_steps = int(num_inference_steps), int(num_inner_steps)
        scheduler = self.ddim_scheduler(num_inference_steps)
        passes = num_inference_steps * (1 if method == "direct" else 2)
        latents, own, time_ids = self.encode(pixels), conditioning, self.time_ids(image_size, pixels.shape[-2:])
        conditioning = self.condition(prompt, clip_skip, lora_scale) if own is None else own
        empty = self.condition_empty(lora_scale) if empty is None else empty
        conditioning, empty = (one.with_sizes(time_ids) for one in (conditioning, empty))
        with attention_control(self.unet), self.progress_bar(total=passes) as progress:
            fingerprint = model_fingerprint(self.unet, scheduler, conditioning, lora_scale)
            trajectory, null_embeds, pooled_null_embeds = invert_latents(
                self.unet,
                scheduler,
                self.ddim_scheduler(num_inference_steps, inverse=True),
                latents,
                conditioning,
                empty,
                method,
                guidance_scale,
                num_inner_steps,
                early_stop_epsilon,
                progress,
                guidance_rescale,
                lora_scale,
            )
        self.maybe_free_model_hooks()
        return Inversion(
            latents=trajectory,
            null_embeds=null_embeds,
            prompt=prompt,
            method=method,
            guidance_scale=float(guidance_scale),
            timesteps=scheduler.timesteps.cpu(),
            alphas_cumprod=scheduler.alphas_cumprod[scheduler.timesteps.cpu()],
            prediction_type=scheduler.config.prediction_type,
            fingerprint=fingerprint,
            model_dtype=str(self.unet.dtype),
            image_size=image_size,
            negative_prompt=None if method == "negative_prompt" else negative_prompt,
            prompt_embeds=own and own.embeds,
            guidance_rescale=float(guidance_rescale),
            clip_skip=clip_skip,
            lora_scale=lora_scale,
            family=self.family,
            pooled_null_embeds=pooled_null_embeds,
            pooled_prompt_embeds=own and own.pooled,
            time_ids=time_ids,
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Masks from attention
    # -----------------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def generate_mask(self, inversion: Inversion, word: WordKey) -> np.ndarray:
        r"""
        Where a word of the source prompt is in the picture, by the model's own attention: three U-Net passes.

        It tells apart what the prompt names, so name what surrounds the thing too ("a cat on grass"). It cannot tell
        that a thing is not there: its word then looks at what resembles it. In an edit the word can stand in a mask's
        place: `object_masks={"dog": "cat"}`.

        Args:
            inversion ([`Inversion`]):
                From [`~MDEEditPipeline.invert`].
            word (`str` or `tuple`):
                A word or phrase of the source prompt, as a mask's key names one of the target's.

        Returns:
            `np.ndarray`: (height, width) bool, at the size of the picture that was inverted.

        Raises:
            ValueError: a word that is not in the prompt, before any pass; one that is nowhere in the picture.
        """
        return self.generate_masks(inversion, [(word, "`word`")])[word]

    def generate_masks(self, inversion: Inversion, words: Collection[tuple[WordKey, str]]) -> dict[WordKey, np.ndarray]:
        """[`~MDEEditPipeline.generate_mask`] of several words at once.

        Args:
            words: each with what it is called in an error.
        """
        self.check_model()
        inversion = self.check_inversion(inversion)
        for word, name in words:
            self.check_source_word(inversion.prompt, word, name)
        self.check_same_model(inversion, self.ddim_scheduler(inversion.num_inference_steps))
        regions = self.find_regions(inversion, dict(words))
        self.maybe_free_model_hooks()
        return regions

    def find_regions(self, inversion: Inversion, words: dict[WordKey, str]) -> dict[WordKey, np.ndarray]:
        """The regions of several words, (height, width) bool each.

        Args:
            words: what each is called in an error.
        """
        scheduler, device = self.ddim_scheduler(inversion.num_inference_steps), self._execution_device
        with attention_control(self.unet):
            conditioning = self.source_conditioning(inversion)
            cross, own = source_attention(self.unet, scheduler, inversion.to(device), conditioning)
        with lock_of(self.tokenizer):
            phrases = prompt_phrases(self.tokenizer, self.spell_out(inversion.prompt))
        size = inversion.image_size or tuple(side * self.vae_scale_factor for side in inversion.latents.shape[-2:])
        regions = {}
        for word, name in words.items():
            tokens = self.check_source_word(inversion.prompt, word, name)
            others = [phrase for phrase in phrases if not set(phrase) & set(tokens)]
            regions[word] = word_region(cross, own, tokens, others, size).cpu().numpy()
            if not regions[word].any():
                raise ValueError(
                    f"{name}: the model's attention finds {word!r} nowhere in the picture, since other words of"
                    f" {inversion.prompt!r} look there more. Draw its mask, or describe the picture differently."
                )
        return regions

    # -----------------------------------------------------------------------------------------------------------------
    # Edit
    # -----------------------------------------------------------------------------------------------------------------

    def check_sources(
        self,
        inversion: Inversion | None,
        image: PipelineImageInput | None,
        source_prompt: str | Sequence[str] | None,
        num_inference_steps: int | None,
        inversion_method: str,
        guidance: dict[str, float | None],
        size: dict[str, int | None],
        clip_skip: int | None,
        cross_attention_kwargs: dict[str, Any] | None,
    ) -> list[Source]:
        """What `__call__` starts from, one per picture: an inversion, or pictures to invert.

        Args:
            guidance: "guidance_scale" and "guidance_rescale". size: "height" and "width".

        Raises:
            ValueError: both are given or neither, or what is given with them contradicts them.
        """
        self.check_model()
        check_setting("inversion_method", inversion_method, str, choices=INVERSION_METHODS)
        check_setting("guidance_rescale", guidance["guidance_rescale"], float | None, 0, 1)
        if inversion is not None:
            inversion = self.check_inversion(inversion)
        if (inversion is None) == (image is None):
            raise ValueError("Pass either `inversion` (from `pipe.invert`) or `image` with `source_prompt`, not both.")
        reading = self.check_reading(clip_skip, cross_attention_kwargs, inversion)
        if inversion is not None:
            if source_prompt is not None:
                raise ValueError("`source_prompt` goes with `image`; an inversion knows its own prompt.")
            return [self.check_given(inversion, num_inference_steps, guidance, size, reading)]
        if source_prompt is None:
            raise ValueError("`image` needs `source_prompt`: what the picture shows now, in words.")
        pictures = as_pictures(image)
        texts = source_prompt if isinstance(source_prompt, (list, tuple)) else [source_prompt] * len(pictures)
        if not pictures or len(texts) != len(pictures):
            raise ValueError(
                f"`image` holds {len(pictures)} pictures and `source_prompt` {len(texts)} prompts: pass one prompt per"
                " picture, or one for all."
            )
        steps = 50 if num_inference_steps is None else num_inference_steps
        defaults = {"guidance_scale": 7.5, "guidance_rescale": 0.0}
        guidance = {name: defaults[name] if value is None else value for name, value in guidance.items()}
        scale, rescale = guidance.values()
        sources = []
        for k, (picture, text) in enumerate(zip(pictures, texts)):
            place = f"[{k}]" if len(pictures) > 1 else ""
            names = {"prompt_name": f"source_prompt{place}", "image_name": f"`image{place}`"}
            pixels, image_size = self.check_picture(picture, text, steps, inversion_method, scale, **size, **names)
            told = {"pixels": pixels, "image_size": image_size, "prompt": text, "num_inference_steps": int(steps)}
            told |= {"method": inversion_method, **guidance, **reading}
            latent_size = tuple(side // self.vae_scale_factor for side in pixels.shape[-2:])
            settings = (text, image_size, latent_size, int(steps), float(scale), float(rescale), reading)
            sources.append(Source(*settings, told=told))
        sizes = [source.told["pixels"].shape[-2:] for source in sources]
        if len(set(sizes)) > 1:
            shown = ", ".join(f"{w}x{h}" for h, w in sizes)
            raise ValueError(
                f"`image` holds pictures of different sizes ({shown}, width x height): pass `height` and `width`."
            )
        return sources

    def check_given(self, inversion: Inversion, num_inference_steps, guidance, size, reading) -> Source:
        """An inversion as the source of edits; raises `ValueError` for what is given with it and contradicts it."""
        for (name, wanted), latent in zip(size.items(), inversion.latents.shape[-2:]):
            own = latent * self.vae_scale_factor
            if check_setting(name, wanted, int | None, 1) not in (None, own):
                raise ValueError(
                    f"`{name}` is {wanted!r} and the inversion's picture has {own}: leave it out, or pass it to"
                    " `pipe.invert`."
                )
        steps = inversion.num_inference_steps
        if check_setting("num_inference_steps", num_inference_steps, int | None, 1) not in (None, steps):
            raise ValueError(f"`num_inference_steps` is {num_inference_steps} and the inversion was made with {steps}.")
        chosen = []
        for name, wanted in guidance.items():
            own = getattr(inversion, name)
            if inversion.method == "null_text" and wanted not in (None, own):
                raise ValueError(
                    f"`{name}` is {wanted} and the null-text inversion was made for {own}: leave it out, or invert"
                    " again with this one."
                )
            chosen.append(float(own if wanted is None else wanted))
        latent_size = tuple(inversion.latents.shape[-2:])
        settings = (inversion.prompt, inversion.image_size, latent_size, steps, *chosen, reading)
        return Source(*settings, inversion=inversion)

    def check_inversion(self, inversion: Inversion) -> Inversion:
        """`inversion` as one of this copy of the code; raises `ValueError` unless it is one, and whole."""
        # by name: loaded through another door, the class is another object
        if type(inversion).__name__ != "Inversion":
            raise ValueError(
                f"`inversion` is a {type(inversion).__name__}: pass what `pipe.invert` returned;"
                " `pipe.load_inversion(path)` reads a file, and a picture is `image`."
            )
        try:
            inversion = Inversion.adopt(inversion)
            inversion.check_whole()
        except (TypeError, ValueError) as error:
            raise ValueError(f"`inversion` is damaged ({error}): call `pipe.invert` again.") from error
        if inversion.family != self.family:
            models, editor = FAMILIES[inversion.family]
            raise ValueError(
                f"`inversion` was made with a model of {models}'s kind, whose latents mean nothing to"
                f" {FAMILIES[self.family][0]}'s: edit it with {editor}, or call `pipe.invert` of this pipeline."
            )
        return inversion

    def check_same_model(self, inversion: Inversion, scheduler) -> None:
        """Raise `ValueError` unless this pipeline, with `scheduler`, does what the one that made `inversion` did."""
        inversion.check_schedule(scheduler)
        conditioning = self.source_conditioning(inversion)
        with attention_control(self.unet):
            fingerprint = model_fingerprint(self.unet, scheduler, conditioning, inversion.lora_scale)
        inversion.check_model(fingerprint, str(self.unet.dtype))

    def check_null_embeds(
        self, sources: list[Source], negative_prompt, negative_prompt_embeds, source_prompt_embeds, count: int
    ) -> tuple[list[Conditioning | None], list[Source]]:
        """The unconditional rows of `count` edits, one per prompt, or `None` for the inversion's; and the sources with
        what those inversions that are still to be made are told of prompts."""
        inversion, lora_scale = sources[0].inversion, sources[0].reading["lora_scale"]
        nulls = self.check_negative(negative_prompt, negative_prompt_embeds, count, lora_scale)
        if inversion is not None and source_prompt_embeds is not None:
            raise ValueError("`source_prompt_embeds` goes with `image`; an inversion has its own.")
        optimized = (sources[0].told["method"] if inversion is None else inversion.method) != "direct"
        if inversion is None:
            own = self.check_embeds("source_prompt_embeds", source_prompt_embeds, len(sources))
            told = []
            for k, source in enumerate(sources):
                negative = (negative_prompt, negative_prompt_embeds)
                if not optimized:  # an edit of a "direct" inversion brings its own, one per prompt if it likes
                    negative = (None, None)
                elif len(sources) > 1:
                    negative = (item_of(value, k) for value in negative)
                text, embeds = negative
                beside = (source.told["method"], text, own and own[k], embeds, "source_prompt_embeds", lora_scale)
                told.append(replace(source, told={**source.told, **self.check_source_embeds(*beside)}))
            sources = told
        elif optimized and nulls is not None:
            texts = negative_prompt if isinstance(negative_prompt, (list, tuple)) else [negative_prompt]
            if inversion.negative_prompt is None or set(texts) != {inversion.negative_prompt}:
                given = "negative_prompt" if negative_prompt_embeds is None else "negative_prompt_embeds"
                raise ValueError(
                    f"`{given}` cannot change in an edit of a {inversion.method!r} inversion, whose null embeddings are"
                    f" of {inversion.negative_prompt!r}: leave it out, or pass it to `pipe.invert` (with 'null_text' or"
                    " 'direct')."
                )
        return [None] * count if optimized or nulls is None else nulls, sources

    def prepare_run(
        self,
        source: Source,
        checked: tuple[dict, tuple],
        edited: tuple[list, ...],
        scheduler,
        settings: Settings,
        capture_maps: bool,
        edits_per_pass: int,
    ) -> tuple[Run, list[Edit]]:
        """A picture's run and edits: inverts it, unless that is done, and finds the regions that stand as words.

        Args:
            checked: what [`~MDEEditPipeline.check_edits`] gives.
            edited: prompts, generators, object masks, attribute masks, conditioning of prompt and negative prompt where
                the user says it, or `None`; each one per edit.
            scheduler: a `DDIMScheduler`, timesteps set.
        """
        (words, (layers, loss_layers, edits)), inversion = checked, source.inversion
        prompts, generators, *masks, given, nulls = edited
        if inversion is None:
            inversion = self.invert_pixels(**source.told)
        else:
            self.check_same_model(inversion, scheduler)
        if words:
            masks = with_regions(masks, self.find_regions(inversion, words))
            rest = (source.image_size, source.latent_size, settings, generators)
            _, _, edits = self.prepare_edits(prompts, source.prompt, masks, *rest, **source.reading)
        edits = [
            replace(
                edit,
                conditioning=(edit.conditioning if own is None else own).with_sizes(inversion.time_ids),
                null=null and null.with_sizes(inversion.time_ids),
            )
            for edit, own, null in zip(edits, given, nulls)
        ]
        run = Run(
            unet=self.unet,
            scheduler=scheduler,
            inversion=inversion.to(self._execution_device),
            source_conditioning=self.source_conditioning(inversion),
            guidance_scale=source.guidance_scale,
            settings=settings,
            layers=layers,
            loss_layers=loss_layers,
            capture_maps=capture_maps,
            guidance_rescale=source.guidance_rescale,
            edits_per_pass=edits_per_pass,
        )
        return run, edits

    def plan(
        self,
        settings: Settings,
        prompt: str | list[str],
        inversion: Inversion | None = None,
        image: PipelineImageInput | None = None,
        source_prompt: str | list[str] | None = None,
        object_masks: Masks | list[Masks | None] | None = None,
        attribute_masks: Masks | list[Masks | None] | None = None,
        num_inference_steps: int | None = None,
        inversion_method: str = "null_text",
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        source_prompt_embeds: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_rescale: float | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        edits_per_pass: int | None = None,
    ) -> Plan:
        """All of a call's edits, as far as they can be checked and prepared before a pass on the picture. The arguments
        are [`~MDEEditPipeline.__call__`]'s.

        Raises:
            ValueError: one that cannot be used; names it.
        """
        source = (inversion, image, source_prompt, num_inference_steps, inversion_method)
        guidance = {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale}
        size = {"height": height, "width": width}
        sources = self.check_sources(*source, guidance, size, clip_skip, cross_attention_kwargs)
        prompts = per_picture(prompt, len(sources))
        edits_per_pass = check_setting("edits_per_pass", edits_per_pass, int | None, 1) or self.edits_per_pass
        copies = check_setting("num_images_per_prompt", num_images_per_prompt, int, 1)
        if copies > 1 and not settings.eta:
            raise ValueError(
                f"`num_images_per_prompt` is {copies} and edits without noise are all the same: set `eta` above 0."
            )
        given = self.check_embeds("prompt_embeds", prompt_embeds, len(prompts)) or [None] * len(prompts)
        masks = [
            per_prompt(m, len(prompts), n)
            for m, n in ((object_masks, "object_masks"), (attribute_masks, "attribute_masks"))
        ]
        negative = (negative_prompt, negative_prompt_embeds)
        nulls, sources = self.check_null_embeds(sources, *negative, source_prompt_embeds, len(prompts))
        prompts, *masks, given, nulls = (repeated(values, copies) for values in (prompts, *masks, given, nulls))
        generators = per_prompt_generators(generator, len(prompts))
        columns = (prompts, generators, *masks, given, nulls)
        parts = list(zip(*(split_evenly(values, len(sources)) for values in columns)))  # of each picture
        checked = []
        for source, (texts, noise, *drawn, _, _) in zip(sources, parts):
            rest = (source.image_size, source.latent_size, settings, noise)
            checked.append(self.check_edits(texts, source.prompt, drawn, *rest, **source.reading))
        return Plan(settings, edits_per_pass, sources, parts, checked)

    def prepare_runs(self, plan: Plan, capture_maps: bool = False) -> tuple[list[Run], list[Edit], torch.Tensor]:
        """What the steps of a plan need; inverts what is not inverted.

        Returns:
            a run per picture, all edits, picture by picture, and (edits, channels, h, w) fp32, each edit's z_T.
        """
        scheduler = self.ddim_scheduler(plan.sources[0].num_inference_steps)
        rest = (scheduler, plan.settings, capture_maps, plan.edits_per_pass)
        pictures = zip(plan.sources, plan.checked, plan.parts)
        prepared = [self.prepare_run(*picture, *rest) for picture in pictures]
        runs, edits = [run for run, _ in prepared], [edit for _, own in prepared for edit in own]
        starts = [run.inversion.source_latents(0) for run in runs]
        return runs, edits, torch.cat(repeated(starts, len(edits) // len(runs)))

    @torch.inference_mode(False)  # a tensor made in inference mode can have no gradient, and Eq. 7 needs one
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        inversion: Inversion | None = None,
        image: PipelineImageInput | None = None,
        source_prompt: str | list[str] | None = None,
        object_masks: Masks | list[Masks | None] | None = None,
        attribute_masks: Masks | list[Masks | None] | None = None,
        num_inference_steps: int | None = None,
        inversion_method: str = "null_text",
        guidance_scale: float | None = None,
        cross_replace_steps: float = Settings.cross_replace_steps,
        self_replace_steps: float = Settings.self_replace_steps,
        oal_weight: float = Settings.oal_weight,
        ccl_weight: float = Settings.ccl_weight,
        ccl_form: str = Settings.ccl_form,
        optimization_steps: float = Settings.optimization_steps,
        optimization_iterations: int = Settings.optimization_iterations,
        optimization_threshold: float = Settings.optimization_threshold,
        step_size: float = Settings.step_size,
        max_update: float | None = Settings.max_update,
        outside_attention: float = Settings.outside_attention,
        attention_resolution: int | None = Settings.attention_resolution,
        mask_dilation: int | None = Settings.mask_dilation,
        background_blend: float = Settings.background_blend,
        eta: float = Settings.eta,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_attention_maps: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["EditsPictures", int, int, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        source_prompt_embeds: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_rescale: float | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        edits_per_pass: int | None = None,
        **refused,
    ) -> MDEEditPipelineOutput | tuple:
        r"""
        Edit an inverted picture, or several pictures that are inverted first.

        Args:
            prompt (`str` or `list[str]`):
                The target prompt p*. A list edits the same picture several ways, or, of several pictures, each its own.
            inversion ([`Inversion`], *optional*):
                From [`~MDEEditPipeline.invert`]. Otherwise pass `image` and `source_prompt`, and, if wanted,
                `num_inference_steps` (50) and `inversion_method` (as `method` there), to invert and edit in one call.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or `list`, *optional*):
                A picture as [`~MDEEditPipeline.invert`] takes it, or a list of several, all of one size (see `height`).
                With several, all that is "one per prompt" is one per picture, and what is not a list holds for all.
            source_prompt (`str` or `list[str]`, *optional*):
                What the picture shows, or each picture.
            object_masks (`dict`, *optional*):
                Per new object, the region S_i it belongs to, for the Object Alignment Loss. Keys name words of the
                target prompt: `"dog"`, a phrase, `("dog", 1)` for the second occurrence, or token positions. Masks are
                PIL, numpy or torch, any resolution, white (at least half of the range) = edit, or what is not
                transparent where there is transparency; they may overlap, and a list of masks is their union. In a
                mask's place a word of the source prompt, `{"dog": "cat"}`, is where the model's attention finds it
                ([`~MDEEditPipeline.generate_mask`]). One dict for all prompts, or a list with one per prompt.
            attribute_masks (`dict`, *optional*):
                Per color, texture or other attribute word, its region S, for the Color Consistency Loss.
            num_inference_steps (`int`, *optional*):
                The inversion's; another number is an error.
            guidance_scale (`float`, *optional*):
                Classifier-free guidance; the inversion's by default, 7.5 in one call. With null-text embeddings any
                other is an error.
            cross_replace_steps (`float`, defaults to 0.8):
                Share of the steps, from the first, in which shared words take the source's cross-attention (Eq. 3).
            self_replace_steps (`float`, defaults to 0.5):
                Share of the steps in which self-attention of at most half the latents' resolution is the source's. Not
                in the paper; in its code. Lower it when shapes should change.
            oal_weight (`float`, defaults to 1.0):
                lambda_1 of Eq. 7.
            ccl_weight (`float`, defaults to 1.25):
                lambda_2 of Eq. 7.
            ccl_form (`str`, defaults to `"both"`):
                `"token_ratio"` is Eq. 6, which asks for attention inside the mask and has no gradient outside it;
                `"spatial_ratio"` is what the official code computes, which pulls attention in from outside; `"both"` is
                their sum.
            optimization_steps (`float`, defaults to 0.4):
                Share of the steps, from the first, with latent guidance (Eq. 7).
            optimization_iterations (`int`, defaults to 5):
                Latent updates per such step. The paper's are 15, without the cap of `max_update`.
            optimization_threshold (`float`, defaults to 0.6):
                A step guides a word only if at most this share of its attention lies on pixels that its mask touches,
                looked at once, before the step's first update; a step without such a word leaves the latents as they
                are. 1 guides every word, as in the paper, and is what a mask of most of the picture needs.
            step_size (`float`, defaults to 1.0):
                delta of Eq. 7 in units of sigma_t.
            max_update (`float`, *optional*, defaults to 0.05):
                Trust cap: an update changes no latent value by more than this times the latents' RMS inside the masks.
                `None`: no cap, as in the official code.
            outside_attention (`float`, defaults to 1.0):
                How much of an edited word's own attention is kept outside its mask in the steps that inject maps: all
                of it as in Eq. 3, or none (0), as the paper's overview has it ("new maps within masks").
            attention_resolution (`int`, *optional*):
                Short side of the cross-attention level the losses read; by default the coarsest of at least 16.
            mask_dilation (`int`, *optional*):
                By how many latent cells M, the union of all masks, is grown; by default one per 64 of the latents'
                short side, rounded (the official code's 3x3 at 64x64).
            background_blend (`float`, defaults to 0.3):
                Share of the steps, up to the last, after which the latents outside M are set to the source's (Eq. 8).
                Without masks there is no M and no blending.
            eta (`float`, defaults to 0.0):
                DDIM's eta: above 0, noise from `generator` is added to the edit at every step.
            generator (`torch.Generator` or `list`, *optional*):
                For `eta` > 0; everything else is deterministic. A list has one per prompt.
            output_attention_maps (`bool`, defaults to `False`):
                Return the edited words' maps before and after each step's latent guidance.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`):
                An [`MDEEditPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                `callback(pipe, i, t, {"latents": ...})` after each step, latents (edits, channels, h, w); what it
                returns under "latents" replaces them. `pipe._interrupt = True` ends the loop, and
                `pipe._guidance_scale` is that of the steps to come: diffusers' own callbacks work.
            callback_on_step_end_tensor_inputs (`list`, defaults to `["latents"]`):
                What the callback is given: "latents", "prompt_embeds" (with classifier-free guidance the unconditional
                rows come first; what it returns replaces the prompts' for the steps to come).
            negative_prompt (`str` or `list`, *optional*):
                What guidance leads away from, the inversion's by default. One for all prompts or one per prompt. Null
                embeddings that were optimized hold for the one they started from: with those any other is an error.
            prompt_embeds (`torch.Tensor`, *optional*):
                (prompts, tokens, dim), the target prompts' embeddings if they are not the text encoder's own (weighted
                words). `prompt` is needed beside them, for the masks' words.
            negative_prompt_embeds (`torch.Tensor`, *optional*):
                (1 or prompts, tokens, dim), instead of `negative_prompt`.
            source_prompt_embeds (`torch.Tensor`, *optional*):
                (1 or pictures, tokens, dim), the same for `source_prompt`.
            height, width (`int`, *optional*):
                With `image`: the size to resize it to. An inversion's picture keeps its own.
            num_images_per_prompt (`int`, defaults to 1):
                So many edits of each prompt, in the prompts' order; more than one needs `eta`, without which they would
                all be the same.
            guidance_rescale (`float`, *optional*):
                From 0 to 1: how far guidance keeps the spread that the conditional prediction has (arXiv 2305.08891);
                the inversion's by default, or 0. With null-text embeddings any other than theirs is an error.
            cross_attention_kwargs (`dict`, *optional*):
                `{"scale": s}`: LoRAs at `s` times their strength. The inversion's by default; any other is an error.
            clip_skip (`int`, *optional*):
                How many of the text encoder's last layers to leave out. The inversion's by default; any other is an
                error.
            edits_per_pass (`int`, *optional*):
                So many edits of one picture at most share the passes of the U-Net, each as a row: faster, and each
                takes memory; by default 4, with SDXL 1. Beside others an edit is the same but for rounding.
            refused:
                Other arguments of diffusers' pipeline; an error that says why and what to do instead.

        Returns:
            [`MDEEditPipelineOutput`] or, without `return_dict`, its fields' tuple `(images, source_images, nsfw, ...)`.

        Raises:
            ValueError: bad word, mask, prompt, inversion or setting; before any pass on the picture.
            FloatingPointError: losses or latents left the finite numbers.
        """
        arguments = locals()
        settings = Settings(**{setting.name: arguments[setting.name] for setting in fields(Settings)})

        # 1. Check inputs
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        callback = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(guidance_scale, output_type, *callback, refused)
        plan = self.plan(settings, **{name: arguments[name] for name in PLANNED})

        # 2. Prepare each picture and its edits: words, masks, alignment, text; then invert
        runs, edits, latents = self.prepare_runs(plan, output_attention_maps)

        # 3. Denoise
        losses: list[list[dict[str, float]]] = [[] for _ in edits]
        maps: list[dict[WordKey, list[torch.Tensor]]] = [{} for _ in edits]
        scheduler = runs[0].scheduler
        control, bar = attention_control(self.unet), self.progress_bar(total=len(scheduler.timesteps))
        with control as nested, self.talk_to_callbacks(runs[0], nested), bar as progress:
            for i, t in enumerate(scheduler.timesteps):
                if self.interrupt:
                    break
                guidance = {"guidance_scale": self._guidance_scale, "guidance_rescale": self._guidance_rescale}
                runs = [replace(run, **guidance) for run in runs]
                shares = zip(runs, latents.chunk(len(runs)), split_evenly(edits, len(runs)))
                done = [step for run, z, own in shares for step in picture_step(run, i, t, z, own)]
                latents = join_steps(i, done, losses, maps)
                if done[-1].losses:
                    shown = {k: f"{v:.3f}" for k, v in done[-1].losses[-1].items() if k in ("oal", "ccl")}
                    progress.set_postfix(shown)
                if callback_on_step_end is not None:
                    latents, edits = self.call_back(runs, i, t, latents, edits, *callback)
                progress.update()

        # 4. Decode
        images, nsfw = self.decode(latents, output_type)
        source_images = self.decode_source([run.inversion for run in runs], output_type)
        self.maybe_free_model_hooks()
        output = MDEEditPipelineOutput(
            images=images,
            source_images=source_images,
            nsfw_content_detected=nsfw,
            attention_maps=[{k: torch.stack(v) for k, v in m.items()} for m in maps] if output_attention_maps else None,
            losses=losses,
        )
        return output if return_dict else tuple(vars(output).values())  # `to_tuple` would drop what is None

    @contextmanager
    def talk_to_callbacks(self, run: Run, nested: bool):
        """diffusers' protocol, which is attributes of the pipeline: callbacks read the steps and how prompts are read,
        and set the rest. A call within a call's callback gives them back."""
        values = {
            "_num_timesteps": run.inversion.num_inference_steps,
            "_guidance_scale": run.guidance_scale,
            "_guidance_rescale": run.guidance_rescale,
            "_interrupt": False,
            "_clip_skip": run.inversion.clip_skip,
            "_cross_attention_kwargs": {"scale": run.inversion.lora_scale},
        }
        before = {name: getattr(self, name, None) for name in values}
        try:
            for name, value in values.items():
                setattr(self, name, value)
            yield
        finally:
            for name, value in before.items() if nested else ():
                setattr(self, name, value)

    def call_back(
        self,
        runs: list[Run],
        i: int,
        t: torch.Tensor,
        latents: torch.Tensor,
        edits: list[Edit],
        callback,
        names: Sequence[str],
    ) -> tuple[torch.Tensor, list[Edit]]:
        """Give the user's callback the tensors it asks for after a step; the latents and edits to go on with."""
        rows = [edit.conditioning for edit in edits]
        if runs[0].guidance_scale > 1:  # unconditional rows first, as in Stable Diffusion's own pipeline
            owners = repeated(runs, len(edits) // len(runs))
            rows = [*(run.null(i, edit) for run, edit in zip(owners, edits)), *rows]
        tensors = {"latents": latents}
        tensors |= {TENSOR_INPUTS[name]: part for name, part in join_conditioning(rows).parts().items()}
        returned = callback(self, i, t, {name: tensors[name] for name in names})
        if not (returned is None or isinstance(returned, dict)):
            raise ValueError(
                f"`callback_on_step_end` returned a {type(returned).__name__}: return the dict it was given, or None."
            )
        tensors |= returned or {}
        parts = {part: tensors[name][-len(edits) :] for part, name in TENSOR_INPUTS.items() if name in tensors}
        short = [TENSOR_INPUTS[part] for part, rows in parts.items() if len(rows) < len(edits)]
        if short:
            raise ValueError(
                f"`callback_on_step_end` returned {', '.join(short)} with fewer rows than the {len(edits)} edits: leave"
                " them out to keep what there is, or return a row for each."
            )
        rows = [Conditioning(**{part: rows[k : k + 1] for part, rows in parts.items()}) for k in range(len(edits))]
        return tensors["latents"], [replace(edit, conditioning=row) for edit, row in zip(edits, rows)]

    # -----------------------------------------------------------------------------------------------------------------
    # Pictures and latents
    # -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(1, 3, height, width) in [-1, 1] to latents z_0, (1, channels, h, w) fp32: the mode of the posterior."""
        with self.working_vae():
            encoded = self.vae.encode(pixels.to(self._execution_device, self.vae.dtype))
        # `AutoencoderTiny` has no posterior
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        mean, deviation = self.latent_statistics()
        return (latents.float() - mean) * self.vae.config.scaling_factor / deviation

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str):
        """(n, channels, h, w) latents to pictures, with the safety checker's verdicts (None without one)."""
        if output_type == "latent":
            return latents, None
        return self.finish(self.decode_pixels(latents), output_type)

    @torch.no_grad()
    def decode_source(self, inversion: Inversion | Sequence[Inversion], output_type: str):
        """The reconstruction branch's picture of each inversion, decoded once for all its edits by the same VAE."""
        inversions = inversion if isinstance(inversion, (list, tuple)) else [inversion]
        if output_type == "latent":
            return torch.cat([one.source_latents(one.num_inference_steps) for one in inversions])
        flags = sorted((name, value) for name, value in vars(self.vae).items() if isinstance(value, (int, float)))
        probe = self.decode_pixels(probe_noise(self.vae.config.latent_channels, 1))
        decoder = (*flags, self.vae.dtype, probe.float().cpu().numpy().tobytes())
        pixels = torch.cat([one.decoded(decoder, self.decode_pixels) for one in inversions])
        return self.finish(pixels, output_type)[0]

    def decode_pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """(n, channels, h, w) latents to (n, 3, height, width), in [-1, 1] but for the VAE's overshoot."""
        with self.working_vae():
            mean, deviation = self.latent_statistics()
            latents = latents.to(self._execution_device) * deviation / self.vae.config.scaling_factor + mean
            latents = latents.to(self.vae.dtype)
            return torch.cat([self.vae.decode(z, return_dict=False)[0] for z in latents.split(1)])

    def finish(self, pixels: torch.Tensor, output_type: str):
        """(n, 3, height, width) to pictures as `output_type` asks, with the safety checker's verdicts; a flagged one,
        also in `pixels`, is black."""
        images, nsfw = self.screen(pixels)
        denormalize = [not flagged for flagged in nsfw] if nsfw else [True] * len(images)
        return self.image_processor.postprocess(images, output_type, do_denormalize=denormalize), nsfw


def extending(function: Callable, **defaults: Any) -> Callable:
    """Decorator of a method that takes all that `function` takes, with other `defaults`, before its own keyword
    arguments, and is given it by keyword: a call has one signature, of which a family states what it adds."""

    def decorate(method: Callable) -> Callable:
        taken = list(inspect.signature(function).parameters.values())
        taken = [one.replace(default=defaults.get(one.name, one.default)) for one in taken]
        own = [one for one in inspect.signature(method).parameters.values() if one.kind is one.KEYWORD_ONLY]
        rest = [taken.pop()] if taken[-1].kind is inspect.Parameter.VAR_KEYWORD else []
        signature = inspect.signature(method).replace(parameters=[*taken, *own, *rest])

        @functools.wraps(method)
        def extended(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = dict(bound.arguments)
            pipe, others = given.pop("self"), [given.pop(one.name) for one in rest]
            return method(pipe, **given, **{name: value for other in others for name, value in other.items()})

        extended.__signature__ = signature
        return extended

    return decorate


def per_picture(prompt, num_pictures: int) -> list:
    """Prompts as a list: those of one picture, or one for each of several.

    Raises:
        ValueError: none, or another number than pictures.
    """
    if not isinstance(prompt, (list, tuple)):
        return [prompt] * num_pictures
    if not prompt:
        raise ValueError("`prompt` is an empty list: give at least one target prompt.")
    if num_pictures > 1 and len(prompt) != num_pictures:
        raise ValueError(
            f"`prompt` is a list of {len(prompt)} and `image` one of {num_pictures}: pass one prompt per picture, or"
            " one for all."
        )
    return list(prompt)


def item_of(values, k: int):
    """The `k`-th of a list or of the rows, (1, ...), of tensors; what is not a list, or has one row, holds for all."""
    if isinstance(values, Conditioning):  # each part may be one for all
        return values.each(lambda part: item_of(part, k))
    if isinstance(values, torch.Tensor):
        return values[k : k + 1] if len(values) > 1 else values
    return values[k] if isinstance(values, (list, tuple)) else values


def split_evenly(values: list, parts: int) -> list[list]:
    """A list as `parts` lists of one length."""
    size = len(values) // parts
    return [values[k : k + size] for k in range(0, len(values), size)]


def per_prompt(masks, num_prompts: int, name: str) -> list[Masks | None]:
    """One mask dict per prompt, from one shared dict or a list of them.

    Raises:
        ValueError: neither of these, or a list of another length; says `name`.
    """
    if masks is None or isinstance(masks, dict):
        return [masks] * num_prompts
    right = isinstance(masks, (list, tuple)) and len(masks) == num_prompts
    if not right or not all(m is None or isinstance(m, dict) for m in masks):
        raise ValueError(
            f"`{name}` is a {type(masks).__name__}: it must be a dict of word and mask, or a list with one dict per"
            f" prompt ({num_prompts})."
        )
    return list(masks)


def repeated(values: Sequence, times: int) -> list:
    """Each value so many times, one after the other."""
    return [value for value in values for _ in range(times)]


def per_prompt_generators(generator, num_prompts: int) -> list[torch.Generator | None]:
    """One generator per prompt, from one for all (which they then draw from in turn) or a list of them.

    Raises:
        ValueError: neither of these, or a list of another length.
    """
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * num_prompts
    if len(generators) != num_prompts or not all(g is None or isinstance(g, torch.Generator) for g in generators):
        raise ValueError(
            f"`generator` is {generator!r}: pass a `torch.Generator`, or a list with one per picture ({num_prompts})."
        )
    return generators
