# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""Attention control: who attends to what, which pass records, which pass injects.

Three things live here, and no state outlives a call:

* prompts as tokens: [`find_token_indices`] (a word's places), [`align_tokens`] (what two prompts share);
* the U-Net's attention layers: [`attention_layers`] (name, kind, spatial size, in execution order);
* the control itself: inside [`attention_control`] every layer obeys the [`Record`] or [`Inject`] that the caller hands
  to *that* U-Net call as `cross_attention_kwargs={"control": ...}`; a call without one is the model's own.
"""

import re
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F


# A word or phrase, its k-th occurrence, or token positions, as users name what a mask is for.
WordKey = Union[str, Tuple[str, int], int, Tuple[int, ...]]


# ---------------------------------------------------------------------------------------------------------------------
# Prompts as tokens
# ---------------------------------------------------------------------------------------------------------------------


def _content_ids(tokenizer, text: str) -> List[int]:
    """Token ids of `text` without the start, end and padding tokens, never truncated."""
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


def check_prompt_length(tokenizer, prompt: str) -> None:
    """Raise `ValueError` if `prompt` has more tokens than the text encoder reads (the rest would be cut off)."""
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    count = len(_content_ids(tokenizer, prompt))
    if count > room:
        raise ValueError(
            f"The prompt {prompt!r} has {count} tokens and the text encoder reads {room}: shorten it, since the words"
            " after that would be dropped without a trace."
        )


def prompt_words(tokenizer, prompt: str) -> List[Tuple[str, Tuple[int, ...]]]:
    """The words of `prompt` as the tokenizer splits it, each with its token positions in the encoded prompt.

    Punctuation marks are words of their own. Position 0 is the start token, so the first word begins at 1.
    """
    ids = _content_ids(tokenizer, prompt)
    words, start = [], 0
    for position, (token, token_id) in enumerate(zip(tokenizer.convert_ids_to_tokens(ids), ids)):
        # CLIP's BPE marks the last piece of a word; added tokens (textual inversion) are whole words.
        if token.endswith("</w>") or token_id in tokenizer.added_tokens_decoder or position + 1 == len(ids):
            # a deep copy of a fast tokenizer (transformers 5) decodes without removing the marks
            text = tokenizer.decode(ids[start : position + 1]).replace("</w>", "")
            words.append((text.strip(), tuple(range(start + 1, position + 2))))
            start = position + 1
    return words


def find_token_indices(tokenizer, prompt: str, key: WordKey) -> Tuple[int, ...]:
    """Token positions (0 is the start token) of what `key` names in `prompt`.

    Args:
        key: a word or phrase (`"dog"`, `"polar bear"`; case and surrounding punctuation do not matter), one occurrence
            of it (`("dog", 1)` is the second), or positions themselves (`5`, `(5, 6)`).

    Raises:
        ValueError: the word is not in the prompt, occurs several times and none was chosen, or a position is out of
            range. The message lists what can be named.
    """
    words = prompt_words(tokenizer, prompt)
    last = max((positions[-1] for _, positions in words), default=0)
    if isinstance(key, int) or (isinstance(key, tuple) and key and all(isinstance(k, int) for k in key)):
        indices = (key,) if isinstance(key, int) else tuple(sorted(set(key)))
        if indices[0] < 1 or indices[-1] > last:
            raise ValueError(
                f"Token position {key!r} is not a word of the prompt {prompt!r}: its words are at 1..{last}."
            )
        return indices

    text, occurrence = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
    if not isinstance(text, str) or not (occurrence is None or isinstance(occurrence, int)):
        raise ValueError(
            f"{key!r} does not name a word: use a word ('dog'), one occurrence of it (('dog', 1)) or token positions"
            " (5 or (5, 6))."
        )
    wanted = [word for word, _ in prompt_words(tokenizer, text)]
    while wanted and not re.search(r"\w", wanted[-1]):
        wanted.pop()
    while wanted and not re.search(r"\w", wanted[0]):
        wanted.pop(0)
    spelled = [word for word, _ in words]
    starts = [i for i in range(len(words) - len(wanted) + 1) if wanted and spelled[i : i + len(wanted)] == wanted]
    if not starts:
        raise ValueError(f"{text!r} is not in the prompt {prompt!r}. Its words are: {', '.join(map(repr, spelled))}.")
    if occurrence is None and len(starts) > 1:
        choices = ", ".join(repr((text, k)) for k in range(len(starts)))
        raise ValueError(f"{text!r} occurs {len(starts)} times in the prompt {prompt!r}: choose one of {choices}.")
    if not 0 <= (occurrence or 0) < len(starts):
        raise ValueError(f"{text!r} occurs {len(starts)} times in {prompt!r}: there is no occurrence {occurrence}.")
    start = starts[occurrence or 0]
    return tuple(i for _, positions in words[start : start + len(wanted)] for i in positions)


class TokenAlignment(NamedTuple):
    """Which tokens of the target prompt stand in the source prompt too (the `j` of Eq. 3).

    mapper: (tokens,) int64, for each target position its source position (0 where it has none).
    shared: (tokens,) bool, True where the target token has a source position.
    """

    mapper: torch.Tensor
    shared: torch.Tensor

    def to(self, device) -> "TokenAlignment":
        return TokenAlignment(self.mapper.to(device), self.shared.to(device))

    def without(self, indices: Sequence[int]) -> "TokenAlignment":
        """The same alignment with `indices` (target positions) taken as new words: they keep their own maps."""
        shared = self.shared.clone()
        shared[list(indices)] = False
        return TokenAlignment(self.mapper, shared)


def _common_subsequence(a: Sequence[int], b: Sequence[int]) -> List[Tuple[int, int]]:
    """Index pairs of a longest common subsequence of `a` and `b` (global alignment: gap 0, match 1, no mismatches)."""
    length = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]  # length[i][j]: best for a[i:], b[j:]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            length[i][j] = length[i + 1][j + 1] + 1 if a[i] == b[j] else max(length[i + 1][j], length[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif length[i + 1][j] >= length[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs


def align_tokens(tokenizer, source_prompt: str, prompt: str) -> TokenAlignment:
    """Align the tokens of `prompt` with those of `source_prompt` (Eq. 3; P2P's "refine").

    Words are matched in order (longest common subsequence of token ids), the start and end tokens with each other, and
    the padding from its end. Padding is never matched with a word, as the official code does when the source prompt is
    the longer one.
    """
    total = tokenizer.model_max_length
    source, target = _content_ids(tokenizer, source_prompt), _content_ids(tokenizer, prompt)
    pairs = [(0, 0), (len(source) + 1, len(target) + 1)]  # start and end tokens
    pairs += [(i + 1, j + 1) for i, j in _common_subsequence(source, target)]
    padding = total - 2 - max(len(source), len(target))
    pairs += [(total - k, total - k) for k in range(1, padding + 1)]
    mapper, shared = torch.zeros(total, dtype=torch.long), torch.zeros(total, dtype=torch.bool)
    for i, j in pairs:
        mapper[j], shared[j] = i, True
    return TokenAlignment(mapper, shared)


# ---------------------------------------------------------------------------------------------------------------------
# The U-Net's attention layers
# ---------------------------------------------------------------------------------------------------------------------


class AttentionLayer(NamedTuple):
    """One attention layer of the U-Net: its name among `unet.attn_processors`, its kind, its (height, width)."""

    name: str
    is_cross: bool
    size: Tuple[int, int]

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]


def attention_layers(unet, latent_size: Tuple[int, int]) -> List[AttentionLayer]:
    """All attention layers of an SD-shaped `unet` for latents of `latent_size` (h, w), in execution order."""
    sizes = [tuple(latent_size)]  # size at which each down block attends
    for block in unet.down_blocks:
        h, w = sizes[-1]
        # a stride-2 convolution with padding 1 rounds up
        sizes.append(((h + 1) // 2, (w + 1) // 2) if block.downsamplers is not None else (h, w))
    levels = len(unet.down_blocks)
    stage = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}

    layers = []
    for name in unet.attn_processors:
        place, numbers = name.split(".")[0], [int(n) for n in re.findall(r"\.(\d+)", name)]
        if "transformer_blocks" not in name or place not in stage:
            raise ValueError(f"The U-Net's attention layer {name!r} is not of Stable Diffusion 1.x/2.x's shape.")
        level = {"down_blocks": numbers[0], "mid_block": levels - 1, "up_blocks": levels - 1 - numbers[0]}[place]
        is_cross = ".attn2." in name
        layers.append(((stage[place], *numbers, is_cross), AttentionLayer(name, is_cross, sizes[level])))
    return [layer for _, layer in sorted(layers)]


# ---------------------------------------------------------------------------------------------------------------------
# Control
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """Source pass (batch 1): keep what the edit will need. The dictionaries are filled by the pass.

    cross: layer name -> (heads, pixels, tokens) fp32, the probabilities A of Eq. 2.
    self_qk: layer name -> query and key, each (1, heads, pixels, head_dim).
    """

    cross_layers: frozenset
    self_layers: frozenset
    cross: Dict[str, torch.Tensor] = field(default_factory=dict)
    self_qk: Dict[str, Tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def reads(self, name: str) -> bool:
        return name in self.cross_layers or name in self.self_layers


@dataclass(frozen=True)
class Inject:
    """Target pass: take the source's attention where the prompts agree (Eq. 3). Acts on the last row of the batch.

    Rows before the last (the unconditional one of classifier-free guidance) are left as they are.

    cross: layer name -> (heads, pixels, tokens), the source's maps on the target's shared tokens ([`align_maps`]).
    shared: (tokens,) bool, the tokens those maps replace; the others keep the target's own map.
    self_qk: layer name -> the source's query and key; the target's value is weighted by them.
    capture_layers, captured: layers whose *own* map A* (before injection) the pass puts into `captured`.
    exit_after: name of the layer at which the pass ends with [`UNetExit`]: what comes after has no reader.
    """

    cross: Dict[str, torch.Tensor]
    shared: torch.Tensor
    self_qk: Dict[str, Tuple[torch.Tensor, torch.Tensor]]
    capture_layers: frozenset = frozenset()
    captured: Dict[str, torch.Tensor] = field(default_factory=dict)
    exit_after: Optional[str] = None

    def reads(self, name: str) -> bool:
        return name in self.cross or name in self.self_qk or name in self.capture_layers


class UNetExit(Exception):
    """Ends a U-Net pass at the last layer anyone reads; caught by whoever asked for it with `Inject.exit_after`."""


def align_maps(maps: Dict[str, torch.Tensor], alignment: TokenAlignment) -> Dict[str, torch.Tensor]:
    """Source maps (heads, pixels, source tokens) on the target's token positions, zero at its new tokens."""
    return {name: m[..., alignment.mapper] * alignment.shared for name, m in maps.items()}


class MDEAttnProcessor:
    """An attention layer that obeys the `control` of the call, and is the layer's own processor without one."""

    def __init__(self, name: str, original):
        self.name = name
        self.original = original

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, control=None
    ) -> torch.Tensor:
        if control is None or not control.reads(self.name):
            return self.original(
                attn, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask
            )

        def split_heads(states):  # (batch, tokens, heads * head_dim) -> (batch, heads, tokens, head_dim)
            return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        if encoder_hidden_states is None:
            context, attend = hidden_states, self._self_attention
        else:
            context, attend = encoder_hidden_states, self._cross_attention
            if attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)
        out = attend(attn, hidden_states, context, split_heads, control)
        out = out.transpose(1, 2).flatten(-2).to(hidden_states.dtype)  # (batch, pixels, heads * head_dim)
        for layer in attn.to_out:  # linear, dropout
            out = layer(out)
        return out / attn.rescale_output_factor

    def _self_attention(self, attn, hidden_states, context, split_heads, control):
        value = split_heads(attn.to_v(context))
        if isinstance(control, Record):
            query, key = split_heads(attn.to_q(hidden_states)), split_heads(attn.to_k(context))
            control.self_qk[self.name] = (query, key)
        else:
            query, key = control.self_qk[self.name]
            if len(hidden_states) > 1:  # the rows before the last attend by themselves
                query = torch.cat([split_heads(attn.to_q(hidden_states[:-1])), query])
                key = torch.cat([split_heads(attn.to_k(context[:-1])), key])
        return F.scaled_dot_product_attention(query, key, value, scale=attn.scale)

    def _cross_attention(self, attn, hidden_states, context, split_heads, control):
        query, key, value = (split_heads(f) for f in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        # Eq. 2 in fp32, for the row that is recorded or injected only.
        scores = query[-1].float() @ key[-1].float().transpose(-1, -2) * attn.scale
        probs = scores.softmax(dim=-1)  # (heads, pixels, tokens), sums to 1 over tokens
        if isinstance(control, Record):
            control.cross[self.name] = probs
        else:
            if self.name in control.capture_layers:
                control.captured[self.name] = probs
            if self.name == control.exit_after:
                raise UNetExit
            if self.name in control.cross:
                probs = control.cross[self.name] + probs * ~control.shared  # Eq. 3
        out = (probs.to(value.dtype) @ value[-1])[None]
        if len(value) > 1:
            others = F.scaled_dot_product_attention(query[:-1], key[:-1], value[:-1], scale=attn.scale)
            out = torch.cat([others, out])
        return out


@contextmanager
def attention_control(unet):
    """The one place that touches the U-Net: freezes its weights and lets each call bring its own control.

    Processors and every parameter's `requires_grad` are put back on any exit, also after an exception. A compiled U-Net
    runs uncompiled inside: controls change from call to call, and a pass may leave in the middle.
    """
    processors = dict(unet.attn_processors)
    # by name: CPU offload replaces the parameters it moves
    grads = {name: p.requires_grad for name, p in unet.named_parameters()}
    set_stance = getattr(torch.compiler, "set_stance", nullcontext)  # torch 2.6
    try:
        unet.requires_grad_(False)
        unet.set_attn_processor({name: MDEAttnProcessor(name, original) for name, original in processors.items()})
        with set_stance("force_eager"):
            yield
    finally:
        unet.set_attn_processor(dict(processors))  # it empties the dictionary it is given
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(grads[name])
