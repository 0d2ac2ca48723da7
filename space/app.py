"""The page of `mde-edit app` as a Space: `make space REPO=user/name` puts it there."""

import os


try:
    import spaces  # of ZeroGPU, which wants to come before torch
except ImportError:
    spaces = None

import torch
from mde_edit import MDEEditPipeline
from mde_edit.tools.app import serve
from mde_edit.tools.segment import load_segmenter
from mde_edit.tools.studio import Studio


model, segmenter = os.environ.get("MODEL", "emoji_ldm"), os.environ.get("SEGMENTER")
accelerated = spaces is not None or torch.cuda.is_available()
pipe = MDEEditPipeline.from_pretrained(model, torch_dtype=torch.float16 if accelerated else torch.float32)
pipe.to("cuda" if accelerated else "cpu")
studio = Studio(
    pipe,
    model,
    load_segmenter(segmenter) if segmenter else None,
    **({} if spaces is None else {"on_accelerator": spaces.GPU(duration=120)}),
)

if __name__ == "__main__":
    serve(studio)
