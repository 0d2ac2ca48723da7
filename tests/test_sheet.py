"""What a sheet shows of the guidance."""

import numpy as np
from matplotlib.figure import Figure
from mde_edit.tools.sheet import plot_losses


def test_losses_stand_at_their_iterations():
    """A step may guide words of one kind alone: its entries have one loss, and the other's curve has a gap there."""
    axis = Figure().subplots()
    plot_losses(axis, [{"ccl": 3.0}, {"oal": 2.0, "ccl": 1.0}, {"oal": 1.0}])
    curves = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
    assert np.array_equal(curves["OAL"], [np.nan, 2, 1], equal_nan=True)
    assert np.array_equal(curves["CCL"], [3, 1, np.nan], equal_nan=True)
    axis = Figure().subplots()
    plot_losses(axis, [{"ccl": 1.0}])
    assert [line.get_label() for line in axis.get_lines()] == ["CCL"]
