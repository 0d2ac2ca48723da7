"""Write the CLIP tokenizer of the embedded models: byte-pair encoding trained on the scenes' words.

Every word of a caption is one token. Any other text splits into sub-words, down to bytes: all 256 byte symbols are in
the vocabulary, alone and as the end of a word, in CLIP's own order. The files load with transformers 4 and 5.

    python -m training.tokenizer --out train_out/tokenizer
"""

import argparse
import itertools
import json
from collections import Counter
from pathlib import Path

from transformers import CLIPTokenizer

from training.scenes import WORDS, Caption


MAX_LENGTH = 32  # the longest training caption takes 28 with its start and end
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """The printable stand-ins of the 256 bytes, in CLIP's order (printable bytes first)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index, _ in enumerate(others)]


def train_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one symbol."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for symbols in spelled for pair in itertools.pairwise(symbols)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for symbols in spelled:
            index = 0
            while index < len(symbols) - 1:
                if (symbols[index], symbols[index + 1]) == best:
                    symbols[index : index + 2] = ["".join(best)]
                index += 1
    return merges


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write the tokenizer's files into `folder`, and load it from there."""
    merges = train_merges((*WORDS, ","))
    symbols = byte_symbols()
    vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges), START, END]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "add_prefix_space": False,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": MAX_LENGTH,
    }
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {name: config[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def caption_tokens(tokenizer: CLIPTokenizer, caption: Caption) -> tuple[list[int], list[int]]:
    """Token ids of a caption, padded to `MAX_LENGTH`, and for each the index of the object it names (-1: none)."""
    named = {}
    for index, (noun, attributes) in enumerate(zip(caption.nouns, caption.attributes, strict=True)):
        named |= dict.fromkeys((noun, *attributes), index)
    ids, objects = [tokenizer.bos_token_id], [-1]
    for place, word in enumerate(caption.text.split()):
        pieces = _word_ids(tokenizer, word)
        ids += pieces
        # A comma is a token of its own and names nothing.
        objects += [named.get(place, -1)] + [-1] * (len(pieces) - 1)
    if len(ids) >= MAX_LENGTH:
        raise ValueError(f"caption of {len(ids) + 1} tokens: {caption.text!r}")
    padding = MAX_LENGTH - len(ids)
    return ids + [tokenizer.eos_token_id] * padding, objects + [-1] * padding


_CACHE: dict[tuple[int, str], list[int]] = {}


def _word_ids(tokenizer: CLIPTokenizer, word: str) -> list[int]:
    key = id(tokenizer), word
    if key not in _CACHE:
        _CACHE[key] = tokenizer(word, add_special_tokens=False).input_ids
    return _CACHE[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("train_out/tokenizer"))
    tokenizer = write_tokenizer(parser.parse_args().out)
    print(f"{len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
