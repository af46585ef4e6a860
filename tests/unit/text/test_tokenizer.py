"""Tokenizers: ids equal to the field's own libraries', round trips, stop ids, and hostile files."""

from __future__ import annotations

import base64
import itertools
import json
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.errors import TokenizerError
from puna.text.tokenizer import Tokenizer, load_tokenizer

Strings = Callable[[int], list[str]]

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
O200K = "o200k_base"


@pytest.fixture(scope="session")
def llama2(reference: Path) -> Tokenizer:
    return load_tokenizer(reference / "tokenizers/llama2/tokenizer.model")


@pytest.fixture(scope="session")
def llama3(reference: Path) -> Tokenizer:
    return load_tokenizer(reference / "tokenizers/llama3", generation="llama3")


@pytest.fixture(scope="session")
def llama4(reference: Path) -> Tokenizer:
    return load_tokenizer(reference / "tokenizers/llama4/tokenizer.model", generation="llama4")


def sentencepiece_oracle(reference: Path) -> Callable[[str], list[int]]:
    from sentencepiece import SentencePieceProcessor

    engine = SentencePieceProcessor(model_file=str(reference / "tokenizers/llama2/tokenizer.model"))
    return lambda text: list(engine.encode(text))


def tiktoken_oracle(reference: Path, name: str, special: dict[str, int]) -> Any:
    """tiktoken set up as its own loader does it; Llama 4's pattern is OpenAI's o200k, spelled in tiktoken itself."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(reference / "tokenizers" / name / "tokenizer.model"))
    pattern = LLAMA3_PATTERN
    if name == "llama4":
        import inspect

        from tiktoken_ext import openai_public

        lines = inspect.getsource(openai_public.o200k_base).split("pat_str = ")[1]
        pattern = eval(lines.split("\n    return")[0].strip())
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def assert_same_ids(ours: Tokenizer, oracle: Callable[[str], list[int]], strings: list[str]) -> None:
    for text in strings:
        ids = ours.encode(text)
        assert ids == oracle(text), repr(text)
        # sentencepiece's own space, written in a text, comes back as a space; everything else comes back as it was.
        assert ours.decode(ids) == (text if ours.kind == "tiktoken" else text.replace("▁", " ")), repr(text)
        assert not set(ids) & set(ours.special.values()), repr(text)


def check_llama2(reference: Path, llama2: Tokenizer, strings: list[str]) -> None:
    from tokenizers import Tokenizer as Engine

    oracle = sentencepiece_oracle(reference)
    as_json = load_tokenizer(reference / "tokenizers/llama2/tokenizer.json")
    as_bin = load_tokenizer(reference / "tokenizers/llama2/tokenizer.bin")
    assert (llama2.kind, as_json.kind, as_bin.kind) == ("sentencepiece", "tokenizer.json", "llama2c")
    assert_same_ids(llama2, oracle, strings)
    assert_same_ids(as_json, oracle, strings)
    # llama2.c's file has spaces where sentencepiece has ▁, so that character is another one to it.
    assert_same_ids(as_bin, oracle, [text for text in strings if "▁" not in text])
    # With special tokens parsed, tokenizers is the oracle for both.
    engine = Engine.from_file(str(reference / "tokenizers/llama2/tokenizer.json"))
    for text in strings:
        expected = engine.encode(text, add_special_tokens=False).ids
        assert as_json.encode(text, allow_special=True) == expected
        assert llama2.encode(text, allow_special=True) == expected


def check_tiktoken(reference: Path, name: str, tokenizer: Tokenizer, strings: list[str]) -> None:
    oracle = tiktoken_oracle(reference, name, dict(tokenizer.special))
    assert_same_ids(tokenizer, oracle.encode_ordinary, strings)
    for text in strings:
        assert tokenizer.encode(text, allow_special=True) == oracle.encode(text, allowed_special="all")


def test_llama2_ids_equal_sentencepiece_and_tokenizers(reference: Path, llama2: Tokenizer, strings: Strings) -> None:
    check_llama2(reference, llama2, strings(2_000))


def test_llama3_ids_equal_tiktoken(reference: Path, llama3: Tokenizer, strings: Strings) -> None:
    check_tiktoken(reference, "llama3", llama3, strings(2_000))


def test_llama4_ids_equal_tiktoken(reference: Path, llama4: Tokenizer, strings: Strings) -> None:
    check_tiktoken(reference, "llama4", llama4, strings(2_000))


@pytest.mark.slow
def test_ids_equal_on_ten_thousand_strings(
    reference: Path, llama2: Tokenizer, llama3: Tokenizer, llama4: Tokenizer, strings: Strings
) -> None:
    check_llama2(reference, llama2, strings(10_000))
    check_tiktoken(reference, "llama3", llama3, strings(10_000))
    check_tiktoken(reference, "llama4", llama4, strings(10_000))


@pytest.mark.slow
def test_llama3_as_tokenizer_json_equals_tiktoken(
    reference: Path, llama3: Tokenizer, strings: Strings, tmp_path: Path
) -> None:
    """The same vocabulary as a tokenizer.json, by transformers' converter."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    engine = TikTokenConverter(
        vocab_file=str(reference / "tokenizers/llama3/tokenizer.model"),
        pattern=LLAMA3_PATTERN,
        extra_special_tokens=list(llama3.special),
    ).converted()
    engine.save(str(tmp_path / "tokenizer.json"))
    as_json = load_tokenizer(tmp_path)
    assert as_json.kind == "tokenizer.json"
    assert dict(as_json.special) == dict(llama3.special)
    for text in strings(10_000):
        assert as_json.encode(text) == llama3.encode(text)
        assert as_json.decode(as_json.encode(text)) == text
        assert as_json.encode(text, allow_special=True) == llama3.encode(text, allow_special=True)
    assert [as_json.token_bytes(i) for i in range(0, 128_256, 7)] == [
        llama3.token_bytes(i) for i in range(0, 128_256, 7)
    ]


