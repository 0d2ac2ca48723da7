# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""Masks: what a user draws, at every resolution that something reads it at, and M of Eq. 7-8."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F

from .pictures import PictureInput, has_alpha, read_pixels
from .prompts import WordKey


MaskInput = PictureInput | Sequence[PictureInput]
# An edited word's region: a mask, or the word of the source prompt that the model's attention is to find.
Masks = dict[WordKey, MaskInput | str | tuple[str, int]]


def as_binary_mask(mask: MaskInput, name: str, sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
    """A user's mask as (height, width) fp32 in {0, 1}, at its own resolution.

    Args:
        mask: what [`read_pixels`] reads. White is what at least half of the range is. Where there is transparency, the
            mask is what is not transparent, whatever its color (a painted layer, a cut-out); of a palette of colors
            (labels) it is everything but index 0; integers that are all 0 or 1 are as good as bool. A list of masks is
            their union.
        sizes: (height, width), each up to a factor: the picture's and, if it was resized, what it was resized to. The
            mask's proportions must be those of one of them.

    Raises:
        ValueError: wrong type, shape, proportions or range, or no white at all.
    """
    if isinstance(mask, (list, tuple)):
        if not mask:
            raise ValueError(f"{name} is an empty {type(mask).__name__}: give at least one mask.")
        parts = [as_binary_mask(part, f"{name}[{k}]", sizes) for k, part in enumerate(mask)]
        size = tuple(max(part.shape[axis] for part in parts) for axis in (0, 1))
        return torch.stack([F.interpolate(part[None, None], size)[0, 0] for part in parts]).amax(0)
    if isinstance(mask, PIL.Image.Image) and mask.mode == "P" and _is_label_map(mask):
        mask = np.array(PIL.ImageOps.exif_transpose(mask)) > 0
    values = read_pixels(mask, name)
    height, width, channels = values.shape
    if not any(0.9 < (height * w) / (width * h) < 1.1 for h, w in sizes):
        h, w = sizes[0]
        raise ValueError(
            f"{name} is {width}x{height} (width x height) and the picture's proportions are {w}:{h}: draw the mask on"
            " the picture (or is it transposed?)."
        )
    if channels in (2, 4) and (values[..., -1] < 1).any():
        values = values[..., -1]
    elif channels >= 3:
        color = values[..., :3]
        if not isinstance(mask, PIL.Image.Image) and (color != color[..., :1]).any():
            raise ValueError(
                f"{name} has shape {tuple(mask.shape)} and its channels differ: a mask is (H, W), one value per pixel;"
                " several masks for one word go into a list."
            )
        values = color @ color.new_tensor([0.299, 0.587, 0.114])
    else:
        values = values[..., 0]
    if not isinstance(mask, PIL.Image.Image) and not _is_float(mask) and 0 < values.max() <= 1 / 255:
        values = values * 255  # 0 and 1 in an integer array
    binary = (values >= 0.5 - 1e-6).float()
    if not binary.any():
        raise ValueError(
            f"{name} is empty: nothing in it is white (at least half of the range), so nothing can be edited there."
        )
    return binary


def _is_float(mask: np.ndarray | torch.Tensor) -> bool:
    return mask.dtype.kind == "f" if isinstance(mask, np.ndarray) else mask.is_floating_point()


def _is_label_map(mask: PIL.Image.Image) -> bool:
    """Whether a palette picture is one of labels: some color that it uses is not gray, and nothing is transparent."""
    if has_alpha(mask):
        return False
    used = mask.convert("RGB").getcolors(256) or []
    return any(len(set(color)) > 1 for _, color in used)


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
    radius = min(radius, max(mask.shape))  # further than to the other side nothing grows, and a window can overflow
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
    touched = torch.zeros(latent_size, dtype=torch.bool, device="cpu")
    for mask in masks:
        touched |= resize_mask(mask, latent_size) > 0
    return dilate_mask(touched.float(), default_dilation(latent_size) if dilation is None else dilation).bool()


def _is_word(value) -> bool:
    """Whether a mask's value is a word of the source prompt, or one of its occurrences."""
    if isinstance(value, tuple) and len(value) == 2:
        return isinstance(value[0], str) and isinstance(value[1], int)
    return isinstance(value, str)


def source_words(masks: Sequence[Sequence[Masks | None]]) -> dict[WordKey, str]:
    """The words that stand in a mask's place, and what an error calls them.

    Args:
        masks: object masks and attribute masks, each one dict per prompt.
    """
    words: dict[WordKey, str] = {}

    def look_at(value, name: str) -> None:
        if _is_word(value):
            words.setdefault(value, name)
        elif isinstance(value, (list, tuple)):
            for part in value:
                look_at(part, name)

    for name, dicts in zip(("object_masks", "attribute_masks"), masks):
        for key, value in (item for d in dicts for item in (d or {}).items()):
            look_at(value, f"{name}[{key!r}]")
    return words


def with_regions(masks: Sequence[Sequence[Masks | None]], regions: dict[WordKey, np.ndarray]):
    """`masks` with the region of each word in its place."""
    return each_mask(masks, lambda value, name: regions[value] if _is_word(value) else value)


def each_mask(masks: Sequence[Sequence[Masks | None]], form: Callable[[Any, str], Any]):
    """`masks` with `form(value, name)` in the place of each value, in a list too; `name` is what an error calls it."""

    def formed(value, name: str):
        if isinstance(value, (list, tuple)) and not _is_word(value):
            return [formed(part, name) for part in value]
        return form(value, name)

    return [
        [d and {key: formed(value, f"{role}[{key!r}]") for key, value in d.items()} for d in dicts]
        for role, dicts in zip(("object_masks", "attribute_masks"), masks)
    ]
