"""The benchmark's methods by name; each module states its own."""

from benchmarks.methods import ours
from benchmarks.methods.base import Method


METHODS: dict[str, Method] = {**ours.METHODS}
