"""The incremental detokenizer equals decoding the whole; stop strings across token borders."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.errors import TokenizerError, UsageError
from puna.text.detokenizer import Detokenizer, StopStrings
from puna.text.tokenizer import Tokenizer, load_tokenizer

FILES = [
    "tokenizers/llama2/tokenizer.model",
    "tokenizers/llama2/tokenizer.json",
    "tokenizers/llama2/tokenizer.bin",
    "tokenizers/llama3/tokenizer.model",
]


@pytest.fixture(scope="module", params=FILES)
def tokenizer(request: pytest.FixtureRequest, reference: Path) -> Tokenizer:
    return load_tokenizer(reference / request.param)


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int], *, skip_special: bool = False) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special=skip_special)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


def test_pieces_join_to_the_whole(tokenizer: Tokenizer, strings: Callable[[int], list[str]]) -> None:
    for text in strings(300):
        for prompt in ([], [tokenizer.bos_id]):
            pieces = streamed(tokenizer, tokenizer.encode(text), prompt)
            assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))
            # Nothing is half a character: replacement characters only where the text itself has them.
            assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


def test_random_ids_with_invalid_utf8(tokenizer: Tokenizer) -> None:
    """Random tokens are full of broken characters; the stream must replace them as bytes.decode does the whole."""
    random_ = random.Random(1)
    low = list(range(300)) if tokenizer.kind != "tiktoken" else [*range(256), 128_000, 128_009]
    for n in range(300):
        choice = low if n % 2 else range(tokenizer.vocab_size)
        ids = random_.choices(choice, k=random_.randrange(1, 12))
        for skip in (False, True):
            joined = "".join(streamed(tokenizer, ids, [], skip_special=skip))
            assert joined == tokenizer.decode(ids, skip_special=skip)


def test_an_answer_is_the_whole_minus_its_prompt(tokenizer: Tokenizer, strings: Callable[[int], list[str]]) -> None:
    random_ = random.Random(2)
    for text in strings(200):
        ids = tokenizer.encode("Once " + text + " end", bos=True)
        cut = random_.randrange(1, len(ids))
        whole, prompt = tokenizer.decode(ids), tokenizer.decode(ids[:cut])
        answer = "".join(streamed(tokenizer, ids[cut:], ids[:cut]))
        if prompt.endswith("\ufffd"):  # the cut is inside a character, which belongs to the answer
            assert whole.endswith(answer)
        else:
            assert prompt + answer == whole


def test_leading_space_of_llama2(reference: Path) -> None:
    tokenizer = load_tokenizer(reference / FILES[0])
    ids = tokenizer.encode("Once upon")
    assert streamed(tokenizer, ids, [1]) == ["Once", " upon", ""]  # from BOS alone: no dummy space
    assert streamed(tokenizer, ids, [1, *tokenizer.encode("Hi")]) == [" Once", " upon", ""]


def test_a_character_is_held_until_it_is_whole(reference: Path) -> None:
    tokenizer = load_tokenizer(reference / FILES[0])
    llama = [3 + b for b in "🦙".encode()]
    assert streamed(tokenizer, llama, [1, 4]) == ["", "", "", "🦙", ""]
    assert streamed(tokenizer, llama[:3], [1, 4]) == ["", "", "", "\ufffd"]
    assert streamed(tokenizer, [*llama[:3], 3 + ord("a")], [1, 4]) == ["", "", "", "\ufffda", ""]
    assert streamed(tokenizer, llama[2:], [1, 4, *llama[:2]]) == ["", "🦙", ""]  # begun by the prompt


def test_unknown_ids_are_refused(llama2c_file: Path) -> None:
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        Detokenizer(load_tokenizer(llama2c_file)).push(9_999)


# --- stop strings ----------------------------------------------------------------------------------------------------


def run_stops(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    scanner = StopStrings(stops)
    text = "".join(map(scanner.push, pieces)) + scanner.flush()
    return text, scanner.hit


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "hit"),
    [
        (["END"], ["one E", "N", "D two"], "one ", "END"),
        (["END"], ["one E", "N"], "one EN", None),
        (["END"], ["EEN", "DEND"], "E", "END"),
        (["aab"], ["aaa", "ab"], "aa", "aab"),
        (["\n\n", "User:"], ["Hi", "\n", "\nUser:"], "Hi", "\n\n"),
        (["bc", "abc"], ["xabcd"], "x", "abc"),  # complete at the same character: the one that began first
        (["abcd", "bc"], ["abcd"], "a", "bc"),  # complete first
        ([], ["a", "b"], "ab", None),
        (["🦙"], ["a🦙", "b"], "a", "🦙"),
    ],
)
def test_stop_strings(stops: list[str], pieces: list[str], text: str, hit: str | None) -> None:
    assert run_stops(stops, pieces) == (text, hit)


def test_text_is_held_only_while_it_may_be_a_stop() -> None:
    scanner = StopStrings(["abc"])
    assert [scanner.push(piece) for piece in ("xa", "b", "d", "ab", "c", "more")] == ["x", "", "abd", "", "", ""]
    assert (scanner.hit, scanner.flush()) == ("abc", "")


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
)
def test_stop_strings_do_not_depend_on_the_borders(stops: list[str], pieces: list[str]) -> None:
    """Against the definition: the shortest beginning of the text that ends with a stop; the longest stop there."""
    whole = "".join(pieces)
    expected: tuple[str, str | None] = (whole, None)
    for end in range(len(whole) + 1):
        found = [stop for stop in stops if whole[:end].endswith(stop)]
        if found:
            hit = max(found, key=len)
            expected = (whole[: end - len(hit)], hit)
            break
    assert run_stops(stops, pieces) == expected


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopStrings(["ok", ""])
