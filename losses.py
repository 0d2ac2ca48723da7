# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""The losses of MDE-Edit (Eq. 4-6): pure functions of tensors, fp32 inside.

Shapes: `heads` is every head of every loss layer, `pixels` the h*w of the loss level, `tokens` the prompt's positions,
`regions` the edited words.
"""

from collections.abc import Sequence

import torch


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def word_map(maps: torch.Tensor, token_indices: Sequence[int]) -> torch.Tensor:
    """Attention on a word: the sum over its sub-tokens. (heads, pixels, tokens) -> (heads, pixels)."""
    # token by token: a list of positions would be copied to the device, which waits for it
    return _at_least_fp32(torch.stack([maps[..., i] for i in token_indices], dim=-1)).sum(dim=-1)


def aggregate_maps(maps: torch.Tensor, token_indices: Sequence[int]) -> torch.Tensor:
    """Eq. 4: a word's implicit segmentation, its attention averaged over layers and heads.

    Args:
        maps: (heads, pixels, tokens) probabilities over tokens.
        token_indices: positions of the word's tokens.

    Returns:
        (pixels,) fp32 in [0, 1].
    """
    return word_map(maps, token_indices).mean(dim=0).clamp(max=1.0)


def _bce(probability: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy with soft labels, mean over pixels. (regions, pixels) -> (regions,)."""
    return -(label * probability.log() + (1 - label) * (1 - probability).log()).mean(dim=-1)


def object_alignment_loss(
    attention: torch.Tensor, masks: torch.Tensor, eps: float = 1e-5, norm_eps: float = 0.05
) -> torch.Tensor:
    """Object Alignment Loss, Eq. 5: BCE(S_hat, S) + BCE(S_hat / |S_hat|_inf, S), summed over objects.

    Both probabilities are squeezed affinely into the open unit interval rather than clipped: a clip has no gradient
    exactly where attention is most diluted. The norm is a constant to the gradient: with it attached, the arg-max gets
    no push of its own, and a leak there is *raised* by descent.

    Args:
        attention: (regions, pixels) in [0, 1], the objects' maps S_hat ([`aggregate_maps`]).
        masks: (regions, pixels) in [0, 1], their masks S.
        eps: margin of the first term.
        norm_eps: margin of the second; bounds its gradient at the arg-max, which is 1 by construction.

    Returns:
        scalar >= 0.
    """
    attention, masks = _at_least_fp32(attention), _at_least_fp32(masks)
    peak = attention.amax(dim=-1, keepdim=True).detach() + 1e-8
    absolute = _bce(eps + (1 - 2 * eps) * attention, masks)
    relative = _bce(norm_eps + (1 - 2 * norm_eps) * (attention / peak), masks)
    return (absolute + relative).sum()


def color_consistency_loss(attention: torch.Tensor, shared_attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Color Consistency Loss, Eq. 6 ("token ratio"): the word's share of attention inside its mask should be all.

    `(1 - mean_S A*_i / (A*_i + sum_j A_j))^2`, averaged over layers and heads. Pixels outside S have no gradient. The
    shared tokens' attention comes from the source and is constant, so the ratio stays below `1 / (1 + sum_j A_j)` and
    the loss has a floor above 0.

    Args:
        attention: (heads, pixels), the word's own map A*_i ([`word_map`]).
        shared_attention: (heads, pixels), sum_j A_j over the tokens both prompts share, of the source pass.
        mask: (pixels,) in {0, 1}, at least one 1.

    Returns:
        scalar in [0, 1].
    """
    attention, shared_attention, mask = (_at_least_fp32(x) for x in (attention, shared_attention, mask))
    ratio = attention / (attention + shared_attention + 1e-6)
    return (1 - (ratio * mask).sum(dim=-1) / mask.sum()).square().mean()


def spatial_ratio_loss(attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The released program's color loss ("spatial ratio"): `3 - 4 a`, a the share of the word's attention inside S.

    Unlike Eq. 6 it pushes attention outside the mask down. Averaged over layers and heads.

    Args:
        attention: (heads, pixels), the word's own map A*_i ([`word_map`]).
        mask: (pixels,) in {0, 1}.

    Returns:
        scalar in [-1, 3].
    """
    attention, mask = _at_least_fp32(attention), _at_least_fp32(mask)
    share = (attention * mask).sum(dim=-1) / (attention.sum(dim=-1) + 1e-8)
    return (3 - 4 * share).mean()
