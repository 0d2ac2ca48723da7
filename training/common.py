"""What every training stage shares: device, budget, learning rate, EMA, checkpoints, drawing, picture grids."""

import argparse
import contextlib
import copy
import itertools
import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from training.scenes import Scene, random_scene


def arguments(description: str, out: str, seconds: float, batch: int, rate: float) -> argparse.ArgumentParser:
    """Parser with the options that all stages have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of this stage's results (%(default)s)")
    parser.add_argument("--seconds", type=float, default=seconds, help="wall-clock budget (%(default)s)")
    parser.add_argument("--samples", type=float, default=math.inf, help="budget in training samples (none)")
    parser.add_argument("--batch", type=int, default=batch, help="batch size (%(default)s)")
    parser.add_argument("--rate", type=float, default=rate, help="peak learning rate (%(default)s)")
    parser.add_argument("--decay", type=float, default=0.35, help="share of the budget in which it falls (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return torch.device(name)


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, dtype=torch.bfloat16)


class Budget:
    """How much of a run is done, by its seconds or its samples, whichever are nearer their end.

    Seconds and samples of earlier sessions count (`state_dict`), so a resumed run keeps its schedule; resumed with a
    larger budget, it goes on in the larger one's schedule. A step counts for ten seconds at most, so that time in which
    the process was suspended does not.
    """

    def __init__(self, seconds: float, samples: float = math.inf) -> None:
        self.seconds, self.samples = seconds, samples
        self.seconds_done, self.samples_done = 0.0, 0
        self.start()

    def start(self) -> None:
        """Time runs from here: call it when data and models are ready."""
        self.last = time.monotonic()

    @property
    def progress(self) -> float:
        return min(1.0, max(self.seconds_done / self.seconds, self.samples_done / self.samples))

    def count(self, samples: int) -> None:
        now = time.monotonic()
        self.seconds_done += min(now - self.last, 10.0)
        self.samples_done += samples
        self.last = now

    def state_dict(self) -> dict:
        return {"seconds_done": self.seconds_done, "samples_done": self.samples_done}

    def load_state_dict(self, state: dict) -> None:
        self.seconds_done, self.samples_done = state["seconds_done"], state["samples_done"]


def learning_rate(peak: float, step: int, progress: float, decay: float, warmup: int = 100) -> float:
    """Linear warm-up, constant, then linear to 2 % of the peak in the last `decay` of the budget."""
    falling = (1 - progress) / decay if decay else 1.0
    return peak * min(1.0, (step + 1) / warmup) * min(1.0, max(0.02, falling))


class Ema:
    """Exponential moving average of a module's parameters; its horizon grows with the run up to `decay`."""

    def __init__(self, module: torch.nn.Module, average: torch.nn.Module, decay: float = 0.999) -> None:
        self.source, self.average, self.decay = list(module.parameters()), list(average.parameters()), decay
        average.requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(self.average, self.source, 1 - decay)


def save_checkpoint(path: Path, **state) -> None:
    """Write atomically: a run killed while saving keeps its previous checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def save_half(module: torch.nn.Module, folder: Path) -> None:
    """Save a diffusers or transformers model as fp16 safetensors that load as fp32 unless asked otherwise.

    transformers 5 loads a model in the dtype that its config names, diffusers always in fp32: without this, the text
    encoder of a pipeline would be fp16 and its U-Net fp32.
    """
    copy.deepcopy(module).half().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if "dtype" in config:
        config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")


# Data


def held_out_scenes(count: int, seed: int = 10**6, groups: int | None = None, held_out: bool | None = False) -> list:
    """Scenes for measuring: seeds from 10**6 on are never used for training."""
    return [random_scene(random.Random(seed + index), held_out, groups) for index in range(count)]


def render_all(draw: Callable, jobs: Iterable, workers: int | None = None) -> Iterator:
    """`map(draw, jobs)` in processes, in order; `draw` must be a module-level function."""
    jobs = list(jobs)
    workers = workers or os.cpu_count() or 1
    if workers == 1 or len(jobs) < 64:
        yield from map(draw, jobs)
        return
    # spawn, not fork: forking a process that has run torch's thread pool can deadlock
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(draw, jobs, chunksize=32)


def to_tensor(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 (n, h, w, 3) -> float (n, 3, h, w) in [-1, 1], channels last."""
    tensor = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return tensor.contiguous(memory_format=torch.channels_last)


def to_images(tensor: torch.Tensor) -> list[Image.Image]:
    """float (n, 3, h, w) in [-1, 1] -> pictures."""
    array = ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def psnr(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """(n,) dB between pictures (n, 3, h, w) in [-1, 1], over the pixels of `weight` (n, 1, h, w) in [0, 1]."""
    squared = ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).float().square()
    if weight is None:
        error = squared.mean((1, 2, 3))
    else:
        error = (squared * weight).sum((1, 2, 3)) / (weight.sum((1, 2, 3)) * squared.shape[1]).clamp(min=1)
    return -10 * torch.log10(error.clamp(min=1e-10))


def grid(images: list[Image.Image], columns: int, labels: list[str] | None = None) -> Image.Image:
    """Contact sheet, captions below the pictures."""
    width, height = images[0].size
    lines = 3 if labels else 0
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * (height + 10 * lines)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        x, y = index % columns * width, index // columns * (height + 10 * lines)
        sheet.paste(image, (x, y))
        words = iter(labels[index].split()) if labels else iter(())
        for line in range(lines):
            text = ""
            for word in words:
                if len(text) + len(word) + 1 > width // 5:
                    words = itertools.chain([word], words)
                    break
                text = f"{text} {word}".strip()
            draw.text((x + 1, y + height + 10 * line), text, fill="black", font_size=9)
    return sheet


def scene_image(job: tuple[Scene | int, int]) -> np.ndarray:
    """(scene or training seed, size) -> uint8 (size, size, 3)."""
    scene, size = job
    if isinstance(scene, int):
        scene = random_scene(random.Random(scene))
    return np.asarray(scene.render(size).image)
