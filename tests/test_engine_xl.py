"""The costs of passes with SDXL are counted like Stable Diffusion's."""

import pytest
import torch

from benchmarks import engine_xl

from .test_engine import SIZE, small_model
from .tiny_xl import make_unet


@pytest.mark.slow
def test_the_table_has_a_column_per_model_and_the_programs_sums(tmp_path, monkeypatch):
    models = {
        "SD": (small_model, SIZE, torch.float32),
        "half": (lambda: (make_unet(), small_model()[1]), SIZE, torch.float16),
    }
    monkeypatch.setattr(engine_xl, "MODELS", models)
    monkeypatch.setattr(engine_xl, "TERA", 1)
    monkeypatch.setattr(engine_xl, "GIB", 1)
    engine_xl.main(["--out", str(tmp_path / "engine_xl.md")])
    lines = (tmp_path / "engine_xl.md").read_text().splitlines()
    assert lines[0] == "| pass | SD: TFLOP | peak, GiB | half: TFLOP | peak, GiB |"
    rows = {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in lines[2:] if line.startswith("|"))}
    assert float(rows["null iteration"][2]) > float(rows["plain pass"][2]) > 0
    edit, passes = rows["**edit, `fast`, 15 steps, with its direct inversion**"], ("plain pass", "encode", "decode")
    assert all(float(edit[2]) > float(rows[name][2]) for name in passes)
    assert max(float(rows[name][3]) for name in passes) <= float(edit[3])
