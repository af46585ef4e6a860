"""The frequencies of rotary position embedding, with the ways in which Llamas stretch them.

What it is: a small frozen record and the table it settles when a model is built.
What it is not: the rotation itself (`ops.rope`).
What is surprising: the table is computed in float32, step by step in the order of Meta's code and transformers. A more
exact one differs by one to four units in the last place; at position 100,000 that turns a pair by 0.003 radians, and
logits in float32 are no longer theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from puna.kernels.layouts import F32


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretching of rope: long wavelengths by `factor`, short ones not, those between by a ramp.

    Where the two other factors are one number (Llama 4 Scout) there is nothing between. `original_context` is the
    context length, in tokens, before stretching.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of `head_dim` dimensions with base `theta`, stretched linearly or by Llama 3.1's rule.

    `factors` (D/2 of them) stretch each frequency by a number of its own: how a GGUF spells a rule that is not one of
    the family's.
    """

    head_dim: int
    theta: float
    linear_factor: float = 1.0
    llama3: Llama3Scaling | None = None
    factors: tuple[float, ...] | None = None

    def inv_freq(self) -> F32:
        """theta^(-2i/D) for i < D/2, stretched: float32 [D/2].

        Su et al. 2021, eq. 15; the stretching as `apply_scaling` in Meta's llama-models (models/llama3/model.py).
        """
        exponent = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        # NumPy's own float32 power is up to two units in the last place off.
        power = (float(np.float32(self.theta)) ** exponent.astype(np.float64)).astype(np.float32)
        freq = 1 / power / np.float32(self.linear_factor)
        if (s := self.llama3) is not None:
            # torch divides a number by a tensor as the tensor's reciprocal times the number: two roundings.
            wavelength = (1 / freq) * np.float32(2 * np.pi)
            if s.high_freq_factor == s.low_freq_factor:  # Llama 4 Scout: a step, and no ramp
                kept = (wavelength <= s.original_context / s.low_freq_factor).astype(np.float32)
            else:
                turns = (1 / wavelength) * s.original_context
                kept = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
            freq = (1 - kept) * freq / s.factor + kept * freq
        if self.factors is not None:
            freq = freq / np.array(self.factors, np.float32)
        return freq.astype(np.float32, copy=False)
