"""How well the model's own attention finds the things of a picture, against their true masks.

    python -m benchmarks.localization --scenes 200 --soften 1 0.22

Prints, with intervals over scenes, the mean IoU of `pipe.generate_mask` of every noun, what a perfect mask of as many
cells as the attention has would score, what a mask of everything would, and the share of a noun's attention (mean over
its layers) that lies in its true mask.
"""

import argparse
import random

import numpy as np
import torch
import torch.nn.functional as F
from mde_edit.attention_processors import attention_control
from mde_edit.localize import source_attention
from mde_edit.masks import resize_mask
from tqdm import tqdm

from benchmarks.cases import SMALL
from benchmarks.run import load_pipe
from benchmarks.tables import bootstrap
from training.scenes import PHRASINGS, Scene, random_scene


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


def coarse(mask: np.ndarray, cells: tuple[int, int]) -> np.ndarray:
    """A mask as it comes back from as many cells as attention has."""
    shares = resize_mask(torch.from_numpy(mask), cells)
    return (F.interpolate(shares[None, None], mask.shape, mode="bicubic")[0, 0] > 0.5).numpy()


def noun_key(words: list[str], place: int) -> tuple[str, int]:
    """The pipeline's key for the word at `place` of a split caption."""
    words = [word.rstrip(",") for word in words]
    return words[place], words[:place].count(words[place])


def measure(pipe, scene: Scene, phrasing: int, steps: int) -> list[dict[str, float]]:
    """One entry per thing that is seen, its word's mask against its own."""
    drawn, caption = scene.render(128), scene.caption(phrasing)
    inversion = pipe.invert(drawn.image, caption.text, steps, method="direct")
    scheduler, text = pipe.ddim_scheduler(steps), pipe.condition(caption.text)
    with attention_control(pipe.unet):
        cross, _ = source_attention(pipe.unet, scheduler, inversion, text)
    entries = []
    for place, mask in zip(caption.nouns, drawn.visible):
        if not mask.any():
            continue
        key = noun_key(caption.text.split(), place)
        attention = cross[list(pipe.check_source_word(caption.text, key, "noun"))].mean(0)
        covered = resize_mask(torch.from_numpy(mask), attention.shape)
        try:
            found = pipe.generate_mask(inversion, key)
        except ValueError:  # nowhere
            found = np.zeros_like(mask)
        entries.append(
            {
                "iou": iou(found, mask),
                "ceiling": iou(coarse(mask, attention.shape), mask),
                "everything": mask.mean(),
                "in_mask": float((attention * covered).sum() / attention.sum()),
                "size": mask.mean(),
            }
        )
    return entries


def cell(scenes: list[list[dict]], name: str, keep=lambda entry: True) -> str:
    """Mean over scenes of the scene's mean, with its interval."""
    kept = [[entry[name] for entry in scene if keep(entry)] for scene in scenes]
    mean, low, high = bootstrap(np.array([np.mean(values) for values in kept if values]))
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--soften", type=float, nargs="+", default=[1.0], help="scale the cross-attention's queries")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="emoji_ldm")
    args = parser.parse_args(argv)
    columns = ("IoU", f"of things under {100 * SMALL:g} % of the picture", "ceiling", "everything", "attention in mask")
    print(f"| soften | things | {' | '.join(columns)} |\n|{'---|' * (2 + len(columns))}")
    for factor in args.soften:
        pipe, rng = load_pipe(args.model, torch.device("cpu"), "float32", factor), random.Random(args.seed)
        # combinations that training never showed
        scenes = [random_scene(rng, held_out=True) for _ in range(args.scenes)]
        found = [
            measure(pipe, scene, k % len(PHRASINGS), args.steps)
            for k, scene in enumerate(tqdm(scenes, f"soften {factor}"))
        ]
        cells = [cell(found, "iou"), cell(found, "iou", lambda entry: entry["size"] < SMALL)]
        cells += [cell(found, name) for name in ("ceiling", "everything", "in_mask")]
        print(f"| {factor:g} | {sum(map(len, found))} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