def test_decoding_equals_the_libraries(reference: Path, llama2: Tokenizer, strings: Strings) -> None:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer as Engine

    processor = SentencePieceProcessor(model_file=str(reference / "tokenizers/llama2/tokenizer.model"))
    engine = Engine.from_file(str(reference / "tokenizers/llama2/tokenizer.json"))
    as_json = load_tokenizer(reference / "tokenizers/llama2/tokenizer.json")
    for text in strings(300):
        ids = llama2.encode(text)
        assert llama2.decode(ids) == processor.decode(ids)
        assert as_json.decode(ids) == engine.decode(ids)
        assert llama2.decode(ids[1:]) == processor.decode(ids[1:]) or "\ufffd" in llama2.decode(ids[1:])


def test_byte_level_json_decodes_as_the_library_does(byte_level_folder: Path, strings: Strings) -> None:
    from tokenizers import Tokenizer as Engine

    ours = load_tokenizer(byte_level_folder)
    engine = Engine.from_file(str(byte_level_folder / "tokenizer.json"))
    engine.encode_special_tokens = True
    for text in strings(500):
        ids = ours.encode(text)
        assert ids == engine.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text == engine.decode(ids, skip_special_tokens=False)
        assert b"".join(map(ours.token_bytes, ids)) == text.encode()
    assert (ours.bos_id, ours.eos_id, sorted(ours.stop_ids)) == (258, 259, [259])
    assert ours.encode("he<|eot_id|> he", bos=True, allow_special=True) == [258, 256, 259, 257]
    assert ours.encode("<|begin_of_text|>he", bos=True, allow_special=True) == [258, 256]


def test_stories260k_tokenizer(reference: Path) -> None:
    """Ids that llama2.c's own tests expect of the merge: the longest run of best scores, with the dummy space."""
    tokenizer = load_tokenizer(reference / "checkpoints/stories260K/tok512.bin")
    text = json.loads((reference / "checkpoints/stories260K/expected_greedy.json").read_text())["text"]
    ids = tokenizer.encode(text, bos=True)
    assert (tokenizer.kind, tokenizer.vocab_size, ids[0]) == ("llama2c", 512, 1)
    assert ids[1:5] == [403, 407, 261, 378]  # the ids of "Once upon a time" that the model itself writes first
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.decode(ids, skip_special=True) == text


