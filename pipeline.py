# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""The file diffusers looks for: `DiffusionPipeline.from_pretrained(model, custom_pipeline=<this folder or Hub repo>)`.

diffusers copies only the files that this one imports itself, so it imports them all.
"""

import re
import sys
from pathlib import Path


# What diffusers does with a plug-in from a folder: every `pipeline.py` runs as one module of one name, and the files it
# imports are copied into one folder, whoever's they are. So another plug-in's classes may still be in this module, and
# its `losses` under the name of ours. Both are cleared away before our imports, and our helpers after them, so that
# neither plug-in gets the other's (tests/test_doors.py: two local plug-ins in one process, in any order).
_SHARED = __name__ == "diffusers_modules.local.pipeline"
_MODULES = re.findall(r"^from \.(\w+) import", Path(__file__).read_text(encoding="utf-8"), flags=re.MULTILINE)
if _SHARED:
    for _name, _value in list(globals().items()):
        if isinstance(_value, type) and _value is not Path:
            del globals()[_name]
    for _name in _MODULES:
        sys.modules.pop(f"{__package__}.{_name}", None)

from .attention_processors import attention_control  # noqa: E402, F401
from .bundle import self_contained_source  # noqa: E402, F401
from .checks import check_setting  # noqa: E402, F401
from .conditioning import Conditioning  # noqa: E402, F401
from .denoise import edit_step  # noqa: E402, F401
from .editing import MDEEditPipelineOutput  # noqa: E402
from .inversion import Inversion  # noqa: E402
from .localize import word_region  # noqa: E402, F401
from .losses import object_alignment_loss  # noqa: E402, F401
from .masks import edit_mask  # noqa: E402, F401
from .mde_pipeline import MDEEditPipeline  # noqa: E402
from .pictures import read_pixels  # noqa: E402, F401
from .prompts import align_tokens  # noqa: E402, F401
from .texts import ReadsPrompts  # noqa: E402, F401


if _SHARED:
    # The pipeline's own module stays, since a pickled pipeline, inversion or output names it.
    Inversion.__module__ = MDEEditPipelineOutput.__module__ = MDEEditPipeline.__module__
    for _name in set(_MODULES) - {"mde_pipeline"}:
        sys.modules.pop(f"{__package__}.{_name}", None)
    # Old releases of diffusers run this file by `import`, which looks for its result in `sys.modules`; newer ones do
    # not, and must not find it there at the next load.
    if not getattr(__spec__, "_initializing", False):
        sys.modules.pop(__name__)
