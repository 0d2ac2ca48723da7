"""A mask at every resolution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mde_edit.masks import binarize_mask, default_dilation, dilate_mask, resize_mask


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.data())
@settings(max_examples=50, deadline=None)
def test_a_single_white_pixel_survives_every_resize(height, width, h, w, data):
    mask = torch.zeros(height, width)
    mask[data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))] = 1
    soft = resize_mask(mask, (h, w))
    assert soft.shape == (h, w) and 0 <= soft.min() and soft.max() <= 1 and soft.max() > 0
    assert binarize_mask(soft).sum() >= 1
    assert set(binarize_mask(soft).unique().tolist()) <= {0.0, 1.0}


def test_masks_resize_by_covered_area():
    mask = torch.zeros(4, 4)
    mask[:2, :3] = 1
    assert resize_mask(mask, (2, 2)).tolist() == [[1.0, 0.5], [0.0, 0.0]]
    assert binarize_mask(resize_mask(mask, (2, 2))).tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_dilation_grows_by_its_radius_in_all_directions():
    mask = torch.zeros(7, 7)
    mask[3, 3] = 1
    assert dilate_mask(mask, 0).equal(mask)
    assert dilate_mask(mask, 1).sum() == 9 and dilate_mask(mask, 2).sum() == 25


@pytest.mark.parametrize("size,cells", [((16, 24), 0), ((32, 32), 0), ((64, 64), 1), ((64, 96), 1), ((128, 96), 2)])
def test_default_dilation_is_one_cell_at_stable_diffusions_size(size, cells):
    assert default_dilation(size) == cells
