"""What an edit cost, and how close two pictures are."""

import numpy as np
import pytest
import torch
from mde_edit.tools.measure import measured, psnr

from .conftest import SOURCE, count_unet_calls


def test_passes_are_counted_as_they_come(pipe, image):
    with count_unet_calls(pipe.unet) as expected, measured(pipe.unet) as cost:
        pipe.invert(image, SOURCE, 3, method="direct")
    both = expected["forward"] + expected["probe"]
    assert (cost["forwards"], cost["rows"], cost["whole"]) == (both, both, 3 + 2) and expected["probe"] == 2
    assert cost["seconds"] > 0
    with measured(pipe.unet) as cost:
        pipe.unet(sample=pipe.encode(pipe.prepare_image(image)), timestep=1, encoder_hidden_states=pipe.embed(SOURCE))
    assert (cost["forwards"], cost["rows"], cost["whole"]) == (1, 1, 1)


def test_a_failing_run_is_measured_too_and_leaves_no_hook(pipe):
    before = len(pipe.unet._forward_pre_hooks)
    with pytest.raises(RuntimeError, match="channels"), measured(pipe.unet) as cost:
        pipe.unet(torch.zeros(2, 3, 16, 24), 1, pipe.embed(SOURCE))
    assert (cost["forwards"], cost["rows"], cost["whole"]) == (1, 2, 0) and "seconds" in cost
    assert len(pipe.unet._forward_pre_hooks) == before


def test_psnr_by_hand():
    one, other = np.zeros((4, 5, 3)), np.full((4, 5, 3), 0.1)
    other[0] = 1
    where = np.ones((4, 5), bool)
    where[0] = False
    assert psnr(one, other, where) == pytest.approx(20)
    assert psnr(one, one) == 100 and np.isnan(psnr(one, other, ~where & where))
