# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""MDE-Edit (arXiv 2505.05101) as a diffusers pipeline: several masked edits of one real picture, without training.

`pipe.invert(image, prompt)` gives an [`Inversion`]; `pipe(prompt, inversion=..., object_masks=...)`
edits it. The losses are in `losses.py`, attention control in `attention_processors.py`, inversion in `inversion.py`.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import PIL.Image
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, StableDiffusionPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import BaseOutput, logging

from .attention_processors import (
    AttentionLayer,
    Inject,
    Record,
    TokenAlignment,
    UNetExit,
    WordKey,
    align_maps,
    align_tokens,
    attention_control,
    attention_layers,
    check_prompt_length,
    find_token_indices,
    prompt_words,
)
from .bundle import self_contained_source
from .inversion import (
    Inversion,
    check_inversion_settings,
    ddim_invert,
    gradient,
    model_fingerprint,
    optimize_null_embeds,
    predict,
    sample_source,
)
from .losses import (
    aggregate_maps,
    binarize_mask,
    color_consistency_loss,
    color_leakage_loss,
    dilate_mask,
    object_alignment_loss,
    resize_mask,
    word_map,
)


logger = logging.get_logger(__name__)

MODULE_NAME = "mde_edit"  # of the code file that a saved pipeline brings along
CCL_FORMS = ("token_ratio", "spatial_ratio", "both")
# Named settings of `__call__`: `pipe(prompt, inversion, object_masks=..., **MDEEditPipeline.presets["paper"])`.
PRESETS: Dict[str, Dict[str, Any]] = {
    # The paper's text: Eq. 6 alone, lambda_2 = 1.25, no trust cap.
    "paper": {"ccl_form": "token_ratio", "ccl_weight": 1.25, "max_update": None},
    # What the official code computes: an object loss without gradient, the spatial ratio at its hard-coded weight.
    "released": {"oal_weight": 0.0, "ccl_form": "spatial_ratio", "ccl_weight": 1.5, "max_update": None},
    # More iterations did not pay in emoji-bench (benchmarks/tuning.md), nor more steps than 10 of a "direct" inversion.
    "fast": {"optimization_iterations": 2},
}
# Arguments of `StableDiffusionPipeline.__call__` that mean nothing here: why, and what to do instead.
REFUSED = {
    "negative_prompt": "the inversion's null embeddings stand in its place, and another would not retrace the picture",
    "negative_prompt_embeds": "the inversion's null embeddings stand in its place",
    "prompt_embeds": "attention is steered by the prompt's words, which embeddings do not show: pass `prompt`",
    "clip_skip": "the inversion needs the same text encoder: load it with so many layers less, as in"
    " `CLIPTextModel.from_pretrained(model, subfolder='text_encoder', num_hidden_layers=12 - clip_skip)`",
    "guidance_rescale": "the inversion retraces the picture without it: lower `guidance_scale`, or invert with less",
    "ip_adapter_image": "image prompts have no words whose attention could be steered",
    "ip_adapter_image_embeds": "image prompts have no words whose attention could be steered",
    "cross_attention_kwargs": "it carries this pipeline's own control; for a LoRA's strength use `pipe.set_adapters`",
    "height": "the picture keeps its size: pass it to `pipe.invert`",
    "width": "the picture keeps its size: pass it to `pipe.invert`",
    "latents": "every edit starts where the inversion ended",
    "num_images_per_prompt": "an edit is deterministic: pass a list of prompts, or vary the seed of `eta`'s noise",
    "timesteps": "an edit takes the inversion's: pass `num_inference_steps` to `pipe.invert`",
    "sigmas": "an edit takes the inversion's: pass `num_inference_steps` to `pipe.invert`",
}
MaskInput = Union[PIL.Image.Image, np.ndarray, torch.Tensor]
Masks = Dict[WordKey, MaskInput]


@dataclass
class MDEEditPipelineOutput(BaseOutput):
    """Output of [`MDEEditPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            One edited picture per target prompt, in the form `output_type` asked for ("latent": the final latents).
        source_images (same form):
            The reconstruction branch's picture (one): what the edit would be without an edit.
        nsfw_content_detected (`list[bool]`, *optional*):
            The safety checker's verdict per edited picture; `None` without one.
        attention_maps (`list[dict]`, *optional*):
            With `output_attention_maps`: per prompt, for each edited word (the mask's key) a tensor
            `(guided steps, 2, h, w)`: its aggregated map (Eq. 4) before and after each step's guidance.
        losses (`list[list[dict]]`):
            Per prompt, one entry per guidance iteration: `step`, `iteration`, the weighted `loss`, the bare `oal` and
            `ccl`, and `capped`, the share of latent values whose update the trust cap cut.
    """

    images: Union[List[PIL.Image.Image], np.ndarray, torch.Tensor]
    source_images: Union[List[PIL.Image.Image], np.ndarray, torch.Tensor]
    nsfw_content_detected: Optional[List[bool]]
    attention_maps: Optional[List[Dict[WordKey, torch.Tensor]]]
    losses: List[List[Dict[str, float]]]


class Region(NamedTuple):
    """An edited word and where it belongs.

    key: how the user named it. token_indices: its tokens in the target prompt.
    soft, binary: (pixels,) its mask S at the loss level, as covered share and in {0, 1}.
    """

    key: WordKey
    token_indices: Tuple[int, ...]
    soft: torch.Tensor
    binary: torch.Tensor


