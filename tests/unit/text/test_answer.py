"""An answer's text from ids that arrive one at a time or many: the same text, and the stop string's place."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.text.answer import AnswerText
from puna.weights.find import find_model
from puna.weights.load import load

TOKENIZER = load(find_model("cria")).tokenizer
TEXT = "Once upon a time a llama said: hello, é world. The END of it, and more."


def told(cuts: list[int], stops: tuple[str, ...]) -> tuple[str, int]:
    answer, text, used = AnswerText(TOKENIZER, (), stops), "", 0
    ids = TOKENIZER.encode(TEXT, bos=False)
    borders = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    for start, end in pairwise(borders):
        if not answer.stopped:
            piece, count = answer.push(ids[start:end])
            text, used = text + piece, used + count
    return text + answer.finish(), used


@given(
    cuts=st.lists(st.integers(0, 80), max_size=12), stops=st.sampled_from([(), ("END",), ("END", " hello"), ("ever",)])
)
def test_text_and_its_end_do_not_depend_on_how_ids_arrive(cuts: list[int], stops: tuple[str, ...]) -> None:
    whole = TOKENIZER.decode(TOKENIZER.encode(TEXT, bos=False))
    expected = whole[: min([whole.index(stop) for stop in stops if stop in whole], default=len(whole))]
    text, used = told(cuts, stops)
    assert text == expected
    assert used == told(list(range(80)), stops)[1]


@pytest.mark.parametrize("stops", [("llama",), ("a time",)])
def test_ids_after_a_stop_string_are_not_used(stops: tuple[str, ...]) -> None:
    ids = TOKENIZER.encode(TEXT, bos=False)
    answer = AnswerText(TOKENIZER, (), stops)
    text, used = answer.push(ids)
    assert answer.stopped
    assert text == TEXT[: TEXT.index(stops[0])]
    assert stops[0] in TOKENIZER.decode(ids[:used])
    assert stops[0] not in TOKENIZER.decode(ids[: used - 1])
    assert answer.push(ids) == ("", 0)
