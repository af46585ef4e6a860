"""Ops for the host in NumPy that are faster than their definitions; there is no C++ of them.

What it is: what the table of `ops` takes before `reference.py` unless the reference is asked for.
What it is not: a definition: `reference.py` has those, and tests compare the two.
What is surprising: NumPy has no error function. A polynomial is fitted to Python's when the first is asked for.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]

EDGE = 4.0
"""From here on erf rounds to 1 in float32 (1 − erf(4) = 1.5e-8)."""

DEGREE = 22
"""Of the polynomial: its error is then below 1e-9 (see the test), a fiftieth of float32's rounding."""

PART = 1 << 15
"""Numbers taken together: a few arrays of so many float64 stay in the second cache."""


@cache
def _coefficients() -> tuple[float, ...]:
    """Of a polynomial in u = x²/8 − 1 that is erf(x) / x for |x| ≤ EDGE, the highest power first.

    Interpolated at Chebyshev's points, where it is as good as minimax within a digit.
    """
    points = np.polynomial.chebyshev.chebpts1(DEGREE + 1)
    x = np.sqrt((points + 1) / 2) * EDGE
    values = [math.erf(one) / one for one in x]
    fitted = np.polynomial.chebyshev.chebfit(points, values, DEGREE)
    return tuple(float(c) for c in np.polynomial.chebyshev.cheb2poly(fitted)[::-1])


def gelu(x: Floats) -> Floats:
    """x · (1 + erf(x / √2)) / 2, any shape; see the reference."""
    out = np.empty(x.shape, x.dtype)
    flat, result = np.ascontiguousarray(x).reshape(-1), out.reshape(-1)
    highest, *others = _coefficients()
    for at in range(0, flat.size, PART):
        part = flat[at : at + PART].astype(np.float64)
        y = np.clip(part * math.sqrt(0.5), -EDGE, EDGE)
        u = y * y * (2 / EDGE**2) - 1
        ratio = np.full(u.shape, highest)
        for c in others:
            ratio *= u
            ratio += c
        ratio *= y
        np.copyto(ratio, np.sign(y), where=np.abs(y) >= EDGE)
        result[at : at + PART] = part * (0.5 + 0.5 * ratio)
    return out
