"""The tokenizers in GGUF files: ids equal to sentencepiece's and tiktoken's own, settings honoured, faults named.

What it is not: a model. The last test asks llama.cpp (`peers`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_builder as gb
import numpy as np
import pytest
from gguf import GGUFWriter

from puna.errors import ConfigError, PunaError, TokenizerError
from puna.text.chat import chat_format
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.text.tokenizer_gguf import _from_alphabet, _pairs
from puna.text.tokenizer_json import byte_level_alphabet
from puna.text.tokenizer_sentencepiece import SentencePieceTokenizer
from puna.text.vocabulary import vocabulary
from puna.text.words import Words
from puna.weights.gguf_model import read_tokenizer

Strings = Callable[[int], list[str]]
SPELLED = {byte: letter for letter, byte in byte_level_alphabet().items()}


def llama3_gguf(reference: Path, path: Path, **changes: Any) -> Path:
    """Meta's Llama 3 vocabulary as the gguf package writes it: ranks in GPT-2's alphabet, every split a merge."""
    meta = load_tokenizer(reference / "tokenizers" / "llama3", generation="llama3.1")
    stored = vocabulary(meta)
    assert stored.merges is not None
    writer = GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gpt2")
    if changes.get("pre", "llama-bpe"):
        writer.add_tokenizer_pre(changes.get("pre", "llama-bpe"))
    writer.add_token_list(changes.get("tokens", stored.tokens))
    writer.add_token_types(changes.get("kinds", stored.kinds))
    writer.add_token_merges(changes.get("merges", stored.merges))
    writer.add_bos_token_id(128000)
    writer.add_eos_token_id(128009)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def spm(reference: Path) -> Tokenizer:
    return read_tokenizer(reference / "tokenizers" / "ggml-vocab-llama-spm.gguf")


@pytest.fixture(scope="session")
def llama3_file(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama3_gguf(reference, tmp_path_factory.mktemp("llama3") / "vocabulary.gguf")


def check_spm(reference: Path, spm: Tokenizer, strings: list[str]) -> None:
    meta = load_tokenizer(reference / "tokenizers" / "llama2" / "tokenizer.model")
    for text in strings:
        ids = meta.encode(text)
        assert spm.encode(text) == ids, repr(text)
        assert spm.decode(ids) == meta.decode(ids)
        assert spm.encode(text, allow_special=True, bos=True) == meta.encode(text, allow_special=True, bos=True)


def check_llama3(reference: Path, ours: Tokenizer, strings: list[str]) -> None:
    meta = load_tokenizer(reference / "tokenizers" / "llama3", generation="llama3.1")
    for text in strings:
        ids = meta.encode(text)
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == text
        assert ours.encode(text, allow_special=True, bos=True) == meta.encode(text, allow_special=True, bos=True)


def test_sentencepiece_ids(reference: Path, spm: Tokenizer, strings: Strings) -> None:
    check_spm(reference, spm, strings(2_000))


def test_sentencepiece_settings(reference: Path, spm: Tokenizer) -> None:
    meta = load_tokenizer(reference / "tokenizers" / "llama2" / "tokenizer.model")
    assert (spm.kind, spm.vocab_size, dict(spm.special)) == ("sentencepiece", 32000, dict(meta.special))
    assert (spm.bos_id, spm.eos_id, spm.stop_ids, spm.adds_bos) == (1, 2, frozenset({2}), True)
    assert spm.token_bytes(4) == b"\1"
    assert isinstance(spm, SentencePieceTokenizer)


def test_llama3_by_its_ranks(reference: Path, llama3_file: Path, strings: Strings) -> None:
    ours = read_tokenizer(llama3_file)
    meta = load_tokenizer(reference / "tokenizers" / "llama3", generation="llama3.1")
    assert (ours.kind, ours.vocab_size, dict(ours.special)) == ("tiktoken", 128256, dict(meta.special))
    assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (128000, 128009, True)
    assert ours.stop_ids == {128001, 128008, 128009}
    check_llama3(reference, ours, strings(2_000))


def test_words_are_decoded_together_as_they_would_be_alone() -> None:
    for texts in ([], [""], ["", "a b", "ü 🦙", "", "x", "é"], ["ab", "c"], ["é"]):
        raw = [text.encode() for text in texts]
        words = Words(b"".join(raw), np.cumsum([len(word) for word in raw], dtype=np.int64))
        assert words.texts() == texts
    for raw in ([b"\xff"], ["é".encode()[:1], "é".encode()[1:]], [b"a", "é".encode()[:1]]):
        with pytest.raises(UnicodeDecodeError):
            Words(b"".join(raw), np.cumsum([len(word) for word in raw], dtype=np.int64)).texts()


@pytest.mark.parametrize("bad", ["ab", "a b c", " ab", "ab ", " ", "", "a  b"])
def test_a_merge_is_two_texts_with_one_space_between(bad: str) -> None:
    def pairs(*merges: str) -> list[tuple[str, str]] | None:
        raw = [merge.encode() for merge in merges]
        return _pairs(Words(b"".join(raw), np.cumsum([len(word) for word in raw], dtype=np.int64)))

    assert pairs("Ġ he", "a Ġ", "x y") == [("Ġ", "he"), ("a", "Ġ"), ("x", "y")]
    assert pairs() == []
    # Spaces in all are as many as merges.
    for merges in ((bad,), ("h e", bad), (bad, "Ġ he"), ("ab", "a b c"), ("a b c", "ab")):
        assert pairs(*merges) is None


def test_llama3_by_the_merges(
    reference: Path, llama3_file: Path, strings: Strings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk that any other vocabulary takes, on one whose right answers are known."""
    monkeypatch.setattr("puna.text.tokenizer_gguf._LLAMA3_SHA256", "")
    ours = read_tokenizer(llama3_file)
    assert (ours.kind, ours.vocab_size, ours.bos_id, ours.adds_bos) == ("merges", 128256, 128000, True)
    check_llama3(reference, ours, strings(500))


