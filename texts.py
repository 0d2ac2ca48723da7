# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""What the text encoders are asked: prompts, words and embeddings, checked and read.

A mixin of the pipelines, whose tokenizers and text encoders these are. `clip_skip` and `lora_scale` say how a text is
read, and come with each call.
"""

import re
from typing import Any

import torch

from .attention_processors import lock_of
from .checks import check_setting, check_text
from .conditioning import Conditioning
from .inversion import LORA_SCALES, Inversion
from .prompts import WordKey, check_prompt_length, find_token_indices, prompt_words


class ReadsPrompts:
    """Mixin of a Stable Diffusion pipeline: its words, prompts and embeddings.

    A class says how it reads a text ([`~ReadsPrompts.condition`]), how many layers it can leave out (`max_clip_skip`),
    and what it reads where there is no prompt (`empty_prompt`; `None` for zeros).
    """

    max_clip_skip: int
    empty_prompt: str | None

    def condition(self, prompt: str, clip_skip: int | None = None, lora_scale: float = 1.0) -> Conditioning:
        """The text encoders' reading of `prompt`, one row, without sizes.

        Args:
            clip_skip: how many of the last layers to leave out.
            lora_scale: see [`lora_strength`].
        """
        raise NotImplementedError

    def tokens(self, prompt: str) -> list[tuple[str, tuple[int, ...]]]:
        """The words of `prompt` and their token positions: what a mask's key can name.

        >>> pipe.tokens("a dog wearing a red hat")
        [('a', (1,)), ('dog', (2,)), ('wearing', (3,)), ('a', (4,)), ('red', (5,)), ('hat', (6,))]
        """
        with lock_of(self.tokenizer):
            return prompt_words(self.tokenizer, self.spell_out(prompt))

    def spell_out(self, text: str) -> str:
        """`text` as the text encoder gets it: a textual-inversion token of several vectors stands for all of them."""
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{text!r} does not name a word: it holds half a character (a lone surrogate).")
        with lock_of(self.tokenizer):
            return self.maybe_convert_prompt(text, self.tokenizer)

    def spell_out_key(self, key: WordKey) -> WordKey:
        """A mask's key with its text, if it has one, spelled out."""
        if isinstance(key, tuple) and key and isinstance(key[0], str):
            return (self.spell_out(key[0]), *key[1:])
        return self.spell_out(key) if isinstance(key, str) else key

    def check_prompt(self, prompt: str, name: str) -> None:
        """Raise `ValueError`, naming the argument, for a prompt that is empty, no text, or longer than is read."""
        check_text(name, prompt)
        with lock_of(self.tokenizer):
            check_prompt_length(self.tokenizer, self.spell_out(prompt))

    def word_indices(self, prompt: str, word: WordKey) -> tuple[int, ...]:
        """The token positions of `word` in `prompt`; see [`find_token_indices`]."""
        with lock_of(self.tokenizer):
            return find_token_indices(self.tokenizer, self.spell_out(prompt), self.spell_out_key(word))

    def check_source_word(self, source_prompt: str, word: WordKey, name: str) -> tuple[int, ...]:
        """Its token positions in the source prompt; raises `ValueError` that says `name`."""
        try:
            return self.word_indices(source_prompt, word)
        except ValueError as error:
            hint = " A mask's file has to be opened: `PIL.Image.open(...)`." if "." in str(word) else ""
            raise ValueError(f"{name} names no word of the source prompt: {error}{hint}") from error

    def condition_empty(self, lora_scale: float = 1.0) -> Conditioning:
        """What guidance leads away from where nothing is said, one row."""
        empty = self.condition(self.empty_prompt or "", lora_scale=lora_scale)
        return empty if self.empty_prompt is not None else empty.each(torch.zeros_like)

    def check_embeds(self, name: str, embeds, count: int = 1) -> list[Conditioning] | None:
        """What the user made in the text encoders' place, one row per prompt; raises `ValueError`, naming the argument,
        for another shape than theirs.

        Args:
            embeds: a tensor, or, where there is a pooled embedding beside it, a [`Conditioning`].
        """
        if embeds is None:
            return None
        given = embeds if isinstance(embeds, Conditioning) else Conditioning(embeds)
        checked = {}
        for part, own in self.condition("").parts().items():
            value, shape = getattr(given, part), own.shape[1:]
            named = name if part == "embeds" else name.replace("prompt_embeds", "pooled_prompt_embeds")
            right = isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[1:] == shape
            if not right or len(value) not in (1, count) or not torch.isfinite(value).all():
                found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(
                    f"`{named}` is {found}: pass finite numbers of shape {(count, *shape)}, as `pipe.encode_prompt`"
                    " makes them, and the prompt they are of beside them."
                )
            checked[part] = value.detach().to(self._execution_device).expand(count, *shape)
        rows = Conditioning(**checked)
        return [rows[k : k + 1] for k in range(count)]

    def check_negative(
        self, negative_prompt, negative_prompt_embeds, count: int = 1, lora_scale: float = 1.0
    ) -> list[Conditioning] | None:
        """What is not wanted, one row per prompt; `None` if nothing was said.

        As in diffusers, `clip_skip` is of the prompts alone: these are read by all layers."""
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Pass `negative_prompt` or `negative_prompt_embeds`, not both.")
        if negative_prompt is None:
            return self.check_embeds("negative_prompt_embeds", negative_prompt_embeds, count)
        texts = list(negative_prompt) if isinstance(negative_prompt, (list, tuple)) else [negative_prompt] * count
        if len(texts) != count or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"`negative_prompt` is {negative_prompt!r}: pass a text, or one per prompt ({count}).")
        for text in filter(str.strip, texts):
            self.check_prompt(text, "negative_prompt")
        return [self.condition(text, lora_scale=lora_scale) for text in texts]

    def source_conditioning(self, inversion: Inversion) -> Conditioning:
        """The source prompt as the inversion was made with it, one row."""
        given = inversion.prompt_embeds
        if given is not None and inversion.pooled_prompt_embeds is not None:
            given = Conditioning(given, inversion.pooled_prompt_embeds)
        (own,) = self.check_embeds("inversion.prompt_embeds", given) or [None]
        own = self.condition(inversion.prompt, inversion.clip_skip, inversion.lora_scale) if own is None else own
        return own.with_sizes(inversion.time_ids)

    def check_reading(self, clip_skip, cross_attention_kwargs, inversion: Inversion | None = None) -> dict[str, Any]:
        """How texts are read and how strong adapters are, `clip_skip` (`None` for 0) and `lora_scale`: as is said, or
        as with `inversion`.

        Raises:
            ValueError: what cannot be used, or is not as with `inversion`; names the argument.
        """
        skip = check_setting("clip_skip", clip_skip, int | None, 0, self.max_clip_skip)
        given = {} if cross_attention_kwargs is None else cross_attention_kwargs
        if not isinstance(given, dict):
            raise ValueError(f"`cross_attention_kwargs` is {given!r}: pass a dict, as {{'scale': 0.8}}.")
        other = [key for key in given if key != "scale"]
        if other:
            raise ValueError(
                f"`cross_attention_kwargs` has {other}: only 'scale', a LoRA's strength, has a place in MDE-Edit, whose"
                " own processors run in the layers that it steers. Leave the rest out; what other processors need goes"
                " into them when they are made (`pipe.unet.set_attn_processor`)."
            )
        scale = check_setting('cross_attention_kwargs["scale"]', given.get("scale"), float | None, *LORA_SCALES)
        if inversion is None:
            return {"clip_skip": skip or None, "lora_scale": 1.0 if scale is None else scale}
        own = {"clip_skip": inversion.clip_skip, "lora_scale": inversion.lora_scale}
        if skip is not None and (skip or None) != own["clip_skip"]:
            raise ValueError(
                f"`clip_skip` is {clip_skip} and the inversion was made with {own['clip_skip'] or 0}: leave it out, or"
                " pass it to `pipe.invert`."
            )
        if scale not in (None, own["lora_scale"]):
            raise ValueError(
                f"`cross_attention_kwargs` has a 'scale' of {scale} and the inversion was made with"
                f" {own['lora_scale']}: leave it out, or pass it to `pipe.invert`."
            )
        return own
