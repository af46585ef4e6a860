"""Structured output: which tokens may come next, so that an answer has the form that was asked for.

What it is: `Grammars` compiles schemas, regular expressions, Lark grammars and lists of choices through llguidance, on
threads of its own, and keeps what it compiled; `Constraint` follows one answer through its grammar.
What it is not: a reader of text. It sees the bytes of each id; an id of no bytes (a special token, padding) is never
part of a grammar.
What is surprising:
- JSON is written in one way: `{"a": 1, "b": [2, 3]}`, as Python's json.dumps does, keys in the schema's order, no
  \\u escapes. That is how tool calls look in what models were trained on; it leaves nothing to choose between two
  values, so that most of a tool call's tokens are forced; and a key has one spelling, so none comes twice unnoticed.
- A compile that takes too long cannot be stopped. Its request is refused, its thread goes on until llguidance's own
  limits end it, and another thread takes its place; where too many are stuck so, further grammars are refused at once.
- Tokens are forced as the tokenizer would have cut the text, where it is given (`encode`): a model has not seen others.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from puna.engine.call_grammar import calls_lark
from puna.engine.ecma_regex import MAX_UNROLLED, literal, unrolled
from puna.engine.json_schema import MAX_PATTERNS_AT_ONCE, normalise
from puna.errors import GrammarError
from puna.types import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher

COMPILE_SECONDS = 5.0
"""How long a grammar may take; real ones take milliseconds."""

WORKERS = 2
"""How many grammars are compiled at a time."""

MAX_STUCK = 4
"""How many compiles may have outlived their time before further ones are refused."""

MAX_WAITING = 256
"""How many grammars may wait for their turn."""

CACHED = 64
"""How many compiled grammars are kept, the least recently used going first. One takes well under a megabyte; one made
to take much, some 20 MB."""

MAX_CHARACTERS = 64 << 10
"""How long a regular expression, a Lark grammar or a list of choices may be."""

MAX_NESTED = 40
"""How deep brackets of a Lark grammar may be nested: its parser goes down a level a bracket."""

_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    # What one step may take. llguidance's own limits let a hostile grammar hold up everybody's step for 0.3 s, and keep
    # a gigabyte; under these an answer ends with an error after 10 ms.
    "step_lexer_fuel": 100_000,
    "step_max_items": 10_000,
    "max_items_in_row": 500,
    "max_lexer_states": 10_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,  # they would carry the answer's text into a message
}
"""llguidance's limits (its ParserLimits)."""

_JSON_STYLE: dict[str, Any] = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "json_allowed_escapes": 'nrbtf\\"',
}

