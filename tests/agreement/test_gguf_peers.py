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
from tests.unit.weights.family_models import llama4, save

from puna.kernels import encode
from puna.kernels.layouts import to_float32
from puna.models.registry import definition
from puna.text.tokenizer import load_tokenizer
from puna.types import QUANTS
from puna.weights.checkpoint import open_checkpoint
from puna.weights.convert import convert
from puna.weights.embedded import embedded_folder
from puna.weights.load import load_weights
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


def quantized(source: Path, path: Path, mix: str) -> Path:
    """llama.cpp's packing of a file."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = MIXES[mix].file_type, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(options)) == 0
    return path


@pytest.mark.parametrize("mix", QUANTS)
def test_llama_cpp_chooses_the_same_types(mix: str, tmp_path: Path) -> None:
    """Tensor by tensor, from the same file; and it continues a story from ours."""
    source = convert(embedded_folder(), tmp_path / "f16.gguf", to="gguf", dtype="F16").path
    ours = convert(embedded_folder(), tmp_path / "ours.gguf", to="gguf", dtype=mix).path
    assert types(ours) == types(quantized(source, tmp_path / "theirs.gguf", mix))
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


@pytest.fixture(scope="module")
def llama4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama 4 with Scout's rope: two layers of four experts among five, one of them global."""
    import torch

    scout = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    sizes: dict[str, Any] = {
        "hidden_size": 256, "intermediate_size": 256, "intermediate_size_mlp": 512, "head_dim": 64, "vocab_size": 512,
        "num_attention_heads": 4, "num_local_experts": 4, "num_hidden_layers": 5, "rope_parameters": scout,
    }  # fmt: skip
    model = llama4(vision=False, **sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(1 + parameter * 0.3 if "norm" in name else parameter * 0.2)
    return save(model, tmp_path_factory.mktemp("llama4") / "hub", torch.float32)


@pytest.mark.parametrize(("mix", "typical"), [("F32", 1e-5), ("Q8_0", 0.1), ("Q4_K_M", 0.1)])
def test_llama_cpp_runs_llama_4(mix: str, typical: float, llama4_folder: Path, reference: Path, tmp_path: Path) -> None:
    """Logits beside ours of the same file: metadata, names, the experts' orientation, gate and up, the rope's tensor.

    Packed products round their input, and now and then a token then takes another expert: the median row is compared.
    """
    tokenizer = reference / "checkpoints" / "stories260K" / "tok512.bin"
    made = convert(llama4_folder, tmp_path / "x.gguf", to="gguf", dtype=mix, tokenizer=tokenizer)
    ids = np.random.default_rng(0).integers(3, 500, 40).astype(np.int32)
    checkpoint = open_checkpoint(made.path)
    (weights, _), page = load_weights(checkpoint), definition(checkpoint.config)
    ours = np.asarray(page.logits(weights, page.forward(weights, checkpoint.config, ids[None])))[0]
    model = llama(made.path, n_ctx=64, logits_all=True, type_k=0, type_v=0, flash_attn=False)
    model.eval(ids.tolist())
    theirs = np.array(model.scores[: len(ids)])
    rows = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    assert np.median(rows) < typical
    assert rows.max() < 50 * typical


@pytest.mark.parametrize("mix", QUANTS)
def test_llama_cpp_chooses_the_same_types_for_experts(
    mix: str, llama4_folder: Path, reference: Path, tmp_path: Path
) -> None:
    tokenizer = reference / "checkpoints" / "stories260K" / "tok512.bin"
    source = convert(llama4_folder, tmp_path / "f32.gguf", to="gguf", dtype="F32", tokenizer=tokenizer).path
    ours = convert(llama4_folder, tmp_path / "ours.gguf", to="gguf", dtype=mix, tokenizer=tokenizer).path
    assert types(ours) == types(quantized(source, tmp_path / "theirs.gguf", mix))


def test_llama_cpp_opens_our_vision_encoder(reference: Path, tmp_path: Path) -> None:
    """Every tensor and key that its `clip` asks for is there, under the sizes it expects."""
    from llama_cpp import mtmd_cpp

    tokenizer = reference / "checkpoints" / "stories260K" / "tok512.bin"
    sizes = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "vocab_size": 512}
    folder = save(llama4(vision={"image_size": 336, "patch_size": 14}, **sizes), tmp_path / "hub")
    made = convert(folder, tmp_path / "x.gguf", to="gguf", tokenizer=tokenizer)
    model, params = llama(made.path, n_ctx=64), mtmd_cpp.mtmd_context_params_default()
    params.use_gpu, params.n_threads = False, 1
    context = mtmd_cpp.mtmd_init_from_file(str(tmp_path / "mmproj-x.gguf").encode(), model.model, params)
    assert context
    assert mtmd_cpp.mtmd_support_vision(context)
    mtmd_cpp.mtmd_free(context)
