"""GGUF files we write: read back by the `gguf` package by value, whole or not there, honest about what they lose."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.quants import dequantize
from tiny_models import hub_model, meta_config, random_state, save_meta

from puna.errors import CheckpointError, PunaError, TokenizerError, UsageError
from puna.kernels import ops
from puna.kernels.layouts import Packed, to_float32
from puna.models.tree import leaves
from puna.text.chat import builtin_format, chat_format
from puna.text.tokenizer import load_tokenizer
from puna.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, vocabulary
from puna.types import QUANTS, TYPES, Message
from puna.weights import convert_gguf, gguf_metadata, gguf_write, mixes, names, whole
from puna.weights.checkpoint import open_checkpoint
from puna.weights.convert import convert
from puna.weights.embedded import embedded_folder
from puna.weights.load import load_weights

LAYER = {
    "attention_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


def values(reader: GGUFReader) -> dict[str, Any]:
    """Metadata as Python has it, the bookkeeping of the container left out."""
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def numbers(reader: GGUFReader) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor as float32, by the `gguf` package."""
    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in reader.tensors
    }


@pytest.fixture
def meta_folder(tmp_path: Path, reference: Path) -> Path:
    """A random model with a tokenizer of 512 tokens beside it, and 8 rows more in the embedding."""
    folder = save_meta(tmp_path / "meta", random_state(meta_config(vocab_size=520)), vocab_size=520)
    shutil.copy(reference / "checkpoints" / "stories260K" / "tok512.bin", folder / "tok520.bin")
    return folder


# --- by value --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "kind"), [("auto", "BF16"), ("F32", "F32"), ("F16", "F16"), ("Q8_0", "Q8_0")])
def test_gguf_reads_what_meta_stored(dtype: str, kind: str, meta_folder: Path, tmp_path: Path) -> None:
    """Meta's row order is GGUF's, so that nothing moves."""
    made = convert(meta_folder, tmp_path / "x.gguf", to="gguf", dtype=dtype)
    assert (made.path, made.files) == (tmp_path / "x.gguf", ("x.gguf",))
    reader = GGUFReader(made.path)
    found, state = numbers(reader), random_state(meta_config(vocab_size=520))
    assert made.nbytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    expected = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
    for layer in range(2):
        for ours, theirs in LAYER.items():
            meta_name = names.foreign(f"layers.{layer}.{ours}" + ".weight" * ("norm" not in ours), "meta")
            expected[meta_name.removesuffix(".weight")] = f"blk.{layer}.{theirs}"
    assert found.keys() == {f"{theirs}.weight" for theirs in expected.values()}
    for ours, theirs in expected.items():
        want, got = state[f"{ours}.weight"].float().numpy(), found[f"{theirs}.weight"]
        tolerance = 0.0 if kind in ("BF16", "F32") or want.ndim == 1 else 2**-11 if kind == "F16" else 1 / 200
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max(), theirs
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {types[name] for name in types if "norm" in name} == {"F32"}
    # Rows of 176 are no multiple of 32.
    assert {types[name] for name in types if "norm" not in name} == {kind, *(("F16",) if kind == "Q8_0" else ())}


def test_q_and_k_rows_of_the_hub_are_brought_into_order(tmp_path: Path, reference: Path) -> None:
    """A model that went from Meta's layout to the hub's has Meta's rows again in the GGUF, biases too."""
    tokenizer = reference / "checkpoints" / "stories260K" / "tok512.bin"
    source = save_meta(tmp_path / "meta", random_state(meta_config(vocab_size=512)), vocab_size=512)
    convert(source, tmp_path / "hub")
    direct = convert(source, tmp_path / "direct.gguf", to="gguf", tokenizer=tokenizer)
    round_about = convert(tmp_path / "hub", tmp_path / "hub.gguf", to="gguf", tokenizer=tokenizer)
    one, other = numbers(GGUFReader(direct.path)), numbers(GGUFReader(round_about.path))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    model = hub_model(vocab_size=512, attention_bias=True, mlp_bias=True)
    model.save_pretrained(tmp_path / "biased")
    found = numbers(GGUFReader(convert(tmp_path / "biased", tmp_path / "b.gguf", to="gguf", tokenizer=tokenizer).path))
    stored = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    order = np.arange(8).reshape(2, 4).T.reshape(-1)  # of one head's rows: 0, 4, 1, 5, …
    for bias in (".weight", ".bias"):
        rows = stored[f"model.layers.1.self_attn.k_proj{bias}"]
        expected = np.concatenate([rows[head * 8 : (head + 1) * 8][order] for head in range(2)])
        assert np.array_equal(found[f"blk.1.attn_k{bias}"], expected)
        assert np.array_equal(found[f"blk.1.attn_v{bias}"], stored[f"model.layers.1.self_attn.v_proj{bias}"])
        assert np.array_equal(found[f"blk.0.ffn_down{bias}"], stored[f"model.layers.0.mlp.down_proj{bias}"])


