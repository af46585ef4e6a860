"""The exact text that was published with stories260K, through every path that Puna has.

One trained model, one greedy text of 256 tokens: a wrong rotation, norm, cache entry, merge rule or rounding anywhere
changes a word of it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from puna import LLM
from puna.cli.main import main
from puna.kernels import ops
from puna.weights.checkpoint import open_checkpoint
from puna.weights.convert import convert

TOKENS = 256


@pytest.fixture(scope="module")
def folder(reference: Path) -> Path:
    return reference / "checkpoints" / "stories260K"


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    text: str = json.loads((folder / "expected_greedy.json").read_text())["text"]
    return text


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """stories260K as safetensors, that as Meta's layout, and that as safetensors again."""
    root = tmp_path_factory.mktemp("stories260K")
    source, tokenizer = folder / "stories260K.bin", folder / "tok512.bin"
    convert(source, root / "safetensors", to="safetensors", tokenizer=tokenizer)
    convert(root / "safetensors", root / "meta", to="meta")
    convert(root / "meta", root / "back", to="safetensors")
    return {name: root / name for name in ("safetensors", "meta", "back")}


@pytest.fixture(autouse=True)
def _auto_kernels():
    yield
    ops.select("auto")


def greedy(model: Path, folder: Path, **options: str) -> str:
    llm = LLM(model, tokenizer=folder / "tok512.bin", **options)
    return llm.generate("", raw=True, temperature=0, max_tokens=TOKENS).text


def kernel_names() -> list[str]:
    from puna.kernels import cpu

    return ["reference", *cpu.isas()]


@pytest.mark.parametrize("kernels", kernel_names())
def test_every_kernel(folder: Path, expected: str, kernels: str) -> None:
    assert greedy(folder / "stories260K.bin", folder, kernels=kernels) == expected


def test_an_op_at_a_time(folder: Path, expected: str) -> None:
    """C++ ops under the plain forward: what the native call must equal."""
    from puna.engine.engine import Engine
    from puna.engine.native_runner import NativeRunner
    from puna.engine.runner import HostRunner

    llm = LLM(folder / "stories260K.bin", tokenizer=folder / "tok512.bin")
    assert isinstance(llm._runner, NativeRunner)
    llm._engine = Engine(HostRunner(llm.config, llm._runner._weights), pages=8)
    assert llm.generate("", raw=True, temperature=0, max_tokens=TOKENS).text == expected


def test_torch(folder: Path, expected: str) -> None:
    llm = LLM(folder / "stories260K.bin", tokenizer=folder / "tok512.bin")
    from puna.engine.engine import Engine
    from puna.engine.torch_runner import TorchRunner
    from puna.weights.load import load

    loaded = load(folder / "stories260K.bin", tokenizer=folder / "tok512.bin")
    # `--device cpu` means the C++ kernels, so the torch runner is put in by hand; cuda would take the same walk.
    llm._engine = Engine(TorchRunner(loaded.config, loaded.weights, "cpu"), pages=8)
    assert llm.generate("", raw=True, temperature=0, max_tokens=TOKENS).text == expected


@pytest.mark.parametrize("form", ["safetensors", "meta", "back"])
def test_after_conversion(folder: Path, expected: str, converted: dict[str, Path], form: str) -> None:
    assert greedy(converted[form], folder) == expected


def test_conversion_there_and_back_is_bit_equal(folder: Path, converted: dict[str, Path]) -> None:
    first, back = (open_checkpoint(converted[form]) for form in ("safetensors", "back"))
    assert first.tensors.keys() == back.tensors.keys()
    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(tensor.read(), back.tensors[name].read(), err_msg=name)
    assert (converted["safetensors"] / "model.safetensors").read_bytes() == (
        converted["back"] / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("form", ["safetensors", "back"])
def test_transformers_on_the_converted_files(
    folder: Path, expected: str, converted: dict[str, Path], form: str
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(converted[form]).eval()
    llm = LLM(folder / "stories260K.bin", tokenizer=folder / "tok512.bin")
    ids = llm.generate("", raw=True, temperature=0, max_tokens=TOKENS).token_ids
    with torch.inference_mode():
        out = model.generate(torch.tensor([[1]]), do_sample=False, max_new_tokens=TOKENS, eos_token_id=None)
    assert tuple(out[0, 1 : 1 + len(ids)].tolist()) == ids
    assert llm.tokenizer.decode([1, *ids], skip_special=True).strip() == expected.strip()


def test_the_command_line_prints_it(folder: Path, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(folder / "stories260K.bin"), "", "--tokenizer", str(folder / "tok512.bin"), "--raw"]
    assert main([*command, "--temperature", "0", "--max-tokens", "256"]) == 0
    assert capsys.readouterr().out.removesuffix("\n") == expected


def test_llama2xs_pt_and_bin_agree(reference: Path) -> None:
    folder = reference / "checkpoints" / "llama2xs"
    pt, binary = (open_checkpoint(folder / name) for name in ("ckpt.pt", "model.bin"))
    assert pt.read_config.config.layers == binary.read_config.config.layers
    assert set(pt.tensors) == set(binary.tensors)
    for name, tensor in pt.tensors.items():
        np.testing.assert_array_equal(tensor.read(), binary.tensors[name].read(), err_msg=name)
