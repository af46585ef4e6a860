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
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import starmap
from typing import NamedTuple

from puna.engine import scores
from puna.engine.adapters import Pairs
from puna.engine.loaded import LoadedAdapters
from puna.engine.pictures import SIGHT_BYTES, Shown, Sights, check_pictures, words
from puna.engine.prefix import NO_PAGE
from puna.engine.progress import Progress, Statistics, explained
from puna.engine.runner import Hidden, Logits, Runner, window
from puna.engine.sampler import Draw, LogitsError, Sampler, check_tokens
from puna.engine.scheduler import Bytes, Part, Scheduler
from puna.engine.sequence import NEVER, Constraint, Request, Sequence
from puna.engine.speculation import Drafts, Proposer, StepCost, Together, Wanted
from puna.engine.turns import Turn, draw
from puna.errors import ContextError, PunaError, QueueFullError, UsageError
from puna.models.tree import Placed
from puna.types import FinishReason, Pooling, Sampling

__all__ = ["LOGITS_BYTES", "PREFILL_CHUNK", "SPARE_DEADLINES", "Engine", "Progress", "Statistics"]

PREFILL_CHUNK = 512
"""Tokens a step computes at most: it bounds the memory of activations, and how long every other stream waits."""

LOGITS_BYTES = 64 << 20
"""Bytes of logits a step makes at most for tokens that are not drawn, where a prompt's or a given answer's are asked
for: a row of 128,256 words takes half a megabyte."""

SPARE_DEADLINES = 64
"""How many deadlines of requests that are over may be kept, beside one for each that is not."""


class Kept(NamedTuple):
    """What a cache has of a text: whole pages, what each holds, and how many of the last ones hold a local page too."""

    pages: int
    contents: Iterator[bytes]
    local_pages: int


