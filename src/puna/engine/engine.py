"""The engine: it owns the sequence, decides what runs next, and hands out token ids.

What it is: a synchronous `step()` over one request at a time: a chunk of the prompt, or one token of the answer.
What it is not: a thread, a server, or a reader of text. The engine of many requests grows from this one.
What is surprising: a new request that begins with what the last one left in the cache (the next turn of a chat) does
not compute it again; `Progress.reused` says how much that was.
"""

from __future__ import annotations

from dataclasses import dataclass

from puna.engine.runner import Runner
from puna.engine.sampler import Sampler
from puna.errors import ContextError, PunaError, UsageError
from puna.types import FinishReason, Sampling

PREFILL_CHUNK = 512
"""Prompt tokens a step computes at most: it bounds the memory of activations, and how long a cancellation waits."""


@dataclass(frozen=True)
class Progress:
    """What one step did: `token` is the new token's id, or None while the prompt is being read; `finish` why it ended.

    A stop token is not handed out: `token` is None beside finish "stop". `prefilled` counts the prompt's tokens in the
    cache, `reused` of which were there before.
    """

    token: int | None
    finish: FinishReason | None
    prefilled: int
    reused: int


class Engine:
    """Runs requests one after another on a runner. Not thread-safe: one thread owns it."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._cached: list[int] = []  # the tokens whose keys and values are in the cache
        self._prompt: list[int] = []
        self._made: list[int] = []
        self._reused = 0
        self._sampling = Sampling()
        self._sampler = Sampler(self._sampling)
        self._stop_ids: frozenset[int] = frozenset()
        self.active: int | None = None
        """The number of the request under way, or None between two."""
        self._requests = 0

    def submit(self, prompt: list[int], sampling: Sampling, stop_ids: frozenset[int] = frozenset()) -> int:
        """Begin a request and return its number; the one before, finished or not, is over.

        Raises what `check_prompt` does, and the request under way then goes on; or what the runner does where there is
        no room for this one, and then none is under way.
        """
        self.check_prompt(prompt, answer=sampling.max_tokens or 1)
        self.active = None  # should the runner fail below, no request goes on with this one's tokens
        # The last prompt token is always computed: its logits are where the answer starts.
        self._reused = _common_prefix(self._cached, prompt[:-1])
        self._cached = self._cached[: self._reused]
        self._prompt, self._made = list(prompt), []
        self._sampling, self._sampler, self._stop_ids = sampling, Sampler(sampling), stop_ids
        if not self._reused:
            self._runner.reset(len(prompt) + (sampling.max_tokens or 1))
        self._requests += 1
        self.active = self._requests
        return self.active

    def check_prompt(self, prompt: list[int], *, answer: int) -> None:
        """Raise what is wrong with a prompt that is to be followed by `answer` tokens.

        ContextError when they exceed the model's context, UsageError for an empty prompt or an id outside the
        vocabulary.
        """
        config = self._runner.config
        if not prompt:
            raise UsageError("The prompt has no tokens.", remedy="Give some text; a model without BOS needs a start.")
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                raise UsageError(
                    f"Token {token} is outside the model's vocabulary of {config.vocab_size}.",
                    remedy="The tokenizer does not belong to this model; give the right one with --tokenizer.",
                )
        over = len(prompt) + answer - config.context_length
        if over > 0:
            asked = f" and {answer} of answer" if answer else ""
            raise ContextError(
                f"The prompt's {len(prompt)} tokens{asked} exceed the model's context of {config.context_length} "
                f"by {over} tokens.",
                remedy=f"Shorten the prompt{' or lower max_tokens' if answer > 1 else ''}. Puna never cuts a context.",
            )

    def step(self) -> Progress:
        """Do the next piece of work. Raises PunaError when there is none, or when the weights give no numbers."""
        if self.active is None:
            raise PunaError("There is no request to step.")
        done = len(self._cached)
        if done < len(self._prompt):
            chunk = self._prompt[done : done + PREFILL_CHUNK]
        else:
            chunk = [self._made[-1]]
        logits = self._runner.run(chunk, done)
        self._cached += chunk
        if len(self._cached) < len(self._prompt):
            return Progress(None, None, len(self._cached), self._reused)
        try:
            token = self._sampler.pick(logits)
        except FloatingPointError as error:
            self.active = None
            raise PunaError(
                f"After {len(self._cached)} tokens {error}.",
                remedy="The weights are damaged or of the wrong type; try --dtype fp32, or fetch the model again.",
            ) from error
        if token in self._stop_ids:
            return self._end(None, "stop")
        self._made.append(token)
        if self._sampling.max_tokens == len(self._made):
            return self._end(token, "length")
        if len(self._prompt) + len(self._made) >= self._runner.config.context_length:
            return self._end(token, "context")
        return Progress(token, None, len(self._prompt), self._reused)

    def cancel(self, request: int) -> None:
        """End a request; what it computed stays in the cache for a next one that begins the same way.

        A request that is over already is left alone, and so is the one that came after it.
        """
        if self.active == request:
            self.active = None

    def check(self) -> None:
        """Recompute the engine's books; raises AssertionError when they are wrong."""
        whole = self._prompt + self._made
        assert self._cached == whole[: len(self._cached)], "the cache holds tokens that are not of this sequence"
        assert len(whole) <= self._runner.config.context_length, "the sequence is longer than the context"
        assert self._reused < max(1, len(self._prompt)), "the prompt's last token was not computed"
        if self.active is not None and self._made:
            assert len(self._cached) == len(whole) - 1, "a step leaves exactly the newest token to compute"

    def _end(self, token: int | None, reason: FinishReason) -> Progress:
        self.active = None
        return Progress(token, reason, len(self._prompt), self._reused)


def _common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens are the same."""
    same = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        same += 1
    return same
