"""GGUF files against other people's arithmetic and tokenizers.

What it is: every packed type through a whole model, against float32 over the numbers that the gguf package unpacks;
stories260K, written as GGUF by the gguf package, against its published text; and llama.cpp on the same files (`peers`).
What is surprising: random bytes serve as packed weights, those kept whose numbers are of a weight's size: most types
have no encoder but llama.cpp's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import gguf_builder as gb
import numpy as np
import numpy.typing as npt
import pytest

from puna import LLM
from puna.engine.native_runner import host_runner
from puna.engine.runner import Batch
from puna.kernels import ops
from puna.kernels.blocks import TYPES
from puna.kernels.layouts import page_table
from puna.models import decoder, llama3
from puna.text.tokenizer import load_tokenizer
from puna.text.tokenizer_llama2c import Llama2cTokenizer
from puna.weights import names
from puna.weights.checkpoint import open_checkpoint
from puna.weights.convert import convert
from puna.weights.embedded import embedded_folder
from puna.weights.load import load_weights

Floats = npt.NDArray[np.float32]
KINDS = [name for name, kind in TYPES.items() if kind.block > 1]
TEXT_IDS = [1, *range(50, 90), 3, 120, 7, 250]
NEW = 256


@pytest.fixture(autouse=True)
def _auto_kernels() -> Iterator[None]:
    yield
    ops.select("auto")


def unpacked(kind: str, data: npt.NDArray[np.uint8]) -> Floats:
    with np.errstate(all="ignore"):
        values: Floats = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    return values


def random_model(kind: str, path: Path, seed: int = 5) -> dict[str, Floats]:
    """A model of random blocks of `kind`, 256 wide; gives its numbers by GGUF's names."""
    random = np.random.default_rng(seed)
    pool = random.integers(0, 256, (20_000, TYPES[kind].size), np.uint8)
    values = unpacked(kind, pool)
    with np.errstate(all="ignore"):
        size = np.sqrt(np.mean(np.square(values), axis=1))
    pool = pool[(size > 0.02) & (size < 0.08)]  # NaN is neither
    assert len(pool) > 100

    def encode(shape: npt.NDArray[Any]) -> bytes:
        return pool[random.integers(0, len(pool), shape.size // TYPES[kind].block)].tobytes()

    built = gb.tiny(kind, encode, dim=256, hidden=512)
    built.write(path)
    numbers = {}
    for row in built.tensors:
        data = np.frombuffer(row.data, np.uint8)
        plain = data.view(np.float32) if len(row.shape) == 1 else unpacked(kind, data.reshape(row.shape[0], -1))
        numbers[row.name] = plain
    return numbers


def exact_logits(path: Path, numbers: dict[str, Floats], of: list[int] = TEXT_IDS) -> Floats:
    """Float32 logits over the unpacked numbers, by the NumPy reference."""
    ops.select("reference")
    config = open_checkpoint(path).config
    weights = decoder.build(config, lambda name: numbers[names.foreign(name, "gguf")])
    hidden = decoder.forward(weights, config, np.array([of], np.int32))
    logits: Floats = decoder.logits(weights, hidden)[0]
    return logits


def divergence(p: Floats, q: Floats) -> float:
    """The mean of KL(p ‖ q) over the positions, from logits, in nats."""

    def log_softmax(x: Floats) -> npt.NDArray[np.float64]:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    a, b = log_softmax(p), log_softmax(q)
    return float(np.mean(np.sum(np.exp(a) * (a - b), -1)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_packed_type(kind: str, tmp_path: Path) -> None:
    expected = exact_logits(tmp_path / "a.gguf", random_model(kind, tmp_path / "a.gguf"))
    assert expected.std() > 0.5  # they say something
    for served, most in (("reference", 1e-9), ("auto", 1e-3)):
        got = LLM(tmp_path / "a.gguf", kernels=served).logits(TEXT_IDS)
        assert divergence(expected, got) < most
    assert divergence(expected, np.roll(expected, 1, 0)) > 0.1  # and the measure sees a wrong answer


def test_a_model_on_torch_is_unpacked(tmp_path: Path) -> None:
    random_model("Q4_K", tmp_path / "a.gguf")
    from puna.engine.torch_runner import TorchRunner
    from puna.weights.load import load

    loaded = load(tmp_path / "a.gguf", packed=False)
    assert "the weights were converted from Q4_K, fp32 to bf16" in loaded.notes
    got = TorchRunner(loaded.config, loaded.weights, "cpu").all_logits(TEXT_IDS)
    expected = LLM(tmp_path / "a.gguf", kernels="reference", dtype="bf16").logits(TEXT_IDS)
    assert divergence(expected, got) < 2e-2  # torch rounds what it adds up to bf16 as well


def stories260k(folder: Path, path: Path) -> Path:
    """stories260K as the gguf package writes it, float32; q and k of llama2.c are in Meta's order, as GGUF's are."""
    checkpoint = open_checkpoint(folder / "stories260K.bin")
    words = load_tokenizer(folder / "tok512.bin")
    assert isinstance(words, Llama2cTokenizer)
    config, writer = checkpoint.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_name("stories260K")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_file_type(0)
    tokens = [words._ordinary_bytes(i).replace(b" ", "▁".encode()) for i in range(512)]
    tokens[:259] = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % b for b in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(words._scores)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 253)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in checkpoint.tensors.items():
        writer.add_tensor(names.foreign(name, "gguf"), np.asarray(tensor.read()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("served", ["reference", "auto"])
def test_stories260k_writes_its_published_text(served: str, reference: Path, tmp_path: Path) -> None:
    folder = reference / "checkpoints" / "stories260K"
    llm = LLM(stories260k(folder, tmp_path / "a.gguf"), kernels=served)
    assert llm.notes == ()
    text = llm.generate("", raw=True, temperature=0, max_tokens=NEW).text
    assert text == json.loads((folder / "expected_greedy.json").read_text())["text"]
    beside = load_tokenizer(folder / "tok512.bin")
    for line in (text, "Lily  likes\tcats\n", "größe 🦙"):
        assert llm.tokenizer.encode(line) == beside.encode(line)


# llama.cpp on the same files.


def llama_cpp(path: Path, **options: Any) -> Any:
    import llama_cpp

    return llama_cpp.Llama(str(path), n_ctx=512, n_threads=2, logits_all=True, verbose=False, **options)


def their_logits(path: Path, ids: list[int], engine: Any = None) -> Floats:
    engine = engine or llama_cpp(path, type_k=0, type_v=0)  # a cache of float32, as ours
    engine.reset()
    engine.eval(ids)
    return np.array(engine.scores[: len(ids)], np.float32)


def geometric_mean(ours: list[float], theirs: list[float]) -> float:
    """Of the ratios of paired distances. Both engines' errors are chance: one pair says 0.7 as easily as 1.4."""
    return float(np.exp(np.mean(np.log(np.array(ours) / np.array(theirs)))))


@pytest.mark.peers
@pytest.mark.parametrize("kind", KINDS)
def test_every_packed_type_is_as_near_as_llama_cpp(kind: str, tmp_path: Path) -> None:
    """Over two models and eight texts of each; the mean of sixteen ratios is within 5 % of what more would give."""
    ours, theirs = [], []
    random = np.random.default_rng(3)
    for seed in (5, 6):
        path = tmp_path / f"{seed}.gguf"
        numbers = random_model(kind, path, seed)
        texts = [TEXT_IDS, *([1, *map(int, random.integers(3, 250, 39))] for _ in range(7))]
        expected = [exact_logits(path, numbers, ids) for ids in texts]
        llm, engine = LLM(path, kernels="auto"), llama_cpp(path, type_k=0, type_v=0)
        ours += [divergence(want, llm.logits(ids)) for want, ids in zip(expected, texts, strict=True)]
        theirs += [divergence(want, their_logits(path, ids, engine)) for want, ids in zip(expected, texts, strict=True)]
    assert max(theirs) < 0.05  # the same file, the same model
    assert max(ours) < 1e-3
    assert geometric_mean(ours, theirs) < 1.05


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M"])
def test_a_prefill_over_a_cache_is_as_near_as_llama_cpp(kind: str, tmp_path: Path) -> None:
    """Each with the cache it chooses, and more tokens than decode attention takes; twelve texts of `cria`'s kind.

    Beside packed weights prefill attention rounds to bfloat16, which costs up to 6 % of their distance (docs/notes).
    """
    path = convert(embedded_folder(), tmp_path / "a.gguf", to="gguf", dtype=kind).path
    story = "Once upon a time there was a little girl named Lily. She liked to play in the park with her red ball. "
    ids = load_tokenizer(embedded_folder() / "tokenizer.json").encode(story * 2)
    texts = [[*ids[at:], *ids[:at]] * 4 for at in range(0, 48, 4)]
    exact = LLM(path, kernels="reference")
    expected = [exact.logits(text[:150]) for text in texts]
    ops.select("auto")
    checkpoint = open_checkpoint(path)
    weights, _ = load_weights(checkpoint)
    engine = llama_cpp(path)
    runner = host_runner(checkpoint.config, weights)
    pages = -(-150 // runner.page)
    runner.allocate(pages)
    table = page_table([0], [150], np.arange(pages)[None])
    ours, theirs = [], []
    for want, text in zip(expected, texts, strict=True):
        batch = Batch(np.array(text[:150], np.int32), table, np.arange(150, dtype=np.int32))
        ours.append(divergence(want, runner.run(batch)))
        theirs.append(divergence(want, their_logits(path, text[:150], engine)))
    assert geometric_mean(ours, theirs) < 1.1


@pytest.mark.peers
def test_a_foreign_file_gives_llama_cpps_logits(reference: Path) -> None:
    path = reference / "checkpoints" / "llama-2-tiny-random" / "llama-2-tiny-random.gguf"
    ids = [1, 15043, 3186, 29892, 445, 338, 263, 11148, 3304, 29991]
    np.testing.assert_allclose(LLM(path).logits(ids), their_logits(path, ids), atol=2e-4)


@pytest.mark.peers
def test_llama_3_1s_rope_gives_llama_cpps_logits(tmp_path: Path) -> None:
    built = gb.tiny(dim=256, hidden=512)
    built.metadata = [gb.real("llama.rope.freq_base", 500000.0) if b"freq_base" in m else m for m in built.metadata]
    values = np.float32(gb.converter_factors(llama3.SCALING_3_1, 64, 500000.0))
    built.tensors.append(gb.Row("rope_freqs.weight", (32,), values.tobytes()))
    path = built.write(tmp_path / "a.gguf")
    assert open_checkpoint(path).config.rope.llama3 is not None
    np.testing.assert_allclose(LLM(path).logits(TEXT_IDS), their_logits(path, TEXT_IDS), atol=2e-3)


@pytest.mark.peers
def test_llama_cpp_writes_stories260k_too(reference: Path, tmp_path: Path) -> None:
    folder = reference / "checkpoints" / "stories260K"
    engine = llama_cpp(stories260k(folder, tmp_path / "a.gguf"))
    llm = LLM(tmp_path / "a.gguf")
    ids = llm.generate([1], temperature=0, max_tokens=200).token_ids
    theirs = []
    for token in engine.generate([1], temp=0.0, repeat_penalty=1.0):
        theirs.append(token)
        if len(theirs) == 200:
            break
    assert list(ids) == theirs
