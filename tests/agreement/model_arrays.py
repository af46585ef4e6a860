"""What every comparison with transformers needs: its answer to rows of ids, and its numbers as arrays of the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from puna.kernels.layouts import BF16

Floats = npt.NDArray[np.float32]


def host_array(tensor: torch.Tensor) -> Any:
    """A tensor as what stands for it on the host."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return BF16(tensor.view(torch.int16).numpy().view(np.uint16))
    return tensor.numpy()


def answers(model: Any, rows: list[npt.NDArray[np.int32]]) -> list[Floats]:
    """transformers' logits of each row alone, no padding: [T, V] each."""
    with torch.no_grad():
        return [model(torch.from_numpy(row)[None].long()).logits[0].float().numpy() for row in rows]
