"""What the tests of the doors share: a user's script in a fresh process, a clone of this repository, one edit."""

import hashlib
import inspect
import os
import re
import shutil
import textwrap
from pathlib import Path

import numpy as np
import PIL.Image

from . import fresh
from .conftest import HEIGHT, SOURCE, TARGET, WIDTH


ROOT = Path(__file__).resolve().parents[1]


def short_edit(pipe):
    """A picture edited in two steps with both losses, as bytes: the same through every door."""
    pipe.set_progress_bar_config(disable=True)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = [np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 9)]
    image = PIL.Image.fromarray((np.stack(waves, -1) * 100 + 127).astype(np.uint8))
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[24:56, 16:48] = True
    inversion = pipe.invert(image, SOURCE, num_inference_steps=2, method="direct", guidance_scale=3.0)
    losses = {"optimization_steps": 0.5, "optimization_iterations": 2}
    out = pipe(TARGET, inversion, object_masks={"dog": mask}, attribute_masks={"red": mask}, output_type="np", **losses)
    assert len(out.losses[0]) == 2
    return hashlib.sha1((out.images * 255).round().astype(np.uint8).tobytes()).hexdigest()


PRELUDE = f"""
import hashlib
import numpy as np
import PIL.Image
import torch
torch.set_num_threads(1)
SOURCE, TARGET, HEIGHT, WIDTH = {SOURCE!r}, {TARGET!r}, {HEIGHT}, {WIDTH}
{inspect.getsource(short_edit)}
"""


def clone(folder: Path) -> Path:
    """This repository as `git clone` leaves it, without its model and tests."""
    folder.mkdir(parents=True)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run_script(script, home: Path, cwd: Path, hub=None, check=True, **env):
    """Run a user's script in a fresh process whose caches are in `home` and whose only Hub is `hub`; returns the
    `KEY value` lines it printed, as a dictionary, and its stderr."""
    hidden = ("HF_", "HUGGINGFACE_", "DIFFUSERS_", "TRANSFORMERS_")
    base = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    base |= {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9",  # the discard port: any attempt fails at once
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
    }
    status, stdout, stderr = fresh.run(PRELUDE + textwrap.dedent(script), cwd, {**base, **env}, timeout=240)
    if check:
        assert status == 0, stderr[-4000:]
    return dict(re.findall(r"^(\w+) (.+)$", stdout, flags=re.MULTILINE)), stderr
