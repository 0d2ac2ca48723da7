# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""What the text encoder is asked: prompts, words and embeddings, checked and read.

A mixin of the pipeline, whose tokenizer and text encoder these are. `clip_skip` and `lora_scale` say how a text is
read, and come with each call.
"""

import re
from typing import Any

import torch

from .attention_processors import lock_of, lora_strength
from .checks import check_setting, check_text
from .inversion import LORA_SCALES, Inversion
from .prompts import WordKey, check_prompt_length, find_token_indices, prompt_words


class ReadsPrompts:
    """Mixin of a Stable Diffusion pipeline: its words, prompts and embeddings."""

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

    def embed(self, prompt: str, clip_skip: int | None = None, lora_scale: float = 1.0) -> torch.Tensor:
        """(1, tokens, dim), the text encoder's reading of `prompt`.

        Args:
            clip_skip: how many of the last layers to leave out.
            lora_scale: see [`lora_strength`].
        """
        device = self._execution_device
        with lock_of(self.tokenizer), lora_strength(self.text_encoder, lora_scale):
            if not clip_skip:
                return self.encode_prompt(prompt, device, 1, do_classifier_free_guidance=False)[0]
            # diffusers' own way asks for a `text_model`, which encoders of transformers 5 do not have
            text = self.tokenizer(self.spell_out(prompt), padding="max_length", truncation=True, return_tensors="pt")
            reads_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
            mask = text.attention_mask.to(device) if reads_mask else None
            hidden = self.text_encoder(text.input_ids.to(device), attention_mask=mask, output_hidden_states=True)
            norm = getattr(self.text_encoder, "text_model", self.text_encoder).final_layer_norm
            return norm(hidden.hidden_states[-1 - clip_skip]).to(self.text_encoder.dtype)

    def check_embeds(self, name: str, embeds, count: int = 1) -> list[torch.Tensor] | None:
        """One embedding per prompt, (1, tokens, dim) each; raises `ValueError`, naming the argument, for another shape
        than the text encoder's."""
        if embeds is None:
            return None
        shape = self.embed("").shape[1:]
        right = isinstance(embeds, torch.Tensor) and embeds.is_floating_point() and embeds.shape[1:] == shape
        if not right or len(embeds) not in (1, count) or not torch.isfinite(embeds).all():
            found = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__
            raise ValueError(
                f"`{name}` is {found}: pass finite numbers of shape {(count, *shape)}, as `pipe.encode_prompt` makes"
                " them, and the prompt they are of beside them."
            )
        embeds = embeds.detach().to(self._execution_device)
        return list(embeds.expand(count, *shape).split(1))

    def check_negative(
        self, negative_prompt, negative_prompt_embeds, count: int = 1, lora_scale: float = 1.0
    ) -> list[torch.Tensor] | None:
        """Embeddings of what is not wanted, one per prompt, (1, tokens, dim) each; `None` if nothing was said.

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
        return [self.embed(text, lora_scale=lora_scale) for text in texts]

    def source_embeds(self, inversion: Inversion) -> torch.Tensor:
        """(1, tokens, dim), the source prompt as the inversion was made with it."""
        (own,) = self.check_embeds("inversion.prompt_embeds", inversion.prompt_embeds) or [None]
        return self.embed(inversion.prompt, inversion.clip_skip, inversion.lora_scale) if own is None else own

    def check_reading(self, clip_skip, cross_attention_kwargs, inversion: Inversion | None = None) -> dict[str, Any]:
        """How texts are read and how strong adapters are, `clip_skip` (`None` for 0) and `lora_scale`: as is said, or
        as with `inversion`.

        Raises:
            ValueError: what cannot be used, or is not as with `inversion`; names the argument.
        """
        layers = self.text_encoder.config.num_hidden_layers
        skip = check_setting("clip_skip", clip_skip, int | None, 0, layers)
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
