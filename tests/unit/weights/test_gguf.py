"""The reader of GGUF: what it reads, against the gguf package; what it refuses, byte by byte.

What it is not: the arithmetic of packed types (`tests/unit/kernels/test_blocks.py`), or another engine's answers
(`tests/agreement/test_gguf.py`).
"""

from __future__ import annotations

import math
import mmap
import resource
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_builder as gb
import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import mapped

from puna import LLM
from puna.cli.show import describe
from puna.errors import CheckpointError, ConfigError, PunaError, TokenizerError, UsageError
from puna.kernels.blocks import TYPES
from puna.kernels.layouts import Mapped, Packed, Panels, to_float32
from puna.models import config_gguf, llama3
from puna.models.rope import Llama3Scaling, Rope
from puna.models.tree import leaves
from puna.text.words import Words
from puna.weights import gguf, gguf_model
from puna.weights import load as load_module
from puna.weights.checkpoint import open_checkpoint
from puna.weights.convert import convert
from puna.weights.files import MappedFile, mapping
from puna.weights.load import load, load_weights


def refused(path: Path, words: str, kind: type[PunaError] = CheckpointError) -> PunaError:
    with pytest.raises(kind, match=words) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert caught.value.remedy
    return caught.value


# What is read.


def test_values_of_every_type_are_those_the_gguf_package_wrote(tmp_path: Path) -> None:
    writer = GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    values: dict[str, tuple[Any, GGUFValueType]] = {
        "u8": (200, GGUFValueType.UINT8), "i8": (-100, GGUFValueType.INT8), "u16": (60000, GGUFValueType.UINT16),
        "i16": (-30000, GGUFValueType.INT16), "u32": (4000000000, GGUFValueType.UINT32),
        "i32": (-2000000000, GGUFValueType.INT32), "u64": (1 << 63, GGUFValueType.UINT64),
        "i64": (-(1 << 62), GGUFValueType.INT64), "f32": (1e-5, GGUFValueType.FLOAT32),
        "f64": (math.pi, GGUFValueType.FLOAT64), "yes": (True, GGUFValueType.BOOL), "no": (False, GGUFValueType.BOOL),
        "text": ("größe 🦙", GGUFValueType.STRING),
    }  # fmt: skip
    for key, (value, kind) in values.items():
        writer.add_key_value(f"x.{key}", value, kind)
    writer.add_array("x.numbers", [1, -2, 3])
    writer.add_array("x.texts", ["a", "", "größe", "x" * 300, "b" * 255, "c" * 256])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = gguf.read(tmp_path / "a.gguf").metadata
    assert {key: metadata[f"x.{key}"] for key in values} == {key: value for key, (value, _) in values.items()}
    assert metadata["x.numbers"].tolist() == [1, -2, 3]
    assert isinstance(metadata["x.texts"], Words)
    assert [w.decode() for w in metadata["x.texts"].to_list()] == ["a", "", "größe", "x" * 300, "b" * 255, "c" * 256]
    assert metadata["x.texts"][3] == b"x" * 300
    assert (metadata.count("x.texts"), metadata.count("x.numbers"), metadata.count("x.u8"), metadata.count("?")) == (
        6, 3, 0, 0,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_strings_are_found_whatever_their_lengths(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    longest = (3, 9, 255, 256, 300, 70_000)[seed]
    texts = [random.bytes(int(n)) for n in random.integers(0, longest + 1, 40 if seed == 5 else 3000)]
    if seed == 1:  # zeros are what the fast walk takes for a length's upper bytes
        texts = [t + b"\5" + b"\0" * 9 for t in texts]
    built = gb.Built([gb.words("general.architecture", "llama"), gb.entry("t", gb.ARRAY, gb.array(gb.STRING, texts))])
    found = gguf.read(built.write(tmp_path / "a.gguf")).metadata["t"]
    assert found.to_list() == texts


def test_tensors_are_those_the_gguf_package_reads(reference: Path) -> None:
    path = reference / "checkpoints" / "llama-2-tiny-random" / "llama-2-tiny-random.gguf"
    whole, theirs = gguf.read(path), GGUFReader(path)
    assert (whole.version, len(whole.tensors)) == (3, 12)
    for tensor in theirs.tensors:
        ours = whole.tensors[tensor.name]
        assert ours.shape == tuple(reversed([int(n) for n in tensor.shape]))
        assert (ours.kind, ours.nbytes, ours.offset) == (tensor.tensor_type.name, tensor.n_bytes, tensor.data_offset)
        weight = ours.lazy().read()
        assert mapped(weight)
        assert np.array_equal(to_float32(weight).reshape(-1), tensor.data.astype(np.float32).reshape(-1))
    tokens = [
        bytes(theirs.fields["tokenizer.ggml.tokens"].parts[i]) for i in theirs.fields["tokenizer.ggml.tokens"].data
    ]
    assert whole.metadata["tokenizer.ggml.tokens"].to_list() == tokens


def test_the_config_of_a_foreign_file(reference: Path) -> None:
    checkpoint = open_checkpoint(reference / "checkpoints" / "llama-2-tiny-random")
    config = checkpoint.config
    assert (config.vocab_size, config.dim, config.layers, config.heads, config.kv_heads) == (32000, 8, 1, 2, 2)
    assert (config.hidden_dim, config.head_dim, config.norm_eps, config.context_length) == (32, 4, 1e-5, 4096)
    assert (config.generation, config.rope, config.tied_head) == ("llama2", Rope(4, 10000.0), False)
    assert config.interleaved_rope
    assert (checkpoint.read_config.bos_id, checkpoint.read_config.eos_ids) == (1, (2,))
    assert (checkpoint.notes, checkpoint.read_config.unknown, checkpoint.ignored) == ((), (), ())


@pytest.mark.parametrize("kind", [name for name, kind in TYPES.items() if kind.block > 1])
def test_every_packed_type_is_a_view_of_the_file(kind: str, tmp_path: Path) -> None:
    block, size = TYPES[kind].block, TYPES[kind].size
    data = np.random.default_rng(1).integers(0, 256, 3 * 2 * size, np.uint8)
    row = gb.Row("m", (3, 2 * block), data.tobytes(), TYPES[kind].ggml_id)
    path = gb.Built([gb.words("general.architecture", "llama")], [row]).write(tmp_path / "a.gguf")
    lazy = gguf.read(path).tensors["m"].lazy()
    assert (lazy.dtype, lazy.shape, lazy.nbytes) == (kind, (3, 2 * block), data.size)
    weight = lazy.read()
    assert isinstance(weight, Packed)
    assert weight.kind == kind
    assert mapped(weight)
    assert np.array_equal(weight.data.reshape(-1), data)


def test_the_names_of_the_mixes_are_those_of_the_gguf_package() -> None:
    theirs = {t.value: t.name.removeprefix("MOSTLY_").removeprefix("ALL_") for t in LlamaFileType if t.value < 1000}
    assert {number: theirs[number] for number in gguf.FILE_TYPES} == gguf.FILE_TYPES


def test_a_version_2_file_is_read(tmp_path: Path) -> None:
    built = gb.tiny()
    built.version = 2
    assert open_checkpoint(built.write(tmp_path / "a.gguf")).config.layers == gb.LAYERS


def test_another_alignment_is_honoured(tmp_path: Path) -> None:
    built = gb.tiny()
    built.metadata.append(gb.number("general.alignment", 256))
    built.alignment = 256
    checkpoint = open_checkpoint(built.write(tmp_path / "a.gguf"))
    expected = np.frombuffer(built.named("blk.1.ffn_down.weight").data, np.float32)
    assert np.array_equal(np.asarray(checkpoint.tensors["layers.1.down.weight"].read()).reshape(-1), expected)


def test_a_tied_head_and_an_untied_one(tmp_path: Path) -> None:
    built = gb.tiny()
    assert open_checkpoint(built.write(tmp_path / "tied.gguf")).config.tied_head
    head = np.ones((gb.VOCAB, gb.DIM), np.float32).tobytes()
    built.tensors.append(gb.Row("output.weight", (gb.VOCAB, gb.DIM), head))
    assert not open_checkpoint(built.write(tmp_path / "untied.gguf")).config.tied_head
    built.named("output.weight").data = built.named("token_embd.weight").data
    same = open_checkpoint(built.write(tmp_path / "same.gguf"))
    assert same.config.tied_head
    assert same.ignored == ("output.weight (a copy of token_embd.weight)",)


def test_biases(tmp_path: Path) -> None:
    built = gb.tiny()
    for i in range(gb.LAYERS):
        for name, rows in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("attn_output", 64)):
            built.tensors.append(gb.Row(f"blk.{i}.{name}.bias", (rows,), np.full(rows, i + 1, np.float32).tobytes()))
    checkpoint = open_checkpoint(built.write(tmp_path / "a.gguf"))
    assert (checkpoint.config.attention_bias, checkpoint.config.mlp_bias) == (True, False)
    assert np.all(np.asarray(checkpoint.tensors["layers.1.k.bias"].read()) == 2)


# Rope.


def with_factors(factors: Any, theta: float = 500000.0, shape: tuple[int, ...] | None = None) -> gb.Built:
    built = gb.tiny().without("llama.rope.freq_base")
    built.metadata.append(gb.real("llama.rope.freq_base", theta))
    values = np.asarray(factors, np.float32)
    built.tensors.append(gb.Row("rope_freqs.weight", shape or values.shape, values.tobytes()))
    return built


@pytest.mark.parametrize(
    ("rule", "generation"), [(llama3.SCALING_3_1, "llama3.1"), (llama3.SCALING_3_2, "llama3.2")], ids=["3.1", "3.2"]
)
def test_the_divisors_of_llama_3_1_are_known_as_its_rule(rule: Llama3Scaling, generation: str, tmp_path: Path) -> None:
    factors = gb.converter_factors(rule, 16, 500000.0)
    config = open_checkpoint(with_factors(factors).write(tmp_path / "a.gguf")).config
    assert config.rope == Rope(16, 500000.0, llama3=rule)
    assert config.generation == generation
    plain = Rope(16, 500000.0).inv_freq()
    np.testing.assert_allclose(config.rope.inv_freq(), plain / np.float32(factors), rtol=2e-6)


def test_other_divisors_are_used_as_they_are(tmp_path: Path) -> None:
    factors = np.float32([1, 1, 2, 3, 4, 5, 6, 7.5])
    config = open_checkpoint(with_factors(factors).write(tmp_path / "a.gguf")).config
    assert config.rope.llama3 is None
    assert np.array_equal(config.rope.inv_freq(), Rope(16, 500000.0).inv_freq() / factors)
    same = open_checkpoint(with_factors(np.ones(8)).write(tmp_path / "b.gguf")).config
    assert same.rope == Rope(16, 500000.0)


@pytest.mark.parametrize("factors", [[1.0] * 7, [1.0] * 7 + [0.0], [1.0] * 7 + [-1.0], [1.0] * 7 + [math.nan]])
def test_divisors_that_cannot_be(factors: list[float], tmp_path: Path) -> None:
    refused(with_factors(factors).write(tmp_path / "a.gguf"), "rope_freqs.weight", ConfigError)


def test_linear_scaling_in_both_spellings(tmp_path: Path) -> None:
    new = gb.tiny()
    new.metadata += [gb.words("llama.rope.scaling.type", "linear"), gb.real("llama.rope.scaling.factor", 4.0)]
    old = gb.tiny()
    old.metadata.append(gb.real("llama.rope.scale_linear", 4.0))
    off = gb.tiny()
    off.metadata += [gb.words("llama.rope.scaling.type", "none"), gb.real("llama.rope.scaling.factor", 4.0)]
    for built, factor in ((new, 4.0), (old, 4.0), (off, 1.0)):
        assert open_checkpoint(built.write(tmp_path / "a.gguf")).config.rope == Rope(16, 10000.0, linear_factor=factor)


# What is refused by name.


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            gb.words("llama.rope.scaling.type", "yarn"),
            r"'llama.rope.scaling.type' is 'yarn', which Puna does not imple",
        ),
        (gb.number("llama.expert_count", 8), r"'llama.expert_count' \(8\) is a mixture of experts"),
        (gb.number("llama.attention.sliding_window", 4096), "'llama.attention.sliding_window'"),
        (gb.real("llama.attention.scale", 0.5), "'llama.attention.scale'"),
        (gb.number("llama.attention.value_length", 8), "'llama.attention.value_length' is 8, and each head has 16"),
        (gb.number("llama.vocab_size", 300), "'llama.vocab_size' is 300, and the embedding has 259 rows"),
        (gb.entry("llama.attention.causal", 7, b"\0"), "'llama.attention.causal'"),
        (gb.entry("llama.rope.scaling.factor", 12, struct.pack("<d", 1e300)), "of float32's range, not 1e\\+300"),
        (gb.entry("llama.rope.scaling.factor", 12, struct.pack("<d", 1e-300)), "of float32's range, not 1e-300"),
    ],
)
def test_what_puna_does_not_compute(entry: bytes, words: str, tmp_path: Path) -> None:
    built = gb.tiny()
    built.metadata.append(entry)
    refused(built.write(tmp_path / "a.gguf"), words, ConfigError)