class Engine:
    """Runs requests on a runner. Not thread-safe: one thread owns it.

    `pages` of KV cache are shared by all; layers that see one chunk only, where there are any, have `local_pages` of
    their own (None: as many). `step_tokens` bounds what a step computes, beyond one token of each answer under way, of
    which there are `max_running`; `max_waiting` requests may wait for that; `logits_bytes` bounds the
    logits of tokens that are not drawn (one row at least), `sight_bytes` what is kept of pictures beyond what one
    request needs. `speculate` makes a proposer for each sequence. `clock` is
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
        sight_bytes: int = SIGHT_BYTES,
        prefix_cache: bool = True,
        speculate: Callable[[], Proposer] | Together | None = None,
        clock: Callable[[], float] = time.monotonic,
        local_pages: int | None = None,
    ) -> None:
        chunk = runner.config.chunk if runner.config.local_layers else 0
        local = 0 if not chunk else pages if local_pages is None else local_pages
        numbers = {"pages": pages, "step_tokens": step_tokens, "max_running": max_running}
        for name, value in (numbers | {"local_pages": local} if chunk else numbers).items():
            if value < 1:
                raise UsageError(f"{name} must be a whole number, 1 or larger, not {value}.", remedy="Raise it.")
        runner.allocate(pages, local)
        self._runner = runner
        self._max_waiting = max_waiting
        self._speculate = speculate
        self._together = speculate if isinstance(speculate, Together) else None
        self._clock = clock
        self._longest = runner.config.context_length
        if local < window(runner.config, runner.page):
            self._longest = min(self._longest, local * runner.page)
        self.capacity = min(self._longest, pages * runner.page)
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
            chunk=chunk,
            local_pages=local,
            copy_local=partial(runner.copy_page, local=True),
            has_room=self._has_room,
        )
        self._sights = Sights(sight_bytes)
        self._adapters = LoadedAdapters(runner, self._scheduler)
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
        pictures: Ids[Shown] = (),
    ) -> int:
        """Have a request wait for its turn; returns its number, by which `step` reports it.

        Only requests of the same `namespace` share what was computed. The larger `priority` goes first. At `deadline`
        it ends, wherever it is. `adapter` is the name of one that is loaded. A constraint that is not ready holds up
        nobody else; an error in it ends the request. Beside one, stop tokens wait for `min_tokens` as long as it allows
        others; where it does not, the request ends with NothingLeftError. `pictures` stand in the prompt; for penalties
        and DRY their tokens are not there, and a draft model, which does not see them, makes no guesses.
        Raises what `check_prompt` does, UsageError for `ignore_eos` beside a constraint and for pictures that the model
        or another option has no place for, AdapterError for an unknown adapter, and QueueFullError when `max_waiting`
        wait already.
        """
        self.check_prompt(prompt, answer=sampling.max_tokens or 1, pictures=pictures)
        if pictures:
            self._check_pictures(pictures, sampling, adapter)
        check_tokens(sampling, self._runner.config.vocab_size)
        if constraint is not None and sampling.ignore_eos:
            raise UsageError(
                "ignore_eos cannot be honoured beside a grammar: an answer that fulfils its grammar has to end.",
                remedy="Leave one of them out; min_tokens keeps the end away for a while.",
            )
        limit = self.capacity if sampling.max_tokens is None else len(prompt) + sampling.max_tokens
        # A tokenizer may have more ids than the model: those never come, and have no logit to bar.
        stop_ids = frozenset(token for token in stop_ids if 0 <= token < self._runner.config.vocab_size)
        ends = frozenset[int]() if sampling.ignore_eos else stop_ids
        number, space, _, which = self._whose(adapter, namespace, priority)
        request = Request(number, len(prompt), sampling, ends, space, priority, limit, which, pictures=tuple(pictures))
        ready = None if isinstance(constraint, Future) else constraint
        sampler = Sampler(sampling, words(prompt, pictures), stop_ids)
        sequence = Sequence(request, 0, list(prompt), sampler, ready, self._drafts(request))
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
        scores.check_continuations(continuations)
        self.check_prompt(prompt, answer=max(map(len, continuations)))
        for given in continuations:
            self.check_prompt(given, answer=0)
        return self._enter(scores.scored(prompt, continuations, self._whose(adapter, namespace, priority)), deadline)

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
        scores.check_pooling(pooling)
        self.check_prompt(prompt, answer=0)
        return self._enter(scores.embedded(prompt, pooling, self._whose(adapter, namespace, priority)), deadline)

    def _whose(self, adapter: str | None, namespace: str, priority: int) -> scores.Whose:
        """What a request says of itself. Raises AdapterError and QueueFullError."""
        number, space = self._adapters.find(adapter, namespace)
        return scores.Whose(self._number(), space, priority, number)

    def _number(self) -> int:
        """The next request's. Raises QueueFullError when too many wait already."""
        if self._scheduler.waiting + len(self._compiling) >= self._max_waiting:
            raise QueueFullError(
                f"{self._max_waiting} requests are waiting already.", remedy="Try again when some have been answered."
            )
        self._submitted += 1
        return self._submitted

    def _enter(self, sequence: Sequence, deadline: float | None, constraint: Future[Constraint] | None = None) -> int:
        request = sequence.request
        request.live.append(sequence)
        self._requests[request.number] = request
        if deadline is not None:
            heappush(self._deadlines, (deadline, request.number))
            if len(self._deadlines) > 2 * len(self._requests) + SPARE_DEADLINES:  # most are of requests that are over
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._requests]
                heapify(self._deadlines)
        if constraint is None:
            self._scheduler.add(sequence)
        else:
            self._compiling[request.number] = constraint
        return request.number

    def check_prompt(self, prompt: Ids[int], *, answer: int, pictures: Ids[Shown] = ()) -> None:
        """Raise what is wrong with a prompt that is to be followed by `answer` tokens.

        ContextError when they exceed the model's context or the whole cache, UsageError for an empty prompt, an id
        outside the vocabulary that is no picture's, or pictures that do not stand in the prompt.
        """
        config = self._runner.config
        if not prompt:
            raise UsageError("The prompt has no tokens.", remedy="Give some text; a model without BOS needs a start.")
        check_pictures(pictures, len(prompt))
        said = words(prompt, pictures)
        if min(said, default=0) < 0 or max(said, default=0) >= config.vocab_size:
            token = next(token for token in said if not 0 <= token < config.vocab_size)
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

    def _check_pictures(self, pictures: Ids[Shown], sampling: Sampling, adapter: str | None) -> None:
        """Raises UsageError where a request's pictures cannot be honoured."""
        why = ""
        if not self._runner.sees:
            why = "this model does not see"
        elif adapter is not None:
            why = "an adapter would have to see them its own way"
        elif sampling.prompt_logprobs is not None:
            why = "their tokens have no probability, which prompt_logprobs asks for"
        if why:
            raise UsageError(f"Pictures cannot be honoured: {why}.", remedy="Leave one of them out.")
        sizes = {each.digest: self._runner.sight_bytes(each.pixels) for each in pictures}
        if len(sizes) > 1 and sum(sizes.values()) > self._sights.budget:
            raise UsageError(
                f"What is seen in the request's {len(sizes)} pictures takes {sum(sizes.values()) / 1e6:,.0f} MB, and "
                f"there is room for {self._sights.budget / 1e6:,.0f} MB.",
                remedy="Send fewer pictures at once.",
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

    @property
    def blocked(self) -> bool:
        """Whether all there is to do waits for grammars that are not ready."""
        return 0 < len(self._compiling) == len(self._requests) and not any(
            future.done() for future in self._compiling.values()
        )

    @property
    def seconds_left(self) -> float | None:
        """Until the next deadline, which may be that of a request that is over; None where there is none."""
        return max(self._deadlines[0][0] - self._clock(), 0.0) if self._deadlines else None

    # -- adapters --------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of those that are loaded."""
        return self._adapters.names

    def load_adapter(self, name: str, pairs: Pairs, nbytes: int) -> None:
        """Have requests name an adapter. Its `nbytes` are taken from the KV cache's memory while it is loaded.

        So many pages stay empty, and requests under way that need them start over; `capacity` may become less. Raises
        AdapterError for a name that is taken, and where the pages left do not hold what one request may come to.
        """
        longest = max((request.limit for request in self._requests.values()), default=0)
        self._adapters.load(name, pairs, nbytes, longest)
        self._measure()

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; its pages are the cache's again. Raises AdapterError while a request uses or awaits it."""
        self._adapters.unload(name, [request.adapter for request in self._requests.values()])
        self._measure()

    def _measure(self) -> None:
        self.capacity = min(self._longest, self._adapters.pages_left * self._runner.page)

    # -- a step ----------------------------------------------------------------------------------------------------

    def step(self) -> list[Progress]:
        """Compute the next piece of everybody's work, and say what became of each. Empty where nothing could run.

        An error ends the requests it concerns, in their Progress; the engine goes on.
        """
        began = time.perf_counter()
        reports: list[Progress] = []
        self._expire(reports)
        self._collect_constraints(reports)
        self._sights.trim(self._needed_sights)
        # Until there is a batch the books of everybody who runs are at work; after that only pages of those in it are
        # written, of which nobody knows which are whole, or whose row was at fault.
        concerned = self._scheduler.running
        try:
            if self._together is not None:
                self._guess_together(self._together)
            parts = self._scheduler.plan(None if self._speculate is None else self._guess)
            parts = self._look(parts, reports)
            if not parts:
                return reports
            batch = self._scheduler.batch(parts)
            if any(part.sequence.request.pictures for part in parts):
                batch = batch._replace(placed=self._placed(parts))
            concerned = [part.sequence for part in parts]
            planned = time.perf_counter()
            pooling = parts[0].sequence.request.pooling is not None
            rows = self._runner.hidden(batch) if pooling else self._runner.run(batch)
        except Exception as error:  # reported to each of the requests that it may concern
            for sequence in list(concerned):
                self._fail(sequence, error, reports)
            return reports
        ran = time.perf_counter()
        if pooling:
            self._pool_all(parts, rows, reports)
        else:
            self._draw_all(parts, rows, reports)
            self._cost.add(len(batch.tokens), ran - planned)
        self._sights.trim(self._needed_sights)
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

    # -- pictures --------------------------------------------------------------------------------------------------

    def _look(self, parts: list[Part], reports: list[Progress]) -> list[Part]:
        """See what the parts are computed with; the parts that can be computed now.

        One picture a step is looked at, for everybody's next tokens wait for it; parts that need another wait.
        """
        if not any(part.sequence.request.pictures for part in parts):
            return parts
        ready: list[Part] = []
        looked = False
        for part in parts:
            sequence, waits = part.sequence, False
            try:
                for shown in sequence.shown(part.start, part.start + part.length):
                    key = _sight_key(sequence, shown)
                    if key in self._sights:
                        continue
                    waits = looked
                    if waits:
                        break
                    sight, nbytes = self._runner.see(shown.pixels), self._runner.sight_bytes(shown.pixels)
                    self._sights.add(key, sight, nbytes)
                    self._sights.trim(self._needed_sights)
                    looked = True
            except Exception as error:  # the others do not pay for one picture
                self._fail(sequence, error, reports)
                continue
            if waits:
                self._scheduler.trim(sequence)
            else:
                ready.append(part)
        return ready

    def _placed(self, parts: list[Part]) -> tuple[Placed, ...]:
        """What was seen, for the rows of a step."""
        return tuple(
            placed
            for row, (sequence, start, length, guesses) in enumerate(parts)
            for shown in sequence.shown(start, start + length + len(guesses))
            for placed in shown.placed(
                row, self._sights[_sight_key(sequence, shown)], start, start + length + len(guesses)
            )
        )

    def _needed_sights(self) -> set[Hashable]:
        """Those that running sequences are computed with from here on."""
        return {_sight_key(each, shown) for each in self._scheduler.running for shown in each.shown_still}

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether what a sequence sees has room beside what those that run do; alone it has."""
        if not sequence.request.pictures:
            return True
        running = [each for each in self._scheduler.running if each.shown_still]
        if not running:
            return True
        sizes = {
            _sight_key(each, shown): self._runner.sight_bytes(shown.pixels)
            for each in (*running, sequence)
            for shown in each.request.pictures
        }
        return sum(sizes.values()) <= self._sights.budget

    # -- guesses ---------------------------------------------------------------------------------------------------

    def _guess(self, sequence: Sequence, most: int, decoding: int) -> list[int]:
        guesses = sequence.guess(most, self._price(decoding))
        if sequence.request.pictures:  # prompt lookup may come upon the tokens of a picture, which are no words
            for i, token in enumerate(guesses):
                if token >= self._runner.config.vocab_size:
                    return guesses[:i]
        return guesses

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
        turns: list[Turn] = []
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
                    scores.read_prompt(sequence, first, seen)
            except LogitsError as error:
                self._fail(sequence, explained(error, f"After {first + error.row + 1} tokens {error}."), reports)
                continue
            if sequence.computed < len(sequence.tokens):
                reports.append(self._report(sequence))
                continue
            row -= 1
            turns.append(Turn(sequence, row, guesses))
            if len(sequence.tokens) == sequence.request.prompt:
                turns += [Turn(twin, row, []) for twin in self._fork(sequence)]
            row += 1 + len(guesses)
        draw(turns, logits)
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

    def _score(self, sequence: Sequence, first: int, logits: Logits, reports: list[Progress]) -> None:
        """Tell how likely the tokens of given answers are, given the logits after the tokens from `first` on."""
        request = sequence.request
        if not len(logits):
            reports.append(self._report(sequence))
            return
        forks = len(sequence.tokens) == request.prompt  # the same logits are for each answer's first token
        choices = range(request.choices) if forks else (sequence.choice,)
        told = [scores.score(sequence, choice, first, logits) for choice in choices]
        going = [sequence, *(self._fork(sequence) if forks else ())]
        for each, (draws, last) in zip(going, told, strict=True):
            if forks:
                each.tokens += request.continuations[each.choice][:-1]
            each.wanted = first + len(logits)
            reports.append(self._report(each, draws=draws, finish="length" if last else None))
            if last:
                self._end(each)

    def _pool_all(self, parts: list[Part], hidden: Hidden, reports: list[Progress]) -> None:
        """Add the hidden states to what each sequence has seen, and report the embeddings that are whole."""
        row = 0
        for sequence, start, length, _ in parts:
            end = start + length
            seen = hidden[row : row + max(end - max(start, sequence.first), 0)]
            row += len(seen)
            sequence.computed = end
            self._scheduler.commit(sequence)
            try:
                vector = scores.pool(sequence, end, seen)
            except FloatingPointError as error:
                self._fail(sequence, explained(error, f"After {end} tokens {error}."), reports)
                continue
            if vector is None:
                reports.append(self._report(sequence))
                continue
            reports.append(self._report(sequence, finish="length")._replace(embedding=vector))
            self._end(sequence)

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        """The other choices, at the moment when the prompt is computed and nothing is drawn."""
        sampling, stop_ids = sequence.request.sampling, sequence.request.stop_ids
        sequence.request.forked = True
        twins = []
        for choice in range(1, sequence.request.choices):
            sampler = Sampler(sampling, words(sequence.tokens, sequence.request.pictures), stop_ids, choice)
            drafts = self._drafts(sequence.request) if sequence.drafts else None
            twins.append(sequence.fork(choice, sampler, drafts))
            self._scheduler.add_fork(sequence, twins[-1])
        return twins

    def _drafts(self, request: Request) -> Drafts | None:
        if self._speculate is None or (request.pictures and self._together is not None):
            return None
        return Drafts(self._speculate())

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
        reports += self._reports_of_end(sequence, error=explained(error))
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

    def kept(self, tokens: Ids[int], *, namespace: str = "") -> Kept:
        """How many whole pages of a text's beginning the cache has, and what each holds. No step may come between.

        Where layers see one chunk only, the last of them have their local page's content after their own.
        """
        pages = self._scheduler.kept(namespace, list(tokens))
        return Kept(len(pages), starmap(self._read, pages), sum(local != NO_PAGE for _, local in pages))

    def _read(self, page: int, local: int) -> bytes:
        data = self._runner.read_page(page)
        return data if local == NO_PAGE else data + self._runner.read_page(local, local=True)

    def restore(self, tokens: Ids[int], pages: Iterable[bytes | memoryview], *, namespace: str = "") -> int:
        """Put pages of an engine like this one back under the text they begin; returns the tokens that are there now.

        As many as there is room for, in order; what is used last is evicted for them. Raises what `pages` does, and
        ValueError for a page of another length; what came before it stays.
        """
        size = self._runner.page_bytes
        whole = self._scheduler.windows is None  # then what is longer is refused

        def parts(data: Bytes) -> tuple[Bytes, Bytes | None]:
            return (data, None) if whole or len(data) <= size else (data[:size], data[size:])

        write_local = partial(self._runner.write_page, local=True)
        contents = map(parts, pages)
        return self._scheduler.restore(namespace, list(tokens), contents, self._runner.write_page, write_local)

    # -- books -----------------------------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """The engine's counts."""
        scheduler = self._scheduler
        pool, cache = scheduler.pool, scheduler.cache
        local = scheduler.windows.pool if scheduler.windows else None
        return Statistics(
            pages_free=pool.free,
            pages_cached=len(cache.unused),
            pages_used=pool.count - pool.available - len(scheduler.reserved),
            pages_reserved=len(scheduler.reserved),
            local_pages_free=local.free if local else 0,
            local_pages_cached=len(local.unused) if local else 0,
            local_pages_used=local.count - local.available if local else 0,
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
        self._adapters.check({request.adapter for request in self._requests.values()})
        assert len(live) == len(scheduler.running) + scheduler.waiting + len(compiling), "a sequence is lost"
        assert all(sequence.request.live for sequence in scheduler.running), "a finished request runs"
        for sequence in live:
            limit = sequence.request.limit + (sequence.request.pooling is not None)  # nothing follows its prompt
            assert len(sequence.tokens) < limit, "a sequence is longer than it may be"
            assert sequence.wanted == NEVER or sequence.computed <= sequence.first, "a row that is wanted was passed"
            assert sequence.reused < sequence.request.prompt, "the prompt's last token was not computed"
        self._sights.check()
        for sequence in scheduler.running:
            if sequence.computed >= sequence.goal:  # before, the next part is looked at first
                for shown in sequence.shown_still:
                    assert _sight_key(sequence, shown) in self._sights, "a picture that an answer needs was forgotten"


def _sight_key(sequence: Sequence, shown: Shown) -> Hashable:
    return sequence.request.namespace, shown.digest
