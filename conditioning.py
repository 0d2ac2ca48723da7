# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""What the U-Net is told of a text, as one value: with SDXL it is more than an embedding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch


# What diffusers' callbacks call the parts of a conditioning.
TENSOR_INPUTS = {"embeds": "prompt_embeds", "pooled": "add_text_embeds", "time_ids": "add_time_ids"}


@dataclass(frozen=True, eq=False)  # a value of tensors has no one truth value of its equality
class Conditioning:
    """What conditions a U-Net call, in each part one row per row of the batch.

    embeds: (rows, tokens, dim), for cross-attention. pooled: (rows, pooled dim), SDXL's second reading of the text, and
    time_ids: (rows, 6), SDXL's sizes (height, width) of the original, the crop's corner, and of the target; both are
    added to the timestep's embedding, and `None` in Stable Diffusion 1.x/2.x.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: slice) -> "Conditioning":
        return self.each(lambda part: part[rows])

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Conditioning":
        """`change` of every part that there is."""
        return Conditioning(**{name: change(part) for name, part in self.parts().items()})

    def parts(self) -> dict[str, torch.Tensor]:
        """Those that there are, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, *form) -> "Conditioning":
        """The text's parts as `torch.Tensor.to` gives them; sizes keep their dtype, since half precision would
        round them."""
        embeds = self.embeds.to(*form)
        pooled = None if self.pooled is None else self.pooled.to(*form)
        return Conditioning(embeds, pooled, None if self.time_ids is None else self.time_ids.to(embeds.device))

    def with_sizes(self, time_ids: torch.Tensor | None) -> "Conditioning":
        """The same of a picture of these sizes, (1, 6); `None` where the model reads none."""
        return self if time_ids is None else replace(self, time_ids=time_ids.to(self.embeds.device))

    def unet_arguments(self) -> dict:
        """These as the keyword arguments of diffusers' U-Net."""
        added = {"text_embeds": self.pooled, "time_ids": self.time_ids}
        extra = {} if self.pooled is None else {"added_cond_kwargs": added}
        return {"encoder_hidden_states": self.embeds, **extra}


def join_conditioning(rows: Sequence[Conditioning]) -> Conditioning:
    """One of all rows, in their order."""
    return Conditioning(**{name: torch.cat([getattr(row, name) for row in rows]) for name in rows[0].parts()})
