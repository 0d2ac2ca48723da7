"""OIR: Object-aware Inversion and Reassembly (Yang et al., ICLR 2024), every object edited from a depth of its own.

A depth is the number of inversion steps taken: 0 is the picture, `steps` is noise. For each object the method tries
depths and keeps the one whose picture has the new object in it and the least change around it. The objects, denoised
from their own depths to a common one, are pasted there onto the inverted picture; a short inversion and denoising
with the whole target prompt then joins them.
"""

import itertools
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from mde_edit import MDEEditPipeline
from mde_edit.attention_processors import predict
from mde_edit.conditioning import Conditioning
from mde_edit.masks import binarize_mask, resize_mask
from PIL import Image

from benchmarks.cases import Case, Region
from benchmarks.methods.base import Method
from training.judge import Judge, article, object_window, window


ROWS = 64  # at most, of a U-Net batch

Similarity = Callable[[list[Image.Image], Region], torch.Tensor]  # (n,): how much of the region's new words is in it


# Prompts


Span = tuple[int, int]


def rewrite(prompt: str, changes: dict[Span, str]) -> str:
    """`prompt` with other words at some spans of characters, and "a" or "an" before them to suit."""
    for start, stop in sorted(changes, reverse=True):
        before, words = prompt[:start], changes[start, stop]
        if found := re.search(r"\ban? $", before):
            before, words = before[: found.start()], article(words)
        prompt = before + words + prompt[stop:]
    return prompt


def guided_prompts(case: Case) -> list[str]:
    """Per region, the source prompt with the words of that region alone changed (the guided prompts of Sec. 3.1).

    Where a region's words occur several times, those are meant whose change, with all other regions', gives the target
    prompt.

    Raises:
        ValueError: the source prompt does not hold a region's words.
    """
    places: list[list[Span]] = []
    for region in case.regions:
        found = re.finditer(rf"\b{re.escape(region.source)}\b", case.source_prompt)
        places.append([match.span() for match in found])
        if not places[-1]:
            raise ValueError(f"the source prompt {case.source_prompt!r} does not hold {region.source!r}")
    texts = [region.target for region in case.regions]
    apart = [  # no two regions on the same words
        spans
        for spans in itertools.product(*places)
        if all(one[1] <= other[0] for one, other in itertools.pairwise(sorted(spans)))
    ]
    if not apart:
        raise ValueError(f"the regions' words lie over each other in the source prompt {case.source_prompt!r}")
    chosen = next(
        (spans for spans in apart if rewrite(case.source_prompt, dict(zip(spans, texts))) == case.target_prompt),
        apart[0],
    )
    return [rewrite(case.source_prompt, {span: text}) for span, text in zip(chosen, texts)]


# Steps


def guided_step(
    pipe: MDEEditPipeline, scheduler, latents: torch.Tensor, t, embeds: torch.Tensor, guidance_scale: float
) -> torch.Tensor:
    """A DDIM step of (n, channels, h, w) with the first of `embeds` (2, tokens, dim) as the unconditional one."""
    count = len(latents)
    pair = latents.repeat(2, 1, 1, 1)
    free, conditional = predict(pipe.unet, pair, t, Conditioning(embeds.repeat_interleave(count, 0))).split(count)
    return scheduler.step(free + guidance_scale * (conditional - free), t, latents).prev_sample


