"""What an engine says of its requests, and of itself.

What it is: plain records, and the wording of an error.
What it is not: a place for decisions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from puna.engine.runner import Hidden
from puna.engine.sampler import Draw
from puna.errors import PunaError
from puna.types import FinishReason


class Progress(NamedTuple):
    """What a step did for one choice of one request.

    `tokens` are new and in order: none while the prompt is being read, several where guesses or a grammar gave them. A
    stop token is not handed out. `logprobs` has one for each token where they were asked for. `finish` or `error` says
    that it was the last. `prefilled` counts the prompt's tokens in the cache, `reused` of which were there before.

    `prompt_logprobs`, where asked for, are those of the prompt's tokens that became known, from its second on (nothing
    stands before the first), in order over the reports of choice 0. Of given answers (`submit_score`) `logprobs` are
    told and no tokens; of an embedding (`submit_embedding`) the last report has it, float32 [dim]. Both end with
    "length".
    """

    request: int
    choice: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Draw, ...] | None = None
    finish: FinishReason | None = None
    prefilled: int = 0
    reused: int = 0
    error: PunaError | None = None
    prompt_logprobs: tuple[Draw, ...] | None = None
    embedding: Hidden | None = None


@dataclass(frozen=True)
class Statistics:
    """Counts since the engine was made, but for those of now: pages, `running`, `waiting` and `compiling`."""

    pages_free: int
    pages_cached: int
    pages_used: int
    pages_reserved: int
    """Not to be used: their memory is counted as that of adapters."""
    local_pages_free: int
    """These three: of the layers that see one chunk only, where there are any."""
    local_pages_cached: int
    local_pages_used: int
    running: int
    waiting: int
    compiling: int
    """Requests whose grammar is not ready."""
    steps: int
    computed_tokens: int
    reused_tokens: int
    made_tokens: int
    guessed_tokens: int
    right_guesses: int
    preemptions: int
    evictions: int
    schedule_seconds: float
    run_seconds: float
    sample_seconds: float


def explained(error: Exception, message: str = "") -> PunaError:
    """The error as one of ours; `message` words logits that are not numbers."""
    if isinstance(error, PunaError):
        return error
    if isinstance(error, FloatingPointError):
        remedy = "The weights are damaged or of the wrong type; try --dtype fp32, or fetch the model again."
    else:
        message = f"A step of the engine failed: {type(error).__name__}: {error}."
        remedy = "What else is running goes on. This is a defect; PUNA_DEBUG=1 shows where."
    known = PunaError(message, remedy=remedy)
    known.__cause__ = error
    return known
