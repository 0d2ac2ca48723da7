"""What a method of the benchmark is."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from mde_edit import MDEEditPipeline
from PIL import Image

from benchmarks.cases import Case


@dataclass(frozen=True)
class Method:
    """A way to edit a case.

    Attributes:
        run: (pipe, case, steps, seed, **settings) -> edited picture. Leaves `pipe` as it was.
        group: "masks" or "prompt", what the method is told; "floor" for rows that edit nothing, ceilings
            among them.
        source: the paper, and what differs from it.
        settings: keyword arguments of `run`, with the values used.
        grid: per setting, what tuning tries.
        needs_ideal: whether it looks at the case's ideal picture; not run where there is none.
    """

    run: Callable[..., Image.Image]
    group: str
    source: str
    settings: dict = field(default_factory=dict)
    grid: dict[str, tuple] = field(default_factory=dict)
    needs_ideal: bool = False

    def __call__(self, pipe: MDEEditPipeline, case: Case, steps: int, seed: int, **settings) -> Image.Image:
        """Run with `settings` in place of the method's own.

        Raises:
            ValueError: a setting that the method does not have.
        """
        unknown = settings.keys() - self.settings.keys()
        if unknown:
            raise ValueError(f"no setting {', '.join(sorted(unknown))}; there are {', '.join(self.settings) or 'none'}")
        return self.run(pipe, case, steps, seed, **{**self.settings, **settings})


def encode(pipe: MDEEditPipeline, image: Image.Image) -> torch.Tensor:
    """(1, channels, h, w) fp32, the latents z_0 of a picture."""
    return pipe.encode(pipe.prepare_image(image))
