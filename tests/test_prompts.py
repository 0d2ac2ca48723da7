"""Words to token positions and prompts to an alignment."""

import itertools
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mde_edit.prompts import align_tokens, check_prompt_length, find_token_indices, prompt_words

from .conftest import WORDS


# "zebra", "giraffe" and "strawcat" are split into pieces; the last two end in pieces that are words of their own.
words = st.sampled_from([*WORDS, "zebra", "giraffe", "bobcat", "strawcat"])
prompts = st.lists(words, min_size=1, max_size=8)


@given(prompts, st.data())
def test_a_word_is_found_at_its_occurrence(tokenizer, prompt, data):
    text = " ".join(prompt)
    place = data.draw(st.integers(0, len(prompt) - 1))
    occurrence = prompt[:place].count(prompt[place])
    indices = find_token_indices(tokenizer, text, (prompt[place], occurrence))
    ids = tokenizer(text).input_ids
    assert tokenizer.decode([ids[i] for i in indices]).strip() == prompt[place]
    before = tokenizer(" ".join(prompt[:place]), add_special_tokens=False).input_ids if place else []
    assert indices[0] == 1 + len(before)


@given(prompts, words, st.sampled_from([",", "!", ".", "..."]))
def test_case_punctuation_and_spaces_do_not_matter(tokenizer, prompt, word, mark):
    text = " ".join([*prompt, word])
    occurrence = prompt.count(word)
    plain = find_token_indices(tokenizer, text, (word, occurrence))
    assert find_token_indices(tokenizer, text.upper(), (word.title(), occurrence)) == plain
    assert find_token_indices(tokenizer, text.replace(" ", "   ") + mark, (word + mark, occurrence)) == plain


def test_a_word_inside_another_is_not_found(tokenizer):
    with pytest.raises(ValueError, match="'cat' is not in the prompt 'a bobcat on grass'"):
        find_token_indices(tokenizer, "a bobcat on grass", "cat")
    assert find_token_indices(tokenizer, "a bobcat and a cat", "cat") == (
        len(tokenizer("a bobcat and a").input_ids) - 1,
    )


def test_phrases_positions_and_words_agree(tokenizer):
    prompt = "a polar bear, and a cat"
    assert find_token_indices(tokenizer, prompt, "polar bear") == (2, 3)
    assert find_token_indices(tokenizer, prompt, (2, 3)) == (2, 3)
    assert find_token_indices(tokenizer, prompt, 7) == find_token_indices(tokenizer, prompt, "cat") == (7,)
    assert prompt_words(tokenizer, prompt)[-1] == ("cat", (7,))


@pytest.mark.parametrize(
    "key,message",
    [
        ("dog", "'dog' is not in the prompt .* Its words are: 'a', 'cat'"),
        ("", "is not in the prompt"),
        ("?", "is not in the prompt"),
        ("a", r"'a' occurs 2 times .* choose one of \('a', 0\), \('a', 1\)"),
        (("a", 2), "no occurrence 2"),
        (("a", -1), "no occurrence -1"),
        (0, "Token position 0"),
        (7, r"its words are at 1\.\.6"),
        ((1, 90), "Token position"),
        (None, "does not name a word"),
        (("cat", "dog"), "does not name a word"),
        ((), "does not name a word"),
    ],
)
def test_keys_that_name_nothing_are_refused(tokenizer, key, message):
    with pytest.raises(ValueError, match=message):
        find_token_indices(tokenizer, "a cat and a tiger !", key)


def test_a_prompt_longer_than_the_text_encoder_is_refused(tokenizer):
    check_prompt_length(tokenizer, " ".join(["cat"] * 75))
    with pytest.raises(ValueError, match="has 76 tokens and the text encoder reads 75"):
        check_prompt_length(tokenizer, " ".join(["cat"] * 76))


def longest_common_subsequence(a, b):
    for size in range(min(len(a), len(b)), 0, -1):
        if any(c in set(itertools.combinations(b, size)) for c in itertools.combinations(a, size)):
            return size
    return 0


@given(prompts, prompts)
def test_alignment_is_an_order_keeping_match_of_equal_tokens(tokenizer, source, target):
    source_text, target_text = " ".join(source), " ".join(target)
    alignment = align_tokens(tokenizer, source_text, target_text)
    source_ids = tokenizer(source_text, padding="max_length").input_ids
    target_ids = tokenizer(target_text, padding="max_length").input_ids
    matched = [(int(alignment.mapper[j]), j) for j in range(77) if alignment.shared[j]]
    assert all(source_ids[i] == target_ids[j] for i, j in matched)
    assert matched == sorted(matched) and len({i for i, _ in matched}) == len(matched)
    # Words only match words, padding only padding, start and end each other.
    source_end, target_end = source_ids.index(tokenizer.eos_token_id), target_ids.index(tokenizer.eos_token_id)
    assert all((i < source_end) == (j < target_end) and (i > source_end) == (j > target_end) for i, j in matched)
    assert {(0, 0), (source_end, target_end)} <= set(matched)
    padding = sum(j > target_end for _, j in matched)
    assert padding == 76 - max(source_end, target_end)


@given(*[st.lists(st.sampled_from(["a", "cat", "dog", "red"]), min_size=1, max_size=6)] * 2)
def test_alignment_shares_as_many_words_as_possible(tokenizer, source, target):
    shared = align_tokens(tokenizer, " ".join(source), " ".join(target)).shared
    assert int(shared[1 : 1 + len(target)].sum()) == longest_common_subsequence(source, target)


def test_padding_never_takes_the_map_of_a_word(tokenizer):
    """The official code maps padding by index, so a shorter target's padding receives words of the source."""
    source, target = "a cat on the big old wooden table", "a dog on the table"
    alignment = align_tokens(tokenizer, source, target)
    assert [int(alignment.mapper[j]) for j in (1, 3, 4, 5, 6)] == [1, 3, 4, 8, 9]
    assert not alignment.shared[2] and not alignment.shared[7:10].any()
    assert alignment.shared[10:].all() and alignment.mapper[10:].tolist() == list(range(10, 77))


def test_equal_prompts_share_everything(tokenizer):
    alignment = align_tokens(tokenizer, "a cat", "a cat")
    assert alignment.shared.all() and alignment.mapper.tolist() == list(range(77))
    assert not alignment.without([2]).shared[2]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12))
@example("a 🐶 & a $5 dog, 50% c++ c# !")
@example("e\u0301 न\u093f \u0301 \u200d👩\u200d🚀 'İ it's <b>")
def test_every_token_belongs_to_a_word_that_can_be_named(tokenizer, prompt):
    words = prompt_words(tokenizer, prompt)
    count = len(tokenizer(prompt, add_special_tokens=False, truncation=False).input_ids)
    assert [i for _, positions in words for i in positions] == list(range(1, count + 1))
    seen = Counter()
    for word, positions in words:
        assert find_token_indices(tokenizer, prompt, (word, seen[word])) == positions
        seen[word] += 1


@pytest.mark.parametrize(
    "word", ["🐶", "&", "$5", "50%", "c++", "c#", "e\u0301", "न\u093f", "#1", "@home", "it's", "!"]
)
def test_a_word_keeps_all_of_its_marks(tokenizer, word):
    before, after = "a dog and ", " on grass"
    start, end = (len(tokenizer(text, add_special_tokens=False).input_ids) for text in (before, before + word))
    positions = tuple(range(start + 1, end + 1))
    assert find_token_indices(tokenizer, before + word + after, word) == positions