@pytest.mark.parametrize("mix", QUANTS)
def test_packed_numbers_are_near_those_stored(mix: str, tmp_path: Path) -> None:
    made = convert(embedded_folder(), tmp_path / "x.gguf", to="gguf", dtype=mix)
    reader = GGUFReader(made.path)
    found, stored = numbers(reader), open_checkpoint(embedded_folder())
    for name, tensor in stored.tensors.items():
        want = to_float32(tensor.read())
        want = np.asarray(names.repair(name, want, stored.config, interleaved=True))
        got = found[names.foreign(name, "gguf")]
        bits = 9 if want.ndim == 1 else 2 if mix == "Q2_K" else int(mix[1])
        assert np.sqrt(np.mean((got - want) ** 2)) < 2.0 ** (1 - bits) * np.sqrt(np.mean(want**2)), name
    assert values(reader)["general.file_type"] == mixes.MIXES[mix].file_type
    assert made.notes == ()


def test_packing_on_load_gives_the_numbers_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.kernels.ops.prepare", lambda weight, keep=False: weight)  # as packed, not as panels
    checkpoint = open_checkpoint(embedded_folder())
    ops.select("reference")  # which leaves packed matrices as they are
    weights, notes = load_weights(checkpoint, quant="Q4_K_M")
    ops.select("auto")
    file = numbers(GGUFReader(convert(embedded_folder(), tmp_path / "x.gguf", to="gguf", dtype="Q4_K_M").path))
    kinds, _ = mixes.choose(
        mixes.MIXES["Q4_K_M"], checkpoint.config, {name: t.shape for name, t in checkpoint.tensors.items()}
    )
    checked = 0
    for name, leaf in leaves(weights):
        if isinstance(leaf, Packed):
            assert leaf.kind == kinds[name]
            part = name.split(".")[2] if "." in name else name
            if part not in ("q", "k"):  # whose rows have another order in the file
                ours = dequantize(leaf.data, GGMLQuantizationType[leaf.kind])
                assert np.array_equal(ours, file[names.foreign(name, "gguf")])
                checked += 1
    assert checked == 1 + 5 * 5
    assert "packed to Q4_K_M on load" in notes[-1]
    assert "2 MB of memory for 7 MB stored" in notes[-1]


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q5_0", "F16"])
def test_a_gguf_kept_as_it_is(mix: str, tmp_path: Path) -> None:
    """Block for block, and with every word it says."""
    first = convert(embedded_folder(), tmp_path / "first.gguf", to="gguf", dtype=mix).path
    second = convert(first, tmp_path / "second.gguf", to="gguf")
    one, other = GGUFReader(first), GGUFReader(second.path)
    assert values(one) == values(other)
    assert [tensor.name for tensor in one.tensors] == [tensor.name for tensor in other.tensors]
    for a, b in zip(one.tensors, other.tensors, strict=True):
        assert a.tensor_type == b.tensor_type
        assert np.array_equal(a.data, b.data)
    assert second.notes == ()
    again = convert(first, tmp_path / "third.gguf", to="gguf", dtype="Q4_0")
    assert any("packed already" in note for note in again.notes) == (mix != "F16")
    for quant, twice in (("Q4_0", mix != "F16"), ("Q5_0", mix == "Q4_K_M")):  # Q5_0 is kept as it is
        _, notes = load_weights(open_checkpoint(first), quant=quant)
        assert any("packed already" in note for note in notes) == twice
    if mix == "F16":
        direct = convert(embedded_folder(), tmp_path / "direct.gguf", to="gguf", dtype="Q4_0")
        ours, theirs = numbers(GGUFReader(again.path)), numbers(GGUFReader(direct.path))
        assert max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours) < 1e-3


