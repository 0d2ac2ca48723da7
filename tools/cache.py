# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""Inversions kept by what they are of: the picture's pixels, its prompt, the model's weights, the settings."""

import argparse
import hashlib
import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ..inversion import Inversion
from ..mde_pipeline import MDEEditPipeline
from .edit import Request, inversion_settings, versions
from .files import replacing


OURS = re.compile(r"[0-9a-f]{64}\.inversion|\.[0-9a-f]{64}\.inversion\..*\.tmp")  # and nobody else's files
WRITING = 3600  # seconds after which nobody writes to a temporary file any more


def model_digest(pipe: MDEEditPipeline) -> str:
    """All of a model that an inversion depends on: weights with their dtype, configurations, vocabulary. Seconds for
    Stable Diffusion's gigabytes."""
    digest = hashlib.sha256()
    for name in ("unet", "text_encoder", "vae"):
        module = getattr(pipe, name)
        digest.update(_told(module.config.to_dict() if hasattr(module.config, "to_dict") else module.config))
        for key, tensor in module.state_dict().items():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    digest.update(_told(pipe.scheduler.config))
    digest.update(_told(pipe.tokenizer.get_vocab()))
    return digest.hexdigest()


def _told(config) -> bytes:
    """A configuration but for where it was loaded from."""
    return json.dumps({k: v for k, v in config.items() if not k.startswith("_")}, sort_keys=True, default=str).encode()


def inversion_key(request: Request, pipe: MDEEditPipeline, model: str) -> str:
    """What an inversion is of, told in 64 characters.

    Args:
        request: one with a picture.
        model: its [`model_digest`].
    """
    args: argparse.Namespace = request.args
    pixels = pipe.prepare_image(request.image, args.height, args.width)
    told = {
        "pixels": hashlib.sha256(pixels.contiguous().numpy()).hexdigest(),
        "image_size": tuple(pipe.read_image(request.image).shape[:2]),
        "prompt": args.source_prompt,
        "negative_prompt": args.negative_prompt,
        "settings": inversion_settings(args),
        "model": model,
        "device": pipe.device.type,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class InversionCache:
    """A folder of inversions. Several processes may share one; whatever is not whole in it counts as not there.

    size: bytes that it may hold; the ones unused for longest go first.
    """

    folder: Path
    size: float

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.inversion"

    def get(self, key: str) -> Inversion | None:
        with suppress(OSError):  # another user's, or one that is not there
            os.utime(self.path(key))  # used just now
        try:
            return Inversion.load(self.path(key))
        except (OSError, ValueError):
            return None

    def put(self, key: str, inversion: Inversion) -> None:
        with replacing(self.path(key)) as temporary:
            inversion.save(temporary)
        self.evict()

    def evict(self) -> None:
        """Remove what has not been used for longest, until the rest fits; also what a killed process left, but not what
        another one may be writing."""
        found = []
        for path in filter(lambda path: OURS.fullmatch(path.name), self.folder.iterdir()):
            try:
                stat = path.stat()
            except OSError:  # another process was faster
                continue
            if path.suffix != ".tmp" or time.time() - stat.st_mtime > WRITING:
                found.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.size:
                break
            path.unlink(missing_ok=True)
            total -= size
