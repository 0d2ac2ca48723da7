"""What the losses gain against how softly the model attends: the curve over `benchmarks.run --soften`.

    for tau in 1 0.35 0.22; do
        python -m benchmarks.run --cases bench_out/dev/cases --out bench_out/dev_$tau --soften $tau --methods none mde
    done
    python -m benchmarks.softness --cases bench_out/dev/cases --results bench_out/dev_* --out bench_out/softness

Each results folder is one point: the success of the edits without losses, and what each other method gains on it, case
by case, with bootstrap 95 % intervals. Where a point lies is measured, not set: the share of the attention of the
things' words that lies in their masks, on the first cases of each task and split. Writes `softness.md` and
`softness.png`.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.cases import Case, load_cases
from benchmarks.localization import measure, seen_case
from benchmarks.run import limited, load_pipe
from benchmarks.tables import COLUMNS, bootstrap, gain_cell, of_methods, paired, read_results


matplotlib.use("Agg")
BASE = "none"  # what the others are compared with: the same edit without losses
GAINS = ("success", "in_psnr", "bg_psnr")


def softness_of(results: list[dict], folder: Path) -> tuple[str, float]:
    """Model and tau of a results folder.

    Raises:
        ValueError: none, or more than one.
    """
    found = {(entry["model"], entry["soften"]) for entry in results}
    if len(found) != 1:
        raise ValueError(f"{folder} holds results of {len(found)} models and softnesses: give each a folder of its own")
    return found.pop()


def attention_in_mask(model: str, factor: float, cases: list[Case], steps: int) -> tuple[float, float, float]:
    """Share of the attention of the things' words that lies in their masks: mean over cases, and its interval."""
    pipe = load_pipe(model, torch.device("cpu"), "float32", factor)
    found = [measure(pipe, seen_case(case), steps) for case in tqdm(cases, f"soften {factor:g}")]
    return bootstrap(np.array([np.mean([entry["in_mask"] for entry in entries]) for entries in found if entries]))


def point(results: list[dict], methods: list[str]) -> dict:
    """One point of the curve: {"n", "base": success, "gains": {label: {figure: mean, low, high}}}."""
    rows = of_methods(results, [BASE, *methods])
    base = np.array([entry["success"] for entry in rows if entry["label"] == BASE], float)
    gains = {label: {figure: paired(rows, label, BASE, figure) for figure in GAINS} for label in methods}
    return {"n": len(base), "base": bootstrap(base), "gains": gains}


def table(points: list[dict], methods: list[str]) -> str:
    """Markdown: one row per softness and method."""
    heads = [f"{COLUMNS[figure][0]} against {BASE}" for figure in GAINS]
    lines = [f"| τ | attention in mask | cases | {BASE}: success, % | method | {' | '.join(heads)} |"]
    lines.append("|---" * (5 + len(GAINS)) + "|")
    for one in points:
        share, base = ("{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in one[key])) for key in ("in_mask", "base"))
        for label in methods:
            cells = [gain_cell(one["gains"][label][figure], figure) for figure in GAINS]
            lines.append(f"| {one['tau']:g} | {share} | {one['n']} | {base} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(points: list[dict], methods: list[str], path: Path) -> None:
    """Gain in edit success against the share of attention in the masks, a line per method."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    axes.axhline(0, color="gray", linewidth=1)
    for k, label in enumerate(methods):
        gains = [[100 * value for value in one["gains"][label]["success"]] for one in points]
        means = [mean for mean, _, _ in gains]
        spans = np.array([(mean - low, high - mean) for mean, low, high in gains]).T
        places = [100 * one["in_mask"][0] + 0.4 * (k - (len(methods) - 1) / 2) for one in points]  # side by side
        axes.errorbar(places, means, spans, fmt="o-", capsize=3, label=label)
    top = axes.get_ylim()[1]
    for one in points:
        axes.annotate(f"τ = {one['tau']:g}", (100 * one["in_mask"][0], top), ha="center", va="bottom", fontsize=8)
    heading = f"edit success against {BASE}, points"
    axes.set(xlabel="attention of a thing's words in its mask, %", ylabel=heading)
    axes.invert_xaxis()  # from sharp to diluted
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--results", type=Path, nargs="+", required=True, help="one folder per softness")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", metavar="LABEL", help=f"beside {BASE} (all that every folder has)")
    parser.add_argument("--limit", type=int, default=1, help="cases of each task and split to look at (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of the inversions to look at (%(default)s)")
    args = parser.parse_args(argv)
    found = {folder: read_results(folder) for folder in args.results}
    shared = set.intersection(*({entry["label"] for entry in results} for results in found.values())) - {BASE}
    methods = args.methods or sorted(shared)
    if not methods:
        raise ValueError(f"the folders share no method beside {BASE}: run the same ones in each")
    places = {folder: softness_of(results, folder) for folder, results in found.items()}
    points = [{"tau": places[folder][1], **point(results, methods)} for folder, results in found.items()]
    seen = limited(load_cases(args.cases), args.limit)
    for one, (model, factor) in zip(points, places.values()):
        one["in_mask"] = attention_in_mask(model, factor, seen, args.steps)
    points.sort(key=lambda one: -one["tau"])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "softness.md").write_text(table(points, methods))
    print(table(points, methods))
    plot(points, methods, args.out / "softness.png")


if __name__ == "__main__":
    main()
