"""How well the model's own attention finds the things of a picture, against their true masks.

    python -m benchmarks.localization --scenes 200 --soften 1 0.22
    python -m benchmarks.localization --model CompVis/stable-diffusion-v1-4 --cases bench_out/pie

Prints, with intervals over pictures:
- the mean IoU of `pipe.generate_mask` of every noun, what a perfect mask of as many cells as the attention has would
  score, and what a mask of everything would;
- the mean IoU of the noun's plain map (mean over heads, layers and steps) where it is at least half of its maximum, the
  figure that others publish of Stable Diffusion;
- the share of a noun's attention that lies in its true mask, and the start token's share of all attention.

The pictures are scenes that the embedded model was never shown, drawn at the model's own size, or a set of cases
(`benchmarks.convert`), whose source words are looked for: with these any model of Stable Diffusion's shape finds its
place on the curve of benchmarks/RESULTS.md.
"""

import argparse
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mde_edit.attention_processors import attention_control
from mde_edit.localize import source_attention
from mde_edit.masks import resize_mask
from mde_edit.prompts import WordKey
from PIL import Image
from tqdm import tqdm

from benchmarks.cases import SMALL, Case, load_cases
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


class Seen(NamedTuple):
    """A picture, what it shows, and where its things are: the pipeline's key of a word, (height, width) bool."""

    image: Image.Image
    prompt: str
    things: list[tuple[WordKey, np.ndarray]]


def seen_scene(scene: Scene, phrasing: int, size: int) -> Seen:
    """A drawn scene, without the things that others hide."""
    drawn, caption = scene.render(size), scene.caption(phrasing)
    keys = [noun_key(caption.text.split(), place) for place in caption.nouns]
    return Seen(drawn.image, caption.text, [(key, mask) for key, mask in zip(keys, drawn.visible) if mask.any()])


def seen_case(case: Case) -> Seen:
    """A case's source, and the things that its edits change."""
    return Seen(case.image, case.source_prompt, [(region.source, region.mask) for region in case.regions])


def measure(pipe, seen: Seen, steps: int) -> list[dict[str, float]]:
    """One entry per thing, its word's mask and map against its own region. Left out is what its words do not tell apart
    from others (of twins), or what the prompt does not name."""
    inversion = pipe.invert(seen.image, seen.prompt, steps, method="direct")
    scheduler = pipe.ddim_scheduler(steps)
    with attention_control(pipe.unet):
        cross, _ = source_attention(pipe.unet, scheduler, inversion, pipe.source_conditioning(inversion))
    entries = []
    for key, mask in seen.things:
        try:
            tokens = pipe.check_source_word(seen.prompt, key, "a thing")
        except ValueError:
            continue
        attention = cross[list(tokens)].mean(0)
        covered = resize_mask(torch.from_numpy(mask), attention.shape).to(attention.device)
        plain = F.interpolate(attention[None, None], mask.shape, mode="bilinear", align_corners=False)[0, 0].cpu()
        try:
            found = pipe.generate_mask(inversion, key)
        except ValueError:  # nowhere
            found = np.zeros_like(mask)
        if found.shape != mask.shape:  # the picture's sides were rounded down
            found = np.asarray(Image.fromarray(found).resize(mask.shape[::-1], Image.Resampling.NEAREST))
        entries.append(
            {
                "iou": iou(found, mask),
                "ceiling": iou(coarse(mask, attention.shape), mask),
                "everything": mask.mean(),
                "plain": iou((plain >= 0.5 * plain.max()).numpy(), mask),
                "in_mask": float((attention * covered).sum() / attention.sum()),
                "start": float(cross[0].mean()),
                "size": mask.mean(),
            }
        )
    return entries


def cell(pictures: list[list[dict]], name: str, keep=lambda entry: True) -> str:
    """Mean over pictures of the picture's mean, with its interval."""
    kept = [[entry[name] for entry in entries if keep(entry)] for entries in pictures]
    mean, low, high = bootstrap(np.array([np.mean(values) for values in kept if values]))
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--soften", type=float, nargs="+", default=[1.0], help="scale the cross-attention's queries")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="emoji_ldm")
    parser.add_argument("--cases", type=Path, help="folder with cases.jsonl, in the place of drawn scenes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(argv)
    names = ("iou", "ceiling", "everything", "plain", "in_mask", "start")
    heads = (
        "IoU",
        f"of things under {100 * SMALL:g} % of the picture",
        "ceiling",
        "everything",
        "IoU of the plain map",
    )
    heads = (*heads, "attention in mask", "start token's share")
    print(f"| soften | things | {' | '.join(heads)} |\n|{'---|' * (2 + len(heads))}")
    for factor in args.soften:
        pipe, rng = load_pipe(args.model, torch.device(args.device), args.dtype, factor), random.Random(args.seed)
        if args.cases:
            pictures = [seen_case(case) for case in load_cases(args.cases)]
        else:  # combinations that training never showed
            size = pipe.unet.config.sample_size * pipe.vae_scale_factor
            scenes = [random_scene(rng, held_out=True) for _ in range(args.scenes)]
            pictures = [seen_scene(scene, k % len(PHRASINGS), size) for k, scene in enumerate(scenes)]
        found = [measure(pipe, seen, args.steps) for seen in tqdm(pictures, f"soften {factor}")]
        cells = [cell(found, name) for name in names]
        cells.insert(1, cell(found, "iou", lambda entry: entry["size"] < SMALL))
        print(f"| {factor:g} | {sum(map(len, found))} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
