"""The torch runner's own part: what it says when the device's memory runs out. Its numbers are in tests/golden."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch

from puna.engine.torch_runner import TorchRunner
from puna.errors import DeviceError
from puna.models import decoder
from puna.weights.find import find_model
from puna.weights.load import load


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
