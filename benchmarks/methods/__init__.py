"""The benchmark's methods by name; each module states its own."""

from benchmarks.methods import cds, guide_and_rescale, oir, ours, peers
from benchmarks.methods.base import Method


METHODS: dict[str, Method] = {
    **ours.METHODS,
    **oir.METHODS,
    **guide_and_rescale.METHODS,
    **cds.METHODS,
    **peers.METHODS,
}