@pytest.mark.parametrize(
    ("key", "replacement", "words"),
    [
        ("llama.block_count", None, "'llama.block_count' is missing"),
        ("llama.block_count", gb.number("llama.block_count", 0), "'llama.block_count' must be a whole number from 1"),
        ("llama.block_count", gb.words("llama.block_count", "2"), "'llama.block_count' must be a whole number"),
        ("llama.attention.head_count", gb.number("llama.attention.head_count", 5), "is not a multiple of"),
        ("llama.attention.head_count_kv", gb.number("llama.attention.head_count_kv", 3), "cannot share"),
        ("llama.rope.dimension_count", gb.number("llama.rope.dimension_count", 8), "is 8, and each head has 16"),
        ("llama.attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon' is missing"),
        (
            "llama.attention.head_count_kv",
            gb.entry("llama.attention.head_count_kv", gb.ARRAY, gb.array(4, [2, 2])),
            "'llama.attention.head_count_kv' must be a whole number",
        ),
        ("general.architecture", gb.words("general.architecture", "gemma2"), "'general.architecture' is 'gemma2'"),
    ],
)
def test_settings_that_are_missing_or_wrong(key: str, replacement: bytes | None, words: str, tmp_path: Path) -> None:
    built = gb.tiny().without(key)
    built.metadata += [] if replacement is None else [replacement]
    refused(built.write(tmp_path / "a.gguf"), words, ConfigError)


