"""SDXL's shape in small, with random weights: two text encoders and tokenizers, and a U-Net of three levels, the finest
without attention, which is told pooled text and sizes."""

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .conftest import make_vae, steepen, text_config


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WIDTHS, POOLED = (16, 24), 16  # of the text encoders, and what the second one pools to


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=sum(WIDTHS),
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED + 6 * 8,
        norm_num_groups=8,
    )


def make_components(tokenizer) -> dict:
    """The parts of a `StableDiffusionXLPipeline` but its scheduler, from the first tokenizer."""
    torch.manual_seed(0)
    unet = make_unet()
    steepen(unet)
    vae = make_vae(scaling_factor=0.13025, force_upcast=True)
    first, second = (
        text_config(tokenizer, hidden_size=width, projection_dim=POOLED, num_hidden_layers=3) for width in WIDTHS
    )
    return {
        "unet": unet.eval(),
        "vae": vae,
        "text_encoder": CLIPTextModel(first).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(second).eval(),
        "tokenizer": tokenizer,
        # other padding than the first, as in SDXL
        "tokenizer_2": CLIPTokenizer.from_pretrained(tokenizer.name_or_path, model_max_length=77, pad_token="!"),
    }


def make_xl(components: dict, cls, **options):
    """A pipeline of class `cls` with SDXL's scheduler (Euler)."""
    scheduler = EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    pipe = cls(**components, scheduler=scheduler, add_watermarker=False, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe
