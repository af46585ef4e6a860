"""llama.cpp on the files we write, and its packing beside ours. Run by `make test-peers`.

What it holds to account: the order of q and k rows, the metadata, the vocabularies, the choice of types, the errors.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from puna.kernels import encode
from puna.kernels.layouts import to_float32
from puna.text.tokenizer import load_tokenizer
from puna.types import QUANTS
from puna.weights.checkpoint import open_checkpoint
from puna.weights.convert import convert
from puna.weights.embedded import embedded_folder
from puna.weights.mixes import MIXES

pytestmark = pytest.mark.peers


def llama(path: Path, **options: Any) -> Any:
    from llama_cpp import Llama

    return Llama(str(path), verbose=False, n_threads=1, **options)


def test_llama_cpp_writes_the_golden_text(reference: Path, tmp_path: Path) -> None:
    """The text that was published with the checkpoint, from BOS, greedily."""
    folder = reference / "checkpoints" / "stories260K"
    made = convert(
        folder / "stories260K.bin", tmp_path / "x.gguf", to="gguf", dtype="F32", tokenizer=folder / "tok512.bin"
    )
    model = llama(made.path, n_ctx=512)
    answer = model.create_completion(prompt=[1], max_tokens=256, temperature=0.0, top_k=1, repeat_penalty=1.0)
    expected = json.loads((folder / "expected_greedy.json").read_text())["text"]
    assert answer["choices"][0]["text"].strip() == expected.strip()


def texts(reference: Path) -> list[str]:
    wiki = (reference / "data" / "wikitext2" / "wiki.test.raw").read_text()
    parts = [wiki[at : at + 10 + at % 290] for at in range(0, 100_000, 1000)]
    return [
        *parts, "", "  a", "\n\n\nx", "\t\ttab", "ñandú ½ ﬁ ａ", "日本語のテキスト。", "🎉🎉 👩‍👩‍👧",
        "١٢٣ ٤٥٦", "1234567890 12 3.14", "I'm you'LL we've", "   trailing   ", "a\u00a0b", "<s> </s> <|begin_of_text|>",
        "x" * 50, "e\u0301", "\r\n a\r\n",
        "def f(x):\n    return x**2\n",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "size"),
    [
        ("tokenizers/llama2/tokenizer.model", 32_000), ("tokenizers/llama2/tokenizer.json", 32_000),
        ("tokenizers/llama2/tokenizer.bin", 32_000), ("tokenizers/llama3/tokenizer.model", 128_256),
        ("checkpoints/stories260K/tok512.bin", 512), ("", 2048),
    ],
)  # fmt: skip
def test_llama_cpp_tokenizes_as_we_do(file: str, size: int, reference: Path, tmp_path: Path) -> None:
    import torch

    from puna.models import decoder
    from puna.models.config import read_meta
    from puna.weights import names

    tokenizer = reference / file if file else embedded_folder() / "tokenizer.json"
    params = {
        "dim": 8, "n_layers": 1, "n_heads": 2, "vocab_size": size, "multiple_of": 8, "norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }  # fmt: skip
    folder = tmp_path / "meta"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    config = read_meta(params).config
    state = {names.foreign(name, "meta"): torch.zeros(shape) for name, shape in decoder.shapes(config).items()}
    torch.save(state, folder / "consolidated.00.pth")
    made = convert(folder, tmp_path / "x.gguf", to="gguf", tokenizer=tokenizer)
    words = load_tokenizer(tokenizer, generation=config.generation)
    model = llama(made.path, vocab_only=True)
    for text in texts(reference):
        assert model.tokenize(text.encode(), add_bos=False, special=False) == words.encode(text), text
    assert model.token_bos() == words.bos_id
    assert model.token_eos() == words.eos_id
    named = next(iter(words.special))
    assert model.tokenize(f"a{named}".encode(), add_bos=True, special=True) == words.encode(
        f"a{named}", bos=True, allow_special=True
    )


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("mix", QUANTS)
def test_llama_cpp_chooses_the_same_types(mix: str, tmp_path: Path) -> None:
    """Tensor by tensor, from the same file; and it continues a story from ours."""
    import llama_cpp

    source = convert(embedded_folder(), tmp_path / "f16.gguf", to="gguf", dtype="F16").path
    ours = convert(embedded_folder(), tmp_path / "ours.gguf", to="gguf", dtype=mix).path
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = MIXES[mix].file_type, 1
    theirs = tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(theirs).encode(), ctypes.byref(options)) == 0
    assert types(ours) == types(theirs)
    answer = llama(ours, n_ctx=64).create_completion("Once upon a time", max_tokens=12, temperature=0.0, top_k=1)
    assert len(answer["choices"][0]["text"]) > 20


def ggmls(kind: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What `ggml_quantize_chunk` makes of rows, without an importance matrix."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(iter(sorted(folder.glob("libggml-base.*"))))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    out = np.empty_like(encode.quantize(kind, x))
    number = GGMLQuantizationType[kind].value
    library.ggml_quantize_chunk(number, x.ctypes.data, out.ctypes.data, 0, len(x), x.shape[1], None)
    return out


@pytest.mark.parametrize("kind", [kind for kind in encode.KINDS if kind[0] == "Q"])
def test_ggml_packs_no_better(kind: str) -> None:
    """The same bytes for the simple types; a larger error than ours for the K types."""
    tensors = open_checkpoint(embedded_folder()).tensors
    trained = np.concatenate(
        [to_float32(tensors[f"layers.2.{part}.weight"].read()).reshape(-1, 256) for part in ("q", "v", "down")]
    )
    for x in (np.random.default_rng(0).standard_normal((512, 256), dtype=np.float32), trained):
        ours, theirs = encode.quantize(kind, x), ggmls(kind, x)
        if not kind.endswith("_K"):
            assert np.array_equal(ours, theirs)
            continue
        errors = [
            float(np.sqrt(np.mean((dequantize(data, GGMLQuantizationType[kind]).astype(np.float64) - x) ** 2)))
            for data in (ours, theirs)
        ]
        assert errors[0] < errors[1]