def test_ollamas_llama_3_2_vision_is_refused_by_name(tmp_path: Path) -> None:
    built = gb.tiny().without("general.architecture")
    built.metadata.append(gb.words("general.architecture", "mllama"))
    refused(built.write(tmp_path / "a.gguf"), "Llama 3.2 Vision as Ollama packs it")


def test_unknown_settings_are_reported(tmp_path: Path) -> None:
    built = gb.tiny()
    built.metadata.append(gb.number("llama.new_idea", 1))
    assert open_checkpoint(built.write(tmp_path / "a.gguf")).read_config.unknown == ("llama.new_idea",)


def test_a_vocabulary_alone_is_no_model(reference: Path) -> None:
    refused(reference / "tokenizers" / "ggml-vocab-llama-spm.gguf", "no weights, only a vocabulary")


def test_tensors_missing_left_over_and_of_another_shape(tmp_path: Path) -> None:
    built = gb.tiny()
    row = built.named("blk.1.attn_k.weight")
    built.tensors.remove(row)
    refused(built.write(tmp_path / "a.gguf"), "blk.1.attn_k.weight")
    built.tensors.append(gb.Row("blk.1.attn_k.weight", (64, 32), row.data))
    refused(built.write(tmp_path / "a.gguf"), r"has the shape \[64, 32\], and the config says \[32, 64\]")
    built = gb.tiny()
    built.tensors.append(gb.Row("blk.1.ffn_gate_exps.weight", (1,), b"\0\0\0\0"))
    refused(built.write(tmp_path / "a.gguf"), "no use for: blk.1.ffn_gate_exps.weight")