_LARK_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?![/*])(?:\\.|[^/\\\n])+/|//[^\n]*|/\*.*?\*/', re.DOTALL)
_LARK_REFUSED = (
    (re.compile(r"(%(?:json|llguidance|lark|regex))\b"), "is not supported; a JSON schema has a kind of its own"),
    (re.compile(r"<"), "would name special tokens, which are no text"),
    (
        re.compile(r"^\s*\w+\s*\[[^\]]*\b(max_tokens|temperature|stop|stop_capture|suffix|lazy)\b", re.M),
        "is not supported",
    ),
)


_UTF8_BYTES = (*range(0xC0), *range(0xC2, 0xF5))
"""The bytes that occur in UTF-8."""


class Constraint:
    """One answer's way through a grammar. Not thread-safe: it belongs to the thread that owns the sequence."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, width: int) -> None:
        """width: words of 32 bits that the matcher writes, at least what `vocab_size` ids need."""
        self._matcher = matcher
        self._words = -(-vocab_size // 32)
        self._width = width

    def mask(self) -> npt.NDArray[np.uint32]:
        """The ids that may come next: bit id % 32 of word id // 32, [ceil(V / 32)]. A new array at each call.

        A stop id is among them where the answer may end. Raises GrammarError where the grammar exceeds what a step
        may take; the answer cannot go on then.
        """
        words = np.empty(self._width, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()
        return words[: self._words]

    def accept(self, token: int) -> None:
        """A token became part of the answer.

        Raises GrammarError for one that the mask does not allow; the constraint is of no use afterwards.
        """
        if not self._matcher.consume_token(token):
            self._check()

    def valid(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, one after another, the grammar allows; nothing is accepted.

        A stop id counts where the answer may end, but for one that is `finished`: there nothing does.
        """
        return int(self._matcher.validate_tokens(list(tokens)))

    def forced(self) -> list[int]:
        """The ids that must come next, as far as only one is allowed at a time; often none. Nothing is accepted."""
        return self._matcher.compute_ff_tokens()

    def rollback(self, count: int) -> None:
        """Forget the last `count` accepted tokens. Raises GrammarError where fewer were accepted."""
        if count and not self._matcher.rollback(count):
            self._check()

    def copy(self) -> Constraint:
        """The same state, from which both go on by themselves."""
        return Constraint(self._matcher.deep_copy(), self._words * 32, self._width)

    @property
    def may_end(self) -> bool:
        """Whether the answer fulfils the grammar as it stands."""
        return self._matcher.is_accepting()

    @property
    def finished(self) -> bool:
        """Whether the answer fulfils the grammar and nothing but a stop id may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(
                f"The answer cannot go on in its grammar: {_first_line(self._matcher.get_error())}.",
                remedy="Simplify the grammar: fewer alternatives that begin the same way, smaller repetitions.",
            )


class Grammars:
    """The grammars of one vocabulary. May be shared by threads."""

    def __init__(
        self,
        vocabulary: Sequence[bytes],
        stop_ids: Iterable[int],
        vocab_size: int,
        *,
        encode: Callable[[str], Sequence[int]] | None = None,
        seconds: float = COMPILE_SECONDS,
        cached: int = CACHED,
    ) -> None:
        """vocabulary: the bytes of each id, none for a special token. vocab_size: the model's, which may be larger.

        stop_ids: the ids that end an answer; whatever their bytes, they are part of no grammar. encode: how the
        tokenizer cuts a text that goes on after another; without it, or where its ids do not spell the text, the
        longest token is taken each time.
        """
        import llguidance

        self._library = llguidance
        self._vocab_size = vocab_size
        self._seconds = seconds
        self._cached = cached
        stops = sorted({i for i in stop_ids if 0 <= i < vocab_size})
        tokens = [*vocabulary[:vocab_size], *(b"" for _ in range(vocab_size - len(vocabulary)))]
        for i in stops:
            tokens[i] = b""
        if not stops:  # llguidance asks for one: an id beyond the vocabulary, cut off each mask
            stops = [vocab_size]
            tokens.append(b"")
        described: Any = _Tokens(tokens, stops[0], encode)  # it reads attributes, of whatever class
        self._tokenizer = llguidance.LLTokenizer(described, eos_token=stops)
        self._width = -(-len(tokens) // 32)
        # A forced text that no tokens spell is left out by llguidance, and the answer goes on behind it.
        single = {token for token in tokens if len(token) == 1}
        self._missing = [byte for byte in _UTF8_BYTES if bytes([byte]) not in single]
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()
        self._queue: deque[tuple[Grammar, Future[LLMatcher]]] = deque()
        self._running = 0
        self._stuck = 0

    def check(self, spec: Grammar) -> None:
        """Refuse, without compiling, what can be told from the text alone. Raises GrammarError with the reason."""
        self._source(spec)

    def compile(self, spec: Grammar) -> Future[Constraint]:
        """A constraint at its beginning, soon. Its errors are GrammarErrors; cancelling it has no effect on others."""
        answer: Future[Constraint] = Future()
        with self._lock:
            matcher = self._compiled.get(spec)
            if matcher is not None:
                self._compiled.move_to_end(spec)
            elif self._stuck >= MAX_STUCK or len(self._queue) >= MAX_WAITING:
                busy = f"{self._stuck} took too long and still run, {len(self._queue)} wait"
                answer.set_exception(
                    GrammarError(f"No grammar can be compiled now: {busy}.", remedy="Try again in a few seconds.")
                )
                return answer
            else:
                matcher = self._compiled[spec] = Future()
                if len(self._compiled) > self._cached:
                    self._compiled.popitem(last=False)
                self._queue.append((spec, matcher))
        matcher.add_done_callback(lambda done: self._hand_out(done, answer))
        self._start_next()
        return answer

    def _hand_out(self, matcher: Future[LLMatcher], answer: Future[Constraint]) -> None:
        if not answer.set_running_or_notify_cancel():
            return
        error = matcher.exception()
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(Constraint(matcher.result().deep_copy(), self._vocab_size, self._width))

    def _start_next(self) -> None:
        with self._lock:
            if self._running >= WORKERS or not self._queue:
                return
            self._running += 1
            job = _Job(self, *self._queue.popleft())
        job.start()

    def _ended(self, job: _Job, *, late: bool) -> None:
        """A job came to its end (late: after it had been given up)."""
        with self._lock:
            if late:
                self._stuck -= 1
            else:
                self._running -= 1
        self._start_next()

    def _given_up(self, job: _Job) -> None:
        with self._lock:
            self._running -= 1
            self._stuck += 1
            # Another time the machine may be less busy.
            if self._compiled.get(job.spec) is job.future:
                del self._compiled[job.spec]
        self._start_next()

    def _source(self, spec: Grammar) -> str:
        if self._missing:
            raise GrammarError(
                f"The vocabulary has no token for the byte {self._missing[0]:#04x}, so it cannot spell every text.",
                remedy="Structured output needs a tokenizer with a token for every byte; Llama's have one.",
            )
        return _source(spec, self._library)

    def _build(self, spec: Grammar) -> LLMatcher:
        """Compile, here and now."""
        source = self._source(spec)
        matcher = self._library.LLMatcher(
            self._tokenizer, source, log_level=0, limits=self._library.LLParserLimits(**_LIMITS)
        )
        problems = [matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings()
        if problems:
            raise GrammarError(
                f"The {spec.kind.replace('_', ' ')} cannot be honoured: {_reason(problems[0])}.",
                remedy="docs/guides/structured-output.md lists what is honoured.",
            )
        # The first mask is computed here too: it is by far the dearest, and what it exceeds shows before the answer.
        constraint = Constraint(matcher.deep_copy(), self._vocab_size, self._width)
        constraint.mask()
        constraint.forced()
        return matcher


class _Job:
    """One compile on a thread of its own, given up after its time."""

    def __init__(self, owner: Grammars, spec: Grammar, future: Future[LLMatcher]) -> None:
        self.spec, self.future = spec, future
        self._owner = owner
        self._lock = threading.Lock()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="puna-grammar", daemon=True)
        self._timer = threading.Timer(owner._seconds, self._give_up)
        self._timer.daemon = True

    def start(self) -> None:
        self._timer.start()
        self._thread.start()

    def _claim(self) -> bool:
        """Whether the one who asks is the first: the result and the end of the time both want the future."""
        with self._lock:
            first, self._over = not self._over, True
        return first

    def _run(self) -> None:
        error: GrammarError | None = None
        matcher = None
        try:
            matcher = self._owner._build(self.spec)
        except GrammarError as refused:
            error = refused
        except BaseException as fault:  # Rust panics reach Python as a BaseException of no importable type
            error = GrammarError(
                f"The {self.spec.kind.replace('_', ' ')} could not be compiled: {_first_line(str(fault))}.",
                remedy="Simplify it; docs/guides/structured-output.md lists what is honoured.",
            )
            error.__cause__ = fault
        first = self._claim()
        self._timer.cancel()
        self._owner._ended(self, late=not first)
        if not first:
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(matcher)  # type: ignore[arg-type]

    def _give_up(self) -> None:
        if not self._claim():
            return
        self._owner._given_up(self)
        self.future.set_exception(
            GrammarError(
                f"The {self.spec.kind.replace('_', ' ')} took more than {self._owner._seconds:g} s to compile.",
                remedy="Simplify it: smaller repetitions, fewer alternatives, fewer nested expressions.",
            )
        )


class _Tokens:
    """The vocabulary as llguidance's LLTokenizer asks for it."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()  # they have no bytes, so no grammar names them either

    def __init__(self, tokens: list[bytes], eos: int, encode: Callable[[str], Sequence[int]] | None) -> None:
        self.tokens = tokens
        self.eos_token_id = eos
        self._encode = encode
        self._ids = {token: i for i, token in reversed([*enumerate(tokens)]) if token}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        data = text.encode()
        if self._encode is not None:
            ids = list(self._encode(text))
            if b"".join(self.tokens[i] for i in ids) == data:
                return ids
        ids = []
        at = 0
        while at < len(data):
            sizes = range(min(self._longest, len(data) - at), 0, -1)
            size = next(n for n in sizes if data[at : at + n] in self._ids)  # every byte is a token
            ids.append(self._ids[data[at : at + size]])
            at += size
        return ids


def _source(spec: Grammar, library: Any) -> str:
    """The grammar in llguidance's words. Raises GrammarError for what can be refused by its text."""
    if spec.kind == "json_object":
        return str(library.LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_JSON_STYLE))
    if spec.kind == "json_schema":
        schema = normalise(spec.text)
        # llguidance takes options with an object only: true is {}.
        return str(library.LLMatcher.grammar_from_json_schema({} if schema is True else schema, overrides=_JSON_STYLE))
    if spec.kind == "pythonic":
        return str(library.LLMatcher.grammar_from_lark(calls_lark(spec.text, _JSON_STYLE)))
    if len(spec.text) > MAX_CHARACTERS:
        raise GrammarError(
            f"The {spec.kind} has {len(spec.text):,} characters, more than the {MAX_CHARACTERS:,} that are read.",
            remedy="Shorten it.",
        )
    try:
        spec.text.encode()
    except UnicodeEncodeError as error:
        raise GrammarError(f"The {spec.kind} holds half of a character.", remedy="Give valid Unicode.") from error
    if spec.kind == "choice":
        return str(library.LLMatcher.grammar_from_regex("|".join(map(literal, _choices(spec.text)))))
    if spec.kind == "regex":
        _check_expression(spec.text)
        return str(library.LLMatcher.grammar_from_regex(spec.text))
    for quoted in _LARK_QUOTED.findall(spec.text):
        if quoted[0] == "/" and quoted[1] not in "/*":
            _check_expression(quoted[1:-1])
    bare = _LARK_QUOTED.sub(" ", spec.text)
    _check_nesting(bare, spec.text)
    for pattern, why in _LARK_REFUSED:
        found = pattern.search(bare)
        if found:
            raise GrammarError(
                f"The Lark grammar cannot be honoured: {found.group(found.lastindex or 0)} {why}.",
                remedy="docs/guides/structured-output.md lists what is honoured.",
            )
    if sum(map(bare.count, "&~")) > MAX_PATTERNS_AT_ONCE:
        raise GrammarError(
            f"The Lark grammar has more than {MAX_PATTERNS_AT_ONCE} operators & and ~.",
            remedy="Use alternatives instead.",
        )
    return str(library.LLMatcher.grammar_from_lark(spec.text))