@dataclass(frozen=True)
class Edit:
    """One target prompt, ready for the loop.

    prompt_embeds: (1, tokens, dim). alignment: with the source prompt, edited words counted as new.
    objects, attributes: the regions of OAL and CCL. mask: (1, 1, h, w) in {0, 1}, M of Eq. 7-8, or None without masks
    (then there is nothing to hold the edit to).
    """

    prompt: str
    prompt_embeds: torch.Tensor
    alignment: TokenAlignment
    objects: Sequence[Region]
    attributes: Sequence[Region]
    mask: Optional[torch.Tensor]


@dataclass(frozen=True)
class Guidance:
    """What [`MDEEditPipeline.guide_latents`] does at one step; see `__call__` for the meaning of each field."""

    oal_weight: float
    ccl_weight: float
    ccl_form: str
    iterations: int
    step_size: float
    max_update: Optional[float]
    tolerance: float

    def has_losses(self, edit: Edit) -> bool:
        weighted = (edit.objects and self.oal_weight) or (edit.attributes and self.ccl_weight)
        return bool(weighted) and self.iterations > 0

    def reads_source(self, edit: Edit) -> bool:
        """Whether Eq. 6 needs the source's maps at every guided step, inside the injection window or not."""
        return bool(edit.attributes and self.ccl_weight) and self.ccl_form != "spatial_ratio"


def edit_losses(
    maps: torch.Tensor, shared_mass: Optional[torch.Tensor], edit: Edit, guidance: Guidance
) -> Dict[str, torch.Tensor]:
    """The losses of one target prompt on its own maps, each only where it is asked for.

    Args:
        maps: (layers, pixels, tokens), A* of the loss layers, every head a row.
        shared_mass: (layers, pixels), sum_j A_j of Eq. 6.

    Returns:
        scalars "oal" (Eq. 5, summed over objects), "ccl" (Eq. 6 or its alternatives, summed over attributes) and
        "loss", lambda_1 OAL + lambda_2 CCL (Eq. 7).
    """
    losses = {"loss": maps.new_zeros(())}
    if edit.objects and guidance.oal_weight:
        attention = torch.stack([aggregate_maps(maps, r.token_indices) for r in edit.objects])  # (objects, pixels)
        losses["oal"] = object_alignment_loss(attention, torch.stack([r.soft for r in edit.objects]))
        losses["loss"] = losses["loss"] + guidance.oal_weight * losses["oal"]
    if edit.attributes and guidance.ccl_weight:
        terms = []
        for region in edit.attributes:
            attention = word_map(maps, region.token_indices)  # (layers, pixels)
            if guidance.ccl_form != "spatial_ratio":
                terms.append(color_consistency_loss(attention, shared_mass, region.binary))
            if guidance.ccl_form != "token_ratio":
                terms.append(color_leakage_loss(attention, region.binary))
        losses["ccl"] = torch.stack(terms).sum()
        losses["loss"] = losses["loss"] + guidance.ccl_weight * losses["ccl"]
    return losses