def test_a_packed_norm_is_refused(tmp_path: Path) -> None:
    built = gb.tiny()
    row = built.named("output_norm.weight")
    row.kind, row.data = TYPES["Q8_0"].ggml_id, b"\0" * 68
    refused(built.write(tmp_path / "a.gguf"), "output_norm.weight is stored as Q8_0")


# Hostile files.


def _bad(change: Callable[[gb.Built], object]) -> gb.Built:
    built = gb.tiny()
    change(built)
    return built


def _set(tensor: str, **values: Any) -> Callable[[gb.Built], object]:
    def change(built: gb.Built) -> None:
        row = built.named(tensor)
        for key, value in values.items():
            setattr(row, key, value)

    return change


def _add(*entries: bytes) -> Callable[[gb.Built], object]:
    return lambda built: built.metadata.extend(entries)


E, N = "token_embd.weight", "output_norm.weight"
HOSTILE: dict[str, tuple[Callable[[gb.Built], object], str]] = {
    "version 1": (lambda b: setattr(b, "version", 1), "GGUF version 1; Puna reads versions 2 and 3"),
    "version 4": (lambda b: setattr(b, "version", 4), "GGUF version 4"),
    "big endian": (lambda b: setattr(b, "version", 3 << 24), r"a big-endian GGUF file \(version 3\)"),
    "huge tensor count": (lambda b: setattr(b, "tensor_count", 1 << 40), "it claims 1099511627776 tensors"),
    "negative tensor count": (lambda b: setattr(b, "tensor_count", (1 << 64) - 1), "it claims 18446744073709551615 te"),
    "one tensor too many": (lambda b: setattr(b, "tensor_count", len(b.tensors) + 1), "entry 21 of its table"),
    "huge value count": (lambda b: setattr(b, "value_count", 1 << 40), "it claims 1099511627776 entries of metadata"),
    "negative value count": (lambda b: setattr(b, "value_count", (1 << 64) - 1), "entries of metadata"),
    "one value too few": (lambda b: setattr(b, "value_count", len(b.metadata) - 1), "damaged"),
    "duplicate key": (_add(gb.number("llama.block_count", 2)), "the key llama.block_count stands there twice|twice"),
    "empty key": (_add(gb.number("", 2)), "has a name of 0 bytes"),
    "long key": (_add(gb.number("k" * 600, 2)), "has a name of 600 bytes"),
    "key of 2^63 bytes": (_add(gb.u64(1 << 63) + b"abc"), "has a name of 9223372036854775808 bytes"),
    "key not UTF-8": (_add(gb.text(b"\xff\xfe") + gb.u32(4) + gb.u32(0)), "not UTF-8"),
    "string of 2^63 bytes": (_add(gb.entry("x", 8, gb.u64(1 << 63) + b"abc")), "it ends within 'x'"),
    "string past the end": (_add(gb.entry("x", 8, gb.u64(1 << 30) + b"abc")), "it ends within 'x'"),
    "type 13": (_add(gb.entry("x", 13, gb.u64(0))), "'x' has the type 13"),
    "type 2^32 - 1": (_add(gb.entry("x", (1 << 32) - 1, gb.u64(0))), "'x' has the type 4294967295"),
    "array of arrays": (_add(gb.entry("x", 9, gb.u32(9) + gb.u64(1) + gb.array(4, [1]))), "'x' is an array of arrays"),
    "array of type 99": (_add(gb.entry("x", 9, gb.u32(99) + gb.u64(1))), "array of the type 99"),
    "array of 2^62 numbers": (_add(gb.entry("x", 9, gb.u32(4) + gb.u64(1 << 62))), "it ends within 'x'"),
    "array of 2^62 strings": (_add(gb.entry("x", 9, gb.u32(8) + gb.u64(1 << 62))), "'x' claims 4611686018427387904"),
    "array whose string is 2^63": (
        _add(gb.entry("x", 9, gb.u32(8) + gb.u64(2) + gb.text("a") + gb.u64(1 << 63))), "it ends within 'x'",
    ),
    "alignment 0": (_add(gb.number("general.alignment", 0)), "'general.alignment' is 0"),
    "alignment 24": (_add(gb.number("general.alignment", 24)), "'general.alignment' is 24; it must be a power of two"),
    "alignment 1": (_add(gb.number("general.alignment", 1)), "'general.alignment' is 1"),
    "alignment 2^31": (_add(gb.number("general.alignment", 1 << 31)), "'general.alignment' is 2147483648"),
    "alignment of text": (_add(gb.words("general.alignment", "32")), "'general.alignment' is '32'"),
    "bool of 2": (_add(gb.entry("llama.attention.causal", 7, b"\2")), "is a bool of the value 2"),
    "architecture not UTF-8": (
        lambda b: b.without("general.architecture").metadata.append(gb.words("general.architecture", b"\xff")),
        "'general.architecture' is not UTF-8",
    ),
    "architecture missing": (lambda b: b.without("general.architecture"), "general.architecture is missing"),
    "architecture a number": (
        lambda b: b.without("general.architecture").metadata.append(gb.number("general.architecture", 1)),
        "general.architecture is missing",
    ),
    "duplicate tensor": (lambda b: b.tensors.append(gb.Row(N, (64,), b"\0" * 256)), "the tensor 'output_norm.weight'"),
    "nameless tensor": (_set(N, name=""), "has a name of 0 bytes"),
    "no dimensions": (_set(N, dimensions=0, shape=()), "has 0 dimensions"),
    "five dimensions": (_set(N, dimensions=5, shape=(1, 1, 1, 1, 64)), "has 5 dimensions"),
    "2^32 - 1 dimensions": (_set(N, dimensions=(1 << 32) - 1), "has 4294967295 dimensions"),
    "a dimension of 0": (_set(N, shape=(0,)), r"has the shape \[0\]"),
    "shape product overflow": (_set(N, shape=(1 << 32, 1 << 32)), "which no tensor can have"),
    "shape product overflows to 64": (_set(N, shape=(1 << 58, 64, 1 << 6)), "which no tensor can have"),
    "tensor type 4": (_set(N, kind=4), "is of ggml's type 4"),
    "tensor type 2^32 - 1": (_set(N, kind=(1 << 32) - 1), "is of ggml's type 4294967295"),
    "half a block": (_set(N, kind=8, shape=(48,)), "has rows of 48, and Q8_0 packs 32 numbers at a time"),
    "offset past the end": (_set(N, offset=1 << 40), "and the file ends at"),
    "offset + size overflow": (_set(N, offset=(1 << 64) - 32), "and the file ends at"),
    "offset not aligned": (_set(N, offset=4), "which is no multiple of 32"),
    "overlap": (_set(N, offset=32), "within 'token_embd.weight'"),
    "same place": (_set("blk.0.attn_norm.weight", offset=0), "within"),
    "a tensor larger than the file": (_set(E, shape=(1 << 20, 1 << 20)), "and the file ends at|within"),
    "the last byte is missing": (lambda b: setattr(b.tensors[-1], "data", b.tensors[-1].data[:-1]), "the file ends at"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, words = HOSTILE[case]
    path = _bad(change).write(tmp_path / "a.gguf")
    tracemalloc.start()
    try:
        if case == "one value too few":  # what follows is read as the table of tensors
            refused(path, ".")
        else:
            refused(path, words)
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size + (4 << 20)
    finally:
        tracemalloc.stop()


def test_every_truncation_of_a_header_is_refused(tmp_path: Path) -> None:
    built = gb.Built(gb.settings(), [gb.Row("rope_freqs.weight", (8,), b"\0" * 32)])
    whole = built.build()
    header = len(built.header())
    for length in range(1, len(whole)):
        path = tmp_path / "a.gguf"
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            gguf.read(path)
        path.unlink()
        assert length < header or length >= header
    (tmp_path / "a.gguf").write_bytes(whole)
    assert list(gguf.read(tmp_path / "a.gguf").tensors) == ["rope_freqs.weight"]


def test_a_header_of_empty_strings_takes_no_more_than_the_file(tmp_path: Path) -> None:
    count = 100_000
    entry = gb.text("x") + gb.u32(9) + gb.u32(8) + gb.u64(count) + b"\0" * 8 * count
    path = gb.Built([gb.words("general.architecture", "llama"), entry]).write(tmp_path / "a.gguf")
    tracemalloc.start()
    began = time.perf_counter()
    found = gguf.read(path).metadata
    assert found.count("x") == count
    assert tracemalloc.get_traced_memory()[1] < path.stat().st_size + (4 << 20)
    tracemalloc.stop()
    assert time.perf_counter() - began < 20
    path = gb.Built([gb.text("x") + gb.u32(9) + gb.u32(8) + gb.u64(gguf.MOST_STRINGS + 1)]).write(tmp_path / "b.gguf")
    with path.open("ab") as file:
        file.truncate(64 << 20)
    with pytest.raises(CheckpointError, match="at most 4194304 strings are read"):
        gguf.read(path)


READ = (
    *(f"llama.{key}" for key in config_gguf._NEUTRAL),
    *(f"llama.{key}" for key in ("block_count", "context_length", "embedding_length", "feed_forward_length",
      "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
      "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scale_linear",
      "rope.scaling.type", "rope.scaling.factor", "vocab_size")),
    *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id",
      "eos_token_id", "eot_token_id", "eos_token_ids", "add_bos_token", "add_eos_token", "add_space_prefix",
      "remove_extra_whitespaces", "escape_whitespaces", "precompiled_charsmap")),
    *(f"general.{key}" for key in ("architecture", "alignment", "file_type", "name", "license", "new")),
    "tokenizer.chat_template", "split.count", "split.no",
)  # fmt: skip
"""Every key that is read, and one that is only carried along."""


