"""Scripts in processes of their own which begin with torch imported, and nothing of Hugging Face.

Most of the seconds in which a new Python gets to its first edit go into importing torch. These processes are forked
from one that has done that; what reads the environment when it is imported (huggingface_hub, transformers, diffusers)
they import themselves.
"""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path


# torch, and what of it and beside it transformers and diffusers import
PRELOADED = ["torch", "torch._dynamo", "torch.distributed.tensor", "torch.export", "numpy", "PIL.Image", "sympy"]


def run(code: str, cwd: Path, env: dict[str, str], timeout: float) -> tuple[int | None, str, str]:
    """`python -c code`, as far as the code can tell: exit code (None: it had to be ended), stdout, stderr.

    Args:
        cwd: its working directory, where its output is kept while it runs.
        env: all of its environment.
    """
    outputs = [cwd / ".stdout", cwd / ".stderr"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    job = (code, str(cwd), env, [str(path) for path in outputs])
    # by its path: the package that pytest takes this module for is named after the folder of the clone
    process = context.Process(target=runpy.run_path, args=(__file__, {"JOB": job}, "fresh"))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        status = None
    else:
        status = process.exitcode
    texts = [path.read_text(encoding="utf-8") for path in outputs]
    for path in outputs:
        path.unlink()
    return status, *texts


def _be(code: str, cwd: str, env: dict[str, str], outputs: list[str]) -> None:
    assert not {"huggingface_hub", "transformers", "diffusers", "mde_edit"} & set(sys.modules)
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    start = os.getcwd()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["-c"]
    sys.path[:] = ["", *(path for path in sys.path if path not in ("", start))]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "fresh":
    _be(*JOB)  # noqa: F821
