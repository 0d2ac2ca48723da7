# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""MDE-Edit: mask-guided editing of several objects at once, as a diffusers pipeline."""

from .editing import MDEEditPipelineOutput
from .inversion import Inversion
from .mde_pipeline import MDEEditPipeline
from .mde_pipeline_xl import MDEEditXLPipeline


__all__ = ["Inversion", "MDEEditPipeline", "MDEEditPipelineOutput", "MDEEditXLPipeline"]
