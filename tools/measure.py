# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""What an edit cost and how close two pictures are: seconds, U-Net passes, memory, PSNR."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import PIL.Image
import torch


@contextmanager
def measured(unet: torch.nn.Module) -> Iterator[dict[str, float]]:
    """Seconds and U-Net passes of what runs inside: `forwards`, the `rows` of their batches, and how many of the
    forwards ran to the U-Net's end (`whole`); `seconds` is there at the end."""
    record = {"forwards": 0, "rows": 0, "whole": 0}

    def before(module, args, kwargs):
        record["forwards"] += 1
        record["rows"] += len(args[0] if args else kwargs["sample"])

    def after(module, args, output):
        record["whole"] += 1

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    hooks = [unet.register_forward_pre_hook(before, with_kwargs=True), unet.register_forward_hook(after)]
    start = now()
    try:
        yield record
    finally:
        record["seconds"] = now() - start
        for hook in hooks:
            hook.remove()


def peak_memory_mib() -> int | None:
    """Peak memory of this process (the device's on CUDA), or None where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> 20 if platform.system() == "Darwin" else peak >> 10


def as_array(image: PIL.Image.Image) -> np.ndarray:
    """(height, width, 3) float64 in [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


def psnr(one: np.ndarray, other: np.ndarray, where: np.ndarray | None = None) -> float:
    """PSNR in dB of two pictures (height, width, 3) in [0, 1], over the pixels of a boolean mask (height, width); at
    most 100, NaN if there are none."""
    error = np.square(one - other).mean(axis=-1)
    error = error if where is None else error[where]
    return float(-10 * np.log10(max(error.mean(), 1e-10))) if error.size else float("nan")
