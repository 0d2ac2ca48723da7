"""Quality against time: inversion method x steps x iterations of the losses, of MDE-Edit on the dev cases.

    python -m benchmarks.tradeoff --cases bench_out/dev/cases --out bench_out/tradeoff --limit 1
    torchrun --nproc_per_node 2 -m benchmarks.tradeoff ...

Every picture is inverted once per method and number of steps, and edited with each number of iterations; the seconds
are the inversion's and the edit's together. Every word is guided, gently: at the defaults' threshold a model that looks
in the right places makes no iteration. Writes `CASE.json`, `tradeoff.md` and `tradeoff.png`; goes on where it stopped.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from mde_edit.denoise import PRESETS
from mde_edit.tools.files import write_json
from mde_edit.tools.measure import measured
from mde_edit.tools.spread import Job, processes, spread

from benchmarks.cases import Case, load_cases
from benchmarks.methods import METHODS
from benchmarks.run import limited, load_meter, load_pipe
from benchmarks.tables import COLUMNS, bootstrap, seconds_axes


matplotlib.use("Agg")
GUIDANCE_SCALES = {"direct": 2.5, "negative_prompt": 1.5, "null_text": 1.5}  # see tuning.md
STEPS = (10, 20, 50)
ITERATIONS = (0, 2, 5, 15)
SHOWN = ("success", "in_psnr", "bg_psnr", "seconds", "unet_calls")


def measure(pipe, meter, case: Case, steps: Sequence[int], iterations: Sequence[int]) -> list[dict]:
    """One entry per inversion method, number of steps and of iterations."""
    settings = METHODS["mde"].settings | PRESETS["gentle"]
    del settings["inversion"], settings["guidance_scale"], settings["masks"]  # the case's masks
    masks = {"object_masks": case.object_masks, "attribute_masks": case.attribute_masks}
    entries = []
    for method, scale in GUIDANCE_SCALES.items():
        for count in steps:
            with measured(pipe.unet) as inverting:
                inverted = pipe.invert(case.image, case.source_prompt, count, method=method, guidance_scale=scale)
            for number in iterations:
                with measured(pipe.unet) as editing:
                    own = {**settings, "optimization_iterations": number}
                    image = pipe(case.target_prompt, inverted, **masks, **own).images[0]
                cost = {
                    "seconds": inverting["seconds"] + editing["seconds"],
                    "unet_calls": inverting["forwards"] + editing["forwards"],
                }
                key = {"inversion": method, "steps": count, "iterations": number}
                entries.append({**key, **cost, **meter(case, image)})
    return entries


def summary(entries: list[dict]) -> list[dict]:
    """Means over the cases, with the interval's ends, of each setting; fastest first."""
    groups: dict[tuple, list[dict]] = {}
    for entry in entries:
        groups.setdefault((entry["inversion"], entry["steps"], entry["iterations"]), []).append(entry)
    rows = [
        {
            **dict(zip(("inversion", "steps", "iterations"), key, strict=True)),
            "cases": len(group),
            **{name: bootstrap(np.array([one[name] for one in group], float)) for name in SHOWN},
        }
        for key, group in groups.items()
    ]
    return sorted(rows, key=lambda row: row["seconds"][0])


def table(rows: list[dict]) -> str:
    """Markdown, one row per setting."""
    heads = ["inversion", "steps", "iterations", "n", *(COLUMNS[name][0] for name in SHOWN)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [str(row[name]) for name in ("inversion", "steps", "iterations", "cases")]
        for name in SHOWN:
            _, digits, factor = COLUMNS[name]
            mean = factor * row[name][0]
            cells.append("–" if np.isnan(mean) else f"{mean:.{digits}f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """A line per inversion method and number of steps, a point per number of iterations."""
    from matplotlib import pyplot

    shown = ("success", "in_psnr", "bg_psnr")
    figure, axes = pyplot.subplots(1, len(shown), figsize=(16, 4.5), constrained_layout=True)
    styles = dict(zip(sorted({row["steps"] for row in rows}), ("o:", "s--", "D-"), strict=False))
    for color, method in zip(("tab:green", "tab:orange", "tab:blue"), GUIDANCE_SCALES, strict=True):
        for steps, style in styles.items():
            line = [row for row in rows if (row["inversion"], row["steps"]) == (method, steps)]
            line.sort(key=lambda row: row["iterations"])
            for axis, name in zip(axes, shown, strict=True):
                factor = COLUMNS[name][2]
                axis.plot(
                    [row["seconds"][0] for row in line],
                    [factor * row[name][0] for row in line],
                    style,
                    color=color,
                    markersize=4,
                    label=f"{method}, {steps} steps",
                )
                for row in line:
                    place = row["seconds"][0], factor * row[name][0]
                    axis.annotate(
                        row["iterations"], place, fontsize=7, xytext=(3, 3), textcoords="offset points", color=color
                    )
    seconds_axes(axes, [COLUMNS[name][0] for name in shown])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    axes[1].set_title("numbers: iterations of the losses per guided step", fontsize=9)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="emoji_ldm")
    parser.add_argument("--judge", default="emoji_judge")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--iterations", type=int, nargs="+", default=ITERATIONS)
    parser.add_argument("--limit", type=int, help="only the first cases of each task and split")
    args = parser.parse_args(argv)
    cases = limited(load_cases(args.cases), args.limit)
    state = processes()
    pipe = load_pipe(args.model, state.device, "float32")
    meter = load_meter(args.judge, pipe)

    def work(jobs: list[Job]) -> Iterator[Job]:
        for job in jobs:
            entries = measure(pipe, meter, job.task, args.steps, args.iterations)
            write_json(job.record, {**job.key(), "entries": entries})
            yield job

    asked = {"steps": list(args.steps), "iterations": list(args.iterations), "model": args.model, "judge": args.judge}
    jobs = [
        Job(case, args.out / f"{case.name}.json", lambda case=case: {**asked, "digest": case.digest}) for case in cases
    ]
    spread(jobs, work, state)
    if state.is_main_process:
        rows = summary([entry for job in jobs for entry in json.loads(job.record.read_text())["entries"]])
        (args.out / "tradeoff.md").write_text(table(rows))
        plot(rows, args.out / "tradeoff.png")
        print(table(rows))


if __name__ == "__main__":
    main()
