"""Tables and pictures of a benchmark run.

    python -m benchmarks.tables --cases bench_out/test --results bench_out/results --out bench_out

Writes `results.json` (every edit with every figure), `tables.md` (means with bootstrap 95 % intervals, per split),
`grid_<split>.png` (cases x methods, chosen by a fixed seed) and `cost.png` (quality against seconds).
"""

import argparse
import json
import random
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from benchmarks.cases import SMALL, Case, load_cases
from benchmarks.methods import METHODS
from benchmarks.methods.ours import CEILING
from benchmarks.metrics import HIGHER, LOWER


matplotlib.use("Agg")

COLUMNS = {  # figure -> heading, digits, factor
    "success": ("edit success, %", 1, 100),
    "bystanders": ("bystanders kept, %", 1, 100),
    "clip": ("CLIP", 3, 1),
    "in_psnr": ("in PSNR, dB", 2, 1),
    "in_ssim": ("in SSIM", 3, 1),
    "bg_psnr": ("BG-PSNR, dB", 2, 1),
    "bg_ssim": ("BG-SSIM", 3, 1),
    "bg_st_lpips": ("BG-ST-LPIPS", 4, 1),
    "bg_ssim_zf": ("BG-SSIM (zero-fill)", 3, 1),
    "bg_st_lpips_zf": ("BG-ST-LPIPS (zero-fill)", 4, 1),
    "leak": ("leak", 3, 1),
    "seconds": ("s", 1, 1),
    "unet_calls": ("U-Net calls", 0, 1),
}
PARTS = {  # of the edits, as far as their regions' verdicts and sizes are known
    "success": COLUMNS["success"],
    "of_ceiling": ("of those the ceiling shows, %", 1, 100),
    "small": (f"of objects under {100 * SMALL:g} % of the picture, %", 1, 100),
    "larger": ("of larger ones, %", 1, 100),
}
REFERENCE = "mde"  # the method that the others are compared with, case by case
GROUPS = {"floor": "what the model allows", "masks": "given the masks", "prompt": "given the prompts alone"}


def read_results(folder: Path) -> list[dict]:
    """Every edit of a results folder, its figures at the top level; NaN where JSON says so."""
    entries = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]
    return [{**entry, **entry.pop("figures")} for entry in entries]


def with_parts(results: list[dict], cases: list[Case]) -> list[dict]:
    """The entries with the success of a part of their edits beside the whole: of those that the judge finds in the
    ideal picture after the autoencoder (what it misses there says nothing about a method), and of each size class.
    NaN where a case has no such edit, or no verdict on its ceiling."""
    sizes = {case.name: {region.name: region.mask.mean() for region in case.regions} for case in cases}
    shown = {entry["case"]: entry.get("edits", {}) for entry in results if entry["label"] == CEILING}

    def part(edits: dict[str, bool], kept: set[str]) -> float:
        values = [right for region, right in edits.items() if region in kept]
        return float(np.mean(values)) if values else float("nan")

    parted = []
    for entry in results:
        name, edits = entry["case"], entry.get("edits", {})  # records of earlier versions have none
        kept = {
            "of_ceiling": {region for region, right in shown.get(name, {}).items() if right},
            "small": {region for region, size in sizes[name].items() if size < SMALL},
            "larger": {region for region, size in sizes[name].items() if size >= SMALL},
        }
        parted.append({**entry, **{column: part(edits, regions) for column, regions in kept.items()}})
    return parted


def of_methods(results: list[dict], labels: list[str]) -> list[dict]:
    """The entries of some labels, on the cases that all of them have.

    Raises:
        ValueError: a label without results, or no case in common.
    """
    cases = [{entry["case"] for entry in results if entry["label"] == label} for label in labels]
    missing = [label for label, found in zip(labels, cases, strict=True) if not found]
    if missing:
        known = ", ".join(sorted({entry["label"] for entry in results}))
        raise ValueError(f"no results of {', '.join(missing)}; there are {known}")
    shared = set.intersection(*cases)
    if not shared:
        raise ValueError(f"{', '.join(labels)} have no case in common: run them on the same ones")
    return [entry for entry in results if entry["label"] in labels and entry["case"] in shared]


