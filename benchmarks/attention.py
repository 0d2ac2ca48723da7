"""Where the edited words look, under each of Table 2's settings with every word guided, gently (the paper's Fig. 7b).

python -m benchmarks.attention --cases bench_out/test/cases --case overlap_twin_00 --out bench_out/attention.png
python -m benchmarks.attention --cases bench_out/dev/cases --limit 1

The first draws one case, the second prints the mean over the first cases of each task and split.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from mde_edit.denoise import PRESETS
from mde_edit.masks import resize_mask
from tqdm import tqdm

from benchmarks.cases import Case, load_cases
from benchmarks.methods import METHODS
from benchmarks.methods.ours import invert
from benchmarks.run import limited, load_pipe


matplotlib.use("Agg")
SETTINGS = ("none", "oal", "ccl", "both")


def word_maps(pipe, case: Case, name: str, steps: int) -> tuple[np.ndarray, dict]:
    """The edited picture, and word -> its map (h, w), mean over the guided steps after each one's guidance."""
    settings = dict(METHODS[name].settings)
    unused = {loss: 0.0 for loss in ("oal_weight", "ccl_weight") if not settings[loss]}
    settings |= PRESETS["gentle"] | unused
    settings.pop("masks")  # the case's
    inversion = invert(pipe, case, steps, settings.pop("inversion"), settings.pop("guidance_scale"))
    out = pipe(
        case.target_prompt,
        inversion,
        object_masks=case.object_masks,
        attribute_masks=case.attribute_masks,
        output_attention_maps=True,
        **settings,
    )
    return out.images[0], {word: maps[:, -1].mean(0).cpu().numpy() for word, maps in out.attention_maps[0].items()}


def in_mask(word_map: np.ndarray, mask: np.ndarray) -> float:
    """Share of a word's attention (h, w) that lies in its mask (height, width)."""
    covered = resize_mask(torch.from_numpy(mask), word_map.shape).numpy()
    return float((word_map * covered).sum() / word_map.sum())


def shares(pipe, cases: list[Case], steps: int) -> str:
    """Markdown: per setting, the mean share of a new word's attention inside its mask, of objects and of attributes."""
    lines = ["| losses | objects' words, % | attributes' words, % |", "|---|---|---|"]
    for name in SETTINGS:
        found: dict[str, list[float]] = {"object": [], "attribute": []}
        for case in tqdm(cases, name):
            _, maps = word_maps(pipe, case, name, steps)
            for kind, masks in (("object", case.object_masks), ("attribute", case.attribute_masks)):
                found[kind] += [in_mask(maps[word], mask) for word, mask in masks.items()]
        lines.append(f"| {name} | " + " | ".join(f"{100 * np.mean(values):.1f}" for values in found.values()) + " |")
    return "\n".join(lines)


def figure(pipe, case: Case, steps: int, path: Path) -> None:
    """Columns: the mask, then each setting. Rows: the results, then one per edited word."""
    from matplotlib import pyplot

    words = {**case.object_masks, **case.attribute_masks}
    found = {name: word_maps(pipe, case, name, steps) for name in SETTINGS}
    drawn, axes = pyplot.subplots(
        1 + len(words),
        1 + len(SETTINGS),
        figsize=(2 * (1 + len(SETTINGS)), 2.1 * (1 + len(words))),
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].imshow(case.image)
    axes[0, 0].set_title("source", fontsize=9)
    for column, (name, (image, maps)) in enumerate(found.items(), 1):
        axes[0, column].imshow(image)
        axes[0, column].set_title(name, fontsize=9)
        for row, word in enumerate(words, 1):
            axes[row, column].imshow(maps[word], cmap="viridis", vmin=0)
            axes[row, column].set_xlabel(f"{100 * in_mask(maps[word], words[word]):.0f} % in the mask", fontsize=8)
    for row, (word, mask) in enumerate(words.items(), 1):
        axes[row, 0].imshow(mask, cmap="gray")
        axes[row, 0].set_ylabel(word[0], fontsize=9)
    drawn.suptitle(f"{case.source_prompt}\n-> {case.target_prompt}", fontsize=9)
    drawn.savefig(path, dpi=100)
    pyplot.close(drawn)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--case", help="name of the case to draw (the first)")
    parser.add_argument("--out", type=Path, help="the figure's file")
    parser.add_argument("--limit", type=int, help="print the mean over the first cases of each task and split")
    parser.add_argument("--model", default="emoji_ldm")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args(argv)
    cases = {case.name: case for case in load_cases(args.cases)}
    if args.case and args.case not in cases:
        parser.error(f"no case {args.case!r}; there are {', '.join(cases)}")
    if not (args.out or args.limit):
        parser.error("nothing to do: give --out for a figure, --limit for the means")
    pipe = load_pipe(args.model, torch.device("cpu"), "float32")
    if args.out:
        figure(pipe, cases[args.case or next(iter(cases))], args.steps, args.out)
    if args.limit:
        print(shares(pipe, limited(list(cases.values()), args.limit), args.steps))


if __name__ == "__main__":
    main()
