"""The torch runner's own part: what it says when the device's memory runs out, or of weights it cannot multiply. Its
numbers are in tests/golden."""

from __future__ import annotations

import dataclasses
from typing import NoReturn

import pytest
import torch

from puna.engine.torch_runner import TorchRunner, open_device
from puna.errors import DeviceError, UsageError
from puna.kernels.layouts import convert, to_float32
from puna.models import decoder
from puna.weights.find import find_model
from puna.weights.load import load


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(DeviceError, match=f"--device {device}"):
        open_device(device)


def test_memory_that_runs_out_is_said_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(find_model("cria"))
    runner = TorchRunner(model.config, model.weights, "cpu")
    assert runner.run([0, 5], 0).shape == (model.config.vocab_size,)

    def full(*_: object) -> NoReturn:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decoder, "forward", full)
    with pytest.raises(DeviceError, match=r"a conversation of 3 tokens does not fit"):
        runner.run([7], 2)
    with pytest.raises(DeviceError, match=r"a text of 2 tokens does not fit"):
        runner.all_logits([0, 5])
    monkeypatch.setattr(decoder, "make_cache", full)
    with pytest.raises(DeviceError, match=r"a conversation of 400 tokens does not fit"):
        runner.reset(400)


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
    want = auto.run([0, 5, 9], 0)
    for kv_type in ("fp32", "fp16"):
        runner = TorchRunner(model.config, model.weights, "cpu", kv_type)
        assert runner.kv_type == kv_type
        assert abs(runner.run([0, 5, 9], 0) - want).max() < 0.05 * abs(want).max()
        assert runner._cache is not None
        assert runner._cache.keys[0].dtype == {"fp32": torch.float32, "fp16": torch.float16}[kv_type]
    with pytest.raises(UsageError, match="--kv-type q8_0: --device cpu keeps keys and values in fp32, bf16, fp16 only"):
        TorchRunner(model.config, model.weights, "cpu", "q8_0")