def test_what_cannot_be_packed_on_load() -> None:
    checkpoint = open_checkpoint(embedded_folder())
    with pytest.raises(UsageError, match="--quant F16: no such type"):
        load_weights(checkpoint, quant="F16")
    with pytest.raises(UsageError, match="exclude each other"):
        load_weights(checkpoint, "bf16", "Q8_0")


# --- metadata --------------------------------------------------------------------------------------------------------


def test_the_keys_of_a_small_model(meta_folder: Path, tmp_path: Path) -> None:
    made = convert(meta_folder, tmp_path / "x.gguf", to="gguf")
    reader = GGUFReader(made.path)
    found = values(reader)
    tokens = found.pop("tokenizer.ggml.tokens")
    scores, kinds = found.pop("tokenizer.ggml.scores"), found.pop("tokenizer.ggml.token_type")
    assert found == {
        "general.architecture": "llama", "general.type": "model", "general.name": "meta", "general.basename": "meta",
        "general.size_label": "159K", "general.tags": ["llama", "text-generation"], "general.file_type": 32,
        "general.quantization_version": 2,
        "llama.block_count": 2, "llama.context_length": 4096, "llama.embedding_length": 64,
        "llama.feed_forward_length": 176, "llama.vocab_size": 520, "llama.attention.head_count": 16,
        "llama.attention.head_count_kv": 8, "llama.attention.key_length": 4, "llama.attention.value_length": 4,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5), "llama.rope.dimension_count": 4,
        "llama.rope.freq_base": 500000.0,
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_space_prefix": True,
    }  # fmt: skip
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert tokens[260:263] == ["he", "▁a", "▁s"]
    assert tokens[512:514] == ["[PAD512]", "[PAD513]"]
    assert kinds == [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 253, *[UNUSED] * 8]
    assert scores[259:262] == [0.0, -1.0, -2.0]
    assert len(tokens) == len(scores) == 520
    assert "8 rows of the embedding have no token; they are called [PAD…]" in made.notes
    types = {key: field.types for key, field in reader.fields.items()}
    assert types["llama.block_count"] == [GGUFValueType.UINT32]
    assert types["tokenizer.ggml.token_type"] == [GGUFValueType.ARRAY, GGUFValueType.INT32]
    assert types["tokenizer.ggml.scores"] == [GGUFValueType.ARRAY, GGUFValueType.FLOAT32]
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)


def test_stretched_rope(meta_folder: Path, tmp_path: Path) -> None:
    """Llama 3.1's rule as divisors, each computed by hand from its formula; a linear factor as a key."""
    source = save_meta(
        tmp_path / "scaled", random_state(meta_config(vocab_size=520)), vocab_size=520, use_scaled_rope=True
    )
    shutil.copy(meta_folder / "tok520.bin", source)
    found = numbers(GGUFReader(convert(source, tmp_path / "x.gguf", to="gguf").path))["rope_freqs.weight"]
    expected = []
    for i in range(2):
        wavelength = 2 * np.pi * 500000.0 ** (2 * i / 4)
        smooth = min(max((8192 / wavelength - 1) / (4 - 1), 0), 1)
        expected.append(1 / ((1 - smooth) / 32 + smooth))
    assert found == pytest.approx(expected, rel=1e-6)
    assert expected[0] == 1
    hub = hub_model(vocab_size=512, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})
    hub.save_pretrained(tmp_path / "hub")
    reader = GGUFReader(
        convert(tmp_path / "hub", tmp_path / "linear.gguf", to="gguf", tokenizer=meta_folder / "tok520.bin").path
    )
    linear = values(reader)
    assert (linear["llama.rope.scaling.type"], linear["llama.rope.scaling.factor"]) == ("linear", 4.0)
    assert all(tensor.name != "rope_freqs.weight" for tensor in reader.tensors)


