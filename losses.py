# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""The losses of MDE-Edit (Eq. 4-6) and the masks they read: pure functions of tensors, fp32 inside.

Shapes: `layers` is layers x heads (every head of every loss layer is one row), `pixels` the h*w of the loss level,
`tokens` the prompt's positions, `regions` the edited words.
"""

from typing import Sequence, Tuple

import torch
import torch.nn.functional as F


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def resize_mask(mask: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Area-resize a binary mask: the covered share of every cell.

    Args:
        mask: (height, width) in {0, 1}.
        size: (h, w) of the result.

    Returns:
        (h, w) fp32 in [0, 1]. A mask with a single pixel still covers a share > 0 of its cell.
    """
    return F.adaptive_avg_pool2d(mask.float()[None, None], size)[0, 0]


def binarize_mask(soft_mask: torch.Tensor) -> torch.Tensor:
    """Cells at least half covered; where there is none (a small object), those at least half as covered as the most
    covered one, so that at least one cell remains. (..., h, w) in [0, 1] -> (..., h, w) in {0, 1}."""
    peak = soft_mask.amax(dim=(-2, -1), keepdim=True)
    return (soft_mask >= 0.5 * torch.where(peak >= 0.5, 1.0, peak)).to(soft_mask.dtype)


def dilate_mask(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Grow a binary mask (h, w) by `radius` cells in every direction, diagonals included."""
    return F.max_pool2d(mask[None, None], 2 * radius + 1, stride=1, padding=radius)[0, 0]


def word_map(maps: torch.Tensor, token_indices: Sequence[int]) -> torch.Tensor:
    """Attention on a word: the sum over its sub-tokens. (layers, pixels, tokens) -> (layers, pixels)."""
    return _at_least_fp32(maps[..., list(token_indices)]).sum(dim=-1)


def aggregate_maps(maps: torch.Tensor, token_indices: Sequence[int]) -> torch.Tensor:
    """Eq. 4: a word's implicit segmentation, its attention averaged over layers and heads.

    Args:
        maps: (layers, pixels, tokens) probabilities over tokens.
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


def color_consistency_loss(attention: torch.Tensor, shared: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Colour Consistency Loss, Eq. 6 ("token ratio"): the word's share of attention inside its mask should be all.

    `(1 - mean_S A*_i / (A*_i + sum_j A_j))^2`, averaged over layers and heads. Pixels outside S have no gradient. The
    shared tokens' attention comes from the source and is constant, so the ratio stays below `1 / (1 + sum_j A_j)` and
    the loss has a floor above 0.

    Args:
        attention: (layers, pixels), the word's own map A*_i ([`word_map`]).
        shared: (layers, pixels), sum_j A_j over the tokens both prompts share, of the source pass.
        mask: (pixels,) in {0, 1}, at least one 1.

    Returns:
        scalar in [0, 1].
    """
    attention, shared, mask = _at_least_fp32(attention), _at_least_fp32(shared), _at_least_fp32(mask)
    ratio = attention / (attention + shared + 1e-6)
    return (1 - (ratio * mask).sum(dim=-1) / mask.sum()).square().mean()


def color_leakage_loss(attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The released program's colour loss ("spatial ratio"): `3 - 4 a`, a the share of the word's attention inside S.

    Unlike Eq. 6 it pushes attention outside the mask down. Averaged over layers and heads.

    Args:
        attention: (layers, pixels), the word's own map A*_i ([`word_map`]).
        mask: (pixels,) in {0, 1}.

    Returns:
        scalar in [-1, 3].
    """
    attention, mask = _at_least_fp32(attention), _at_least_fp32(mask)
    share = (attention * mask).sum(dim=-1) / (attention.sum(dim=-1) + 1e-8)
    return (3 - 4 * share).mean()
