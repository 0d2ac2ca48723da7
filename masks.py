# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""Masks: what a user draws, at every resolution that something reads it at, and M of Eq. 7-8."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F


MaskInput = PIL.Image.Image | np.ndarray | torch.Tensor


def as_binary_mask(mask: MaskInput, name: str, latent_size: tuple[int, int]) -> torch.Tensor:
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


def resize_mask(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
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


def default_dilation(latent_size: tuple[int, int]) -> int:
    """Cells by which M is grown: the official code's 3x3 at 64x64, in proportion (where one cell is a large share of
    the picture, growing by it costs the background several dB)."""
    return round(min(latent_size) / 64)


def edit_mask(masks: Sequence[torch.Tensor], latent_size: tuple[int, int], dilation: int | None = None) -> torch.Tensor:
    """M of Eq. 7-8: every latent cell that one of the masks touches, grown by `dilation` cells.

    Args:
        masks: each (height, width) in {0, 1}, at a resolution of its own.
        latent_size: (h, w).
        dilation: `None` for [`default_dilation`].

    Returns:
        (h, w) bool.
    """
    touched = torch.zeros(latent_size, dtype=torch.bool)
    for mask in masks:
        touched |= resize_mask(mask, latent_size) > 0
    return dilate_mask(touched.float(), default_dilation(latent_size) if dilation is None else dilation).bool()
