"""Run methods on a set of cases: pictures, figures, seconds and U-Net calls of each, one file per edit.

    python -m benchmarks.run --cases bench_out/test --out bench_out/results --methods none oal ccl both
    torchrun --nproc_per_node 2 -m benchmarks.run ...

An edit that is already there, with the same settings, is not run again: a broken-off run goes on where it stopped.
Cases are spread over the processes of `torchrun` (or, on GPUs, `accelerate launch`), if any.
"""

import argparse
import json
import platform
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from mde_edit import MDEEditPipeline
from mde_edit.tools.files import replacing, write_json
from mde_edit.tools.measure import measured
from mde_edit.tools.spread import Job, processes, spread

from benchmarks.cases import Case, load_cases
from benchmarks.methods import METHODS
from benchmarks.metrics import Meter
from benchmarks.perceptual import STLPIPS
from training.judge import Judge


PACKAGES = ("torch", "diffusers", "transformers", "torchmetrics", "stlpips-pytorch")


def edit(pipe: MDEEditPipeline, name: str, case: Case, steps: int, seed: int, settings: dict):
    """One edit by a method: the picture, and its seconds and U-Net calls, those that were cut short too."""
    with measured(pipe.unet) as cost:
        image = METHODS[name](pipe, case, steps, seed, **settings)
    return image, {"seconds": cost["seconds"], "unet_calls": cost["forwards"], "unet_rows": cost["rows"]}


def machine(pipe: MDEEditPipeline) -> dict:
    """What the figures depend on beside the settings."""
    device = torch.cuda.get_device_name() if pipe.device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": PartialState().num_processes,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


class Variant(NamedTuple):
    """A method with settings that differ from its own; `steps` None: the run's."""

    label: str
    method: str
    settings: dict
    steps: int | None


def job_of(case: Case, variant: Variant, args: argparse.Namespace) -> Job:
    """An edit as something to do once; its record carries all settings, not only those that differ, and all else that
    its figures depend on."""
    label, name, settings, own_steps = variant
    whole = {**METHODS[name].settings, **settings}
    key = {"method": name, "settings": whole, "steps": own_steps or args.steps, "seed": args.seed, "model": args.model}
    key |= {"soften": args.soften, "dtype": args.dtype, "judge": args.judge, "digest": case.digest}
    return Job((case, variant), args.out / label / f"{case.name}.json", lambda: key)


def run_case(pipe: MDEEditPipeline, meter: Meter, job: Job) -> None:
    """Edit, measure and save, the record last."""
    case, variant = job.task
    key = job.key()
    image, cost = edit(pipe, variant.method, case, key["steps"], key["seed"], variant.settings)
    job.record.unlink(missing_ok=True)  # of another picture than the one to come
    with replacing(job.record.with_suffix(".png")) as temporary:
        image.save(temporary, "png")
    entry = {"case": case.name, "split": case.split, "task": case.task, "label": variant.label, **key, **cost}
    entry |= {"figures": meter(case, image), "machine": machine(pipe)}
    write_json(job.record, entry)


def load_meter(judge: str | None, pipe: MDEEditPipeline) -> Meter:
    reader = Judge.load(Path(judge), str(pipe.device)) if judge else None
    return Meter(STLPIPS(), reader, cell=pipe.vae_scale_factor)


def parse_variant(text: str) -> Variant:
    """ "mde:guidance_scale=3,steps=10" -> a variant; `steps` may be set for every method."""
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; there are {', '.join(METHODS)}")
    settings = {}
    for pair in filter(None, re.split(r",(?![^\[]*\])", rest)):  # not at the commas of a list
        key, equals, value = pair.partition("=")
        if not equals or key not in (*METHODS[name].settings, "steps"):
            raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(METHODS[name].settings) or 'none'}")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    steps = settings.pop("steps", None)
    return Variant(text.replace(":", "__").replace(",", "_"), name, settings, steps)


def soften(unet: torch.nn.Module, factor: float) -> None:
    """Scale the queries of every cross-attention layer by `factor`, for good: below 1 the softmax over the words gets
    softer and each word's attention spreads, as it does in models that nobody taught where to look. It emulates diluted
    attention; it is not Stable Diffusion."""
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".attn2.to_q." in name:
                parameter.mul_(factor)


def load_pipe(model: str, device: torch.device, dtype: str, softness: float = 1.0) -> MDEEditPipeline:
    pipe = MDEEditPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    soften(pipe.unet, softness)
    return pipe


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True, help="folder with cases.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        metavar="METHOD[:SETTING=VALUE,...]",
        help=f"{', '.join(METHODS)} (all)",
    )
    parser.add_argument("--model", default="emoji_ldm")
    parser.add_argument("--judge", default="emoji_judge", help="folder of the judge; '' on pictures it does not know")
    parser.add_argument("--steps", type=int, default=50, help="of every method without its own (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="only the first cases of each task and split")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--soften", type=float, default=1.0, help="scale the cross-attention's queries, for every method (%(default)s)"
    )
    return parser.parse_args(argv)


def limited(cases: list[Case], limit: int | None) -> list[Case]:
    """The first `limit` cases of each split and task."""
    if limit is None:
        return cases
    taken: dict[tuple[str, str], int] = {}
    kept = []
    for case in cases:
        key = case.split, case.task
        taken[key] = taken.get(key, 0) + 1
        if taken[key] <= limit:
            kept.append(case)
    return kept


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    variants = [parse_variant(text) for text in args.methods]  # a wrong name is found before anything is loaded
    cases = limited(load_cases(args.cases), args.limit)
    state = processes()
    pipe = load_pipe(args.model, state.device, args.dtype, args.soften)
    meter = load_meter(args.judge, pipe)

    def work(jobs: list[Job]) -> Iterator[Job]:
        for job in jobs:
            run_case(pipe, meter, job)
            yield job

    # Case by case, not method by method: a run that is broken off has every method at the same number of cases.
    jobs = [
        job_of(case, variant, args)
        for case in cases
        for variant in variants
        if case.ideal is not None or not METHODS[variant.method].needs_ideal
    ]
    spread(jobs, work, state)
    if state.is_main_process:
        print(f"results of {len(jobs)} edits: {args.out}")


if __name__ == "__main__":
    main()