def denoise(
    pipe: MDEEditPipeline,
    scheduler,
    latents: torch.Tensor,
    depths: list[int],
    stop: int,
    embeds: torch.Tensor,
    guidance_scale: float,
) -> torch.Tensor:
    """Denoise latents from depths of their own to a common one.

    All that have begun are at the same timestep, hence in the same batch: it grows as the shallower ones join in.

    Args:
        latents: (n, channels, h, w), each at its depth.
        depths: deepest first, none below `stop`.
        embeds: (2, tokens, dim), source prompt and the one to follow.

    Returns:
        (n, channels, h, w) at depth `stop`.
    """
    latents = latents.clone()
    for depth in range(depths[0], stop, -1):
        t = scheduler.timesteps[len(scheduler.timesteps) - depth]
        begun = sum(own >= depth for own in depths)
        for first in range(0, begun, ROWS // 2):
            rows = slice(first, min(first + ROWS // 2, begun))
            latents[rows] = guided_step(pipe, scheduler, latents[rows], t, embeds, guidance_scale)
    return latents


def invert_on(pipe: MDEEditPipeline, latents: torch.Tensor, embeds: torch.Tensor, steps: int, start: int, stop: int):
    """DDIM inversion at guidance 1 from one depth to another (re-inversion, Sec. 3.3)."""
    scheduler = pipe.ddim_scheduler(steps, inverse=True)
    for t in scheduler.timesteps[start:stop]:
        latents = scheduler.step(predict(pipe.unet, latents, t, Conditioning(embeds)), t, latents).prev_sample
    return latents


# Search


def minmax(values: torch.Tensor) -> torch.Tensor:
    """(n,) to [0, 1]; zeros if all are equal."""
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else torch.zeros_like(values)


def best(similarity: torch.Tensor, error: torch.Tensor) -> int:
    """Which candidate has the best sum of both criteria, each scaled to [0, 1] over the candidates (Eq. of Sec. 3.1).

    Args:
        similarity: (n,), of the object's region to its new words.
        error: (n,), mean squared change outside it.
    """
    return int((minmax(similarity) + minmax(-error)).argmax())


def outside_error(images: list[Image.Image], source: Image.Image, mask: np.ndarray) -> torch.Tensor:
    """(n,) mean squared change of pictures outside a mask (h, w), of values in [0, 1]."""
    arrays = torch.from_numpy(np.stack([np.asarray(image) for image in (source, *images)])).double() / 255
    return (arrays[1:] - arrays[0]).square()[:, torch.from_numpy(~mask)].mean((1, 2))


@lru_cache(maxsize=1)
def load_judge(folder: str, device: str) -> Judge:
    if not Path(folder).is_dir():
        raise ValueError(f"no judge in {folder!r}: train one (`make train`), or set `judge` to null for a fixed depth")
    return Judge.load(Path(folder), device)


def judge_similarity(judge: Judge) -> Similarity:
    """Cosine of the window around the region with its new words: the judge in place of the paper's masked CLIP."""

    def similarity(images: list[Image.Image], region: Region) -> torch.Tensor:
        box = object_window(region.mask)
        features = judge.encode(np.stack([np.asarray(window(image, box)) for image in images]))
        return (features @ judge.encode_text([article(region.target)])[0]).cpu().double()

    return similarity


@torch.no_grad()
def run(
    pipe: MDEEditPipeline,
    case: Case,
    steps: int,
    seed: int,
    guidance_scale: float,
    reassembly: float,
    reinversion: float,
    search_every: int,
    judge: str | None,
    fixed_depth: float,
) -> Image.Image:
    """Find each object's depth, edit them apart, reassemble. Deterministic: `seed` is not used.

    Args:
        reassembly: depth at which the objects are pasted, as a share of the steps; the search goes down to it.
        reinversion: steps of the inversion that follows, as a share of them.
        search_every: how far apart the depths tried are, from the deepest on.
        judge: folder of the judge that scores the depths.
            None: no search, as for pictures that it does not know.
        fixed_depth: every object's depth without a search, as a share of the steps.
    """
    scheduler = pipe.ddim_scheduler(steps)
    inversion = pipe.invert(case.image, case.source_prompt, steps, method="direct", guidance_scale=1.0)
    trajectory = inversion.latents.to(pipe.device).flip(0)  # by depth
    source_embeds = pipe.embed(case.source_prompt)
    common = max(1, round(reassembly * steps))
    similarity, depths = None, [max(common, round(fixed_depth * steps))]
    if judge is not None:
        similarity = judge_similarity(load_judge(judge, str(pipe.device)))
        depths = list(range(steps, common - 1, -search_every))

    def embeds(prompt: str) -> torch.Tensor:
        return torch.cat([source_embeds, pipe.embed(prompt)])

    # 1. Each object alone, from every depth, to the common one
    edited = []  # depth, region, latents
    for region, prompt in zip(case.regions, guided_prompts(case), strict=True):
        pair, chosen = embeds(prompt), 0
        latents = denoise(pipe, scheduler, trajectory[depths], depths, common, pair, guidance_scale)
        if similarity is not None:
            done = denoise(pipe, scheduler, latents, [common] * len(depths), 0, pair, guidance_scale)
            images = pipe.decode(done, "pil")[0]
            chosen = best(similarity(images, region), outside_error(images, case.image, region.mask))
        edited.append((depths[chosen], region, latents[chosen]))

    # 2. Reassembly: where masks overlap, what needed the lesser depth lies over what needed the greater
    latents = trajectory[common].clone()
    for _, region, own in sorted(edited, key=lambda one: -one[0]):
        inside = binarize_mask(resize_mask(torch.from_numpy(region.mask), latents.shape[-2:])).to(latents)
        latents = inside * own + (1 - inside) * latents

    # 3. Re-inversion, and denoising with the whole target prompt
    deepest = min(steps, common + round(reinversion * steps))
    latents = invert_on(pipe, latents[None], source_embeds, steps, common, deepest)
    pair = embeds(case.target_prompt)
    return pipe.decode(denoise(pipe, scheduler, latents, [deepest], 0, pair, guidance_scale), "pil")[0][0]


METHODS = {
    "oir": Method(
        run,
        "masks",
        "Object-aware Inversion and Reassembly (Yang et al., ICLR 2024), the judge's cosine (which also measures) in"
        " place of masked CLIP, fewer depths searched",
        {
            "guidance_scale": 2.5,
            "reassembly": 0.2,
            "reinversion": 0.2,
            "search_every": 5,
            "judge": "emoji_judge",
            "fixed_depth": 0.6,
        },
        {
            "guidance_scale": (2.5, 4.0, 7.5),
            "reassembly": (0.1, 0.2, 0.4),
            "reinversion": (0.1, 0.2, 0.4),
            "search_every": (2, 5),
        },
    )
}
