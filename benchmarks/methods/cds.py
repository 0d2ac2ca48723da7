"""CDS: Contrastive Denoising Score (Nam et al., CVPR 2024), an optimization of the latents without inversion or masks.

Delta denoising moves the source's latents by what the target prompt changes in the U-Net's noise prediction; a
contrastive loss on self-attention outputs holds each place to its look in the source.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from mde_edit import MDEEditPipeline
from mde_edit.attention_processors import attention_control, attention_layers, gradient, predict
from mde_edit.conditioning import Conditioning
from PIL import Image

from benchmarks.cases import Case
from benchmarks.methods.base import Method, encode


TIME_RANGE = (0.05, 0.95)  # of the training timesteps, as the official code draws them
TEMPERATURE, PATCHES, PATCH_SIZES = 0.07, 256, (1, 2)
DDS_SCALE = 2000  # the official code's factor of the delta, against which its weight of the contrast (3) is stated


def predict_noise(unet, scheduler, noisy: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """Predicted noise (batch, channels, h, w) at a timestep, also of a model that predicts v."""
    output = predict(unet, noisy, t, Conditioning(embeds))
    if scheduler.config.prediction_type != "v_prediction":
        return output
    alpha = scheduler.alphas_cumprod[int(t)]
    return alpha.sqrt() * output + (1 - alpha).sqrt() * noisy


@contextmanager
def self_attention_outputs(unet, latent_size: tuple[int, int]) -> Iterator[dict[str, torch.Tensor]]:
    """What the up blocks' self-attention layers put out in the latest pass.

    Yields:
        a dictionary, layer name -> (channels, h, w) of the batch's last row; later passes overwrite it.
    """
    found, hooks = {}, []

    def keep(name: str, size: tuple[int, int]):
        def hook(module, args, output):
            found[name] = output[-1].T.unflatten(-1, size).float()  # (pixels, channels) -> (channels, h, w)

        return hook

    try:
        for layer in attention_layers(unet, latent_size):
            if not layer.is_cross and layer.name.startswith("up_blocks"):
                module = unet.get_submodule(layer.name.removesuffix(".processor"))
                hooks.append(module.register_forward_hook(keep(layer.name, layer.size)))
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def delta(target: torch.Tensor, source: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """DDS gradient: eps_w(z_t, y) - eps_w(z_t of the source, y of the source), both guided (CDS, Sec. 3).

    Args:
        target, source: (2, channels, h, w), noise predicted without and with the prompt.

    Returns:
        (1, channels, h, w).
    """
    (target_free, target_cond), (source_free, source_cond) = target.split(1), source.split(1)
    guided = target_free + guidance_scale * (target_cond - target_free)
    return guided - (source_free + guidance_scale * (source_cond - source_free))


def patch_nce(target: torch.Tensor, source: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Contrastive loss between one layer's features of target and source (CDS, l_con; CUT's PatchNCE).

    Each target patch should be nearer (cosine) to the source's patch of the same place than to those of other places.

    Args:
        target, source: (channels, h, w).
        chosen: (patches,) places compared, positions in the flattened h x w.

    Returns:
        scalar, the cross-entropy of finding the right place.
    """
    queries, keys = (F.normalize(features.flatten(1)[:, chosen], dim=0) for features in (target, source))
    return F.cross_entropy(queries.T @ keys / TEMPERATURE, torch.arange(len(chosen), device=target.device))


def contrast(
    target: dict[str, torch.Tensor], source: dict[str, torch.Tensor], generator: torch.Generator
) -> torch.Tensor:
    """Scalar: the contrastive loss summed over layers and patch sizes, each on its own random places.

    Args:
        target, source: layer name -> (channels, h, w).
    """
    terms = []
    for name, features in target.items():
        for size in PATCH_SIZES:
            pooled, reference = (F.avg_pool2d(one, size, ceil_mode=True) for one in (features, source[name]))
            places = torch.randperm(pooled[0].numel(), generator=generator)[:PATCHES].to(pooled.device)
            terms.append(patch_nce(pooled, reference, places))
    return torch.stack(terms).sum()


@torch.no_grad()
def run(
    pipe: MDEEditPipeline,
    case: Case,
    steps: int,
    seed: int,
    iterations: int,
    step_size: float,
    guidance_scale: float,
    contrast_weight: float,
) -> Image.Image:
    """Optimize the latents. There is no denoising, so `steps` is not used; `seed` draws timesteps, noise and patches.

    An iteration is z <- z - step_size (delta + contrast_weight / 2000 h w dl_con/dz). The official SGD (rate 0.1 on
    2000 <z, delta> / (h w) + 3 l_con) is this at a step size of 0.1 * 2000 / (64 * 64) = 0.05 and a weight of 3, on
    its 64x64 latents; in this form neither depends on the latents' size.
    """
    generator = torch.Generator().manual_seed(seed)
    scheduler = pipe.ddim_scheduler(1)  # for its noise levels alone
    source_embeds, target_embeds, empty = (pipe.embed(text) for text in (case.source_prompt, case.target_prompt, ""))
    embeds = torch.cat([empty, empty, source_embeds])
    source = encode(pipe, case.image)
    height, width = source.shape[-2:]
    latents = source
    first, last = (int(share * scheduler.config.num_train_timesteps) for share in TIME_RANGE)
    with attention_control(pipe.unet), self_attention_outputs(pipe.unet, (height, width)) as features:
        for _ in range(iterations):
            t = torch.randint(first, last, (1,), generator=generator).to(source.device)
            noise = torch.randn(source.shape, generator=generator).to(source.device)
            noisy_source, noisy = (scheduler.add_noise(one, noise, t) for one in (source, latents))
            free, *source_noise = predict_noise(
                pipe.unet, scheduler, torch.cat([noisy, noisy_source, noisy_source]), t, embeds
            ).split(1)
            reference = dict(features)
            with torch.enable_grad():
                leaf = latents.detach().requires_grad_()
                noisy = scheduler.add_noise(leaf, noise, t)
                conditional = predict_noise(pipe.unet, scheduler, noisy, t, target_embeds)
                loss = contrast(features, reference, generator)
            held = gradient(loss, leaf, pipe.unet.dtype) * height * width / DDS_SCALE
            moved = delta(torch.cat([free, conditional.detach()]), torch.cat(source_noise), guidance_scale)
            latents = latents - step_size * (moved + contrast_weight * held)
    return pipe.decode(latents, "pil")[0][0]


METHODS = {
    "cds": Method(
        run,
        "prompt",
        "Contrastive Denoising Score (Nam et al., CVPR 2024), its step stated per latent value, its settings"
        " tuned here, both losses from the same passes",
        {"iterations": 100, "step_size": 0.1, "guidance_scale": 2.5, "contrast_weight": 30.0},
        {
            "iterations": (100, 200),
            "step_size": (0.02, 0.05, 0.1),
            "guidance_scale": (2.5, 4.0, 7.5),
            "contrast_weight": (3.0, 30.0, 100.0),
        },
    )
}
