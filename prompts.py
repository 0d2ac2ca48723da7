# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""Prompts as tokens: where a word stands ([`find_token_indices`]), what two prompts share ([`align_tokens`], Eq. 3)."""

import numbers
from collections.abc import Sequence
from typing import NamedTuple, Union

import torch


# A word or phrase, its k-th occurrence, or token positions, as users name what a mask is for.
WordKey = Union[str, tuple[str, int], int, tuple[int, ...]]

# Marks of the sentence, which around a word do not belong to it ("dog," is "dog"); those of "$5" and "c++" do.
_SURROUNDING = frozenset(".,;:!?…'\"`()[]{}«»‹›„“”‚‘’¡¿。，、！？；：-–—")

# Words that name nothing to be seen; between two of them is a phrase ("a cat wearing a straw hat": cat, straw hat).
_CONNECTING = frozenset(
    """a an the this that its his her their and or of in on at with without wearing holding having to by from into onto
    near under over above below behind before beside between next through across around is are as for some two three
    """.split()
)


def _content_ids(tokenizer, text: str) -> list[int]:
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


def prompt_words(tokenizer, prompt: str) -> list[tuple[str, tuple[int, ...]]]:
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
            words.append((text.strip(" "), tuple(range(start + 1, position + 2))))
            start = position + 1
    return words


def prompt_phrases(tokenizer, prompt: str) -> list[tuple[int, ...]]:
    """Token positions of each phrase of `prompt` that names something: the words between connecting ones and marks."""
    phrases: list[tuple[int, ...]] = []
    within = False
    for word, positions in prompt_words(tokenizer, prompt):
        names = word not in _CONNECTING and any(letter.isalnum() for letter in word)
        if names and within:
            phrases[-1] += positions
        elif names:
            phrases.append(positions)
        within = names
    return phrases


def find_token_indices(tokenizer, prompt: str, key: WordKey) -> tuple[int, ...]:
    """Token positions (0 is the start token) of what `key` names in `prompt`.

    Args:
        key: a word or phrase (`"dog"`, `"polar bear"`; case and the sentence's punctuation around it do not matter;
            `"$5"`, `"🐶"`, `"&"`, `"!"` are words), one occurrence of it (`("dog", 1)` is the second), or positions
            themselves (`5`, `(5, 6)`).

    Raises:
        ValueError: the word is not in the prompt, occurs several times and none was chosen, or a position is out of
            range. The message lists what can be named.
    """
    words = prompt_words(tokenizer, prompt)
    last = max((positions[-1] for _, positions in words), default=0)
    parts = key if isinstance(key, tuple) else (key,)
    if parts and all(isinstance(k, numbers.Integral) and not isinstance(k, bool) for k in parts):
        indices = tuple(sorted({int(k) for k in parts}))
        if indices[0] < 1 or indices[-1] > last:
            raise ValueError(
                f"Token position {key!r} is not a word of the prompt {prompt!r}: its words are at 1..{last}."
            )
        return indices

    text, occurrence = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
    whole = isinstance(occurrence, numbers.Integral) and not isinstance(occurrence, bool)
    if not isinstance(text, str) or not (occurrence is None or whole):
        raise ValueError(
            f"{key!r} does not name a word: use a word ('dog'), one occurrence of it (('dog', 1)) or token positions"
            " (5 or (5, 6))."
        )
    wanted = [word for word, _ in prompt_words(tokenizer, text)]
    inner = [i for i, word in enumerate(wanted) if not set(word) <= _SURROUNDING]
    if inner:  # else a mark is what is meant
        wanted = wanted[inner[0] : inner[-1] + 1]
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


def _common_subsequence(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
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
    mapper = torch.zeros(total, dtype=torch.long, device="cpu")
    shared = torch.zeros(total, dtype=torch.bool, device="cpu")
    for i, j in pairs:
        mapper[j], shared[j] = i, True
    return TokenAlignment(mapper, shared)
