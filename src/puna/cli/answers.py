"""What `puna run` says about an answer, in a chat and outside one.

What it is not: the answer, or where it is printed.
What is surprising: a seed is drawn here rather than by the sampler, so that a run can be told how to be repeated.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puna.types import Answer, Sampling


def with_seed(sampling: Sampling) -> Sampling:
    """The sampling with a seed drawn where none is set, small enough for every JSON reader to keep exactly."""
    return sampling if sampling.seed is not None else replace(sampling, seed=int.from_bytes(os.urandom(4), "big"))


def verdict(answer: Answer, max_tokens: int | None, context: int) -> str:
    """What a person must hear about the end of an answer; empty where the model itself came to an end."""
    if answer.finish_reason == "length":
        return f"[ended at --max-tokens {max_tokens}]"
    if answer.finish_reason == "context":
        return f"[ended: the model's context of {context} tokens is full]"
    if answer.finish_reason == "cancelled":
        return "[stopped]"
    return ""


def figures(answer: Answer) -> str:
    """Counts and speeds in one line."""
    t = answer.timings
    return (
        f"[{answer.prompt_tokens} tokens read in {t.prefill_seconds:.2f} s ({t.prefill_tokens_per_second:.1f}/s), "
        f"{answer.completion_tokens} made in {t.decode_seconds:.2f} s ({t.decode_tokens_per_second:.1f}/s), "
        f"{answer.kernels}, {answer.kv_type} cache]"
    )