def bootstrap(values: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of the values that are numbers, and its percentile bootstrap 95 % interval."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    rows = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    means = values[rows].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def paired(results: list[dict], one: str, other: str, figure: str) -> tuple[float, float, float]:
    """Mean difference `one` - `other` over the cases that both have, with its interval."""
    values = {
        label: {entry["case"]: entry[figure] for entry in results if entry["label"] == label} for label in (one, other)
    }
    shared = sorted(values[one].keys() & values[other].keys())
    return bootstrap(np.array([values[one][case] - values[other][case] for case in shared], float))


def gain_cell(gain: tuple[float, float, float], name: str) -> str:
    """A difference in the figure `name`, (mean, low, high), with its sign."""
    _, digits, factor = COLUMNS[name]
    mean, low, high = (factor * value for value in gain)
    return "–" if np.isnan(mean) else f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def cell(values: np.ndarray, digits: int, factor: float) -> str:
    mean, low, high = (factor * value for value in bootstrap(values))
    if np.isnan(mean):
        return "–"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(results: list[dict], labels: list[str], columns: dict[str, tuple[str, int, float]] = COLUMNS) -> str:
    """Markdown: one row per label."""
    heads = [heading for heading, _, _ in columns.values()]
    marks = ["↑" if name in HIGHER else "↓" if name in LOWER else "" for name in columns]
    lines = [
        "| method | n | "
        + " | ".join(f"{head} {mark}".strip() for head, mark in zip(heads, marks, strict=True))
        + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for label in labels:
        rows = [entry for entry in results if entry["label"] == label]
        cells = [
            cell(np.array([entry[name] for entry in rows], float), *columns[name][1:]) if rows else "–"
            for name in columns
        ]
        lines.append(f"| {label} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def order(results: list[dict]) -> dict[str, list[str]]:
    """Labels by group, in the registry's order."""
    labels = {entry["label"]: entry["method"] for entry in results}
    names = list(METHODS)
    found = sorted(labels, key=lambda label: (names.index(labels[label]), label))
    return {group: [label for label in found if METHODS[labels[label]].group == group] for group in GROUPS}


def tables(results: list[dict]) -> str:
    """All tables of a run, as Markdown."""
    parts = []
    for split in (*sorted({entry["split"] for entry in results}), "both splits"):
        rows = [entry for entry in results if split in (entry["split"], "both splits")]
        parts.append(f"## {split}\n")
        for group, labels in order(rows).items():
            if labels:
                parts.append(f"**{GROUPS[group]}**\n\n{table(rows, labels)}\n")
    tasks = sorted({entry["task"] for entry in results})
    labels = [label for group in order(results).values() for label in group]
    parts.append(f"## edit success, of all edits and of some\n\n{table(results, labels, PARTS)}\n")
    lines = ["## edit success by task, %\n", "| method | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for label in labels:
        by_task = [
            np.array([e["success"] for e in results if e["label"] == label and e["task"] == task], float)
            for task in tasks
        ]
        means = [100 * bootstrap(values)[0] for values in by_task]
        lines.append(f"| {label} | " + " | ".join("–" if np.isnan(mean) else f"{mean:.0f}" for mean in means) + " |")
    parts.append("\n".join(lines) + "\n")
    if REFERENCE in labels and len(labels) > 1:
        parts.append(differences(results, [label for label in labels if label != REFERENCE]))
    return "\n".join(parts) + "\n"


def differences(results: list[dict], labels: list[str]) -> str:
    """Markdown: how much better `REFERENCE` is than each label, over the cases that both have."""
    columns = ("success", "clip", "in_psnr", "bg_psnr")
    lines = [
        f"## {REFERENCE} minus the others, same cases\n",
        "| method | n | " + " | ".join(COLUMNS[name][0] for name in columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    own = {entry["case"] for entry in results if entry["label"] == REFERENCE}
    for label in labels:
        shared = own & {entry["case"] for entry in results if entry["label"] == label}
        cells = [gain_cell(paired(results, REFERENCE, label, name), name) for name in columns]
        lines.append(f"| {label} | {len(shared)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def grid(cases: list[Case], results: Path, labels: list[str], count: int, seed: int = 0) -> Image.Image:
    """Rows: cases drawn by the seed. Columns: source with masks, ideal, methods."""
    chosen = random.Random(seed).sample(cases, min(count, len(cases)))
    width, height = chosen[0].image.size
    head, foot = 14, 24
    heads = ["source", "masks", "ideal", *labels]
    sheet = Image.new("RGB", (width * len(heads), head + (height + foot) * len(chosen)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(heads):
        draw.text((column * width + 2, 2), text[: width // 5], fill="black", font_size=10)
    for row, case in enumerate(chosen):
        top = head + row * (height + foot)
        masks = Image.fromarray(
            sum((region.mask * (255 // (i + 1))).astype(np.uint8) for i, region in enumerate(case.regions))
            .clip(0, 255)
            .astype(np.uint8)
        )
        pictures = [case.image, masks, case.ideal]
        pictures += [results / label / f"{case.name}.png" for label in labels]
        for column, picture in enumerate(pictures):
            if isinstance(picture, Path):
                picture = Image.open(picture) if picture.is_file() else None
            if picture is not None:
                sheet.paste(picture.convert("RGB").resize((width, height)), (column * width, top))
        for line, text in enumerate((case.source_prompt, "-> " + case.target_prompt)):
            draw.text((2, top + height + 1 + 11 * line), text, fill="black", font_size=10)
    return sheet


def seconds_axes(axes, headings: list[str]) -> None:
    """Label the axes of a plot against seconds, after its points are drawn."""
    for axis, heading in zip(axes, headings, strict=True):
        axis.set(xscale="log", xlabel="seconds per edit, inversion included", ylabel=heading)
        low, high = axis.get_xlim()
        axis.set_xticks([tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low <= tick <= high])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()


def cost_plot(results: list[dict], path: Path) -> None:
    """Quality against seconds, one point per label."""
    from matplotlib import pyplot

    shown = ("success", "bg_psnr")
    figure, axes = pyplot.subplots(1, len(shown), figsize=(11, 4.5), constrained_layout=True)
    for label in [label for group in order(results).values() for label in group]:
        rows = [entry for entry in results if entry["label"] == label]
        seconds = np.mean([entry["seconds"] for entry in rows])
        for axis, name in zip(axes, shown, strict=True):
            factor = COLUMNS[name][2]
            mean, low, high = (factor * value for value in bootstrap(np.array([row[name] for row in rows], float)))
            axis.errorbar(seconds, mean, [[mean - low], [high - mean]], fmt="o", capsize=2)
            axis.annotate(label, (seconds, mean), fontsize=7, xytext=(4, 3), textcoords="offset points")
    seconds_axes(axes, [COLUMNS[name][0] for name in shown])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", metavar="LABEL", help="only these, on the cases that all of them have")
    parser.add_argument("--rows", type=int, default=8, help="cases per picture grid (%(default)s)")
    args = parser.parse_args(argv)
    results = read_results(args.results)
    if not results:
        raise ValueError(f"no results in {args.results}: run `python -m benchmarks.run` first")
    cases = load_cases(args.cases)
    results = with_parts(results, cases)
    if args.methods:
        results = of_methods(results, args.methods)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = tables(results)
    (args.out / "tables.md").write_text(text)
    print(text)
    labels = [label for group in order(results).values() for label in group]
    done = {entry["case"] for entry in results}
    for split in sorted({entry["split"] for entry in results}):
        shown = [case for case in cases if case.split == split and case.name in done]
        grid(shown, args.results, labels, args.rows).save(args.out / f"grid_{split}.png")
    cost_plot(results, args.out / "cost.png")


if __name__ == "__main__":
    main()