@pytest.mark.parametrize("key", READ)
def test_a_key_may_have_any_type(key: str, tmp_path: Path) -> None:
    """Whatever a file says under a key, reading, describing and converting it end well or in a typed error."""
    values = [
        (gb.STRING, gb.text("gpt2")), (gb.STRING, gb.text("")), (7, b"\1"), (6, struct.pack("<f", math.nan)),
        (12, struct.pack("<d", 1e300)), (11, struct.pack("<q", -1)), (10, gb.u64(1 << 63)),
        (gb.ARRAY, gb.array(6, [1.0, math.inf])), (gb.ARRAY, gb.array(5, [-1, 2, 3])), (gb.ARRAY, gb.array(7, [True])),
        (gb.ARRAY, gb.array(12, [])), (gb.ARRAY, gb.array(gb.STRING, [])), (gb.ARRAY, gb.array(gb.STRING, ["a", "b"])),
    ]  # fmt: skip
    for i, (kind, value) in enumerate(values):
        built = gb.tiny().without(key)
        built.metadata.append(gb.entry(key, kind, value))
        path = built.write(tmp_path / f"{i}.gguf")
        try:
            load(path)
            describe("x", open_checkpoint(path))
            convert(path, tmp_path / f"{i}.out.gguf", to="gguf")
            open_checkpoint(tmp_path / f"{i}.out.gguf")
        except (CheckpointError, ConfigError, TokenizerError):
            continue


