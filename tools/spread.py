# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""Many jobs, each with a file that says it is done: spread over processes, gone on with, never half-done.

accelerate does the spreading: alone in one process, over GPUs or processes by `accelerate launch` or `torchrun`.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm


@dataclass(frozen=True)
class Job:
    """Something to do once.

    task: what.
    record: the JSON file, written last of all of its files, that says it was done. Pictures that it names under
        `pictures` lie beside it.
    key: what it is done with, as fields of the record; one that says otherwise is of another job, or of this one before
        it changed.
    """

    task: Any
    record: Path
    key: Callable[[], dict[str, Any]]

    def is_done(self) -> bool:
        """Whether its record is there, whole, and of this very job."""
        try:
            known = json.loads(self.record.read_text(encoding="utf-8"))
            pictures = known.get("pictures", ()) if isinstance(known, dict) else ()
        except (OSError, ValueError):  # none, or none of ours
            return False
        if not all((self.record.parent / name).is_file() for name in pictures):
            return False
        key = json.loads(json.dumps(self.key()))
        return all(field in known and known[field] == value for field, value in key.items())


def processes() -> PartialState:
    """The processes that this one was launched with."""
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    return PartialState(cpu=not accelerated)  # several processes on a CPU, only if told so


def spread(jobs: Sequence[Job], work: Callable[[list[Job]], Iterator[Job]], state: PartialState) -> int:
    """Do what is not done yet, each process its share, with one bar over all in the main process.

    Args:
        work: does the jobs it is given, writes their records, and yields each when that is done.
        state: the processes. The main one returns when all jobs are done.

    Returns:
        how many jobs had been done before.
    """
    todo = [job for job in jobs if not job.is_done()]
    stale = {job.record: _stamp(job.record) for job in todo}
    state.wait_for_everyone()  # nobody writes before everybody has looked
    with state.split_between_processes(todo) as mine:
        own = {job.record for job in mine}
        elsewhere = [job.record for job in todo if job.record not in own] if state.is_main_process else []
        bar = tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="edit", disable=not state.is_main_process)
        with bar:
            looked = time.monotonic()
            for job in work(mine):
                bar.set_postfix_str(job.record.parent.name, refresh=False)
                bar.update()
                if elsewhere and time.monotonic() - looked > 1:
                    elsewhere = _still_to_come(elsewhere, stale, bar)
                    looked = time.monotonic()
            while elsewhere:  # a process that dies takes the others with it: the launcher ends them
                time.sleep(0.2)
                elsewhere = _still_to_come(elsewhere, stale, bar)
    return len(jobs) - len(todo)


def _stamp(record: Path) -> tuple[int, int] | None:
    """Tells one writing of a file from the next; None where there is none."""
    try:
        found = record.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _still_to_come(records: list[Path], stale: dict[Path, tuple[int, int] | None], bar: tqdm) -> list[Path]:
    """Those that nobody has written since the start."""
    coming = [record for record in records if _stamp(record) in (None, stale[record])]
    bar.update(len(records) - len(coming))
    return coming
