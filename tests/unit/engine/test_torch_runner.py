"""The torch runner's own part: what it says when the device's memory runs out, or of weights it cannot multiply. Its
numbers are in tests/golden."""

from __future__ import annotations

import dataclasses
from typing import NoReturn

import numpy as np
import pytest
import torch

from puna.engine.runner import Batch, HostRunner
from puna.engine.torch_runner import TorchRunner, open_device
from puna.errors import DeviceError, UsageError
from puna.kernels.layouts import convert, page_table, to_float32
from puna.models import decoder
from puna.weights.find import find_model
from puna.weights.load import load


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(DeviceError, match=f"--device {device}"):
        open_device(device)


def batch(tokens: list[int], start: int = 0) -> Batch:
    """One sequence in page 1, then page 0; the last token's logits are wanted."""
    wanted = np.array([len(tokens) - 1], np.int32)
    return Batch(np.array(tokens, np.int32), page_table([start], [len(tokens)], [[1, 0]]), wanted)


def test_memory_that_runs_out_is_said_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(find_model("cria"))
    runner = TorchRunner(model.config, model.weights, "cpu")
    runner.allocate(2)
    assert runner.run(batch([0, 5])).shape == (1, model.config.vocab_size)

    def full(*_: object) -> NoReturn:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decoder, "forward", full)
    for call in (runner.run, runner.hidden):
        with pytest.raises(DeviceError, match=r"a step of 1 tokens does not fit"):
            call(batch([7], 2))
    with pytest.raises(DeviceError, match=r"a text of 2 tokens does not fit"):
        runner.all_logits([0, 5])
    monkeypatch.setattr(decoder, "make_cache", full)
    with pytest.raises(DeviceError, match=r"a cache of 640 tokens does not fit"):
        runner.allocate(10)


@pytest.mark.parametrize("kv_type", ["auto", "fp32"])
def test_pages_go_as_on_the_host(kv_type: str) -> None:
    """A ragged batch, then one sequence from a copied page and from one that was read and written back."""
    model = load(find_model("cria"))
    host, ours = (
        HostRunner(model.config, model.weights, "fp32"),
        TorchRunner(model.config, model.weights, "cpu", kv_type),
    )
    assert ours.page_bytes * (2 if kv_type == "auto" else 1) == host.page_bytes
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 90).astype(np.int32)
    table = page_table([0, 0], [70, 20], [[3, 1], [0, 9]])
    for runner in (host, ours):
        runner.allocate(6)
    first = [runner.run(Batch(tokens, table, np.array([5, 69, 89], np.int32))) for runner in (host, ours)]
    for runner in (host, ours):
        runner.copy_page(1, 2)
        runner.write_page(5, runner.read_page(3))
    step = Batch(tokens[:2], page_table([70, 70], [1, 1], [[3, 2], [5, 1]]), np.array([0, 1], np.int32))
    then = [runner.run(step) for runner in (host, ours)]
    for want, got in (first, then):
        assert got.dtype == np.float32
        assert np.abs(got - want).max() < 0.03 * np.abs(want).max()


def test_weights_of_several_types_are_refused_by_name() -> None:
    model = load(find_model("cria"))
    norm = convert(to_float32(model.weights.norm), "fp32")
    head = convert(model.weights.embedding, "bf16")
    mixed = dataclasses.replace(model.weights, norm=norm, head=head)
    with pytest.raises(UsageError, match=r"in several types \(bf16, fp32\)"):
        TorchRunner(model.config, mixed, "cpu")


def test_the_cache_is_of_the_type_asked_for_or_refused() -> None:
    model = load(find_model("cria"))
    auto = TorchRunner(model.config, model.weights, "cpu")
    assert auto.kv_type == "bf16"
    auto.allocate(2)
    want = auto.run(batch([0, 5, 9]))
    for kv_type in ("fp32", "fp16"):
        runner = TorchRunner(model.config, model.weights, "cpu", kv_type)
        assert runner.kv_type == kv_type
        runner.allocate(2)
        assert abs(runner.run(batch([0, 5, 9])) - want).max() < 0.05 * abs(want).max()
        assert runner._cache.keys[0].dtype == {"fp32": torch.float32, "fp16": torch.float16}[kv_type]
    with pytest.raises(UsageError, match="--kv-type q8_0: --device cpu keeps keys and values in fp32, bf16, fp16 only"):
        TorchRunner(model.config, model.weights, "cpu", "q8_0")