def _choices(text: str) -> list[str]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"The choices are no JSON list: {error!s:.100}.", remedy='Give ["yes", "no"].') from error
    if not isinstance(found, list) or not found or not all(isinstance(item, str) and item for item in found):
        raise GrammarError("The choices are no list of strings with something in them.", remedy='Give ["yes", "no"].')
    return found


def _check_expression(expression: str) -> None:
    _check_nesting(expression, expression)
    if unrolled(expression) > MAX_UNROLLED + len(expression):
        raise GrammarError(
            f"The repetitions of {expression[:40]!r} come to more than {MAX_UNROLLED:,} characters.",
            remedy="Repeat less, or without a bound (*, +).",
        )


def _check_nesting(bare: str, text: str) -> None:
    depth = most = 0
    for character in bare:
        depth += (character in "([{") - (character in ")]}")
        most = max(most, depth)
    if most > MAX_NESTED:
        raise GrammarError(
            f"Brackets are nested {most} deep, more than {MAX_NESTED}, in {text[:40]!r}.", remedy="Use rules instead."
        )


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    return (lines[0] if lines else "it gives no reason").rstrip(".")[:300]


def _reason(message: str) -> str:
    if "oneOf constraints are not supported" in message:
        return "the branches of a oneOf may hold of the same value; make them differ in a const or a type, or use anyOf"
    lines = " ".join(line.strip() for line in message.strip().splitlines() if line.strip())
    return lines.rstrip(".")[:300]
