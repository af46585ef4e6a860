"""The prompt of a gap, against transformers' own tokenizer of Code Llama and Meta's way of putting ids together.

No tokenizer of Code Llama is at hand, so one is built: Llama 2's with sixteen pieces more, the marks of a gap at the
ids that they have in Code Llama (32007 to 32010), as ordinary pieces, which they are there.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import TokenizerError, UsageError
from puna.text.infill import gap_follows, infill_ids, infills, split_at_mark
from puna.text.tokenizer import INFILL_NAMES, Tokenizer, load_tokenizer
from puna.types import Infill

PRE, SUF, MID, EOT = 32007, 32008, 32009, 32010

CODE = [
    ("def remove_non_ascii(s: str) -> str:\n    \"\"\" ", "\n    return result\n"),
    ("# Installation instructions:\n    ```bash\n", "\n    ```\nThis downloads the code and installs it.\n"),
    ("class Factory(Abstract):\n    def __init__(", "\ndef main():\n    factory = Factory(start=now())\n"),
    ("π₁ P = 0 ↔ ", " = 0 :=\nbegin\nsplit,\n  simp [←pi_1, h],\nend\n"),
    (" x", " y"),
    ("\tif a:\n\t\t", "\t\treturn 1"),
    ("日本", "語 🦙"),
    ("a", "a"),
]  # fmt: skip


def _piece(text: str, score: float, kind: bytes = b"") -> bytes:
    body = b"\n" + bytes([len(text.encode())]) + text.encode() + b"\x15" + struct.pack("<f", score) + kind
    return b"\n" + bytes([len(body)]) + body


def extended(model: bytes, kind: bytes = b"") -> bytes:
    """Llama 2's sentencepiece model with the pieces of Code Llama at their ids, as a kind that is said or left out."""
    names = [
        *(f"▁<filler{n}" for n in range(7)),
        "▁<PRE>",
        "▁<SUF>",
        "▁<MID>",
        "▁<EOT>",
        *(f"▁<f{n}" for n in range(5)),
    ]
    return model + b"".join(_piece(name, -1e6 - n, kind) for n, name in enumerate(names))


@pytest.fixture(scope="module")
def code(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("codellama") / "tokenizer.model"
    path.write_bytes(extended((reference / "tokenizers/llama2/tokenizer.model").read_bytes()))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def theirs(reference: Path) -> Any:
    """transformers' tokenizer, with Llama 2's own vocabulary and merges."""
    import json

    from transformers import CodeLlamaTokenizer

    file = json.loads((reference / "tokenizers/llama2/tokenizer.json").read_text())
    vocab = file["model"]["vocab"] | {f"▁<filler{n}": 32000 + n for n in range(7)}
    vocab |= {name: PRE + n for n, name in enumerate(INFILL_NAMES)}
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in file["model"]["merges"]]
    made = CodeLlamaTokenizer(vocab=vocab, merges=merges)
    # The files on the hub have none; the one that is put in where there is no file puts a space before the suffix too.
    made.backend_tokenizer.pre_tokenizer = None
    return made


def test_the_marks_are_special_at_their_ids(code: Tokenizer, reference: Path) -> None:
    assert [code.special[name] for name in INFILL_NAMES] == [PRE, SUF, MID, EOT]
    assert code.vocab_size == 32016
    assert EOT in code.stop_ids
    assert infills(code)
    plain = load_tokenizer(reference / "tokenizers/llama2/tokenizer.model")
    assert not infills(plain)
    with pytest.raises(UsageError, match="not trained to fill"):
        infill_ids(plain, Infill("a", "b"))
    for text in ("def f():\n    return 1", "日本語 🦙", "  x"):  # nothing else has changed
        assert code.encode(text) == plain.encode(text)


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_whatever_kind_the_marks_are_said_to_be(reference: Path, tmp_path: Path, kind: int) -> None:
    """Ordinary, control, user-defined: a GGUF says it of every piece."""
    model = (reference / "tokenizers/llama2/tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(extended(model, bytes([0x18, kind])))
    said = load_tokenizer(tmp_path / "tokenizer.model")
    assert [said.special[name] for name in INFILL_NAMES] == [PRE, SUF, MID, EOT]
    assert EOT not in said.encode("a <EOT>")


@pytest.mark.parametrize("suffix_first", [False, True])
@pytest.mark.parametrize(("prefix", "suffix"), CODE)
def test_ids_are_those_of_transformers(
    code: Tokenizer, theirs: Any, prefix: str, suffix: str, suffix_first: bool
) -> None:
    assert theirs.convert_tokens_to_ids(list(INFILL_NAMES)) == [PRE, SUF, MID, EOT]
    expected = theirs(prefix, suffix=suffix, suffix_first=suffix_first).input_ids
    assert infill_ids(code, Infill(prefix, suffix, suffix_first)) == expected
    text = f"{prefix}<FILL_ME>{suffix}"
    assert split_at_mark(text) == Infill(prefix, suffix)
    if not suffix_first:
        assert theirs(text).input_ids == expected


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40), st.booleans())
def test_ids_are_those_of_metas_code(code: Tokenizer, prefix: str, suffix: str, suffix_first: bool) -> None:
    encode = code._processor.encode  # type: ignore[attr-defined]
    before, after = encode(prefix), encode("☺" + suffix)[2:]
    meta = [1, PRE, SUF, *after, MID, *before] if suffix_first else [1, PRE, *before, SUF, *after, MID]
    assert infill_ids(code, Infill(prefix, suffix, suffix_first)) == meta


def test_a_text_that_spells_a_mark_stays_text(code: Tokenizer, tmp_path: Path, reference: Path) -> None:
    ids = infill_ids(code, Infill("a <PRE> b ▁<SUF>", " <MID> <EOT>"))
    assert [i for i in ids if i >= PRE] == [PRE, SUF, MID]
    assert code.decode(ids[2 : ids.index(SUF)]) == "a <PRE> b  <SUF>"
    # A tokenizer.json whose merges lead to a mark cannot tell the two apart, and says so.
    import json

    file = json.loads((reference / "tokenizers/llama2/tokenizer.json").read_text())
    vocab, merges = file["model"]["vocab"], file["model"]["merges"]
    pair = isinstance(merges[0], str)
    made = ""
    for character in "▁<PRE>":
        if made and made + character not in vocab:
            vocab[made + character] = len(vocab)
        if made:
            merges.insert(0, f"{made} {character}" if pair else [made, character])
        made += character
    for name in INFILL_NAMES:
        vocab.setdefault(name, len(vocab))
        file["added_tokens"].append({
            "id": vocab[name], "content": name, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        })  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    merged = load_tokenizer(tmp_path / "tokenizer.json")
    assert infills(merged)
    assert infill_ids(merged, Infill("a", "b"))[1] == merged.special["▁<PRE>"]
    with pytest.raises(TokenizerError, match="spells one of <PRE>"):
        infill_ids(merged, Infill("a <PRE> b", ""))


def test_the_gaps_text_keeps_its_first_space(code: Tokenizer) -> None:
    from puna.text.answer import AnswerText

    answer = AnswerText(code, gap_follows(code))
    assert answer.push(code.encode("x = 1"))[0] == " x = 1"


def test_a_text_has_one_gap() -> None:
    for text in ("nothing", "<FILL_ME> and <FILL_ME>"):
        with pytest.raises(UsageError, match="gaps"):
            split_at_mark(text)
