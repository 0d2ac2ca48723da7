# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""Everything to look at of one edit, on one page."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageOps

from .files import replacing


def overlay(image: PIL.Image.Image, heat: np.ndarray) -> PIL.Image.Image:
    """A map over a gray version of the picture. heat: (h, w) in [0, 1]."""
    from matplotlib import colormaps

    heat_image = PIL.Image.fromarray((colormaps["inferno"](heat)[..., :3] * 255).astype(np.uint8))
    return PIL.Image.blend(image.convert("L").convert("RGB"), heat_image.resize(image.size, PIL.Image.BICUBIC), 0.65)


# Where there are no losses to show.
UNGUIDED = "No word was guided: each looks into its mask, or no loss is asked for."


def plot_losses(axis, losses: Sequence[dict[str, float]]) -> None:
    """The bare losses of an edit over the iterations of its guidance."""
    for name, label in (("oal", "OAL"), ("ccl", "CCL")):
        if any(name in entry for entry in losses):
            values = [entry.get(name, float("nan")) for entry in losses]  # a step may guide words of one kind alone
            axis.plot(values, label=label, linewidth=1)
    axis.set_title("losses per guidance iteration", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)


def attention_panels(before: PIL.Image.Image, after: PIL.Image.Image, maps: dict) -> list[tuple]:
    """Pictures of where each word looks, with titles: at the first guided step before the guidance, at the last after.

    before, after: the pictures under the maps. maps: {word: (guided steps, before/after, h, w)}.
    """
    panels = []
    for key, steps in maps.items():
        first, last = steps[0, 0].cpu().numpy(), steps[-1, 1].cpu().numpy()
        peak = max(first.max(), last.max(), 1e-8)
        panels.append((overlay(before, first / peak), f"attention of {key!r}\nstep 1, before guidance"))
        panels.append((overlay(after, last / peak), f"attention of {key!r}\nstep {len(steps)}, after guidance"))
    return panels


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
    attention = attention_panels(reconstruction, edited, output.attention_maps[0])

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
    axis = axes[1, len(attention)]
    if output.losses[0]:
        axis.axis("on")
        plot_losses(axis, output.losses[0])
    else:
        axis.text(0.5, 0.5, textwrap.fill(UNGUIDED, 36), ha="center", va="center", fontsize=8)
    figure.savefig(path, dpi=110)


def draw_contact_sheets(folder: Path, contacts: Iterable[tuple], side: int = 128, across: int = 6, down: int = 8):
    """Pages of pictures beside their edits: `sheet.png`, of several pages `sheet_0.png` and so on.

    Args:
        contacts: (picture or None, edit, lines of text) each.
        side: pixels of the square that a picture fits in. across, down: edits per page.

    Returns:
        the names of the files, which replace those of before.
    """
    pages, tile, place = [], (2 * side + 8, side + 34), 0
    for number, (source, edited, lines) in enumerate(contacts):
        place = number % (across * down)
        if place == 0:
            pages.append(PIL.Image.new("RGB", (across * tile[0], down * tile[1]), "white"))
        left, top = (place % across) * tile[0] + 4, (place // across) * tile[1] + 4
        for offset, image in ((0, source), (side, edited)):
            if image is not None:
                pages[-1].paste(PIL.ImageOps.contain(image, (side - 2, side - 2)), (left + offset, top))
        for index, line in enumerate(lines):
            text = textwrap.shorten(line.encode("ascii", "replace").decode(), 44, placeholder="...")
            PIL.ImageDraw.Draw(pages[-1]).text((left, top + side + 13 * index), text, "black")
    for old in (folder / "sheet.png", *folder.glob("sheet_*.png")):
        old.unlink(missing_ok=True)
    if pages:  # no more paper than the last one needs
        width = pages[-1].width if len(pages) > 1 else min(across, place + 1) * tile[0]
        pages[-1] = pages[-1].crop((0, 0, width, (place // across + 1) * tile[1]))
    names = ["sheet.png"] if len(pages) == 1 else [f"sheet_{number}.png" for number in range(len(pages))]
    for name, page in zip(names, pages):
        with replacing(folder / name) as temporary:
            page.save(temporary, "png")
    return names