def test_llama2c_merges_best_score_first_then_leftmost(llama2c_file: Path) -> None:
    tokenizer = load_tokenizer(llama2c_file)
    # " a" (score 0) is merged before "ab" (-1), which leaves "b" and "c" to become "bc" (-2).
    assert tokenizer.encode("abc") == [259, 261]
    # "xabc": no " a"; "ab" (-1) before "bc" (-2), then "abc" (-3). x and é have no token: bytes + 3.
    assert tokenizer.encode("xabc") == [263, 3 + ord("x"), 262]
    assert tokenizer.encode("é") == [263, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.encode("") == []
    assert tokenizer.decode([259, 261]) == "abc"
    assert tokenizer.decode([1, 263, 263, 259]) == "<s>  a"
    assert tokenizer.decode([3 + 0x20, 262]) == " abc"  # a space spelled as a byte is no dummy space
    assert tokenizer.decode([1, 259], skip_special=True) == "a"


def test_llama2c_merge_equals_run_c_literally(reference: Path, strings: Strings) -> None:
    """Against run.c's loop transcribed: look at every pair, take the best, repeat."""
    data = (reference / "checkpoints/stories260K/tok512.bin").read_bytes()
    pieces, scores, at = [], [], 4
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + length])
        scores.append(score)
        at += 8 + length
    index = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    tokenizer = load_tokenizer(reference / "checkpoints/stories260K/tok512.bin")
    for text in strings(200):
        tokens: list[int] = []
        for c in " " + text if text else "":
            tokens += [index[c.encode()]] if c.encode() in index else [b + 3 for b in c.encode()]
        while True:
            found = [
                (scores[index[pieces[a] + pieces[b]]], -n)
                for n, (a, b) in enumerate(itertools.pairwise(tokens))
                if pieces[a] + pieces[b] in index
            ]
            if not found:
                break
            n = -max(found)[1]
            tokens[n : n + 2] = [index[pieces[tokens[n]] + pieces[tokens[n + 1]]]]
        assert tokenizer.encode(text) == tokens, repr(text)


def test_special_tokens_by_generation(reference: Path) -> None:
    folder = reference / "tokenizers/llama3/tokenizer.model"
    llama3 = load_tokenizer(folder, generation="llama3")
    assert (llama3.vocab_size, llama3.bos_id, llama3.eos_id) == (128_256, 128_000, 128_001)
    assert sorted(llama3.stop_ids) == [128_001, 128_009]
    assert llama3.special["<|reserved_special_token_250|>"] == 128_255
    config = json.loads((reference / "tokenizers/llama3.1/tokenizer_config.json").read_text())
    published = {entry["content"]: int(i) for i, entry in config["added_tokens_decoder"].items()}
    for generation in ("llama3.1", "llama3.2", "llama3.3", None):
        tokenizer = load_tokenizer(folder, generation=generation)
        assert dict(tokenizer.special) == published
        assert sorted(tokenizer.stop_ids) == [128_001, 128_008, 128_009]


def test_llama4_special_tokens_and_the_config_beside_them(reference: Path, llama4: Tokenizer, tmp_path: Path) -> None:
    folder = reference / "tokenizers/llama4"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    published = {entry["content"]: int(i) for i, entry in config["added_tokens_decoder"].items()}
    with_config = load_tokenizer(folder)  # the config's names win
    assert published.items() <= dict(with_config.special).items()
    assert (with_config.vocab_size, with_config.eos_id) == (202_048, published["<|eot|>"])
    assert with_config.chat_template == config["chat_template"]
    (tmp_path / "tokenizer.model").symlink_to(folder / "tokenizer.model")
    alone = load_tokenizer(tmp_path)  # Meta's names
    for name in ("<|begin_of_text|>", "<|header_start|>", "<|eot|>", "<|python_start|>", "<|image|>", "<|patch|>"):
        assert alone.special[name] == published[name]
    assert alone.special["<|reasoning_thinking_start|>"] == 201_142
    assert (len(alone.special), alone.eos_id) == (2_048, 200_001)
    assert sorted(alone.stop_ids) == sorted(with_config.stop_ids) == [200_001, 200_007, 200_008]


