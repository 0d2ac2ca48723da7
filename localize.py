# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""Where a word of the source prompt is in the picture, by the model's own attention: a mask that nobody has to draw.

The parts are known: cross-attention says what, self-attention says which pixels belong together (DiffSegmenter, arXiv
2309.02773), and what a word has of a pixel counts against what the other words have of it (GoCA, arXiv 2603.06178).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .attention_processors import AttentionLayer, Record, attention_layers, predict
from .conditioning import Conditioning
from .inversion import Inversion


# When the picture is there and its things still are to be told apart; on 60 training scenes of the embedded model the
# result is the same from a quarter to nine tenths of the steps (mean IoU 0.85).
LOOKED_AT = (0.5, 0.6, 0.7)
# What nothing at all has of a pixel, as a share of what all words have at their strongest: between two words that both
# hardly look, none should win. 0.02 to 0.1 are as good.
NOTHING = 0.05


def localization_layers(
    layers: Sequence[AttentionLayer], latent_size: tuple[int, int]
) -> tuple[list[AttentionLayer], list[AttentionLayer]]:
    """The layers that say where things are: cross-attention at a half and a quarter of the latents' side (32x32 and
    16x16 in Stable Diffusion at 512 px), self-attention at the finer of the two that there are; without these, all.

    Returns:
        cross-attention layers, self-attention layers of one size.
    """
    h, w = latent_size
    half = ((h + 1) // 2, (w + 1) // 2)
    quarter = ((half[0] + 1) // 2, (half[1] + 1) // 2)
    chosen = [layer for layer in layers if layer.size in (half, quarter)] or list(layers)
    finest = max(layer.pixels for layer in chosen)
    own = [layer for layer in chosen if not layer.is_cross and layer.pixels == finest]
    return [layer for layer in chosen if layer.is_cross], own


@torch.no_grad()
def source_attention(
    unet, scheduler, inversion: Inversion, conditioning: Conditioning
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the source branch, mean over layers, heads and the steps `LOOKED_AT`. Inside
    [`attention_control`].

    Args:
        scheduler: a `DDIMScheduler` with the inversion's timesteps set.
        inversion: on the U-Net's device.
        conditioning: of one row, the source prompt.

    Returns:
        cross-attention (tokens, h, w), and self-attention (h * w, h * w), whose rows sum to 1.
    """
    latent_size = tuple(inversion.latents.shape[-2:])
    cross, own = localization_layers(attention_layers(unet, latent_size), latent_size)
    size, steps = own[0].size, inversion.num_inference_steps
    words, pixels, passes = 0, 0, sorted({min(round(share * steps), steps - 1) for share in LOOKED_AT})
    for i in passes:
        record = Record(frozenset(layer.name for layer in cross), frozenset(layer.name for layer in own))
        latents = inversion.source_latents(i)
        predict(unet, latents, scheduler.timesteps[i], conditioning, record, inversion.lora_scale)
        for layer in cross:
            maps = record.cross[layer.name].mean(0).T.unflatten(-1, layer.size)  # (tokens, height, width)
            words = words + F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
        for layer in own:
            query, key = (states[0].float() for states in record.self_qk[layer.name])  # (heads, pixels, head_dim)
            scale = unet.get_submodule(layer.name.removesuffix(".processor")).scale
            pixels = pixels + (query @ key.transpose(-1, -2) * scale).softmax(-1).mean(0)
    return words / (len(passes) * len(cross)), pixels / (len(passes) * len(own))


def word_region(
    cross: torch.Tensor,
    own: torch.Tensor,
    tokens: Sequence[int],
    others: Sequence[Sequence[int]],
    size: tuple[int, int],
) -> torch.Tensor:
    """The pixels that `tokens` have more of than any of `others`, and at least half as much as where they have most.

    Args:
        cross, own: from [`source_attention`].
        tokens, others: token positions of the word, and of each other phrase of the prompt that names something.
        size: (height, width) of the result.

    Returns:
        (height, width) bool, which may have no pixel.
    """
    maps = torch.stack([cross[list(positions)].mean(0) for positions in (tokens, *others)])  # (phrases, h, w)
    total = maps.sum(0)
    shares = maps / (total + NOTHING * total.max())
    shares = (own @ shares.flatten(1).T).T.unflatten(-1, cross.shape[-2:])  # pixels that look at each other agree
    low, high = shares.amin((1, 2), keepdim=True), shares.amax((1, 2), keepdim=True)
    shares = (shares - low) / (high - low).clamp(min=1e-6)  # of a word that looks everywhere alike, nothing is left
    shares = F.interpolate(shares[None], size, mode="bicubic", align_corners=False)[0]
    return largest_islands((shares.argmax(0) == 0) & (shares[0] > 0.5))


def largest_islands(region: torch.Tensor, share: float = 0.1) -> torch.Tensor:
    """`region` (height, width) bool without the connected parts smaller than a `share` of its largest."""
    labels = torch.arange(1, region.numel() + 1, device=region.device).view(region.shape) * region
    while True:
        # each pixel takes its neighborhood's largest label, then the label of the pixel that this one began at
        spread = F.max_pool2d(labels[None].double(), 3, stride=1, padding=1)[0].long() * region
        spread = torch.where(region, spread.flatten()[(spread - 1).clamp(min=0)], spread)
        if torch.equal(spread, labels):
            break
        labels = spread
    names, counts = labels[region].unique(return_counts=True)
    if not len(names):
        return region
    return torch.isin(labels, names[counts >= share * counts.max()]) & region
