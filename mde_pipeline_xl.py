# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""MDE-Edit (arXiv 2505.05101) with SDXL, as a diffusers pipeline: several masked edits of one real picture, without
training.

`pipe.invert(image, prompt)` gives an [`Inversion`]; `pipe(prompt, inversion=..., object_masks=...)` edits it. What the
pipelines of Stable Diffusion and of SDXL do alike is in `editing.py`.
"""

from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

# diffusers copies a plug-in's direct imports only: import all
from .attention_processors import lock_of, lora_strength
from .bundle import CarriesItsCode
from .checks import check_setting  # noqa: F401
from .conditioning import Conditioning
from .denoise import edit_step  # noqa: F401
from .editing import REFUSED, EditsPictures, MDEEditPipelineOutput, extending
from .inversion import Inversion
from .localize import word_region  # noqa: F401
from .losses import object_alignment_loss  # noqa: F401
from .masks import edit_mask  # noqa: F401
from .pictures import read_pixels  # noqa: F401
from .prompts import align_tokens  # noqa: F401
from .texts import ReadsPrompts  # noqa: F401


_TWO_PROMPTS = (
    "both text encoders read the same prompt, whose words the masks name: what other prompts make of it goes in as"
    " `prompt_embeds` and `pooled_prompt_embeds`, from `pipe.encode_prompt`"
)
_SIZES = (
    "the model is told the sizes of the picture itself and of what `height` and `width` make of it, and the inversion"
    " keeps them for its edits"
)
_SIZE_NAMES = ("original_size", "crops_coords_top_left", "target_size")
# Beside the arguments that no pipeline of ours takes, those of `StableDiffusionXLPipeline.__call__`.
REFUSED_XL = {
    **REFUSED,
    "prompt_2": _TWO_PROMPTS,
    "negative_prompt_2": _TWO_PROMPTS,
    **{f"{sign}{name}": _SIZES for sign in ("", "negative_") for name in _SIZE_NAMES},
    "denoising_end": "what is left of the noise would be the refiner's, which is another model",
}


class MDEEditXLPipeline(CarriesItsCode, EditsPictures, StableDiffusionXLPipeline):
    r"""
    Training-free, mask-guided editing of several objects of a real picture with SDXL models.

    Implements MDE-Edit (https://arxiv.org/abs/2505.05101) as [`MDEEditPipeline`] does, with the same arguments; the
    inversion is "direct" by default, since the optimization of null embeddings takes more memory than most have.

    All components and loaders are [`StableDiffusionXLPipeline`]'s. The pipeline's own scheduler is left alone:
    inversion and editing use DDIM schedulers derived from its config.
    """

    _callback_tensor_inputs = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    _denoising_end = None  # what a callback can ask for
    family = "sdxl"
    edits_per_pass = 1  # a row of a guided pass holds 6 GiB in half precision, at 1024x1024
    refused = REFUSED_XL
    source_file = Path(__file__)
    module_name = "mde_edit_xl"

    # -----------------------------------------------------------------------------------------------------------------
    # Text
    # -----------------------------------------------------------------------------------------------------------------

    @property
    def max_clip_skip(self) -> int:
        # of the hidden states, of which there is one more than layers, the last but one is read without a skip
        return min(encoder.config.num_hidden_layers for encoder in (self.text_encoder, self.text_encoder_2)) - 1

    @property
    def empty_prompt(self) -> str | None:
        return None if self.config.force_zeros_for_empty_prompt else ""

    def condition(self, prompt: str, clip_skip: int | None = None, lora_scale: float = 1.0) -> Conditioning:
        with (
            lock_of(self.tokenizer),
            lock_of(self.tokenizer_2),
            lora_strength(self.text_encoder, lora_scale),
            lora_strength(self.text_encoder_2, lora_scale),
        ):
            read = {"device": self._execution_device, "do_classifier_free_guidance": False, "clip_skip": clip_skip}
            embeds, _, pooled, _ = self.encode_prompt(prompt, **read)
        return Conditioning(embeds, pooled.to(embeds.device))

    def check_prompt(self, prompt: str, name: str) -> None:
        """Also raises `ValueError` where the second tokenizer has other words than the first, whose positions count."""
        super().check_prompt(prompt, name)
        with lock_of(self.tokenizer), lock_of(self.tokenizer_2):
            first, second = (
                tokenizer.tokenize(self.maybe_convert_prompt(prompt, tokenizer))
                for tokenizer in (self.tokenizer, self.tokenizer_2)
            )
        if first != second:
            raise ValueError(
                f"The two tokenizers read `{name}` {prompt!r} differently, as {first} and {second}, and a mask's word"
                " has one place: load a textual inversion into both, with `tokenizer=pipe.tokenizer_2,"
                " text_encoder=pipe.text_encoder_2` for the second."
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Model, sizes and pictures
    # -----------------------------------------------------------------------------------------------------------------

    def check_model(self) -> None:
        super().check_model()
        readers = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        missing = [name for name in readers if getattr(self, name) is None]
        if missing == ["text_encoder", "tokenizer"]:
            raise ValueError(
                "This is SDXL's refiner, which has the second text encoder alone and finishes pictures of the base"
                " model: edit with the base model."
            )
        if missing:
            raise ValueError(f"The pipeline has no {', '.join(missing)}: load it whole, an edit reads its prompts.")

    def time_ids(self, image_size: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        # An original smaller than the target means a picture that was blown up, which the model would then draw: where
        # a side was enlarged, the original is told as large as the target, diffusers' default.
        original = [max(own, target) for own, target in zip(image_size, size)]
        # resized as a whole, so the crop begins in the corner
        ids = torch.tensor([[*original, 0, 0, *size]], dtype=torch.float32)
        return ids.to(self._execution_device)

    @contextmanager
    def working_vae(self):
        """As diffusers does: SDXL's own VAE leaves the finite numbers in float16, and says so in its config."""
        with lock_of(self.vae):
            dtype = self.vae.dtype
            upcast = dtype == torch.float16 and self.vae.config.get("force_upcast", False)
            try:
                if upcast:
                    self.vae.to(torch.float32)
                yield
            finally:
                if upcast:
                    self.vae.to(dtype)

    def latent_statistics(self) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        # as in diffusers: those of the VAE's config, if it has both
        stated = [self.vae.config.get(name) for name in ("latents_mean", "latents_std")]
        if None in stated:
            return super().latent_statistics()
        mean, deviation = (torch.tensor(one, dtype=torch.float32).view(1, -1, 1, 1) for one in stated)
        return mean.to(self._execution_device), deviation.to(self._execution_device)

    def screen(self, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        return pixels if self.watermark is None else self.watermark.apply_watermark(pixels), None

    # -----------------------------------------------------------------------------------------------------------------
    # Calls
    # -----------------------------------------------------------------------------------------------------------------

    @extending(EditsPictures.invert, method="direct")
    def invert(
        self,
        *,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        **arguments,
    ) -> Inversion:
        r"""
        Invert a real picture, once, for any number of edits: [`MDEEditPipeline.invert`] with SDXL.

        The sizes that SDXL is told are the picture's own and that to which it is resized (where it is enlarged, twice
        the latter); edits are told the same.

        Args:
            pooled_prompt_embeds, negative_pooled_prompt_embeds (`torch.Tensor`, *optional*):
                (1, pooled dim), beside `prompt_embeds` and `negative_prompt_embeds`: `pipe.encode_prompt` gives both.
            arguments:
                Those of [`MDEEditPipeline.invert`], `method` being `"direct"` by default.
        """
        join_pooled(arguments, "prompt_embeds", pooled_prompt_embeds)
        join_pooled(arguments, "negative_prompt_embeds", negative_pooled_prompt_embeds)
        return super().invert(**arguments)

    @extending(EditsPictures.__call__, inversion_method="direct")
    def __call__(
        self,
        *,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        source_pooled_prompt_embeds: torch.Tensor | None = None,
        **arguments,
    ) -> MDEEditPipelineOutput | tuple:
        r"""
        Edit an inverted picture, or several pictures that are inverted first: [`MDEEditPipeline.__call__`] with SDXL.

        Args:
            pooled_prompt_embeds (`torch.Tensor`, *optional*):
                (1 or prompts, pooled dim), beside `prompt_embeds`: `pipe.encode_prompt` gives both.
            negative_pooled_prompt_embeds, source_pooled_prompt_embeds (`torch.Tensor`, *optional*):
                The same beside `negative_prompt_embeds` and `source_prompt_embeds`.
            arguments:
                Those of [`MDEEditPipeline.__call__`], `inversion_method` being `"direct"` by default.
        """
        join_pooled(arguments, "prompt_embeds", pooled_prompt_embeds)
        join_pooled(arguments, "negative_prompt_embeds", negative_pooled_prompt_embeds)
        join_pooled(arguments, "source_prompt_embeds", source_pooled_prompt_embeds)
        return super().__call__(**arguments)


def join_pooled(arguments: dict, name: str, pooled) -> None:
    """Put `pooled` beside the embeddings called `name` in `arguments`.

    Raises:
        ValueError: there are none.
    """
    if arguments[name] is not None:
        arguments[name] = Conditioning(arguments[name], pooled)
    elif pooled is not None:
        beside = name.replace("prompt_embeds", "pooled_prompt_embeds")
        raise ValueError(f"`{beside}` goes with `{name}`: `pipe.encode_prompt` gives both.")