@pytest.mark.slow
def test_ids_equal_on_ten_thousand_strings(
    reference: Path, spm: Tokenizer, llama3_file: Path, strings: Strings, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_spm(reference, spm, strings(10_000))
    check_llama3(reference, read_tokenizer(llama3_file), strings(10_000))
    monkeypatch.setattr("puna.text.tokenizer_gguf._LLAMA3_SHA256", "")
    check_llama3(reference, read_tokenizer(llama3_file), strings(10_000))


def test_the_name_of_the_rule_may_be_missing_for_llama3_alone(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama3_gguf(reference, tmp_path / "a.gguf", pre=None)
    ours = read_tokenizer(path)
    assert (ours.kind, ours.adds_bos) == ("tiktoken", True)
    monkeypatch.setattr("puna.text.tokenizer_gguf._LLAMA3_SHA256", "")
    with pytest.raises(TokenizerError, match=r"'tokenizer.ggml.pre' is missing, and says how text is cut into words"):
        read_tokenizer(path)


def test_the_alphabet_is_decoded_as_it_is_spelled() -> None:
    random = np.random.default_rng(0)
    raw = [random.bytes(int(n)) for n in random.integers(1, 9, 2000)] + [bytes(range(256))]
    spelled = ["".join(SPELLED[byte] for byte in word).encode() for word in raw]
    words = Words(b"".join(spelled), np.cumsum([len(word) for word in spelled]))
    assert _from_alphabet(words, len(raw)).to_list() == raw
    assert _from_alphabet(words, 10).to_list() == raw[:10]
    for bad in ("a b", "日本", "é\u0144", b"\xc3", b"\xa9a", b"\x00"):
        data = bad.encode() if isinstance(bad, str) else bad
        with pytest.raises(ValueError, match="alphabet"):
            _from_alphabet(Words(data, np.array([len(data)])), 1)
    with pytest.raises(ValueError, match="alphabet"):  # a letter cut in two
        _from_alphabet(Words("é".encode(), np.array([1, 2])), 2)


# Small vocabularies, one thing wrong or unusual at a time.


def pairs(**changes: Any) -> gb.Built:
    """A byte-level vocabulary: 256 letters, two merges, two special tokens, one word added, one token unused."""
    letters = [SPELLED[b] for b in range(256)]
    tokens = [*letters, "he", "Ġhe", "<|begin_of_text|>", "<|eot_id|>", "llama", "[PAD]"]
    kinds = [1] * 258 + [3, 3, 4, 5]
    values = {
        "model": gb.words("tokenizer.ggml.model", "gpt2"),
        "pre": gb.words("tokenizer.ggml.pre", "llama-bpe"),
        "tokens": gb.entry("tokenizer.ggml.tokens", 9, gb.array(8, tokens)),
        "token_type": gb.entry("tokenizer.ggml.token_type", 9, gb.array(5, kinds)),
        "merges": gb.entry("tokenizer.ggml.merges", 9, gb.array(8, ["h e", "Ġ he"])),
        "bos_token_id": gb.number("tokenizer.ggml.bos_token_id", 258),
        "eot_token_id": gb.number("tokenizer.ggml.eot_token_id", 259),
    } | changes
    kept = [value for value in values.values() if value is not None]
    return gb.Built([gb.words("general.architecture", "llama"), *kept])


def test_a_byte_level_vocabulary(tmp_path: Path) -> None:
    ours = read_tokenizer(pairs().write(tmp_path / "a.gguf"))
    assert (ours.vocab_size, dict(ours.special)) == (262, {"<|begin_of_text|>": 258, "<|eot_id|>": 259})
    assert ours.encode("he he") == [256, 257]
    assert ours.encode("a llama") == [97, 32, 260]  # an added word is found in any text
    assert ours.decode([97, 32, 260]) == "a llama"
    assert ours.encode("<|eot_id|>") != [259]
    assert ours.encode("<|eot_id|>", allow_special=True, bos=True) == [258, 259]
    assert (ours.adds_bos, ours.stop_ids, ours.eos_id) == (True, {259}, None)
    assert ours.token_bytes(261) == b"[PAD]"


@pytest.mark.parametrize(
    ("name", "first"), [("llama3", True), ("llama-v3", True), ("smaug-bpe", False), ("gpt-2", False)]
)
def test_bos_by_the_name_of_the_rule_and_by_the_key(name: str, first: bool, tmp_path: Path) -> None:
    built = pairs(pre=gb.words("tokenizer.ggml.pre", name))
    assert read_tokenizer(built.write(tmp_path / "a.gguf")).adds_bos is first
    for said in (False, True):
        built = pairs(pre=gb.words("tokenizer.ggml.pre", name))
        built.metadata.append(gb.entry("tokenizer.ggml.add_bos_token", 7, bytes([said])))
        assert read_tokenizer(built.write(tmp_path / "a.gguf")).adds_bos is said


def test_whole_words_are_looked_up_by_llama3s_rule_alone(tmp_path: Path) -> None:
    tokens = [*(SPELLED[b] for b in range(256)), "he", "she", "<|begin_of_text|>", "<|eot_id|>"]
    changes = {
        "tokens": gb.entry("tokenizer.ggml.tokens", 9, gb.array(8, tokens)),
        "token_type": gb.entry("tokenizer.ggml.token_type", 9, gb.array(5, [1] * 258 + [3, 3])),
        "merges": gb.entry("tokenizer.ggml.merges", 9, gb.array(8, ["h e"])),
    }
    for name, ids in (("llama-bpe", [257]), ("smaug-bpe", [115, 256])):
        built = pairs(**changes, pre=gb.words("tokenizer.ggml.pre", name))
        assert read_tokenizer(built.write(tmp_path / "a.gguf")).encode("she") == ids


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "'tokenizer.ggml.model' is missing"),
    "another model": ({"model": gb.words("tokenizer.ggml.model", "bert")}, "'tokenizer.ggml.model' is 'bert'"),
    "a model of number": ({"model": gb.number("tokenizer.ggml.model", 1)}, "must be a text, not 1"),
    "another rule": ({"pre": gb.words("tokenizer.ggml.pre", "tekken")}, "'tokenizer.ggml.pre' is 'tekken', and says"),
    "no rule": ({"pre": None}, "'tokenizer.ggml.pre' is missing"),
    "the default rule": ({"pre": gb.words("tokenizer.ggml.pre", "default")}, "'tokenizer.ggml.pre' is 'default'"),
    "no tokens": ({"tokens": None}, "'tokenizer.ggml.tokens' is missing"),
    "tokens of numbers": (
        {"tokens": gb.entry("tokenizer.ggml.tokens", 9, gb.array(4, [1, 2]))},
        "must be an array of texts",
    ),
    "empty": ({"tokens": gb.entry("tokenizer.ggml.tokens", 9, gb.array(8, []))}, "has 0 of them"),
    "no types": ({"token_type": None}, "'tokenizer.ggml.token_type' is missing"),
    "fewer types": (
        {"token_type": gb.entry("tokenizer.ggml.token_type", 9, gb.array(5, [1] * 3))},
        "has 3 numbers, and there are 262",
    ),
    "type 7": (
        {"token_type": gb.entry("tokenizer.ggml.token_type", 9, gb.array(5, [7] * 262))},
        "whole numbers from 1 to 6",
    ),
    "types of reals": (
        {"token_type": gb.entry("tokenizer.ggml.token_type", 9, gb.array(6, [1.0] * 262))},
        "whole numbers from 1 to 6",
    ),
    "bos outside": (
        {"bos_token_id": gb.number("tokenizer.ggml.bos_token_id", 262)},
        "bos_token_id' is 262, and the voc",
    ),
    "eot outside": (
        {"eot_token_id": gb.number("tokenizer.ggml.eot_token_id", 999)},
        "eot_token_id' is 999, and the voc",
    ),
    "bos of text": (
        {"bos_token_id": gb.words("tokenizer.ggml.bos_token_id", "1")},
        "bos_token_id' must be a whole numb",
    ),
    "no merges": ({"merges": None}, "'tokenizer.ggml.merges' is missing"),
    "merge of one": (
        {"merges": gb.entry("tokenizer.ggml.merges", 9, gb.array(8, ["he"]))},
        "must be pairs of tokens with a space",
    ),
    "merge of three": (
        {"merges": gb.entry("tokenizer.ggml.merges", 9, gb.array(8, ["h e l"]))},
        "must be pairs of tok",
    ),
    "merge of strangers": (
        {"merges": gb.entry("tokenizer.ggml.merges", 9, gb.array(8, ["q q"]))},
        "its merges do not fit its tokens",
    ),
    "merge not UTF-8": ({"merges": gb.entry("tokenizer.ggml.merges", 9, gb.array(8, [b"\xff a"]))}, "not UTF-8"),
    "twice": (
        {"tokens": gb.entry("tokenizer.ggml.tokens", 9, gb.array(8, ["a"] * 258 + ["<b>", "<c>", "d", "e"]))},
        "of them twice",
    ),
    "special twice": (
        {"tokens": gb.entry("tokenizer.ggml.tokens", 9, gb.array(8, ["a"] * 258 + ["<b>", "<b>", "d", "e"]))},
        "has the special token '<b>' twice",
    ),
    "charsmap": (
        {"x": gb.entry("tokenizer.ggml.precompiled_charsmap", 9, gb.array(0, [1]))},
        "a normalization that no Llama has",
    ),
    "whitespace": ({"x": gb.entry("tokenizer.ggml.remove_extra_whitespaces", 7, b"\1")}, "remove_extra_whitespaces"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_vocabulary_is_refused_by_name(case: str, tmp_path: Path) -> None:
    changes, words = WRONG[case]
    path = pairs(**changes).write(tmp_path / "a.gguf")
    with pytest.raises((TokenizerError, ConfigError), match=words) as caught:
        read_tokenizer(path)
    assert isinstance(caught.value, PunaError)
    assert str(path) in caught.value.message
    assert caught.value.remedy


def pieces(**changes: Any) -> gb.Built:
    """A sentencepiece vocabulary: bytes, four letters, two joins."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "ab", "▁ab", "<|im_end|>"]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 5 + [4]
    scores = [0.0] * 259 + [-3.0, -4.0, -5.0, -1.0, -2.0, 0.0]
    values = {
        "model": gb.words("tokenizer.ggml.model", "llama"),
        "tokens": gb.entry("tokenizer.ggml.tokens", 9, gb.array(8, tokens)),
        "token_type": gb.entry("tokenizer.ggml.token_type", 9, gb.array(5, kinds)),
        "scores": gb.entry("tokenizer.ggml.scores", 9, gb.array(6, scores)),
        "bos_token_id": gb.number("tokenizer.ggml.bos_token_id", 1),
        "eos_token_id": gb.number("tokenizer.ggml.eos_token_id", 264),
    } | changes
    return gb.Built([gb.words("general.architecture", "llama"), *(v for v in values.values() if v is not None)])


def test_a_small_sentencepiece_vocabulary(tmp_path: Path) -> None:
    built = pieces()
    built.metadata.append(gb.words("tokenizer.chat_template", "{{ bos_token }}x"))
    ours = read_tokenizer(built.write(tmp_path / "a.gguf"))
    assert ours.encode("ab abé") == [263, 263, 198, 172]
    assert ours.decode([263, 263, 198, 172]) == "ab abé"
    assert ours.encode("<|im_end|>") != [264]
    assert ours.encode("<|im_end|>", allow_special=True) == [264]
    assert (ours.eos_id, ours.stop_ids, ours.chat_template) == (264, {2, 264}, "{{ bos_token }}x")
    assert chat_format(ours, "llama2", instruct=False).name == f"chat template of {tmp_path / 'a.gguf'}"
    bare = pieces()
    bare.metadata.append(gb.entry("tokenizer.ggml.add_space_prefix", 7, b"\0"))
    ours = read_tokenizer(bare.write(tmp_path / "a.gguf"))
    assert ours.encode("ab  ab") == [262, 259, 263]
    assert ours.decode([262, 259, 263]) == "ab  ab"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": None}, "'tokenizer.ggml.scores' is missing"),
        (
            {"scores": gb.entry("tokenizer.ggml.scores", 9, gb.array(6, [float("nan")] * 265))},
            "must hold finite numbers",
        ),
        ({"scores": gb.entry("tokenizer.ggml.scores", 9, gb.array(4, [1] * 265))}, "must hold finite numbers"),
        (
            {"token_type": gb.entry("tokenizer.ggml.token_type", 9, gb.array(5, [1] * 265))},
            "a damaged sentencepiece model",
        ),
        (
            {"tokens": gb.entry("tokenizer.ggml.tokens", 9, gb.array(8, ["<unk>", "<s>", "</s>", *["a"] * 262]))},
            "a damaged sentencepiece model",
        ),
        (
            {"tokens": gb.entry("tokenizer.ggml.tokens", 9, gb.array(8, ["<unk>", "<s>", "</s>", *[b"\xff"] * 262]))},
            "a damaged sentencepiece model|not UTF-8",
        ),
    ],
)
def test_a_wrong_sentencepiece_vocabulary(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=words):
        read_tokenizer(pieces(**changes).write(tmp_path / "a.gguf"))


@pytest.mark.peers
@pytest.mark.parametrize("name", ["llama", "llama-bpe", "smaug-bpe"])
def test_ids_are_llama_cpps(name: str, reference: Path, strings: Strings, tmp_path: Path) -> None:
    from llama_cpp import Llama

    if name == "llama":
        path = reference / "tokenizers" / "ggml-vocab-llama-spm.gguf"
    else:
        path = llama3_gguf(reference, tmp_path / "a.gguf", pre=name)
    ours, engine = read_tokenizer(path), Llama(str(path), vocab_only=True, verbose=False)
    asked = [text for text in strings(2_000) if text]
    differ = [
        text for text in asked if ours.encode(text) != engine.tokenize(text.encode(), add_bos=False, special=False)
    ]
    assert differ == []
