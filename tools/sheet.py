# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""Everything to look at of one edit, on one page."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image


def overlay(image: PIL.Image.Image, heat: np.ndarray) -> PIL.Image.Image:
    """A map over a gray version of the picture. heat: (h, w) in [0, 1]."""
    from matplotlib import colormaps

    heat_image = PIL.Image.fromarray((colormaps["inferno"](heat)[..., :3] * 255).astype(np.uint8))
    return PIL.Image.blend(image.convert("L").convert("RGB"), heat_image.resize(image.size, PIL.Image.BICUBIC), 0.65)


def draw_sheet(path: Path, source, output, masks: Sequence, source_prompt: str, prompt: str) -> None:
    """A page of pictures, masks, attention before and after the latent guidance, losses.

    masks: pairs of key and (height, width) binary mask, objects then attributes.
    """
    from matplotlib.figure import Figure

    reconstruction, edited = output.source_images[0], output.images[0]
    pictures = [(source, f"source\n{textwrap.fill(source_prompt, 36)}")]
    for key, mask in masks:
        shape = np.asarray(PIL.Image.fromarray(mask.numpy().astype(np.uint8) * 255).resize(source.size)) / 255
        pictures.append((overlay(source, 0.15 + 0.7 * shape), f"mask of {key!r}"))
    pictures += [(reconstruction, "reconstruction"), (edited, f"edit\n{textwrap.fill(prompt, 36)}")]
    attention = []
    for key, steps in output.attention_maps[0].items():  # (guided steps, before/after, h, w)
        first, last = steps[0, 0].numpy(), steps[-1, 1].numpy()
        peak = max(first.max(), last.max(), 1e-8)
        attention.append((overlay(reconstruction, first / peak), f"attention of {key!r}\nstep 1, before guidance"))
        attention.append((overlay(edited, last / peak), f"attention of {key!r}\nstep {len(steps)}, after guidance"))

    columns = max(len(pictures), len(attention) + 1)
    figure = Figure(figsize=(2.6 * columns, 6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    axes = figure.subplots(2, columns)
    for axis in axes.flatten():
        axis.axis("off")
    for row, panels in zip(axes, (pictures, attention)):
        for axis, (image, title) in zip(row, panels):
            axis.imshow(image, interpolation="nearest")
            axis.set_title(title, fontsize=8)
    if output.losses[0]:
        axis = axes[1, len(attention)]
        axis.axis("on")
        for name, label in (("oal", "OAL"), ("ccl", "CCL")):
            values = [entry[name] for entry in output.losses[0] if name in entry]
            if values:
                axis.plot(values, label=label, linewidth=1)
        axis.set_title("losses per guidance iteration", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