def test_a_long_name_costs_no_time(tmp_path: Path) -> None:
    """A megabyte of the beginnings of a chat model's name took hours to search."""
    built = gb.tiny().without("llama.context_length")
    built.metadata += [gb.number("llama.context_length", 4096), gb.words("general.name", "llama2 " * 140_000)]
    began = time.perf_counter()
    assert load(built.write(tmp_path / "a.gguf")).config.generation == "llama2"
    assert time.perf_counter() - began < 10
    assert not gguf_model.named_for_chat(gguf.read(tmp_path / "a.gguf"), "llama2")


def mutated(data: bytes, changes: list[tuple[int, int, int]], cut: int) -> bytes:
    out = bytearray(data)
    for at, width, value in changes:
        out[at % len(out) : at % len(out) + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(out[: len(out) - cut])


def survive(data: bytes, path: Path) -> bool:
    """Open, load, run: only typed errors. Whether the file was accepted."""
    path.write_bytes(data)
    try:
        loaded = load(path)
    except (CheckpointError, ConfigError, TokenizerError):
        return False
    finally:
        path.unlink()
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("a b")) is not None
    return True


WHOLE = gb.tiny().build()
HEADER = len(gb.tiny().header())
INTERESTING = [0, 1, 2, 3, 8, 9, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1]
CHANGES = st.lists(
    st.tuples(
        st.integers(0, HEADER - 1), st.sampled_from([1, 1, 2, 4, 8]), st.sampled_from(INTERESTING) | st.integers(0, 255)
    ),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=CHANGES, cut=st.just(0) | st.integers(0, len(WHOLE) - 1))
def test_mutations_end_in_typed_errors(changes: list[tuple[int, int, int]], cut: int, tmp_path: Path) -> None:
    survive(mutated(WHOLE, changes, cut), tmp_path / "a.gguf")


@pytest.mark.slow
def test_ten_minutes_of_mutations(tmp_path: Path) -> None:
    """Every field of the header is hit many times; memory is bounded by the operating system meanwhile."""
    random = np.random.default_rng(int(time.time()))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), hard))
    accepted = total = 0
    try:
        end = time.monotonic() + 600
        while time.monotonic() < end:
            changes = [
                (int(random.integers(HEADER)), int(random.choice([1, 1, 2, 4, 8])),
                 int(random.choice(INTERESTING[:9])) if random.random() < 0.6 else int(random.integers(1 << 62)))
                for _ in range(int(random.integers(1, 5)))
            ]  # fmt: skip
            cut = int(random.integers(len(WHOLE))) if random.random() < 0.1 else 0
            accepted += survive(mutated(WHOLE, changes, cut), tmp_path / "a.gguf")
            total += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert total > 10_000
    assert 0 < accepted < total


# Split files and folders.


def split(folder: Path, parts: int = 3, **changes: Any) -> list[Path]:
    built = gb.tiny()
    said = {"count": parts, "tensors": len(built.tensors)} | changes
    paths = []
    for i in range(parts):
        metadata = built.metadata if i == 0 else [gb.words("general.architecture", "llama")]
        keys = [
            gb.entry("split.no", 2, struct.pack("<H", changes.get("numbers", range(parts))[i])),
            gb.entry("split.count", 2, struct.pack("<H", said["count"])),
            gb.entry("split.tensors.count", 5, struct.pack("<i", said["tensors"])),
        ]
        part = gb.Built([*metadata, *keys], built.tensors[i::parts] + changes.get("more", []))
        paths.append(part.write(folder / f"m-{i + 1:05d}-of-{parts:05d}.gguf"))
    return paths


