from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.attacks.vocabulary import Vocabulary, banned_tokens, find_banned, whole_words
from safetydpo.errors import SafetyDPOError

WHOLE = ("a", "bomb", "ball", "on", "shell", "bombshell", "Big", "!", "bobm")
TOKENS = ["a</w>", "bomb</w>", "bo", "mb</w>", *(f"{word}</w>" for word in WHOLE[2:])]
PIECES = {"bobs": [2, 3]}


def read(texts: Sequence[str]) -> list[list[int]]:
    """Read texts as whole words, `bobs` as two pieces, and `mb` as a letter, so that it is not read back as itself."""
    table = {text.removesuffix("</w>"): [number] for number, text in enumerate(TOKENS)} | PIECES | {"mb": [0]}
    return [[number for word in text.split() for number in table.get(word, [])] for text in texts]


VOCABULARY = whole_words(TOKENS, read)


def test_words_are_small_ascii_letters_that_are_read_back_as_themselves() -> None:
    """`bo` ends no word, `Big` has a capital, `!` no letter, and `mb` is read as another token."""
    assert list(VOCABULARY.words.values()) == ["a", "bomb", "ball", "on", "shell", "bombshell", "bobm"]


def test_banned_tokens_by_hand() -> None:
    """`bobs on a`: its tokens are bo, mb, on and a; no other word shares three letters with one of its words."""
    assert banned_tokens(VOCABULARY, ["bobs on a"]) == {2, 3, 5, 0}


def test_a_word_inside_a_name_and_a_name_inside_a_word_are_banned() -> None:
    assert banned_tokens(VOCABULARY, ["bombshell"]) == {1, 6, 7}  # bomb, shell, bombshell
    assert banned_tokens(VOCABULARY, ["bomb"]) == {1, 7}  # bombshell has it inside


def test_all_aliases_count_and_case_does_not() -> None:
    assert banned_tokens(VOCABULARY, ["Ball", "bobm"]) == {4, 10}


def test_what_is_allowed_has_nothing_of_the_names() -> None:
    assert VOCABULARY.allowed(["bomb", "a ball"]).tolist() == [5, 6, 10]
    assert VOCABULARY.write([5, 6]) == "on shell"


def test_banned_tokens_of_a_text_are_found_in_its_order() -> None:
    assert find_banned(VOCABULARY, "shell on bombshell bomb", ["bomb"]) == [7, 1]
    assert find_banned(VOCABULARY, "shell on", ["bomb"]) == []


@given(st.lists(st.sampled_from(["bomb", "ball", "on", "shell", "bobs"]), min_size=1, max_size=2))
def test_no_allowed_word_is_a_token_of_a_name(names: list[str]) -> None:
    own = {number for tokens in read(names) for number in tokens}
    assert not own & set(VOCABULARY.allowed(names).tolist())


def test_no_name_bans_nothing_and_is_refused() -> None:
    with pytest.raises(SafetyDPOError, match="expected the names of a concept, found none"):
        banned_tokens(VOCABULARY, [])


def test_a_vocabulary_that_is_all_names_is_refused() -> None:
    few = Vocabulary({1: "bomb"}, read)
    with pytest.raises(SafetyDPOError, match="found none left of 1: give fewer names"):
        few.allowed(["bomb"])


def test_no_words_are_no_error() -> None:
    assert whole_words(["bo", "!"], read).words == {}


@given(
    st.lists(st.text("abo", min_size=1, max_size=5), min_size=1, max_size=12, unique=True),
    st.lists(st.text("abo ", min_size=1, max_size=7).filter(str.strip), min_size=1, max_size=4),
)
def test_banned_are_those_that_a_loop_over_all_pairs_finds(words: list[str], names: list[str]) -> None:
    """Tokens are whole words here, and a name's word that is none is read as nothing."""
    number_of = {word: number for number, word in enumerate(words)}

    def read(texts: Sequence[str]) -> list[list[int]]:
        return [[number_of[part] for part in text.split() if part in number_of] for text in texts]

    parts = {part for name in names for part in name.split()}
    expected = {
        number
        for word, number in number_of.items()
        for part in parts
        if word == part or (len(part) >= 3 and (part in word or (len(word) >= 3 and word in part)))
    }
    assert banned_tokens(Vocabulary(dict(enumerate(words)), read), names) == expected