def test_a_picture_past_the_vocabulary_is_no_token_of_the_file(reference: Path, tmp_path: Path) -> None:
    """As the hub lists Llama 3.2 Vision's special tokens."""
    (tmp_path / "tokenizer.model").symlink_to(reference / "tokenizers/llama3/tokenizer.model")
    listed = json.loads((reference / "tokenizers/llama3.2/tokenizer_config.json").read_text())["added_tokens_decoder"]
    for past, fits in (("<|image|>", True), ("<|other|>", False)):
        added = listed | {"128256": listed["128255"] | {"content": past}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
        if fits:
            assert load_tokenizer(tmp_path, generation="llama3.2").vocab_size == 128_256
        else:
            with pytest.raises(TokenizerError, match="names id 128256"):
                load_tokenizer(tmp_path, generation="llama3.2")


def test_generation_and_file_must_agree(reference: Path) -> None:
    with pytest.raises(TokenizerError, match="not of llama4"):
        load_tokenizer(reference / "tokenizers/llama3", generation="llama4")


@pytest.mark.parametrize("character", [" ", "\t", "a", "é", "1", "!", "\n"])
def test_long_runs_equal_tiktoken(llama3: Tokenizer, character: str, reference: Path) -> None:
    oracle = llama3._encoding  # type: ignore[attr-defined]  # the library itself
    text = character * 150_000 + "x"
    assert llama3.encode(text) == oracle.encode_ordinary(text)


def test_endless_whitespace_where_tiktoken_fails(llama3: Tokenizer) -> None:
    """999,998 blanks are tiktoken's last; one more overflows its regex engine, and we cut."""
    oracle = llama3._encoding  # type: ignore[attr-defined]
    most = "y" + " " * 999_998 + "x"
    assert llama3.encode(most) == oracle.encode_ordinary(most)
    text = "y" + " " * 1_100_000 + "x"
    ids = llama3.encode(text)
    assert llama3.decode(ids) == text
    assert ids[:1] + ids[-1:] == llama3.encode("y") + llama3.encode(" x")


def test_llama2_takes_long_runs(llama2: Tokenizer) -> None:
    text = " " * 200_000 + "a" * 200_000
    assert llama2.decode(llama2.encode(text)) == text


def test_lone_surrogates_are_refused(reference: Path, llama2: Tokenizer, llama3: Tokenizer, llama2c_file: Path) -> None:
    text = b"caf\xe9 au lait".decode("utf-8", "surrogateescape")
    tokenizers = [llama2, llama3, load_tokenizer(llama2c_file)]
    tokenizers.append(load_tokenizer(reference / "tokenizers/llama2/tokenizer.json"))
    for tokenizer in tokenizers:
        with pytest.raises(TokenizerError, match=r"character 3 is a lone surrogate \(U\+DCE9\)"):
            tokenizer.encode(text)


def test_no_second_bos(llama2: Tokenizer, llama3: Tokenizer) -> None:
    assert llama2.encode("<s>a", bos=True, allow_special=True) == [1, *llama2.encode("a")]
    assert llama2.encode("<s>a", bos=True)[:1] + llama2.encode("<s>a") == llama2.encode("<s>a", bos=True)
    assert llama3.encode("", bos=True) == [128_000]


def test_invalid_bytes_decode_as_python_does(llama2: Tokenizer, llama3: Tokenizer) -> None:
    raw = b"\xe2\x82\xff\xf0\x9f\x98A\x80"
    byte_ids = [llama2.encode("\0")[-1] + b for b in raw]
    assert llama2.decode(byte_ids) == raw.decode(errors="replace")
    single = {llama3.token_bytes(i): i for i in range(256)}
    assert llama3.decode([single[bytes([b])] for b in raw]) == raw.decode(errors="replace")


@pytest.mark.parametrize("token_id", [-1, 32_000, 1 << 40])
def test_ids_outside_the_vocabulary_are_refused(llama2: Tokenizer, token_id: int) -> None:
    with pytest.raises(TokenizerError, match="outside the vocabulary of 32000"):
        llama2.decode([5, token_id])


def test_user_defined_pieces_of_sentencepiece_are_special(tmp_path: Path) -> None:
    """Code Llama's kind of extra pieces: sentencepiece itself would find them in any text."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(["the llama sleeps", "a story of a llama", "step by step"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<step>", "▁<EOT>", "ll"],
        hard_vocab_limit=False,
        minloglevel=3,
    )
    path = tmp_path / "tokenizer.model"
    plain = SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(path)
    step = plain.piece_to_id("<step>")
    assert step in plain.encode("one <step> two")
    assert step not in tokenizer.encode("one <step> two")
    assert step in tokenizer.encode("one <step> two", allow_special=True)
    assert tokenizer.decode(tokenizer.encode("one <step> two")) == "one <step> two"
    assert {step, tokenizer.special["▁<EOT>"], 2} == tokenizer.stop_ids
    assert tokenizer.encode("llama") == plain.encode("llama")  # "ll" is no tag: it stays as the file has it
    assert tokenizer.decode([tokenizer.encode("one")[0], step], skip_special=True) == plain.decode(
        plain.encode("one")[0]
    )


def test_tags_that_a_tokenizer_json_does_not_call_special_are(byte_level_folder: Path) -> None:
    """R1's distills of Llama add `<｜User｜>` as an ordinary token, which the library would find in any text."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Engine

    path = byte_level_folder / "tokenizer.json"
    engine = Engine.from_file(str(path))
    engine.add_tokens([AddedToken("<｜User｜>", normalized=False), AddedToken("llama", normalized=False)])
    engine.save(str(path))
    tokenizer = load_tokenizer(byte_level_folder)
    tag, word = engine.token_to_id("<｜User｜>"), engine.token_to_id("llama")
    assert tokenizer.special["<｜User｜>"] == tag
    assert tag not in tokenizer.encode("x<｜User｜>llama")
    assert word in tokenizer.encode("x<｜User｜>llama")  # an added word stays a word
    assert tokenizer.encode("<｜User｜>llama", allow_special=True) == [tag, word]
    assert tokenizer.decode(tokenizer.encode("x<｜User｜>llama")) == "x<｜User｜>llama"


def test_text_that_a_tokenizer_json_has_no_tokens_for_is_refused(byte_level_folder: Path) -> None:
    """Without an unknown token the library leaves such characters out; with a wrong one it raises."""
    path = byte_level_folder / "tokenizer.json"
    file = json.loads(path.read_text())
    del file["model"]["vocab"]["z"]
    path.write_text(json.dumps(file))
    tokenizer = load_tokenizer(byte_level_folder)
    assert tokenizer.decode(tokenizer.encode("hey")) == "hey"
    with pytest.raises(TokenizerError, match="no token for the bytes b'z'"):
        tokenizer.encode("hazy")
    file["model"]["unk_token"] = "<nowhere>"
    path.write_text(json.dumps(file))
    with pytest.raises(TokenizerError, match="cannot encode this text"):
        load_tokenizer(byte_level_folder).encode("hazy")


def test_other_threads_run_while_a_long_text_is_encoded(byte_level_folder: Path) -> None:
    """A text of a megabyte takes a second, in which a server's event loop has others to answer."""
    tokenizer = load_tokenizer(byte_level_folder)
    encoding = threading.Thread(target=tokenizer.encode, args=("hey " * 200_000,))
    encoding.start()
    turns = 0
    while encoding.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns >= 20


def test_a_panic_of_the_library_is_a_tokenizer_error(byte_level_folder: Path) -> None:
    class Panic(BaseException):
        """As pyo3's PanicException, which cannot be imported."""

    class Engine:
        def encode_batch(self, texts: list[str], add_special_tokens: bool) -> None:
            raise Panic("index out of bounds")

    tokenizer = load_tokenizer(byte_level_folder)
    tokenizer._engine = Engine()
    with pytest.raises(TokenizerError, match=r"cannot encode this text \(index out of bounds\)"):
        tokenizer.encode("a")


def test_sentencepiece_knows_its_own_begin_and_end(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(["the llama sleeps"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=280,
        model_type="bpe",
        byte_fallback=True,
        bos_piece="[BOS]",
        eos_id=-1,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (tokenizer.special["[BOS]"], None)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
    assert load_tokenizer(tmp_path).bos_id is None


# --- files beside the tokenizer --------------------------------------------------------------------------------------


def test_generation_config_adds_stop_ids(byte_level_folder: Path) -> None:
    (byte_level_folder / "generation_config.json").write_text('{"eos_token_id": [259, 7]}')
    assert sorted(load_tokenizer(byte_level_folder).stop_ids) == [7, 259]


def test_chat_template_file_wins_over_the_config(byte_level_folder: Path) -> None:
    config = byte_level_folder / "tokenizer_config.json"
    config.write_text(
        '{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}'
    )
    assert load_tokenizer(byte_level_folder).chat_template == "D"
    (byte_level_folder / "chat_template.jinja").write_text("J")
    assert load_tokenizer(byte_level_folder).chat_template == "J"


def test_null_eos_means_none(byte_level_folder: Path) -> None:
    (byte_level_folder / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": null}')
    tokenizer = load_tokenizer(byte_level_folder / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    with pytest.raises(TokenizerError, match="no begin-of-text token"):
        tokenizer.encode("a", bos=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer_config.json", "[" * 200_000, "not valid JSON"),
        ("tokenizer_config.json", "[]", "does not hold a JSON object"),
        ("tokenizer_config.json", '{"bos_token": 7}', "bos_token must be"),
        ("tokenizer_config.json", '{"bos_token": "<none>"}', "names '<none>' as its bos_token"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "rag", "template": ""}]}', 'named "default"'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}', "added_tokens_decoder must be"),
        ("special_tokens_map.json", "\xff", "not UTF-8"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id must be"),
        ("generation_config.json", '{"eos_token_id": true}', "eos_token_id must be"),
        ("generation_config.json", '{"eos_token_id": 4000000000}', "outside the vocabulary"),
        ("tokenizer.json", '{"model": {"type": "Unknown"}}', "damaged tokenizer.json"),
        ("tokenizer.json", '{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[]}}', "decoder"),
    ],
)
def test_bad_json_files(byte_level_folder: Path, name: str, text: str, message: str) -> None:
    (byte_level_folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(byte_level_folder)
    assert str(byte_level_folder) in caught.value.message
    assert caught.value.remedy


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(tmp_path / "nothing.bin")
    (tmp_path / "tokenizer.model").write_bytes(b"\x7fELF and so on")
    with pytest.raises(TokenizerError, match="none of the tokenizer files"):
        load_tokenizer(tmp_path)


def test_oversized_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.truncate(10 << 30)  # sparse: ten claimed GiB
    with pytest.raises(TokenizerError, match="larger than 256 MiB"):
        load_tokenizer(path)


# --- hostile files ---------------------------------------------------------------------------------------------------


def loads_or_refuses(path: Path) -> None:
    """Nothing but a typed error that names the file, or a tokenizer that works."""
    refused: TokenizerError | None = None
    try:
        tokenizer = load_tokenizer(path)
        assert isinstance(tokenizer.decode(tokenizer.encode("Once <s> é🦙")), str)
    except TokenizerError as error:
        refused = error
    assert refused is None or (str(path.parent) in refused.message and refused.remedy)


damage = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6)
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def damaged(data: bytes, changes: list[tuple[float, int]], keep: float) -> bytes:
    changed = bytearray(data)
    for place, value in changes:
        changed[int(place**3 * len(changed))] = value  # mostly near the start, where the structure is
    return bytes(changed[: int(keep * len(changed)) + 1])


@quick
@given(changes=damage, keep=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_damaged_llama2c_files(llama2c_file: Path, changes: list[tuple[float, int]], keep: float) -> None:
    path = llama2c_file.with_name("damaged.bin")
    path.write_bytes(damaged(llama2c_file.read_bytes(), changes, keep))
    loads_or_refuses(path)


@quick
@given(changes=damage, keep=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_damaged_tokenizer_json(byte_level_folder: Path, changes: list[tuple[float, int]], keep: float) -> None:
    path = byte_level_folder.parent / "tokenizer.json"
    path.write_bytes(damaged((byte_level_folder / "tokenizer.json").read_bytes(), changes, keep))
    loads_or_refuses(path)


@settings(quick, max_examples=15)
@given(changes=damage, keep=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_damaged_sentencepiece_files(
    reference: Path, tmp_path: Path, changes: list[tuple[float, int]], keep: float
) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damaged((reference / "tokenizers/llama2/tokenizer.model").read_bytes(), changes, keep))
    loads_or_refuses(path)


@quick
@given(data=st.binary(max_size=200))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    loads_or_refuses(path)


def tiktoken_lines(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiktoken_lines([bytes([b]) for b in range(256)]), "holds 256 ranks"),
        (tiktoken_lines([bytes([b]) for b in range(255)]), "one of the 256 bytes has none"),
        (tiktoken_lines([*(bytes([b]) for b in range(256)), b"a"]), "empty or repeated"),
        (b"IQ== 0\nIg== 2\n", "do not count up"),
        (b"IQ== 0\nIg==", "do not count up"),
        (b"IQ== 0\nI*== 1\n", "damaged tiktoken"),
        (b"IQ== 0\nIg== 99999999999999999999999999\n", "do not count up"),
        (b"IQ== 0\nIg== " + b"9" * 5000 + b"\n", "damaged tiktoken"),
    ],
)
def test_damaged_tiktoken_files(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<ifi", 7, 0.0, 1 << 30) + b"<unk>", "length 1073741824"),
        (struct.pack("<ifi", 7, 0.0, -5) + b"<unk>", "length -5"),
        (struct.pack("<ifi", 7, float("nan"), 5) + b"<unk>", "score nan"),
        (struct.pack("<ifi", 7, 0.0, 5) + b"<unk>", "not <0x00> to <0xFF>"),
        (struct.pack("<ifi", 7, 0.0, 5) + b"<unk>\0\0", "cut short"),
    ],
)
def test_damaged_llama2c_headers(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "tok.bin").write_bytes(data)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path / "tok.bin")


def test_importing_the_room_imports_no_library() -> None:
    code = (
        "import sys, puna.text.tokenizer, puna.text.detokenizer, puna.text.chat; "
        "print([m for m in ('tokenizers', 'tiktoken', 'sentencepiece', 'jinja2', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_whether_a_text_begins_with_bos_is_the_files_to_say(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers, processors

    vocabulary = {"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}}
    engine = Engine(models.BPE(vocab=vocabulary, merges=[]))
    engine.add_special_tokens(["<s>", "</s>"])
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    path, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    engine.save(str(path))
    assert load_tokenizer(path).bos_id == 0
    assert not load_tokenizer(path).adds_bos
    config.write_text('{"add_bos_token": true}')
    assert load_tokenizer(path).adds_bos
    config.unlink()
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    engine.save(str(path))
    assert load_tokenizer(path).adds_bos
    config.write_text('{"add_bos_token": false}')
    assert not load_tokenizer(path).adds_bos
    config.write_text('{"add_bos_token": "yes"}')
    with pytest.raises(TokenizerError, match="add_bos_token"):
        load_tokenizer(path)