def test_a_split_model_is_one_whatever_is_named(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    paths = split(tmp_path / "s")
    whole = open_checkpoint(gb.tiny().write(tmp_path / "a.gguf"))
    for named in (*paths, tmp_path / "s"):
        checkpoint = open_checkpoint(named)
        assert checkpoint.files == tuple(paths)
        assert (checkpoint.path, checkpoint.tokenizer) == (paths[0], paths[0])
        assert checkpoint.config == whole.config
        for name, tensor in whole.tensors.items():
            assert np.array_equal(np.asarray(checkpoint.tensors[name].read()), np.asarray(tensor.read()))


def test_all_missing_parts_are_named(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[0].unlink()
    paths[2].unlink()
    error = refused(paths[1], "2 of its 3 parts missing")
    assert "m-00001-of-00003.gguf, m-00003-of-00003.gguf" in error.message


def test_parts_that_do_not_fit_together(tmp_path: Path) -> None:
    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    refused(split(folder("a"), count=4)[0], "its name says that there are 3 parts, and split.count in it says 4")
    refused(split(folder("b"), tensors=5)[0], "it says that the parts hold 5 tensors, and they hold 20")
    paths = split(folder("c"), numbers=[0, 2, 1])
    with pytest.raises(CheckpointError, match="part 3 of 3, against its name"):
        open_checkpoint(paths[0])
    paths = split(folder("d"), more=[gb.Row("output.weight", (1,), b"\0" * 4)], tensors=21)
    with pytest.raises(CheckpointError, match=r"an earlier part has output\.weight too"):
        open_checkpoint(paths[0])
    paths = split(folder("e"))
    refused(paths[1].rename(tmp_path / "e" / "other.gguf"), "one of 3 parts, and its name does not say which")
    refused(gb.tiny().write(tmp_path / "x-00001-of-00002.gguf"), "its name says that there are 2 parts")


def test_a_folder_of_several_models(tmp_path: Path) -> None:
    gb.tiny().write(tmp_path / "a.gguf")
    assert open_checkpoint(tmp_path).format == "gguf"
    gb.tiny().write(tmp_path / "b.gguf")
    refused(tmp_path, "2 GGUF models: a.gguf, b.gguf")
    split(tmp_path)
    assert [p.name for p in gguf_model.models_in(tmp_path)] == ["a.gguf", "b.gguf", "m-00001-of-00003.gguf"]


# Loading.


def test_packed_matrices_stay_in_the_file_and_are_marked_where_memory_allows_regrouping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.kernels.encode import quantize

    built = gb.tiny("Q8_0", lambda values: quantize("Q8_0", values).tobytes())
    checkpoint = open_checkpoint(built.write(tmp_path / "a.gguf"))
    weights, notes = load_weights(checkpoint)
    matrices = [leaf for _, leaf in leaves(weights) if len(leaf.shape) == 2]
    assert len(matrices) == 15
    assert all(type(matrix) is Mapped and mapping(matrix) is not None for matrix in matrices)
    stored = checkpoint.tensors["layers.1.down.weight"].read()
    np.testing.assert_array_equal(weights.layers[1].down.weight.data, stored.data)
    assert weights.layers[1].down.weight.shape == stored.shape
    assert weights.norm.dtype == np.float32
    assert notes == ()
    monkeypatch.setattr("puna.weights.limits.available", lambda: 40_000)
    weights, notes = load_weights(checkpoint)
    assert all(type(leaf) is Packed for _, leaf in leaves(weights) if len(leaf.shape) == 2)
    assert "used as they lie in the file" in notes[0]


def test_a_type_without_a_kernel_of_its_own_is_regrouped_on_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")
    released: list[Any] = []
    monkeypatch.setattr("puna.weights.load.release", released.append)
    blocks = np.random.default_rng(0).integers(0, 256, (32, gb.DIM // 32, 17), np.uint8)
    blocks[..., 0] = 127  # MXFP4: an exponent, here of 1, and 32 numbers of 4 bits
    built = gb.tiny()
    row = built.named("blk.1.attn_v.weight")
    row.kind, row.data = TYPES["MXFP4"].ggml_id, blocks.tobytes()
    weights, _ = load_weights(open_checkpoint(built.write(tmp_path / "a.gguf")))
    value = weights.layers[1].v.weight
    assert (type(value), value.kind) == (Panels, "I8")
    assert [weight.kind for weight in released if isinstance(weight, Packed)] == ["MXFP4"]  # the rest are vectors


def test_the_file_is_mapped_while_the_tokenizer_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from puna.kernels.encode import quantize

    path = gb.tiny("Q8_0", lambda values: quantize("Q8_0", values).tobytes()).write(tmp_path / "a.gguf")
    monkeypatch.setattr("puna.weights.load.TOUCHED", 100_000)
    touched: list[tuple[int, int]] = []
    all_of_it = threading.Event()
    size = path.stat().st_size

    def touch(_: MappedFile, begin: int, end: int) -> None:
        touched.append((begin, end))
        if end >= size:
            all_of_it.set()

    def slow(*_: object) -> Any:
        assert all_of_it.wait(60)
        return real(open_checkpoint(path), None)

    real = load_module.tokenizer_of
    monkeypatch.setattr("puna.weights.files.MappedFile.touch", touch)
    monkeypatch.setattr("puna.weights.load.tokenizer_of", slow)
    assert load(path).tokenizer.vocab_size == gb.VOCAB
    assert touched == [(at, at + 100_000) for at in range(0, size, 100_000)]
    touched.clear()
    monkeypatch.setattr("puna.weights.limits.available", lambda: 40_000)  # the file is larger than memory
    all_of_it.set()
    load(path)
    assert touched == []


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads resident memory from Linux's /proc")
def test_what_was_regrouped_leaves_few_pages_of_the_file(tmp_path: Path) -> None:
    cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")
    rows = np.random.default_rng(0).integers(0, 256, (8000, 34 * 32), dtype=np.uint8)
    path = tmp_path / "mapped"
    path.write_bytes(b"head" + rows.tobytes())
    file = MappedFile(path)
    stored = [file.packed("Q8_0", (4005, 1024), 4), file.packed("Q8_0", (3995, 1024), 4 + 4005 * 1088)]
    weights = [Mapped(weight.kind, weight.shape, weight.data) for weight in stored]
    regrouped = cpu.prepare_mapped(weights)
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.endswith(str(path)))
    assert next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:")) < 200  # of 8,500 kB
    for weight, got in zip(weights, regrouped, strict=True):
        alone = cpu.prepare(weight)
        assert (got.kind, got.shape) == (alone.kind, alone.shape)
        np.testing.assert_array_equal(got.data, alone.data)
    other = file.packed("IQ2_S", (16, 1024), 4)
    with pytest.raises(TypeError, match="no kernel reads IQ2_S as it lies in a file"):
        cpu.prepare_mapped([Mapped(other.kind, other.shape, other.data)])


def test_only_mapped_files_are_given_back(tmp_path: Path) -> None:
    cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")
    data = np.random.default_rng(0).integers(0, 256, (16, 34), dtype=np.uint8)
    nowhere = mmap.mmap(-1, data.nbytes)
    nowhere.write(data.tobytes())
    for memory in (data, np.frombuffer(nowhere, np.uint8).reshape(16, 34)):
        with pytest.raises(ValueError, match=r"Q8_0 \[16, 32\] is no view of a mapped file"):
            cpu.prepare_mapped([Packed("Q8_0", (16, 32), memory)])
        np.testing.assert_array_equal(memory, data)


def test_a_packed_model_as_plain_numbers(tmp_path: Path) -> None:
    from puna.kernels.encode import quantize

    built = gb.tiny("Q8_0", lambda values: quantize("Q8_0", values).tobytes())
    checkpoint = open_checkpoint(built.write(tmp_path / "a.gguf"))
    row = built.named("blk.1.attn_v.weight")
    from gguf import GGMLQuantizationType, dequantize

    expected = dequantize(np.frombuffer(row.data, np.uint8).reshape(32, -1), GGMLQuantizationType.Q8_0)
    weights, notes = load_weights(checkpoint, "fp32")
    assert np.array_equal(weights.layers[1].v.weight, expected)
    assert notes == ("the weights were converted from Q8_0 to fp32",)
    weights, notes = load_weights(checkpoint, packed=False)
    np.testing.assert_allclose(to_float32(weights.layers[1].v.weight), expected, rtol=1 / 256)
    assert to_float32(weights.norm).shape == (64,)
    assert notes == ("the weights were converted from Q8_0, fp32 to bf16",)


def test_a_gguf_may_be_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    built = gb.tiny()
    path = built.write(tmp_path / "a.gguf")
    bare = gb.Built(gb.settings(), built.tensors).write(tmp_path / "bare.gguf")
    with pytest.raises(TokenizerError, match="no tokenizer"):
        load(bare)
    loaded = load(bare, tokenizer=path)
    assert loaded.tokenizer.encode("é", bos=True) == [1, 229, 153, 132, 198, 172]  # ▁ has no piece of its own
    assert loaded.tokenizer.source == path


def test_a_packed_model_is_unpacked_for_other_layouts(tmp_path: Path) -> None:
    from puna.kernels.encode import quantize

    path = gb.tiny("Q8_0", lambda values: quantize("Q8_0", values).tobytes()).write(tmp_path / "a.gguf")
    words = r"its weights are packed \(Q8_0\), and the layout safetensors holds plain numbers.\nSay with --type"
    with pytest.raises(UsageError, match=words):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = convert(path, tmp_path / "out", dtype="fp32")
    assert any("the tokenizer lies in a.gguf and is not copied" in note for note in done.notes)
    assert done.files == ("model.safetensors", "config.json")
    ids = [1, 80, 90, 100, 200]
    expected = LLM(path, kernels="reference").logits(ids)
    got = LLM(tmp_path / "out", kernels="reference", tokenizer=path).logits(ids)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)  # q and k in the hub's order, rope by halves


@pytest.mark.parametrize(
    ("name", "expected"),
    [("llama-2-7b-chat.Q4_K_M.gguf", True), ("llama-2-7b.Q4_K_M.gguf", False), ("zephyr-chat.gguf", False)],
)
def test_an_old_file_is_a_chat_model_by_its_name(name: str, expected: bool, tmp_path: Path) -> None:
    built = gb.tiny().without("llama.context_length")
    built.metadata.append(gb.number("llama.context_length", 4096))
    loaded = load(built.write(tmp_path / name))
    assert loaded.config.generation == "llama2"
    assert (loaded.chat_format is not None) == expected
    assert any("by its name it is a chat model" in note for note in loaded.notes) == expected
