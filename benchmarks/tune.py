"""Tune a method on the dev cases: the same number of trials for each, drawn from its grid.

    python -m benchmarks.tune --cases bench_out/dev --out bench_out/tuning --methods mde sdedit --trials 12

The first trial is the method's own settings; the others are drawn from its grid by a fixed seed. Writes
`METHOD.json`, every trial with its settings and score, best first.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from benchmarks.cases import load_cases
from benchmarks.methods import METHODS
from benchmarks.run import edit, limited, load_meter, load_pipe


BACKGROUND_WORTH = 0.02  # of edit success, per dB of background


def score(figures: list[dict[str, float]]) -> float:
    """What tuning maximizes: edit success, bystanders kept, and 2 points for every dB of background PSNR up to 35."""
    mean = {name: float(np.nanmean([one[name] for one in figures])) for name in ("success", "bystanders", "bg_psnr")}
    return mean["success"] + mean["bystanders"] + BACKGROUND_WORTH * min(mean["bg_psnr"], 35.0)


def trials(name: str, count: int, seed: int = 0) -> list[dict]:
    """The method's own settings, then different draws from its grid."""
    rng = random.Random(f"{name} {seed}")
    method = METHODS[name]
    found: list[dict] = [{}]
    possible = int(np.prod([len(values) for values in method.grid.values()])) if method.grid else 1
    while len(found) < min(count, possible):
        drawn = {key: rng.choice(values) for key, values in method.grid.items()}
        drawn = {key: value for key, value in drawn.items() if value != method.settings[key]}
        if drawn not in found:
            found.append(drawn)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[n for n, m in METHODS.items() if m.grid])
    parser.add_argument("--trials", type=int, default=12, help="per method (%(default)s)")
    parser.add_argument("--model", default="emoji_ldm")
    parser.add_argument("--judge", default="emoji_judge")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--limit", type=int, help="only the first cases of each task and split")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(argv)
    state = PartialState(cpu=not torch.cuda.is_available())
    pipe = load_pipe(args.model, state.device, args.dtype)
    meter = load_meter(args.judge, pipe)
    cases = limited(load_cases(args.cases), args.limit)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.methods:
        found = []
        for settings in tqdm(trials(name, args.trials), name):
            edits = [edit(pipe, name, case, args.steps, 0, settings) for case in cases]
            figures = [meter(case, image) for case, (image, _) in zip(cases, edits, strict=True)]
            means = {key: float(np.nanmean([one[key] for one in figures])) for key in ("success", "in_psnr", "bg_psnr")}
            seconds = float(np.mean([cost["seconds"] for _, cost in edits]))
            found.append({"score": score(figures), "settings": settings, **means, "seconds": seconds})
            found.sort(key=lambda one: -one["score"])
            (args.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
