"""The engine: many requests at once on one model, token ids in, token ids out.

What it is: a synchronous `step()`. The scheduler plans it, the runner computes it, tokens are drawn from its logits,
and every sequence that moved is reported. Between two steps requests are submitted and cancelled.
What it is not: a thread, a server, or a reader of text.
What is surprising: nothing but a token's own logits and numbers that are a function of the request's seed and the
token's place decide about it. So an answer depends on what else runs, on guesses, preemption and the cache only as far
as the logits' rounding does: a prompt computed in other chunks differs in the third digit of a logprob with packed
weights. Where the kernels are invariant (`ops.select`) not even there.

A request's way: `submit` → the scheduler's queue → `plan` (pages, a chunk of the prompt) → `runner.run` → `_draw` →
`Progress`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from collections.abc import Sequence as Ids
from concurrent.futures import Future
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from puna.engine.adapters import Pairs
from puna.engine.runner import Hidden, Logits, Runner
from puna.engine.sampler import Draw, LogitsError, Sampler, check_tokens, logprobs, sample
from puna.engine.scheduler import Part, Scheduler
from puna.engine.sequence import NEVER, Constraint, Request, Sequence
from puna.engine.speculation import Drafts, Proposer, StepCost, Together, Wanted
from puna.errors import AdapterError, ContextError, PunaError, QueueFullError, UsageError
from puna.types import FinishReason, Pooling, Sampling

Mask = npt.NDArray[np.uint32]

PREFILL_CHUNK = 512
"""Tokens a step computes at most: it bounds the memory of activations, and how long every other stream waits."""

LOGITS_BYTES = 64 << 20
"""Bytes of logits a step makes at most for tokens that are not drawn, where a prompt's or a given answer's are asked
for: a row of 128,256 words takes half a megabyte."""


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


class _Loaded(NamedTuple):
    """An adapter: its number at the runner, and the pages whose memory it takes."""

    number: int
    pages: list[int]


class _Turn:
    """One sequence while tokens are drawn for it: `row` has its next logits, `right` counts its right guesses."""

    __slots__ = ("draws", "error", "finish", "guesses", "right", "row", "sequence", "tokens")

    def __init__(self, sequence: Sequence, row: int, guesses: list[int]) -> None:
        self.sequence, self.row, self.guesses = sequence, row, guesses
        self.right = 0
        self.tokens: list[int] = []
        self.draws: list[Draw] = []
        self.finish: FinishReason | None = None
        self.error: PunaError | None = None


class Engine:
    """Runs requests on a runner. Not thread-safe: one thread owns it.

    `pages` of KV cache are shared by all. `step_tokens` bounds what a step computes, beyond one token of each answer
    under way, of which there are `max_running`; `max_waiting` requests may wait for that; `logits_bytes` bounds the
    logits of tokens that are not drawn (one row at least). `speculate` makes a proposer for each sequence. `clock` is
    what deadlines are told in. Raises PunaError where the cache does not fit the memory.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        pages: int,
        step_tokens: int = PREFILL_CHUNK,
        max_running: int = 64,
        max_waiting: int = 1024,
        logits_bytes: int = LOGITS_BYTES,
        prefix_cache: bool = True,
        speculate: Callable[[], Proposer] | Together | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("pages", pages), ("step_tokens", step_tokens), ("max_running", max_running)):
            if value < 1:
                raise UsageError(f"{name} must be a whole number, 1 or larger, not {value}.", remedy="Raise it.")
        runner.allocate(pages)
        self._runner = runner
        self._max_waiting = max_waiting
        self._speculate = speculate
        self._together = speculate if isinstance(speculate, Together) else None
        self._clock = clock
        self.capacity = min(runner.config.context_length, pages * runner.page)
        """Tokens that a sequence may have: the model's context, or what the pages hold that adapters leave."""
        self._scheduler = Scheduler(
            pages=pages,
            page=runner.page,
            context=self.capacity,
            step_tokens=step_tokens,
            step_rows=max(1, logits_bytes // (4 * runner.config.vocab_size)),
            max_running=max_running,
            prefix_cache=prefix_cache,
            copy_page=runner.copy_page,
        )
        self._adapters: dict[str, _Loaded] = {}
        self._loaded = -1
        self._requests: dict[int, Request] = {}
        self._submitted = 0
        self._compiling: dict[int, Future[Constraint]] = {}  # by number of request
        self._deadlines: list[tuple[float, int]] = []  # a heap
        self._cost = StepCost()
        self._steps = self._computed = self._made = self._guessed = self._right = 0
        self._schedule_seconds = self._run_seconds = self._sample_seconds = 0.0

    # -- requests --------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Ids[int],
        sampling: Sampling,
        *,
        stop_ids: frozenset[int] = frozenset(),
        namespace: str = "",
        priority: int = 0,
        deadline: float | None = None,
        adapter: str | None = None,
        constraint: Constraint | Future[Constraint] | None = None,
    ) -> int:
        """Have a request wait for its turn; returns its number, by which `step` reports it.

        Only requests of the same `namespace` share what was computed. The larger `priority` goes first. At `deadline`
        it ends, wherever it is. A constraint that is not ready holds up nobody else; an error in it ends the request.
        `adapter` is the name of one that is loaded. Raises what `check_prompt` does, AdapterError for an unknown
        adapter, and QueueFullError when `max_waiting` wait already.
        """
        self.check_prompt(prompt, answer=sampling.max_tokens or 1)
        check_tokens(sampling, self._runner.config.vocab_size)
        limit = self.capacity if sampling.max_tokens is None else len(prompt) + sampling.max_tokens
        # A tokenizer may have more ids than the model: those never come, and have no logit to bar.
        stop_ids = frozenset(token for token in stop_ids if 0 <= token < self._runner.config.vocab_size)
        ends = frozenset[int]() if sampling.ignore_eos else stop_ids
        number, space = self._adapter(adapter, namespace)
        request = Request(self._number(), len(prompt), sampling, ends, space, priority, limit, number)
        ready = None if isinstance(constraint, Future) else constraint
        sampler = Sampler(sampling, prompt, stop_ids)
        sequence = Sequence(request, 0, list(prompt), sampler, ready, self._drafts())
        if sampling.prompt_logprobs is not None:
            sequence.wanted = 0
        return self._enter(sequence, deadline, constraint if isinstance(constraint, Future) else None)

    def submit_score(
        self,
        prompt: Ids[int],
        continuations: Ids[Ids[int]],
        *,
        namespace: str = "",
        priority: int = 0,
        deadline: float | None = None,
        adapter: str | None = None,
    ) -> int:
        """Have the model say how likely it finds each of the `continuations` after `prompt`, as one request.

        Choice c is continuation c: its `Progress.logprobs` have each token's logarithm of probability, and the
        likeliest token in its place as the one `top`. The prompt is computed once for all. Options and errors are those
        of `submit`; UsageError for a continuation without tokens, and for none.
        """
        if not continuations or not all(map(len, continuations)):
            raise UsageError("A continuation has no tokens.", remedy="Give at least one, of one token or more each.")
        longest = max(map(len, continuations))
        self.check_prompt(prompt, answer=longest)
        for given in continuations:
            self.check_prompt(given, answer=0)
        sampling = Sampling(temperature=0, n=len(continuations), logprobs=1)
        limit, answers = len(prompt) + longest, tuple(map(tuple, continuations))
        number, space = self._adapter(adapter, namespace)
        request = Request(
            self._number(), len(prompt), sampling, frozenset(), space, priority, limit, number, continuations=answers
        )
        return self._enter(Sequence(request, 0, list(prompt), Sampler(sampling), None, None), deadline)

    def submit_embedding(
        self,
        prompt: Ids[int],
        pooling: Pooling = "mean",
        *,
        namespace: str = "",
        priority: int = 0,
        deadline: float | None = None,
        adapter: str | None = None,
    ) -> int:
        """Have the prompt's hidden states after the last norm made into one vector, as they are: not of length 1.

        "cls" computes the first token only, for in this family no token sees those after it. Options and errors are
        those of `submit`; UsageError for an unknown pooling.
        """
        if pooling not in get_args(Pooling):
            raise UsageError(
                f"There is no pooling {pooling!r:.80}.", remedy=f"There are {', '.join(get_args(Pooling))}."
            )
        self.check_prompt(prompt, answer=0)
        tokens = list(prompt[:1] if pooling == "cls" else prompt)
        sampling = Sampling(temperature=0)
        number, space = self._adapter(adapter, namespace)
        request = Request(
            self._number(), len(tokens), sampling, frozenset(), space, priority, len(tokens), number, pooling=pooling
        )
        sequence = Sequence(request, 0, tokens, Sampler(sampling), None, None)
        if pooling == "mean":
            sequence.wanted = 0
        return self._enter(sequence, deadline)

    def _number(self) -> int:
        """The next request's. Raises QueueFullError when too many wait already."""
        if self._scheduler.waiting + len(self._compiling) >= self._max_waiting:
            raise QueueFullError(
                f"{self._max_waiting} requests are waiting already.", remedy="Try again when some have been answered."
            )
        self._submitted += 1
        return self._submitted

    def _adapter(self, name: str | None, namespace: str) -> tuple[int, Hashable]:
        """An adapter's number at the runner, and the namespace in the prefix cache. Raises AdapterError."""
        if name is None:
            return -1, namespace
        if name not in self._adapters:
            raise AdapterError(
                f"There is no adapter {name!r:.80}.",
                remedy=f"Loaded are: {', '.join(self._adapters)}." if self._adapters else "Load it first.",
            )
        number = self._adapters[name].number
        return number, (namespace, number)

    def _enter(self, sequence: Sequence, deadline: float | None, constraint: Future[Constraint] | None = None) -> int:
        request = sequence.request
        request.live.append(sequence)
        self._requests[request.number] = request
        if deadline is not None:
            heappush(self._deadlines, (deadline, request.number))
        if constraint is None:
            self._scheduler.add(sequence)
        else:
            self._compiling[request.number] = constraint
        return request.number

    def check_prompt(self, prompt: Ids[int], *, answer: int) -> None:
        """Raise what is wrong with a prompt that is to be followed by `answer` tokens.

        ContextError when they exceed the model's context or the whole cache, UsageError for an empty prompt or an id
        outside the vocabulary.
        """
        config = self._runner.config
        if not prompt:
            raise UsageError("The prompt has no tokens.", remedy="Give some text; a model without BOS needs a start.")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            token = next(token for token in prompt if not 0 <= token < config.vocab_size)
            raise UsageError(
                f"Token {token} is outside the model's vocabulary of {config.vocab_size}.",
                remedy="The tokenizer does not belong to this model; give the right one with --tokenizer.",
            )
        over = len(prompt) + answer - self.capacity
        if over > 0:
            asked = f" and {answer} of answer" if answer else ""
            what = "model's context" if self.capacity == config.context_length else "room in the KV cache"
            raise ContextError(
                f"The prompt's {len(prompt)} tokens{asked} exceed the {what} of {self.capacity} by {over} tokens.",
                remedy=f"Shorten the prompt{' or lower max_tokens' if answer > 1 else ''}. Puna never cuts a context.",
            )

    def cancel(self, request: int, choice: int | None = None) -> None:
        """End a request, or one choice of it: its pages are free at once, nothing more is reported of it.

        What it computed stays in the cache. A request that is over already is left alone. Until the prompt is computed
        all choices are one sequence: one of them is then ended when its first token would be told.
        """
        known = self._requests.get(request)
        if known is None:
            return
        if choice is not None and not known.forked:
            known.unwanted.add(choice)
            if not known.unwanted.issuperset(range(known.choices)):
                return
            choice = None
        for sequence in list(known.live):
            if choice is None or sequence.choice == choice:
                self._end(sequence)

    def cancel_all(self) -> None:
        """End every request."""
        for request in list(self._requests):
            self.cancel(request)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do until the next `submit`."""
        return not self._requests

    # -- adapters --------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of those that are loaded."""
        return tuple(self._adapters)

    def load_adapter(self, name: str, pairs: Pairs, nbytes: int) -> None:
        """Have requests name an adapter. Its `nbytes` are taken from the KV cache's memory while it is loaded.

        So many pages stay empty, and requests under way that need them start over; `capacity` may become less. Raises
        AdapterError for a name that is taken, and where the pages left do not hold what one request may come to.
        """
        if name in self._adapters:
            raise AdapterError(f"There is an adapter {name!r:.80} already.", remedy="Unload it, or use another name.")
        runner, scheduler = self._runner, self._scheduler
        taken = -(-nbytes // runner.page_bytes)
        pool = scheduler.pool.count - len(scheduler.reserved)
        left = pool - taken
        longest = max((request.limit for request in self._requests.values()), default=1)
        needed = -(-longest // runner.page)
        if left < needed:
            whose = "the longest request under way may need" if self._requests else "a request needs"
            raise AdapterError(
                f"Adapter {name!r:.80} takes {nbytes} bytes, which are {taken} pages of {runner.page_bytes} of the KV "
                f"cache's {pool}, and {whose} {needed} of the {max(left, 0)} left.",
                remedy="Unload another adapter, make the cache larger, or wait for long requests to end.",
            )
        self._loaded += 1
        runner.adapters.load(self._loaded, pairs)  # a number is not used twice: the cache knows pages by it
        self._adapters[name] = _Loaded(self._loaded, scheduler.reserve(taken))
        self._measure()

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; its pages are the cache's again. Raises AdapterError while a request uses or awaits it."""
        number, _ = self._adapter(name, "")
        users = sum(request.adapter == number for request in self._requests.values())
        if users:
            raise AdapterError(
                f"Adapter {name!r:.80} is in use by {users} request{'s' if users > 1 else ''}.",
                remedy="Unload it when they have ended, or cancel them.",
            )
        self._runner.adapters.drop(number)
        self._scheduler.give_back(self._adapters.pop(name).pages)
        self._measure()

    def _measure(self) -> None:
        runner, scheduler = self._runner, self._scheduler
        pages = scheduler.pool.count - len(scheduler.reserved)
        self.capacity = min(runner.config.context_length, pages * runner.page)

    # -- a step ----------------------------------------------------------------------------------------------------

    def step(self) -> list[Progress]:
        """Compute the next piece of everybody's work, and say what became of each. Empty where nothing could run.

        An error ends the requests it concerns, in their Progress; the engine goes on.
        """
        began = time.perf_counter()
        reports: list[Progress] = []
        self._expire(reports)
        self._collect_constraints(reports)
        try:
            if self._together is not None:
                self._guess_together(self._together)
            parts = self._scheduler.plan(None if self._speculate is None else self._guess)
            if not parts:
                return reports
            batch = self._scheduler.batch(parts)
            planned = time.perf_counter()
            pooling = parts[0].sequence.request.pooling is not None
            rows = self._runner.hidden(batch) if pooling else self._runner.run(batch)
        except Exception as error:  # reported to each of the requests that it may concern
            for sequence in list(self._scheduler.running):
                self._fail(sequence, error, reports)
            return reports
        ran = time.perf_counter()
        if pooling:
            self._pool_all(parts, rows, reports)
        else:
            self._draw_all(parts, rows, reports)
            self._cost.add(len(batch.tokens), ran - planned)
        self._steps += 1
        self._computed += len(batch.tokens)
        self._schedule_seconds += planned - began
        self._run_seconds += ran - planned
        self._sample_seconds += time.perf_counter() - ran
        return reports

    def _expire(self, reports: list[Progress]) -> None:
        if not self._deadlines:
            return
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            request = self._requests.get(heappop(self._deadlines)[1])
            for sequence in list(request.live) if request else ():
                reports += self._reports_of_end(sequence, finish="deadline")
                self._end(sequence)

    def _collect_constraints(self, reports: list[Progress]) -> None:
        """Queue the requests whose grammar is ready by now."""
        for number in [number for number, future in self._compiling.items() if future.done()]:
            (sequence,) = self._requests[number].live
            try:
                sequence.constraint = self._compiling[number].result()
            except Exception as error:
                self._fail(sequence, error, reports)
                continue
            del self._compiling[number]
            self._scheduler.add(sequence)

    def _guess(self, sequence: Sequence, most: int, decoding: int) -> list[int]:
        return sequence.guess(most, self._price(decoding))

    def _guess_together(self, together: Together) -> None:
        """Have the guesses made that the plan is going to ask for."""
        decoding = [each for each in self._scheduler.running if each.computed >= each.goal]
        price = self._price(len(decoding))
        wanted: list[Wanted] = []
        for sequence in decoding:
            request, drafts = sequence.request, sequence.drafts
            if drafts is not None:
                most = min(drafts.wanted(sequence.tokens, price), request.limit - len(sequence.tokens) - 1)
                wanted.append(Wanted(drafts.proposer, sequence.tokens, most, request.namespace))
        together.prepare([each for each in wanted if each.most > 0])

    def _price(self, decoding: int) -> float:
        """What a guess for each of so many sequences costs, in tokens that one of them has in the same time."""
        price = self._cost.share(decoding) * decoding
        if self._together is not None and (step := self._cost.seconds(decoding)):
            price += self._together.seconds / step
        return price

    # -- drawing tokens --------------------------------------------------------------------------------------------

    def _draw_all(self, parts: list[Part], logits: Logits, reports: list[Progress]) -> None:
        """Note what was computed, draw what comes next, and report it."""
        turns: list[_Turn] = []
        row = 0
        for sequence, start, length, guesses in parts:
            first = max(start, sequence.first)
            seen = logits[row : row + start + length - first] if first < start + length else logits[:0]
            row += len(seen)
            sequence.computed = start + length
            self._scheduler.commit(sequence)
            try:
                if sequence.request.continuations:
                    self._score(sequence, first, seen, reports)
                    continue
                if sequence.wanted <= first:
                    self._read_prompt(sequence, first, seen)
            except LogitsError as error:
                self._fail(sequence, _explained(error, f"After {first + error.row + 1} tokens {error}."), reports)
                continue
            if sequence.computed < len(sequence.tokens):
                reports.append(self._report(sequence))
                continue
            row -= 1
            turns.append(_Turn(sequence, row, guesses))
            if len(sequence.tokens) == sequence.request.prompt:
                turns += [_Turn(twin, row, []) for twin in self._fork(sequence)]
            row += 1 + len(guesses)
        going = turns
        while going:  # the second round draws after the first guess of those whose first guess was right, and so on
            going = self._draw(going, logits)
        for turn in turns:
            sequence = turn.sequence
            if sequence.choice in sequence.request.unwanted:
                self._end(sequence)
                continue
            reports.append(self._report(sequence, tuple(turn.tokens), turn.draws, turn.finish, turn.error))
            self._made += len(turn.tokens)
            if turn.guesses:
                self._guessed += len(turn.guesses)
                self._right += turn.right
                sequence.judge(len(turn.guesses), turn.right)
            if turn.finish is not None or turn.error is not None:
                self._end(sequence, keep=turn.error is None)
            elif turn.guesses:
                self._scheduler.commit(sequence)
                self._scheduler.trim(sequence)

    def _read_prompt(self, sequence: Sequence, first: int, logits: Logits) -> None:
        """Note how likely the prompt's tokens were, given the logits after its tokens from `first` on."""
        request, end = sequence.request, first + len(logits)
        following = sequence.tokens[first + 1 : min(end + 1, request.prompt)]  # after the last, one is drawn
        sequence.read = _draws(logits[: len(following)], following, request.sampling.prompt_logprobs or 0)
        sequence.wanted = end if end < request.prompt else NEVER

    def _score(self, sequence: Sequence, first: int, logits: Logits, reports: list[Progress]) -> None:
        """Tell how likely the tokens of given answers are, given the logits after the tokens from `first` on."""
        request = sequence.request
        if not len(logits):
            reports.append(self._report(sequence))
            return
        at = first + 1 - request.prompt
        end = at + len(logits)
        told = [_draws(logits, request.continuations[sequence.choice][at:end], 1)]
        going = [sequence]
        if len(sequence.tokens) == request.prompt:  # the same logits are for each answer's first token
            going += self._fork(sequence)
            told += [_draws(logits, given[at:end], 1) for given in request.continuations[1:]]
            for each in going:
                each.tokens += request.continuations[each.choice][:-1]
        for each, draws in zip(going, told, strict=True):
            each.wanted = first + len(logits)
            finish: FinishReason | None = "length" if end == len(request.continuations[each.choice]) else None
            reports.append(self._report(each, draws=draws, finish=finish))
            if finish is not None:
                self._end(each)

    def _pool_all(self, parts: list[Part], hidden: Hidden, reports: list[Progress]) -> None:
        """Add the hidden states to what each sequence has seen, and report the embeddings that are whole."""
        row = 0
        for sequence, start, length, _ in parts:
            end = start + length
            seen = hidden[row : row + max(end - max(start, sequence.first), 0)].astype(np.float64)
            row += len(seen)
            sequence.computed = end
            self._scheduler.commit(sequence)
            mean = sequence.request.pooling == "mean"
            for state in seen:  # one after another: the sum is then the same however the prompt was cut
                sequence.pooled = sequence.pooled + state if mean and sequence.pooled is not None else state
            if mean and len(seen):  # else it starts over, and is not as far as it was
                sequence.wanted = end
            if end < len(sequence.tokens) or sequence.pooled is None:
                reports.append(self._report(sequence))
                continue
            vector = (sequence.pooled / (end if mean else 1)).astype(np.float32)
            if not np.isfinite(vector).all():
                error = FloatingPointError("the model's hidden states are not numbers")
                self._fail(sequence, _explained(error, f"After {end} tokens {error}."), reports)
                continue
            reports.append(self._report(sequence, finish="length")._replace(embedding=vector))
            self._end(sequence)

    def _draw(self, turns: list[_Turn], logits: Logits) -> list[_Turn]:
        """Draw a token for each and add it to its sequence; returns those that go on, for their guess was right."""
        if not turns:
            return []
        masks: list[Mask | None] = []
        for turn in turns:
            constraint = turn.sequence.constraint
            try:
                masks.append(None if constraint is None else constraint.mask())
            except Exception as error:  # the others do not pay for one grammar
                turn.error = _explained(error)
                return self._draw([turn for turn in turns if turn.error is None], logits)
        rows = [turn.row for turn in turns]
        everything = rows == list(range(len(logits)))
        try:
            draws = sample(logits if everything else logits[rows], [turn.sequence.sampler for turn in turns], masks)
        except Exception as error:  # one that names its row ends that sequence alone
            row: int | None = getattr(error, "row", None)
            for turn in turns if row is None else [turns[row]]:
                turn.error = _explained(error, f"After {turn.sequence.computed} tokens {error}.")
            return self._draw([turn for turn in turns if turn.error is None], logits)
        going = []
        for turn, draw in zip(turns, draws, strict=True):
            try:
                if self._add(turn, draw):
                    going.append(turn)
            except Exception as error:
                turn.error = _explained(error)
        return going

    def _add(self, turn: _Turn, draw: Draw) -> bool:
        """Add a drawn token, and what a grammar forces after it; whether all were guessed, so that the walk goes on."""
        sequence, constraint = turn.sequence, turn.sequence.constraint
        request = sequence.request
        telling = request.logprobs
        guessed = True
        new = [draw.token]
        for token in new:
            if token in request.stop_ids:
                turn.finish = "stop"
                return False
            sequence.tokens.append(token)
            sequence.sampler.accept(token)
            turn.tokens.append(token)
            if telling:
                turn.draws.append(draw)
            if len(sequence.tokens) == request.limit:
                turn.finish = "context" if request.sampling.max_tokens is None else "length"
                return False
            if constraint is not None:
                constraint.accept(token)
                if constraint.finished:
                    turn.finish = "stop"
                    return False
                if len(new) == 1 and not telling:  # a token that is not drawn has no probability to tell
                    new += constraint.forced()
            guessed = guessed and turn.right < len(turn.guesses) and turn.guesses[turn.right] == token
            if guessed:  # its keys and values are in place, and the next row's logits are those after it
                turn.right += 1
                turn.row += 1
                sequence.computed += 1
        return guessed

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        """The other choices, at the moment when the prompt is computed and nothing is drawn."""
        sampling, stop_ids = sequence.request.sampling, sequence.request.stop_ids
        sequence.request.forked = True
        twins = []
        for choice in range(1, sequence.request.choices):
            sampler = Sampler(sampling, sequence.tokens, stop_ids, choice)
            twins.append(sequence.fork(choice, sampler, self._drafts() if sequence.drafts else None))
            self._scheduler.add_fork(sequence, twins[-1])
        return twins

    def _drafts(self) -> Drafts | None:
        return None if self._speculate is None else Drafts(self._speculate())

    # -- reports and ends ------------------------------------------------------------------------------------------

    def _report(
        self,
        sequence: Sequence,
        tokens: tuple[int, ...] = (),
        draws: Ids[Draw] = (),
        finish: FinishReason | None = None,
        error: PunaError | None = None,
    ) -> Progress:
        request = sequence.request
        told = tuple(draws) if request.logprobs else None
        read, sequence.read = sequence.read, ()
        of_prompt = None if request.sampling.prompt_logprobs is None else read
        # A choice that waits to start over has read its prompt all the same.
        prefilled = request.prompt if len(sequence.tokens) > request.prompt else min(sequence.computed, request.prompt)
        return Progress(
            request.number, sequence.choice, tokens, told, finish, prefilled, sequence.reused, error, of_prompt
        )

    def _fail(self, sequence: Sequence, error: Exception, reports: list[Progress]) -> None:
        reports += self._reports_of_end(sequence, error=_explained(error))
        self._end(sequence, keep=False)

    def _reports_of_end(
        self, sequence: Sequence, finish: FinishReason | None = None, error: PunaError | None = None
    ) -> list[Progress]:
        """The end of a sequence, for each choice that it stands for."""
        report = self._report(sequence, finish=finish, error=error)
        request = sequence.request
        if request.forked:
            return [report]
        return [report._replace(choice=choice) for choice in range(request.choices) if choice not in request.unwanted]

    def _end(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Take a sequence out; `keep` what it computed in the prefix cache."""
        self._scheduler.remove(sequence, keep=keep)
        request = sequence.request
        request.live.remove(sequence)
        if not request.live:
            del self._requests[request.number]
            self._compiling.pop(request.number, None)

    # -- what outlives the engine ----------------------------------------------------------------------------------

    def kept(self, tokens: Ids[int], *, namespace: str = "") -> tuple[int, Iterator[bytes]]:
        """How many whole pages of a text's beginning the cache has, and what each holds. No step may come between."""
        pages = self._scheduler.kept(namespace, list(tokens))
        return len(pages), map(self._runner.read_page, pages)

    def restore(self, tokens: Ids[int], pages: Iterable[bytes | memoryview], *, namespace: str = "") -> int:
        """Put pages of an engine like this one back under the text they begin; returns the tokens that are there now.

        As many as there is room for, in order; what is used last is evicted for them. Raises what `pages` does, and
        ValueError for a page of another length; what came before it stays.
        """
        return self._scheduler.restore(namespace, list(tokens), pages, self._runner.write_page)

    # -- books -----------------------------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """The engine's counts."""
        scheduler = self._scheduler
        pool, cache = scheduler.pool, scheduler.cache
        return Statistics(
            pages_free=pool.free,
            pages_cached=len(cache.unused),
            pages_used=pool.count - pool.available - len(scheduler.reserved),
            pages_reserved=len(scheduler.reserved),
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            compiling=len(self._compiling),
            steps=self._steps,
            computed_tokens=self._computed,
            reused_tokens=scheduler.reused,
            made_tokens=self._made,
            guessed_tokens=self._guessed,
            right_guesses=self._right,
            preemptions=scheduler.preempted,
            evictions=cache.evicted,
            schedule_seconds=self._schedule_seconds,
            run_seconds=self._run_seconds,
            sample_seconds=self._sample_seconds,
        )

    def check(self) -> None:
        """Recompute the engine's books; raises AssertionError when they are wrong."""
        scheduler = self._scheduler
        scheduler.check()
        live = [sequence for request in self._requests.values() for sequence in request.live]
        compiling = [sequence for number in self._compiling for sequence in self._requests[number].live]
        reserved = sorted(page for adapter in self._adapters.values() for page in adapter.pages)
        assert reserved == sorted(scheduler.reserved), "an adapter's pages are lost"
        numbers = {adapter.number for adapter in self._adapters.values()}
        assert {request.adapter for request in self._requests.values()} <= {-1, *numbers}, "an adapter in use is gone"
        assert len(live) == len(scheduler.running) + scheduler.waiting + len(compiling), "a sequence is lost"
        assert all(sequence.request.live for sequence in scheduler.running), "a finished request runs"
        for sequence in live:
            limit = sequence.request.limit + (sequence.request.pooling is not None)  # nothing follows its prompt
            assert len(sequence.tokens) < limit, "a sequence is longer than it may be"
            assert sequence.wanted == NEVER or sequence.computed <= sequence.first, "a row that is wanted was passed"
            assert sequence.reused < sequence.request.prompt, "the prompt's last token was not computed"


def _draws(logits: Logits, tokens: Ids[int], top: int) -> tuple[Draw, ...]:
    """What the model gave each of `tokens`, and the `top` likeliest in its place. Raises LogitsError."""
    return tuple(Draw(known.token, known.logprob, known.top) for known in logprobs(logits, tokens, top))


def _explained(error: Exception, message: str = "") -> PunaError:
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
