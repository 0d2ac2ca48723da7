"""`make test-matrix`: the tests on other releases of diffusers and transformers; prints docs/compatibility.md's table.

Every combination goes into a folder of its own under build/matrix that shadows the installed packages; torch stays the
one that is there, since neither library decides its version.
"""

import argparse
import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[1]
# (diffusers, transformers, what of that time goes with them). The newest diffusers cannot be installed with
# transformers 4: the two ask for different releases of huggingface_hub.
COMBINATIONS = {
    "oldest": ("0.31.0", "4.46.3", ["peft==0.13.2", "accelerate==1.1.1"]),
    "middle": ("0.35.2", "4.57.6", ["peft==0.17.1", "accelerate==1.11.0"]),
    "transformers-4": ("0.39.0", "4.57.6", ["peft==0.17.1", "accelerate==1.11.0"]),
    "newest": ("0.42.1", "5.23.0", ["peft==0.21.2", "accelerate==1.15.0"]),
}
TESTS = (
    "prompts",
    "pictures",
    "masks",
    "losses",
    "attention_processors",
    "inversion",
    "denoise",
    "mde_pipeline",
    "mde_pipeline_xl",
    "embeds",
    "arguments",
    "localize",
    "inputs",
    "threads",
    "dropin",
    "doors",
    "doors_xl",
    "publish",
    "modular",
)


def prepare(name: str) -> Path:
    """A folder with the combination's packages; made once."""
    folder = ROOT / "build" / "matrix" / name
    if not (folder / ".complete").exists():
        diffusers, transformers, others = COMBINATIONS[name]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder)]
        subprocess.run([*pip, f"diffusers=={diffusers}", f"transformers=={transformers}"], check=True)
        subprocess.run([*pip, "--no-deps", *others], check=True)  # they would bring a torch
        (folder / ".complete").touch()
    return folder


def run(name: str, tests) -> str:
    """The combination's row of the table."""
    path = os.pathsep.join(filter(None, [str(prepare(name)), os.environ.get("PYTHONPATH")]))
    log = ROOT / "build" / "matrix" / f"{name}.log"
    with log.open("w") as output:
        files = [f"tests/test_{test}.py" for test in tests]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rs", *files]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=output, stderr=output)
    text = log.read_text()
    summary = re.findall(r"^=*\s*(.*(?:passed|failed|error).*) in [\d.]+s", text, flags=re.MULTILINE)
    found = []
    for package in ("diffusers", "transformers", "huggingface_hub"):
        (info,) = (ROOT / "build" / "matrix" / name).glob(f"{package}-*.dist-info")
        found.append(info.name.removeprefix(f"{package}-").removesuffix(".dist-info"))
    return (
        "| " + " | ".join([*found, torch.__version__.split("+")[0], summary[-1] if summary else "did not start"]) + " |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(COMBINATIONS), help=", ".join(COMBINATIONS))
    parser.add_argument("--tests", nargs="*", default=TESTS, choices=TESTS)
    parser.add_argument("--prepare", action="store_true", help="only install")
    args = parser.parse_args()
    if args.prepare:
        for name in args.names:
            prepare(name)
        return
    rows = []
    for name in args.names:
        rows.append(run(name, args.tests))
        sys.stdout.write(rows[-1] + "\n")
        sys.stdout.flush()
    header = "| diffusers | transformers | huggingface_hub | torch | result |\n|---|---|---|---|---|\n"
    sys.stdout.write(f"\nTested on {datetime.date.today()}:\n\n{header}" + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