def test_a_model_of_the_catalog_brings_its_name_and_licence(meta_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name and size: a folder that is only called so is not believed."""
    plain = gguf_metadata.general(open_checkpoint(meta_folder), 1)
    assert "general.license" not in plain
    known = meta_folder.rename(meta_folder.parent / "Llama-3.2-1B-Instruct")
    assert "general.license" not in gguf_metadata.general(open_checkpoint(known), 1)
    from puna.catalog.models import lookup

    checkpoint, entry = open_checkpoint(known), lookup("llama3.2:1b")
    config = meta_config(dim=entry.dim, n_layers=entry.layers, n_heads=entry.heads, hidden_dim=entry.ffn_dim)
    monkeypatch.setattr(type(checkpoint), "config", config)
    found = gguf_metadata.general(checkpoint, 15)
    assert found["general.name"] == "Llama-3.2-1B-Instruct"
    assert found["general.license"] == "llama3.2"
    assert found["general.license.name"] == "Llama 3.2 Community License Agreement"
    assert str(found["general.license.link"]).endswith("/meta-llama/Llama-3.2-1B-Instruct")
    assert (found["general.size_label"], found["general.finetune"]) == ("1B", "Instruct")
    assert found["general.languages"] == ["en"]
    assert gguf_metadata.general(open_checkpoint(embedded_folder()), 1)["general.license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("count", "label"), [(262_144, "262K"), (1_235_814_400, "1.2B"), (70_553_706_496, "71B"), (9_960_000, "10M")]
)
def test_size_labels(count: int, label: str) -> None:
    assert gguf_metadata.size_label(count) == label


def test_a_chat_model_of_metas_brings_a_template(tmp_path: Path, reference: Path) -> None:
    source = save_meta(
        tmp_path / "Tiny-Instruct", random_state(meta_config(vocab_size=128256, dim=8, n_heads=2, n_kv_heads=1)),
        vocab_size=128256, dim=8, n_heads=2, n_kv_heads=1,
    )  # fmt: skip
    made = convert(
        source, tmp_path / "x.gguf", to="gguf", tokenizer=reference / "tokenizers" / "llama3" / "tokenizer.model"
    )
    found = values(GGUFReader(made.path))
    assert "<|start_header_id|>" in found["tokenizer.chat_template"]
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (128001, 128009)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "llama-bpe")


CONVERSATION = [
    Message("system", " Be kind. "), Message("user", "Hi <b>\n"), Message("assistant", " Hello! "),
    Message("user", "?"),
]  # fmt: skip


@pytest.mark.parametrize("generation", ["llama2", "codellama", "llama3", "llama3.1", "llama3.2", "llama3.3"])
@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:2]])
def test_built_in_formats_as_templates_say_the_same(
    generation: str, messages: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    built_in = builtin_format(generation, instruct=True)
    tokenizer = load_tokenizer(embedded_folder())
    monkeypatch.setattr(tokenizer, "chat_template", built_in.template)
    templated = chat_format(tokenizer, "any", instruct=False)
    assert templated.template == built_in.template
    assert templated.render(messages) == built_in.render(messages)
    assert builtin_format("codellama70b", instruct=True).template is None


# --- vocabularies ----------------------------------------------------------------------------------------------------


def test_llama2s_tokenizer_in_three_forms_is_one_vocabulary(reference: Path) -> None:
    """ggml's own file of the same vocabulary is the judge."""
    folder = reference / "tokenizers"
    theirs = values(GGUFReader(folder / "ggml-vocab-llama-spm.gguf"))
    for name in ("tokenizer.model", "tokenizer.bin", "tokenizer.json"):
        ours = vocabulary(load_tokenizer(folder / "llama2" / name))
        assert ours.model == theirs["tokenizer.ggml.model"]
        assert ours.tokens == theirs["tokenizer.ggml.tokens"]
        assert ours.kinds == theirs["tokenizer.ggml.token_type"]
        assert (ours.unknown_id, ours.adds_space) == (0, True)
        assert ours.scores is not None
        scores = np.array(theirs["tokenizer.ggml.scores"], np.float32)
        if name == "tokenizer.json":  # ranks of merges: other numbers in the same order
            made = [i for i in range(259, 32000) if ours.scores[i] != 0 and scores[i] > -1e8]
            order = np.argsort(-ours.scores[made], kind="stable")
            assert np.array_equal(order, np.argsort(-scores[made], kind="stable"))
        else:
            assert np.array_equal(ours.scores, scores)


def test_the_merges_of_tiktokens_ranks(reference: Path) -> None:
    """Llama 3's tokenizer.json on the hub has 280,147 merges; a tokenizer built from ours gives tiktoken's ids."""
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    from puna.text.tokenizer_tiktoken import LLAMA3_PATTERN

    ours = load_tokenizer(reference / "tokenizers" / "llama3" / "tokenizer.model")
    found = vocabulary(ours)
    assert found.merges is not None
    assert (len(found.merges), len(found.tokens)) == (280_147, 128_256)
    assert found.kinds == [NORMAL] * 128_000 + [CONTROL] * 256
    assert found.merges[:6] == ["Ġ Ġ", "Ġ ĠĠĠ", "ĠĠ ĠĠ", "ĠĠĠ Ġ", "i n", "Ġ t"]
    assert found.tokens[128_000:128_002] == ["<|begin_of_text|>", "<|end_of_text|>"]
    pairs = [tuple(merge.split(" ")) for merge in found.merges]
    engine = Engine(models.BPE({token: i for i, token in enumerate(found.tokens)}, pairs))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    text = (reference / "data" / "wikitext2" / "wiki.test.raw").read_text()[:200_000]
    assert engine.encode(text, add_special_tokens=False).ids == ours.encode(text)


def test_tokenizers_that_gguf_cannot_express(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    engine = Engine(models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    engine.decoder = decoders.ByteLevel()
    path = tmp_path / "tokenizer.json"
    for splitter, normalizer, why in (
        (pre_tokenizers.Whitespace(), None, "splits text in a way that has no name"),
        (pre_tokenizers.ByteLevel(True), None, "splits text in a way that has no name"),
        (pre_tokenizers.ByteLevel(False), normalizers.NFC(), "rewrites text"),
    ):
        engine.pre_tokenizer, engine.normalizer = splitter, normalizer or normalizers.Sequence([])
        path.write_text(engine.to_str())
        with pytest.raises(TokenizerError, match=why) as caught:
            vocabulary(load_tokenizer(path))
        assert "--tokenizer" in caught.value.remedy


# --- mixes -----------------------------------------------------------------------------------------------------------


def test_the_types_have_one_list() -> None:
    assert tuple(mixes.MIXES) == TYPES
    assert tuple(name for name in TYPES if name not in ("F32", "F16", "BF16")) == QUANTS


def test_which_tensors_get_more_bits() -> None:
    config = meta_config(dim=256, n_heads=4, n_kv_heads=1, n_layers=16, hidden_dim=512)
    from puna.models import decoder

    def chosen(mix: str) -> dict[str, str]:
        kinds, notes = mixes.choose(mixes.MIXES[mix], config, decoder.shapes(config))
        assert notes == []
        return kinds

    medium, small = chosen("Q4_K_M"), chosen("Q4_K_S")
    more = [0, 1, 4, 7, 10, 13, 14, 15]
    for part in ("v", "down"):
        assert [i for i in range(16) if medium[f"layers.{i}.{part}.weight"] == "Q6_K"] == more
    assert [i for i in range(16) if small[f"layers.{i}.v.weight"] == "Q5_K"] == [0, 1, 2, 3]
    assert [i for i in range(16) if small[f"layers.{i}.down.weight"] == "Q5_K"] == [0, 1]
    assert (medium["head"], medium["embedding"], medium["norm"]) == ("Q6_K", "Q4_K", "F32")
    assert (chosen("Q8_0")["head"], chosen("Q4_0")["head"]) == ("Q8_0", "Q6_K")


# --- all or nothing --------------------------------------------------------------------------------------------------


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "meta")


def test_no_tokenizer(tmp_path: Path) -> None:
    source = save_meta(tmp_path / "meta", random_state(meta_config()))
    with pytest.raises(TokenizerError, match="no tokenizer beside the weights"):
        convert(source, tmp_path / "x.gguf", to="gguf")
    assert left(tmp_path) == []


def test_destinations_and_types_that_are_refused(meta_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_text("keep")
    (tmp_path / "folder").mkdir()
    for name in ("there.gguf", "folder"):
        with pytest.raises(UsageError, match="already exists"):
            convert(meta_folder, tmp_path / name, to="gguf")
    with pytest.raises(UsageError, match="--type IQ4_XS: no such type"):
        convert(meta_folder, tmp_path / "x.gguf", to="gguf", dtype="IQ4_XS")
    with pytest.raises(UsageError, match="--dtype Q8_0"):
        convert(meta_folder, tmp_path / "x", to="safetensors", dtype="Q8_0")
    assert (tmp_path / "there.gguf").read_text() == "keep"


@pytest.mark.parametrize(("dtype", "value"), [("Q8_0", float("nan")), ("Q4_K_M", float("inf")), ("F16", 1e30)])
def test_numbers_that_do_not_fit_stop_it(dtype: str, value: float, tmp_path: Path, reference: Path) -> None:
    state = random_state(meta_config(vocab_size=512))
    state["layers.1.attention.wo.weight"][3, 5] = value
    source = save_meta(tmp_path / "meta", state, vocab_size=512)
    shutil.copy(reference / "checkpoints" / "stories260K" / "tok512.bin", source)
    with pytest.raises(CheckpointError, match=r"layers\.1\.o\.weight: a weight is") as caught:
        convert(source, tmp_path / "x.gguf", to="gguf", dtype=dtype)
    assert "BF16 or F32" in caught.value.remedy
    assert left(tmp_path) == []


@pytest.mark.parametrize("after", [0, 11])
def test_an_interruption_leaves_nothing(after: int, meta_folder: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def interrupt(done: int, total: int) -> None:
        calls.append(done)
        assert [name for name in left(tmp_path) if not name.startswith(".x.gguf.unfinished-")] == []
        if len(calls) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(meta_folder, tmp_path / "x.gguf", to="gguf", progress=interrupt)
    assert calls == sorted(calls)
    assert left(tmp_path) == []


def test_progress_reaches_the_total(meta_folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    made = convert(meta_folder, tmp_path / "x.gguf", to="gguf", progress=lambda *call: calls.append(call))
    assert calls[-1] == (made.nbytes, made.nbytes)


def test_a_disk_that_fills_up(meta_folder: Path, tmp_path: Path) -> None:
    """The system refuses to let files grow beyond a size, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(PunaError, match=f"could not be written \\({os.strerror(errno.EFBIG)}") as caught:
            convert(meta_folder, tmp_path / "x.gguf", to="gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == 1
    assert left(tmp_path) == []


def test_a_disk_too_small_is_noticed_first(meta_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    monkeypatch.setattr(convert_gguf.gguf_write, "write", lambda *_: pytest.fail("it wrote"))
    with pytest.raises(PunaError, match="GB are free"):
        convert(meta_folder, tmp_path / "x.gguf", to="gguf")
    assert left(tmp_path) == []


def test_a_killed_process_leaves_nothing_under_the_name(meta_folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from puna.weights.convert import convert\n"
        "def slow(done, total):\n    print(done, flush=True)\n    time.sleep(0.2)\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), to='gguf', progress=slow)\n"
    )
    source = str(Path(gguf_write.__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(meta_folder), str(tmp_path / "x.gguf")], stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": source},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    time.sleep(0)
    assert all(name.startswith(".x.gguf.unfinished-") for name in left(tmp_path))
    assert convert(meta_folder, tmp_path / "x.gguf", to="gguf").path.is_file()


def test_a_model_may_be_float16_in_parts(tmp_path: Path, reference: Path) -> None:
    """Kept as stored, each matrix in its own type; vectors always F32."""
    model = hub_model(vocab_size=512).to(torch.bfloat16)
    model.lm_head.to(torch.float32)
    model.save_pretrained(tmp_path / "hub")
    made = convert(
        tmp_path / "hub", tmp_path / "x.gguf", to="gguf",
        tokenizer=reference / "checkpoints" / "stories260K" / "tok512.bin",
    )  # fmt: skip
    reader = GGUFReader(made.path)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (types["output.weight"], types["token_embd.weight"], types["output_norm.weight"]) == ("F32", "BF16", "F32")
    assert values(reader)["general.file_type"] in (0, 32)
    assert any("several types" in note for note in made.notes)
