# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""The gate for what people bring: pictures and masks of any library, mode, dtype and axis order, as one tensor."""

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch


PictureInput = PIL.Image.Image | np.ndarray | torch.Tensor


def as_pictures(image) -> list:
    """One picture per item: of a list, of an array or tensor with a leading axis of several, or the one that it is."""
    if isinstance(image, (list, tuple)):
        return list(image)
    several = isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 4 and len(image) > 1
    return list(image) if several else [image]


def read_pixels(value: PictureInput, name: str, signed: bool = False) -> torch.Tensor:
    """The pixels of a picture or a mask, upright and at their own resolution.

    Args:
        value: PIL in any mode; or an array or tensor (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4, with any
            leading axes of length 1. Integers are 0-255, or 0-65535 where one is larger; floats 0-1, or 0-255 where one
            is larger than 16 (what lies between is refused, since it could be either).
        name: of the argument, for the errors.
        signed: whether floats from -1 to 1 are a picture too, as diffusers' processors give it.

    Returns:
        (H, W, C) fp32 in [0, 1] on the CPU; C = 2 is gray and alpha (PIL only).

    Raises:
        ValueError: not a picture, no pixels, another number of axes or channels, not finite, or out of range.
    """
    from_pil = isinstance(value, PIL.Image.Image)
    if from_pil:
        value = _from_pil(value, name)
    elif not isinstance(value, (np.ndarray, torch.Tensor)):
        raise ValueError(
            f"{name} is a {type(value).__name__}: pass a PIL image, a numpy array or a torch tensor"
            " (`diffusers.utils.load_image` reads paths and URLs)."
        )
    shape, channels_last = tuple(value.shape), isinstance(value, np.ndarray)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "buif":
            raise ValueError(f"{name} has the dtype {value.dtype}: use bool, integers or floats.")
        if value.dtype.kind == "u" and value.dtype.itemsize > 1:
            value = value.astype(np.int64)  # torch computes little with unsigned ones
        if value.dtype == np.longdouble:
            value = value.astype(np.float64)
        # native byte order, no negative strides, and not PIL's read-only memory
        value = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    elif value.is_complex() or value.is_quantized or value.is_sparse or value.is_meta:
        raise ValueError(f"{name} is a tensor of {value.dtype} ({value.layout}): use plain bool, integers or floats.")
    pixels = value.detach().cpu()
    while pixels.ndim > 3 and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif pixels.ndim == 3:
        first, last = (pixels.shape[axis] in (1, 3, 4) for axis in (0, -1))
        if first and not (last and channels_last):
            pixels = pixels.movedim(0, -1)
    if pixels.ndim != 3 or pixels.shape[-1] not in ((1, 2, 3, 4) if from_pil else (1, 3, 4)):
        raise ValueError(
            f"{name} has shape {shape}: pass one picture or mask, (H, W) or, with channels, (H, W, C) numpy or"
            " (C, H, W) torch."
        )
    if pixels.numel() == 0:
        raise ValueError(f"{name} has shape {shape}: there are no pixels in it.")
    return _to_unit(pixels, name, signed)


def _from_pil(image: PIL.Image.Image, name: str) -> np.ndarray:
    """(H, W) or (H, W, C), upright: the orientation that a camera notes beside the pixels is carried out."""
    try:
        image = PIL.ImageOps.exif_transpose(image)
        image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} cannot be read: {error}.") from error
    if image.mode in ("P", "PA") or (image.mode in ("1", "L", "RGB") and "transparency" in image.info):
        image = image.convert("RGBA" if has_alpha(image) else "RGB")
    elif image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    elif image.mode not in ("1", "L", "LA", "RGB", "RGBA", "F") and not image.mode.startswith("I"):
        image = image.convert("RGB")  # CMYK, YCbCr, LAB, HSV, RGBX
    return np.array(image)


def _to_unit(pixels: torch.Tensor, name: str, signed: bool) -> torch.Tensor:
    """(H, W, C) of any real dtype to fp32 in [0, 1]; see [`read_pixels`]."""
    if pixels.dtype == torch.bool:
        return pixels.float()
    whole = not pixels.is_floating_point()
    pixels8 = pixels.dtype == torch.uint8
    pixels = pixels.double() if whole and not pixels8 else pixels.float()
    if not torch.isfinite(pixels).all():
        raise ValueError(f"{name} holds values that are not finite (NaN or infinity): clean it first.")
    low, high = pixels.min().item(), pixels.max().item()
    if whole and 0 <= low and high <= 65535:
        return (pixels / (255 if high <= 255 else 65535)).float()
    if not whole and 0 <= low and 16 < high <= 255:
        return pixels / 255
    slack = 1e-3  # what resampling and half precision leave
    if not whole and -slack <= low and high <= 1 + slack:
        return pixels.clamp(0, 1)
    if not whole and signed and -1 - slack <= low and high <= 1 + slack:
        return (pixels.clamp(-1, 1) + 1) / 2
    raise ValueError(f"{name} has values from {low:g} to {high:g}: use bool, 0-255 integers or 0-1 floats.")


def on_white(pixels: torch.Tensor) -> torch.Tensor:
    """(H, W, C), C of 1 to 4, to (H, W, 3) or, of one channel, (H, W, 1): what is transparent shows white, not what a
    program left under it."""
    if pixels.shape[-1] in (1, 3):
        return pixels
    color, alpha = pixels[..., :-1], pixels[..., -1:]
    color = color * alpha + (1 - alpha)
    return color.expand(*color.shape[:-1], 3)


def has_alpha(image: PIL.Image.Image) -> bool:
    """Whether a PIL picture can be transparent somewhere: by its mode, its palette or one transparent color."""
    modes = image.mode + (image.palette.mode if image.palette else "")
    return "A" in modes.replace("LAB", "").upper() or "transparency" in image.info
