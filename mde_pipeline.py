# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""MDE-Edit (arXiv 2505.05101) as a diffusers pipeline: several masked edits of one real picture, without training.

`pipe.invert(image, prompt)` gives an [`Inversion`]; `pipe(prompt, inversion=..., object_masks=...)` edits it. What the
pipelines of Stable Diffusion and of SDXL do alike is in `editing.py`.
"""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

# diffusers copies a plug-in's direct imports only: import all
from .attention_processors import lock_of, lora_strength
from .bundle import CarriesItsCode
from .checks import check_setting  # noqa: F401
from .conditioning import Conditioning
from .denoise import edit_step  # noqa: F401
from .editing import EditsPictures, MDEEditPipelineOutput  # noqa: F401
from .inversion import Inversion  # noqa: F401
from .localize import word_region  # noqa: F401
from .losses import object_alignment_loss  # noqa: F401
from .masks import edit_mask  # noqa: F401
from .pictures import read_pixels  # noqa: F401
from .prompts import align_tokens  # noqa: F401
from .texts import ReadsPrompts  # noqa: F401


class MDEEditPipeline(CarriesItsCode, EditsPictures, StableDiffusionPipeline):
    r"""
    Training-free, mask-guided editing of several objects of a real picture with Stable Diffusion 1.x/2.x models.

    Implements MDE-Edit (https://arxiv.org/abs/2505.05101): null-text inversion, injection of the attention that source
    and target prompt share (Eq. 3), and guidance of the latents by the Object Alignment Loss (Eq. 4-5) and the Color
    Consistency Loss (Eq. 6) inside the masks (Eq. 7-8).

    All components and loaders are [`StableDiffusionPipeline`]'s. The pipeline's own scheduler is left alone: inversion
    and editing use DDIM schedulers derived from its config.
    """

    _callback_tensor_inputs = ["latents", "prompt_embeds"]
    family = "sd"
    edits_per_pass = 4  # a row of a guided pass holds a third of a GiB in half precision, at 512x512
    source_file = Path(__file__)
    module_name = "mde_edit"
    empty_prompt = ""

    @property
    def max_clip_skip(self) -> int:
        return self.text_encoder.config.num_hidden_layers

    def embed(self, prompt: str, clip_skip: int | None = None, lora_scale: float = 1.0) -> torch.Tensor:
        """(1, tokens, dim), the text encoder's reading of `prompt`.

        Args:
            clip_skip: how many of the last layers to leave out.
            lora_scale: see [`lora_strength`].
        """
        device = self._execution_device
        with lock_of(self.tokenizer), lora_strength(self.text_encoder, lora_scale):
            if not clip_skip:
                return self.encode_prompt(prompt, device, 1, do_classifier_free_guidance=False)[0]
            # diffusers' own way asks for a `text_model`, which encoders of transformers 5 do not have
            text = self.tokenizer(self.spell_out(prompt), padding="max_length", truncation=True, return_tensors="pt")
            reads_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
            mask = text.attention_mask.to(device) if reads_mask else None
            hidden = self.text_encoder(text.input_ids.to(device), attention_mask=mask, output_hidden_states=True)
            norm = getattr(self.text_encoder, "text_model", self.text_encoder).final_layer_norm
            return norm(hidden.hidden_states[-1 - clip_skip]).to(self.text_encoder.dtype)

    def condition(self, prompt: str, clip_skip: int | None = None, lora_scale: float = 1.0) -> Conditioning:
        return Conditioning(self.embed(prompt, clip_skip, lora_scale))

    def screen(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
        return self.run_safety_checker(pixels, self._execution_device, self.vae.dtype)
