"""Random numbers that are a pure function of what they are for.

What it is: splitmix64's finalizer (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"; the
constants are David Stafford's mix 13) over a request's seed, the answer, the token's place in it and which number of
that token it is.
What it is not: a generator with a state. What is drawn for a token does not depend on the batch, on a request having
been set aside and computed again, or on how far speculation went.
"""

from __future__ import annotations

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def mix(x: int) -> int:
    """A permutation of the numbers of 64 bits, in which every bit of the result hangs on every bit of `x`."""
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _WORD
    return x ^ x >> 31


def uniform(seed: int, choice: int, index: int, draw: int = 0) -> float:
    """From [0, 1), in 53 bits: the `draw`-th number of token `index` of answer `choice` of the request with a seed."""
    x = seed
    for part in (choice, index, draw):
        x = mix((x + (part + 1) * _GOLDEN) & _WORD)
    return (x >> 11) * 2.0**-53