class MDEEditPipeline(StableDiffusionPipeline):
    r"""
    Training-free, mask-guided editing of several objects of a real picture with Stable Diffusion 1.x/2.x models.

    Implements MDE-Edit (https://arxiv.org/abs/2505.05101): null-text inversion, injection of the attention that source
    and target prompt share (Eq. 3), and guidance of the latents by the Object Alignment Loss (Eq. 4-5) and the Colour
    Consistency Loss (Eq. 6) inside the masks (Eq. 7-8).

    All components and loaders are [`StableDiffusionPipeline`]'s. The pipeline's own scheduler is left alone: inversion
    and editing use DDIM schedulers derived from its config.
    """

    _callback_tensor_inputs = ["latents"]
    presets = PRESETS

    # -----------------------------------------------------------------------------------------------------------------
    # Loading and saving
    # -----------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pipe(cls, pipeline, **kwargs) -> "MDEEditPipeline":
        """A pipeline with the components of another Stable Diffusion pipeline, shared, in the dtypes they have.

        Unlike [`DiffusionPipeline.from_pipe`], which casts them, and so the source pipeline, to float32 unless told
        otherwise. With `dtype` (`torch_dtype` before diffusers 0.40) the shared components are cast to that.
        """
        if any(kwargs.get(name) is not None for name in ("dtype", "torch_dtype", "custom_pipeline")):
            return super().from_pipe(pipeline, **kwargs)
        components, options = cls._get_signature_keys(cls)
        given = {k: v for k, v in pipeline.components.items() if k in components}
        given.update({k: pipeline.config[k] for k in options if k in pipeline.config})
        pipe = cls(**{**given, **kwargs})
        pipe.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        return pipe

    def save_config(self, save_directory, **kwargs) -> None:
        """Write `model_index.json` and, beside it, the code it names: what is saved loads again by
        `DiffusionPipeline.from_pretrained(save_directory, trust_remote_code=True)`, with or without this package."""
        super().save_config(save_directory, **kwargs)
        index = Path(save_directory) / self.config_name
        content = {**json.loads(index.read_text()), "_class_name": [MODULE_NAME, "MDEEditPipeline"]}
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        Path(save_directory, f"{MODULE_NAME}.py").write_text(self_contained_source(Path(__file__)), encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file, **kwargs) -> Dict[str, Any]:
        # Whoever loads through this class has the code: the copy in the model's folder is for those who have not, and
        # would ask for their trust.
        config = super()._dict_from_json_file(json_file, **kwargs)
        if config.get("_class_name") == [MODULE_NAME, "MDEEditPipeline"]:
            config["_class_name"] = "MDEEditPipeline"
        return config

    # -----------------------------------------------------------------------------------------------------------------
    # Preparation
    # -----------------------------------------------------------------------------------------------------------------

    def tokens(self, prompt: str) -> List[Tuple[str, Tuple[int, ...]]]:
        """The words of `prompt` and their token positions: what a mask's key can name.

        >>> pipe.tokens("a dog wearing a red hat")
        [('a', (1,)), ('dog', (2,)), ('wearing', (3,)), ('a', (4,)), ('red', (5,)), ('hat', (6,))]
        """
        return prompt_words(self.tokenizer, self.spell_out(prompt))

    def spell_out(self, text: str) -> str:
        """`text` as the text encoder gets it: a textual-inversion token of several vectors stands for all of them."""
        return self.maybe_convert_prompt(text, self.tokenizer)

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
        return scheduler

    def prepare_image(self, image: PipelineImageInput, height: Optional[int], width: Optional[int]) -> torch.Tensor:
        """One picture as (1, 3, height, width) fp32 in [-1, 1], sides rounded down to what the VAE accepts."""
        if isinstance(image, (list, tuple)):
            if len(image) != 1:
                raise ValueError(f"`image` is a list of {len(image)}: invert one picture at a time.")
            image = image[0]
        if isinstance(image, PIL.Image.Image):
            image = image.convert("RGB")
        elif not isinstance(image, (np.ndarray, torch.Tensor)):
            raise ValueError(
                f"`image` is a {type(image).__name__}: pass a PIL image, a numpy array or a torch tensor"
                " (`diffusers.utils.load_image` reads paths and URLs)."
            )
        elif image.ndim not in (3, 4) or (image.ndim == 4 and len(image) != 1):
            raise ValueError(
                f"`image` has shape {tuple(image.shape)}: pass one picture, (H, W, 3) numpy or (3, H, W) torch."
            )
        else:
            if not bool(np.isfinite(image).all() if isinstance(image, np.ndarray) else torch.isfinite(image).all()):
                raise ValueError("`image` holds values that are not finite (NaN or infinity): clean it first.")
            if image.dtype in (np.uint8, torch.uint8):
                image = image / 255
        pixels = self.image_processor.preprocess(image, height=height, width=width).float()
        if pixels.shape[1] != self.vae.config.in_channels:
            raise ValueError(f"`image` has {pixels.shape[1]} channels and the VAE reads {self.vae.config.in_channels}.")
        return pixels

    def check_prompt(self, prompt: str, name: str) -> None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"`{name}` is {prompt!r}: describe the picture in words.")
        check_prompt_length(self.tokenizer, self.spell_out(prompt))

    def check_model(self) -> None:
        """Raise `ValueError` for a model, or an add-on to it, that does not take the passes of this method."""
        config = self.unet.config
        if getattr(self.unet, "encoder_hid_proj", None) is not None:
            raise ValueError(
                "An IP-Adapter is loaded: call `pipe.unload_ip_adapter()` (a picture has no words to steer)."
            )
        if config.in_channels != self.vae.config.latent_channels or config.get("addition_embed_type") is not None:
            raise ValueError(
                f"This U-Net reads {config.in_channels} channels and `addition_embed_type`"
                f" {config.get('addition_embed_type')!r}: it is an inpainting, an image-conditioned or an SDXL model."
                " Use a text-to-image model of Stable Diffusion 1.x or 2.x."
            )

    def embed(self, prompt: str) -> torch.Tensor:
        """(1, tokens, dim), the text encoder's reading of `prompt`."""
        return self.encode_prompt(prompt, self._execution_device, 1, do_classifier_free_guidance=False)[0]

    def loss_layers(self, latent_size: Tuple[int, int], resolution: Optional[int]) -> List[AttentionLayer]:
        """The cross-attention layers the losses read, in execution order (the `l` of Eq. 4).

        Args:
            latent_size: (h, w).
            resolution: the level's short side. `None`: the coarsest level with a short side of at least 16 (Stable
                Diffusion at 512 px: 16x16, the paper's and the official code's choice), else the finest.
        """
        layers = [layer for layer in attention_layers(self.unet, latent_size) if layer.is_cross]
        if not layers:
            raise ValueError("This U-Net has no cross-attention: MDE-Edit reads the attention of words.")
        sides = sorted({min(layer.size) for layer in layers})
        if resolution is None:
            resolution = next((side for side in sides if side >= 16), sides[-1])
        if resolution not in sides:
            raise ValueError(f"`attention_resolution` is {resolution!r}; at this image size the U-Net has {sides}.")
        return [layer for layer in layers if min(layer.size) == resolution]

    def prepare_edit(
        self,
        prompt: str,
        source_prompt: str,
        object_masks: Optional[Masks],
        attribute_masks: Optional[Masks],
        latent_size: Tuple[int, int],
        loss_size: Tuple[int, int],
        mask_dilation: int,
    ) -> Edit:
        """Words to token positions, masks to every resolution, prompts to an alignment; `ValueError` for what has none.

        Runs the tokenizer only: `prompt_embeds` is left empty for `__call__` to fill once every prompt is known good.
        """
        device = self._execution_device
        self.check_prompt(prompt, "prompt")
        words, source_words = self.spell_out(prompt), self.spell_out(source_prompt)

        def spelled_out(key: WordKey) -> WordKey:
            if isinstance(key, tuple) and key and isinstance(key[0], str):
                return (self.spell_out(key[0]), *key[1:])
            return self.spell_out(key) if isinstance(key, str) else key

        covered = torch.zeros(latent_size, dtype=torch.bool)
        regions: Dict[str, List[Region]] = {}
        for name, masks in (("object_masks", object_masks), ("attribute_masks", attribute_masks)):
            keys: Dict[Tuple[int, ...], WordKey] = {}
            soft: Dict[Tuple[int, ...], torch.Tensor] = {}
            for key, value in (masks or {}).items():
                indices = find_token_indices(self.tokenizer, words, spelled_out(key))
                mask = as_binary_mask(value, f"{name}[{key!r}]", latent_size)
                covered |= resize_mask(mask, latent_size) > 0
                # Two masks for the same tokens are one region: as two, their targets would cancel where they differ.
                share = resize_mask(mask, loss_size)
                soft[indices] = torch.maximum(soft[indices], share) if indices in soft else share
                keys.setdefault(indices, key)
            regions[name] = [
                Region(key, i, soft[i].flatten().to(device), binarize_mask(soft[i]).flatten().to(device))
                for i, key in keys.items()
            ]
        mask = None
        if covered.any():
            mask = dilate_mask(covered.float(), mask_dilation)[None, None].to(device)
        objects, attributes = regions["object_masks"], regions["attribute_masks"]
        edited = sorted({i for region in (*objects, *attributes) for i in region.token_indices})
        alignment = align_tokens(self.tokenizer, source_words, words).without(edited).to(device)
        return Edit(prompt, torch.empty(0), alignment, objects, attributes, mask)

    def check_inputs(self, **settings) -> None:
        """Raise `ValueError` for a setting out of its range, naming it and the range."""
        ranges = {
            "cross_replace_steps": (0, 1),
            "self_replace_steps": (0, 1),
            "optimization_steps": (0, 1),
            "background_blend": (0, 1),
            "eta": (0, 1),
            "oal_weight": (0, None),
            "ccl_weight": (0, None),
            "step_size": (0, None),
            "optimization_iterations": (0, None),
            "optimization_tolerance": (0, None),
            "mask_dilation": (0, None),
            "max_update": (0, None),
            "guidance_scale": (1, None),
        }
        for name, (low, high) in ranges.items():
            value = settings[name]
            if value is None and name in ("max_update", "guidance_scale", "mask_dilation"):
                continue
            whole = name in ("optimization_iterations", "mask_dilation")
            if not isinstance(value, int if whole else (int, float)) or not low <= value <= (high or float("inf")):
                span = f"from {low} to {high}" if high is not None else f"of at least {low}"
                raise ValueError(f"`{name}` is {value!r}: use a {'whole ' if whole else ''}number {span}.")
        if settings["ccl_form"] not in CCL_FORMS:
            raise ValueError(
                f"`ccl_form` is {settings['ccl_form']!r}: choose one of {', '.join(map(repr, CCL_FORMS))}."
            )
        if settings["output_type"] not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {settings['output_type']!r}: choose 'pil', 'np', 'pt' or 'latent'.")
        unknown = set(settings["callback_on_step_end_tensor_inputs"]) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}: choose from"
                f" {self._callback_tensor_inputs}."
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Inversion
    # -----------------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
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
        height: Optional[int] = None,
        width: Optional[int] = None,
    ) -> Inversion:
        r"""
        Invert a real picture, once, for any number of edits.

        Args:
            image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
                One picture; (H, W, 3) or (3, H, W), uint8 or in [0, 1]. Sides are rounded down to the VAE's multiple.
            prompt (`str`):
                The source prompt p: what the picture shows.
            num_inference_steps (`int`, defaults to 50):
                DDIM steps; edits use the same number.
            method (`str`, defaults to `"null_text"`):
                `"null_text"`: the paper's; null embeddings optimised so that guided sampling retraces the picture.
                `"negative_prompt"`: no optimisation; the source prompt serves as null embedding.
                `"direct"`: no optimisation; the source branch is read from the inversion trajectory, so the
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

        Returns:
            [`Inversion`]

        Raises:
            ValueError: bad picture, prompt or setting; before any U-Net call.
            FloatingPointError: the optimisation or the inversion left the finite numbers.
        """
        # 1. Check inputs
        self.check_model()
        self.check_prompt(prompt, "prompt")
        check_inversion_settings(
            method,
            num_inference_steps,
            guidance_scale,
            self.scheduler.config.num_train_timesteps,
            num_inner_steps,
            early_stop_epsilon,
        )
        pixels = self.prepare_image(image, height, width)
        sample_size = self.unet.config.sample_size  # a number, (height, width), or not stated
        if isinstance(sample_size, int) and (pixels.numel() // 3) > 2 * (sample_size * self.vae_scale_factor) ** 2:
            trained = sample_size * self.vae_scale_factor
            logger.warning(
                f"The picture is {pixels.shape[-1]}x{pixels.shape[-2]}, the model was trained at {trained}x{trained}:"
                " expect repeated objects, and memory to match. Pass `height` and `width` to resize it."
            )

        # 2. Encode picture and prompts
        device = self._execution_device
        latents = self.vae.encode(pixels.to(device, self.vae.dtype)).latent_dist.mode().float()
        latents = latents * self.vae.config.scaling_factor
        prompt_embeds, empty_embeds = self.embed(prompt), self.embed("")
        scheduler = self.ddim_scheduler(num_inference_steps)
        passes = num_inference_steps * (1 if method == "direct" else 2)

        with attention_control(self.unet), self.progress_bar(total=passes) as progress:
            # 3. DDIM inversion z_0 -> z_T
            inverse_scheduler = self.ddim_scheduler(num_inference_steps, inverse=True)
            trajectory = ddim_invert(self.unet, inverse_scheduler, latents, prompt_embeds, progress)
            if not torch.isfinite(trajectory).all():
                raise FloatingPointError(
                    f"DDIM inversion left the finite numbers with a U-Net in {self.unet.dtype}: load it in float32 or"
                    " bfloat16."
                )
            # 4. The source branch z_T -> z_0, and the null embeddings that go with it
            if method == "null_text":
                trajectory, null_embeds, _ = optimize_null_embeds(
                    self.unet,
                    scheduler,
                    trajectory,
                    prompt_embeds,
                    empty_embeds,
                    guidance_scale,
                    num_inner_steps,
                    early_stop_epsilon,
                    progress,
                )
            elif method == "negative_prompt":
                trajectory = sample_source(self.unet, scheduler, trajectory[:1], prompt_embeds, progress)
                null_embeds = prompt_embeds.float()
            else:
                null_embeds = empty_embeds.float()

        self.maybe_free_model_hooks()
        return Inversion(
            latents=trajectory.contiguous(),
            null_embeds=null_embeds,
            prompt=prompt,
            method=method,
            guidance_scale=float(guidance_scale),
            timesteps=scheduler.timesteps.cpu(),
            alphas_cumprod=scheduler.alphas_cumprod[scheduler.timesteps.cpu()],
            prediction_type=scheduler.config.prediction_type,
            fingerprint=model_fingerprint(self.unet, self.text_encoder),
            model_dtype=str(self.unet.dtype),
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Guidance
    # -----------------------------------------------------------------------------------------------------------------

    def target_maps(self, latents: torch.Tensor, t: torch.Tensor, edit: Edit, control: Inject) -> torch.Tensor:
        """A* of the loss layers for the target branch, by a pass that leaves the U-Net right after the last of them.

        Returns:
            (layers, pixels, tokens) fp32: every head of every loss layer is a row.
        """
        try:
            predict(self.unet, latents, t, edit.prompt_embeds, control)
        except UNetExit:
            pass
        return torch.cat(list(control.captured.values()))

    def guide_latents(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        sigma: float,
        edit: Edit,
        guidance: Guidance,
        control: Inject,
        shared_mass: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, List[Dict[str, float]], torch.Tensor]:
        r"""
        Eq. 7-8 at one step: z* <- z* - M * clamp(delta * grad(lambda_1 OAL + lambda_2 CCL), -c, c), several times, with
        delta = step_size * sigma_t and c = max_update * rms(z* in M).

        The cap is element-wise: a global rescale would couple the regions, so that a large object gradient would
        shrink an attribute's step.

        Args:
            latents: (1, channels, h, w) fp32, z*.
            sigma: sigma_t = sqrt((1 - alpha_bar) / alpha_bar).
            control: captures the loss layers and ends after the last of them.
            shared_mass: (layers, pixels), for Eq. 6.

        Returns:
            the moved latents (outside M bit-identical), the loss history, and the first pass's maps.
        """
        history, first_maps = [], None
        inside = edit.mask.expand_as(latents).bool()
        for iteration in range(guidance.iterations):
            with torch.enable_grad():
                latents = latents.detach().requires_grad_()
                maps = self.target_maps(latents, t, edit, replace(control, captured={}))
                losses = edit_losses(maps, shared_mass, edit, guidance)
                grad = gradient(losses["loss"], latents, self.unet.dtype)
            if not (torch.isfinite(losses["loss"]) and torch.isfinite(grad).all()):
                raise FloatingPointError(
                    f"The guidance left the finite numbers at timestep {int(t)}, iteration {iteration} (loss"
                    f" {losses['loss'].item()}). Lower `step_size` or `max_update`, or load the U-Net in float32."
                )
            first_maps = maps.detach() if first_maps is None else first_maps
            latents = latents.detach()
            update, capped = guidance.step_size * sigma * grad, 0.0
            if guidance.max_update is not None:
                cap = guidance.max_update * latents[inside].square().mean().sqrt()
                capped = (update[inside].abs() > cap).float().mean().item()
                update = update.clamp(-cap, cap)
            latents = torch.where(inside, latents - update, latents)
            history.append({"iteration": iteration, "capped": capped, **{k: v.item() for k, v in losses.items()}})
            if iteration and abs(history[-2]["loss"] - history[-1]["loss"]) < guidance.tolerance:
                break
        return latents, history, first_maps

    # -----------------------------------------------------------------------------------------------------------------
    # Edit
    # -----------------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        prompt: Union[str, List[str]],
        inversion: Optional[Inversion] = None,
        image: Optional[PipelineImageInput] = None,
        source_prompt: Optional[str] = None,
        object_masks: Optional[Union[Masks, List[Optional[Masks]]]] = None,
        attribute_masks: Optional[Union[Masks, List[Optional[Masks]]]] = None,
        num_inference_steps: Optional[int] = None,
        inversion_method: str = "null_text",
        guidance_scale: Optional[float] = None,
        cross_replace_steps: float = 0.8,
        self_replace_steps: float = 0.5,
        oal_weight: float = 1.0,
        ccl_weight: float = 0.3,
        ccl_form: str = "both",
        optimization_steps: float = 0.4,
        optimization_iterations: int = 15,
        optimization_tolerance: float = 0.0,
        step_size: float = 1.0,
        max_update: Optional[float] = 0.02,
        attention_resolution: Optional[int] = None,
        mask_dilation: Optional[int] = None,
        background_blend: float = 0.3,
        eta: float = 0.0,
        generator: Optional[torch.Generator] = None,
        output_attention_maps: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Optional[Callable[["MDEEditPipeline", int, int, Dict[str, Any]], Dict[str, Any]]] = None,
        callback_on_step_end_tensor_inputs: List[str] = ["latents"],
        **refused,
    ) -> Union[MDEEditPipelineOutput, Tuple]:
        r"""
        Edit an inverted picture.

        Args:
            prompt (`str` or `list[str]`):
                The target prompt p*. A list edits the same inversion several ways.
            inversion ([`Inversion`], *optional*):
                From [`~MDEEditPipeline.invert`]. Otherwise pass `image` and `source_prompt`, and, if wanted,
                `num_inference_steps` (50) and `inversion_method`, to invert and edit in one call.
            object_masks (`dict`, *optional*):
                Per new object, the region S_i it belongs to, for the Object Alignment Loss. Keys name words of the
                target prompt: `"dog"`, a phrase, `("dog", 1)` for the second occurrence, or token positions. Masks are
                PIL, numpy or torch, any resolution, white (at least half of the range) = edit; they may overlap. One
                dict for all prompts, or a list with one per prompt.
            attribute_masks (`dict`, *optional*):
                Per colour, texture or other attribute word, its region S, for the Colour Consistency Loss.
            num_inference_steps (`int`, *optional*):
                The inversion's; another number is an error.
            guidance_scale (`float`, *optional*):
                Classifier-free guidance; the inversion's by default. With null-text embeddings any other is an error.
            cross_replace_steps (`float`, defaults to 0.8):
                Share of the steps, from the first, in which shared words take the source's cross-attention (Eq. 3).
            self_replace_steps (`float`, defaults to 0.5):
                Share of the steps in which self-attention of at most half the latents' resolution is the source's. Not
                in the paper; in its code. Lower it when shapes should change.
            oal_weight (`float`, defaults to 1.0):
                lambda_1 of Eq. 7.
            ccl_weight (`float`, defaults to 0.3):
                lambda_2 of Eq. 7. The paper's is 1.25, for Eq. 6 alone.
            ccl_form (`str`, defaults to `"both"`):
                `"token_ratio"` is Eq. 6, which asks for attention inside the mask and has no gradient outside it;
                `"spatial_ratio"` is what the official code computes, which pulls attention in from outside; `"both"` is
                their sum. On the example scenes `"both"` kept the background 2 dB closer than Eq. 6 alone and edited no
                worse (see the README).
            optimization_steps (`float`, defaults to 0.4):
                Share of the steps, from the first, with guidance.
            optimization_iterations (`int`, defaults to 15):
                Latent updates per guided step.
            optimization_tolerance (`float`, defaults to 0.0):
                End a step's updates when the loss changes by less than this.
            step_size (`float`, defaults to 1.0):
                delta of Eq. 7 in units of sigma_t.
            max_update (`float`, *optional*, defaults to 0.02):
                Trust cap: an update changes no latent value by more than this times the latents' RMS inside the masks.
                `None`: no cap, as in the official code.
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
            generator (`torch.Generator`, *optional*):
                For `eta` > 0; everything else is deterministic.
            output_attention_maps (`bool`, defaults to `False`):
                Return the edited words' maps before and after each step's guidance.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`):
                An [`MDEEditPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                `callback(pipe, i, t, {"latents": ...})` after each step, latents (prompts, channels, h, w); what it
                returns under "latents" replaces them.
            callback_on_step_end_tensor_inputs (`list`, defaults to `["latents"]`):
                What the callback is given.
            refused:
                Other arguments of [`StableDiffusionPipeline`]; an error that says why and what to do instead.

        Returns:
            [`MDEEditPipelineOutput`] or, without `return_dict`, its fields' tuple `(images, source_images, nsfw, ...)`.

        Raises:
            ValueError: bad word, mask, prompt, inversion or setting; before any U-Net call.
            FloatingPointError: losses or latents left the finite numbers.
        """
        # 1. Check inputs
        for name in refused:
            if name not in REFUSED:
                raise TypeError(f"MDEEditPipeline.__call__() got an unexpected keyword argument {name!r}")
            raise ValueError(f"`{name}` has no place in MDE-Edit: {REFUSED[name]}.")
        self.check_model()
        self.check_inputs(
            guidance_scale=guidance_scale,
            cross_replace_steps=cross_replace_steps,
            self_replace_steps=self_replace_steps,
            oal_weight=oal_weight,
            ccl_weight=ccl_weight,
            ccl_form=ccl_form,
            optimization_steps=optimization_steps,
            optimization_iterations=optimization_iterations,
            optimization_tolerance=optimization_tolerance,
            step_size=step_size,
            max_update=max_update,
            mask_dilation=mask_dilation,
            background_blend=background_blend,
            eta=eta,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("`prompt` is an empty list: give at least one target prompt.")
        masks = [
            per_prompt(m, len(prompts), n)
            for m, n in ((object_masks, "object_masks"), (attribute_masks, "attribute_masks"))
        ]
        if (inversion is None) == (image is None):
            raise ValueError("Pass either `inversion` (from `pipe.invert`) or `image` with `source_prompt`, not both.")
        if inversion is None:
            if source_prompt is None:
                raise ValueError("`image` needs `source_prompt`: what the picture shows now, in words.")
            self.check_prompt(source_prompt, "source_prompt")
            steps = 50 if num_inference_steps is None else num_inference_steps
            scale = 7.5 if guidance_scale is None else guidance_scale
            check_inversion_settings(inversion_method, steps, scale, self.scheduler.config.num_train_timesteps)
            sides = self.prepare_image(image, None, None).shape[-2:]
            latent_size = tuple(side // self.vae_scale_factor for side in sides)
        else:
            if source_prompt is not None:
                raise ValueError("`source_prompt` goes with `image`; an inversion knows its own prompt.")
            source_prompt, steps = inversion.prompt, inversion.num_inference_steps
            scale = inversion.guidance_scale if guidance_scale is None else guidance_scale
            if num_inference_steps not in (None, steps):
                raise ValueError(
                    f"`num_inference_steps` is {num_inference_steps} and the inversion was made with {steps}."
                )
            if inversion.method == "null_text" and scale != inversion.guidance_scale:
                raise ValueError(
                    f"`guidance_scale` is {scale} and the null-text inversion was made for {inversion.guidance_scale}:"
                    " leave it out, or invert again with this scale."
                )
            latent_size = tuple(inversion.latents.shape[-2:])

        # 2. Prepare each edit: words, masks, alignment; then the text
        if mask_dilation is None:
            mask_dilation = default_dilation(latent_size)
        layers = attention_layers(self.unet, latent_size)
        loss_layers = self.loss_layers(latent_size, attention_resolution)
        loss_size = loss_layers[0].size
        edits = [
            self.prepare_edit(p, source_prompt, objects, attributes, latent_size, loss_size, mask_dilation)
            for p, objects, attributes in zip(prompts, *masks)
        ]
        scheduler = self.ddim_scheduler(steps)
        if inversion is None:
            inversion = self.invert(image, source_prompt, steps, inversion_method, scale)
        else:
            fingerprint = model_fingerprint(self.unet, self.text_encoder)
            inversion.check_matches(fingerprint, str(self.unet.dtype), scheduler)
        device = self._execution_device
        inversion = inversion.to(device)
        source_embeds = self.embed(source_prompt)
        edits = [replace(edit, prompt_embeds=self.embed(edit.prompt)) for edit in edits]

        # 3. Prepare the schedule of the three mechanisms, in steps
        cross_steps, self_steps = round(cross_replace_steps * steps), round(self_replace_steps * steps)
        guided_steps, blend_from = round(optimization_steps * steps), steps - round(background_blend * steps)
        guidance = Guidance(
            oal_weight, ccl_weight, ccl_form, optimization_iterations, step_size, max_update, optimization_tolerance
        )
        loss_names = frozenset(layer.name for layer in loss_layers)
        cross_names = frozenset(layer.name for layer in layers if layer.is_cross)
        half = ((latent_size[0] + 1) // 2) * ((latent_size[1] + 1) // 2)
        self_names = frozenset(layer.name for layer in layers if not layer.is_cross and layer.pixels <= half)

        # 4. Denoise
        latents = inversion.latents[:1].repeat(len(edits), 1, 1, 1)  # (prompts, channels, h, w), every z* starts at z_T
        history: List[List[Dict[str, float]]] = [[] for _ in edits]
        maps: List[Dict[WordKey, List[torch.Tensor]]] = [{} for _ in edits]
        self._num_timesteps, self._interrupt = steps, False
        with attention_control(self.unet), self.progress_bar(total=steps) as progress:
            for i, t in enumerate(scheduler.timesteps):
                if self.interrupt:
                    break
                # 4a. One source pass records what this step's injection and losses read
                guided = i < guided_steps
                reads_source = guided and any(guidance.reads_source(edit) for edit in edits)
                source = Record(
                    cross_layers=cross_names if i < cross_steps else loss_names if reads_source else frozenset(),
                    self_layers=self_names if i < self_steps else frozenset(),
                )
                if source.cross_layers or source.self_layers:
                    predict(self.unet, inversion.latents[i : i + 1], t, source_embeds, source)

                # Where z* has all noise and no picture (zero terminal SNR), sigma_t is infinite: the cap decides there.
                alpha_bar = max(scheduler.alphas_cumprod[t.cpu()].item(), 1e-8)
                sigma = ((1 - alpha_bar) / alpha_bar) ** 0.5
                moved = []
                for edit, z, edit_history, edit_maps in zip(edits, latents.split(1), history, maps):
                    aligned = align_maps(source.cross, edit.alignment)
                    injection = Inject(aligned if i < cross_steps else {}, edit.alignment.shared, source.self_qk)
                    capturing = replace(injection, capture_layers=loss_names)

                    # 4b. Guidance moves z* down the losses, inside M (Eq. 7)
                    before = None
                    if guided and guidance.has_losses(edit):
                        shared_mass = None
                        if guidance.reads_source(edit):
                            shared_mass = torch.cat([aligned[layer.name] for layer in loss_layers]).sum(dim=-1)
                        leaving = replace(capturing, exit_after=loss_layers[-1].name)
                        z, iterations, before = self.guide_latents(z, t, sigma, edit, guidance, leaving, shared_mass)
                        edit_history += [{"step": i, **entry} for entry in iterations]
                        progress.set_postfix({k: f"{v:.3f}" for k, v in iterations[-1].items() if k in ("oal", "ccl")})

                    # 4c. Classifier-free guidance and the DDIM step
                    control = capturing if guided and output_attention_maps else injection
                    if scale > 1:
                        embeds = torch.cat([inversion.null_embed(i).to(edit.prompt_embeds), edit.prompt_embeds])
                        null, cond = predict(self.unet, z.repeat(2, 1, 1, 1), t, embeds, control).chunk(2)
                        noise = null + scale * (cond - null)
                    else:
                        noise = predict(self.unet, z, t, edit.prompt_embeds, control)
                    z = scheduler.step(noise, t, z, eta=eta, generator=generator).prev_sample

                    # 4d. Outside M the picture is the source's (Eq. 8)
                    if edit.mask is not None and i >= blend_from:
                        z = torch.where(edit.mask.bool(), z, inversion.latents[i + 1 : i + 2])
                    moved.append(z)
                    if control.captured:
                        after = torch.cat(list(control.captured.values()))
                        both = (after if before is None else before, after)
                        # by key: a word may be an object and an attribute at once
                        for key, indices in {r.key: r.token_indices for r in (*edit.objects, *edit.attributes)}.items():
                            pair = torch.stack([aggregate_maps(m, indices) for m in both])
                            edit_maps.setdefault(key, []).append(pair.reshape(2, *loss_size).cpu())
                latents = torch.cat(moved)
                if not torch.isfinite(latents).all():
                    raise FloatingPointError(
                        f"The latents left the finite numbers at step {i}. Lower `guidance_scale`, `step_size` or"
                        " `max_update`, or load the U-Net in float32."
                    )
                if callback_on_step_end is not None:
                    given = {name: {"latents": latents}[name] for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, i, t, given) or {}).pop("latents", latents)
                progress.update()

        # 5. Decode
        images, nsfw = self.decode(latents, output_type)
        source_images, _ = self.decode(inversion.latents[-1:], output_type)
        self.maybe_free_model_hooks()
        output = MDEEditPipelineOutput(
            images=images,
            source_images=source_images,
            nsfw_content_detected=nsfw,
            attention_maps=[{k: torch.stack(v) for k, v in m.items()} for m in maps] if output_attention_maps else None,
            losses=history,
        )
        return output if return_dict else tuple(vars(output).values())

    def decode(self, latents: torch.Tensor, output_type: str):
        """(n, channels, h, w) latents to pictures, with the safety checker's verdicts (None without one)."""
        if output_type == "latent":
            return latents, None
        decoded = [
            self.vae.decode((z / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False)[0]
            for z in latents.split(1)
        ]
        images, nsfw = self.run_safety_checker(torch.cat(decoded), self._execution_device, self.vae.dtype)
        denormalize = [not flagged for flagged in nsfw] if nsfw else [True] * len(images)
        return self.image_processor.postprocess(images, output_type, do_denormalize=denormalize), nsfw


def default_dilation(latent_size: Tuple[int, int]) -> int:
    """Cells by which M is grown: the official code's 3x3 at 64x64, in proportion (where one cell is a large share of
    the picture, growing by it costs the background several dB)."""
    return round(min(latent_size) / 64)


def per_prompt(masks, num_prompts: int, name: str) -> List[Optional[Masks]]:
    """One mask dict per prompt, from one shared dict or a list of them."""
    if masks is None or isinstance(masks, dict):
        return [masks] * num_prompts
    masks = list(masks)
    if len(masks) != num_prompts or not all(m is None or isinstance(m, dict) for m in masks):
        raise ValueError(f"`{name}` must be a dict, or a list with one dict per prompt ({num_prompts}).")
    return masks


def as_binary_mask(mask: MaskInput, name: str, latent_size: Tuple[int, int]) -> torch.Tensor:
    """A user's mask as (height, width) fp32 in {0, 1}, at its own resolution.

    Args:
        mask: PIL in any mode; numpy or torch (H, W), (H, W, 1) or (1, H, W): bool, integers (white = 255, or 1 where
            nothing is larger) or floats in [0, 1]. White is what at least half of the range is.
        latent_size: its proportions must be those of the picture.

    Raises:
        ValueError: wrong type, shape, proportions or range, or no white at all.
    """
    if isinstance(mask, PIL.Image.Image):
        mask = np.asarray(mask.convert("L"))
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(mask.copy())  # PIL's array is read-only, a view may have negative strides
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"{name} is a {type(mask).__name__}: pass a PIL image, a numpy array or a torch tensor.")
    if mask.ndim == 3 and 1 in (mask.shape[0], mask.shape[-1]):
        mask = mask.squeeze(0 if mask.shape[0] == 1 else -1)
    if mask.ndim != 2 or 0 in mask.shape:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: a mask is (H, W), one value per pixel.")
    (height, width), (h, w) = mask.shape, latent_size
    if not 0.9 < (height * w) / (width * h) < 1.1:
        raise ValueError(
            f"{name} is {width}x{height} (width x height) and the picture's proportions are {w}:{h}: draw the mask on"
            " the picture (or is it transposed?)."
        )
    values = mask.float().cpu()
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} holds values that are not finite (NaN or infinity).")
    if not mask.is_floating_point() and mask.dtype != torch.bool and values.max() > 1:
        values = values / 255
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"{name} has values from {values.min():g} to {values.max():g}: use bool, 0-255 integers or 0-1 floats."
        )
    binary = (values >= 0.5).float()
    if not binary.any():
        raise ValueError(
            f"{name} is empty: nothing in it is white (at least half of the range), so nothing can be edited there."
        )
    return binary
