# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""The file diffusers looks for: `DiffusionPipeline.from_pretrained(model, custom_pipeline=<this folder or Hub repo>)`.

diffusers copies only the files that this one imports itself, so it imports all four.
"""

from .attention_processors import attention_control  # noqa: F401
from .inversion import Inversion  # noqa: F401
from .losses import object_alignment_loss  # noqa: F401
from .mde_pipeline import MDEEditPipeline  # noqa: F401
