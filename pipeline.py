# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""The file diffusers looks for: `DiffusionPipeline.from_pretrained(model, custom_pipeline=<this folder or Hub repo>)`.

diffusers copies only the files that this one imports itself, so it imports them all.
"""

import sys


# diffusers runs every local plug-in's `pipeline.py` as one module and keeps every plug-in's helpers in one package,
# where names are as common as `losses`. So nothing that another plug-in (or an earlier state of these files) left there
# may be taken for ours, and ours may not be taken for the next one's.
_SHARED = __name__ == "diffusers_modules.local.pipeline"
if _SHARED:
    for _name, _value in list(globals().items()):
        if isinstance(_value, type):
            del globals()[_name]
    for _name in ("attention_processors", "bundle", "inversion", "losses", "mde_pipeline"):
        sys.modules.pop(f"{__package__}.{_name}", None)

from .attention_processors import attention_control  # noqa: E402, F401
from .bundle import self_contained_source  # noqa: E402, F401
from .inversion import Inversion  # noqa: E402
from .losses import object_alignment_loss  # noqa: E402, F401
from .mde_pipeline import MDEEditPipeline  # noqa: E402


if _SHARED:
    Inversion.__module__ = MDEEditPipeline.__module__  # a name that is ours alone, so that it can still be pickled
    for _name in ("attention_processors", "bundle", "inversion", "losses"):
        sys.modules.pop(f"{__package__}.{_name}", None)
    if not getattr(__spec__, "_initializing", False):  # older diffusers use `import`, which must find what it imported
        sys.modules.pop(__name__)
