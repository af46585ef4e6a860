"""Plain data that crosses rooms: what a request asks of a model, and what comes back.

What it is: frozen records of Python numbers and strings.
What it is not: a place for arrays or behaviour; rows below this one import it, it imports nothing but the errors.
What is surprising: `Sampling` refuses values when it is made, so no later room checks them again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Literal, Protocol, TypedDict, get_args, runtime_checkable

from puna.errors import ChatFormatError, UsageError

FinishReason = Literal["stop", "length", "context", "cancelled", "deadline", "filtered"]
"""Why an answer ended: the model said stop (or a stop string came), max_tokens were made, the model's context is full,
the caller asked for an end, the time that it gave was over, or a guard kept the answer back."""

DTYPES = ("auto", "fp32", "bf16", "fp16")
"""What `--dtype` takes: the weights as stored, or converted on load."""

TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K",
)  # fmt: skip
"""The types that a model can be written in, as GGUF's users call them, largest first."""

QUANTS = TYPES[3:]
"""The packed ones, which `--quant` takes."""

Pooling = Literal["mean", "last", "cls"]
"""How the hidden states of a text become one vector: their mean, the last token's, or the first one's."""

KERNELS = ("auto", "reference", "scalar", "avx2", "avx512", "neon")
"""What `--kernels` takes: the fastest available, the NumPy reference, or one instruction set of the C++."""


KV_TYPES = ("auto", "fp32", "bf16", "fp16", "q8_0")
"""What `--kv-type` takes: how the cache keeps keys and values. auto is fp32 where all matrices are, else fp16."""

MOST_STOPS, LONGEST_STOP = 64, 4096
"""Stop strings at most, and characters of one: each is looked for after every piece of an answer."""

MOST_IDS = 1 << 14
"""Token ids that a request may bias, ban or name as DRY's breakers at most: a step goes over them for each answer."""

MOST_CHOICES = 128
"""Answers to one prompt at most, as in OpenAI's API: each is a sequence of the engine's."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to end.

    temperature 0 takes the largest logit; top_k 0, top_p 1 and min_p 0 switch those filters off, and so does every
    other field's default; seed None draws one; max_tokens None goes on until the model stops or its context is full;
    `stop` strings are not part of the answer. What each field does, and in which order, is said in
    `puna.engine.samplers.definitions`.

    Tokens are ids here: who has the text turns words to `logit_bias`, `banned_tokens` and `dry_sequence_breakers`.
    `logit_bias` is (token, what is added to its logit) for each token once. A range of 0 looks back to the beginning.
    `logprobs` asks for each token's logarithm of probability and those of so many of the likeliest (0: its own only),
    `prompt_logprobs` for the same of the prompt's. `n` answers are given, the best of `best_of`. Mirostat takes the
    place of the filters that cut the unlikely off, so they must be off. Raises UsageError for a value out of range.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat_tau: float = 0.0
    mirostat_eta: float = 0.1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_range: int = 0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int = 0
    dry_sequence_breakers: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned_tokens: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    best_of: int | None = None

    def __post_init__(self) -> None:
        def need(fits: bool, name: str, what: str) -> None:
            if not fits:
                raise UsageError(
                    f"{name} must be {what}, not {getattr(self, name)!r:.80}.",
                    remedy=f"Leave it out for the default, {type(self).__dataclass_fields__[name].default!r}.",
                )

        def number(value: object) -> bool:  # NumPy's count, True does not
            return isinstance(value, Real) and not isinstance(value, bool)

        def bounded(values: Sequence[object], most: int, name: str, what: str) -> None:
            if len(values) > most:
                raise UsageError(
                    f"{name} has {len(values)} {what}, and {most} at most are looked after.", remedy="Give fewer."
                )

        def whole(value: object) -> bool:
            return isinstance(value, Integral) and not isinstance(value, bool)

        # Many requests are computed in one array of doubles: a fraction, or a number that none holds, would break all.
        for name, about in type(self).__dataclass_fields__.items():
            if isinstance(about.default, float) and number(value := getattr(self, name)):
                need(abs(value) <= sys.float_info.max or value != value, name, "a number that a double holds")
                object.__setattr__(self, name, float(value))

        need(number(self.temperature) and 0 <= self.temperature < math.inf, "temperature", "a number, 0 or larger")
        need(number(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1")
        need(whole(self.top_k) and 0 <= self.top_k < 1 << 31, "top_k", "a whole number from 0 (off) to 2^31 - 1")
        need(number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "a number between 0 and 1")
        need(number(self.typical_p) and 0 < self.typical_p <= 1, "typical_p", "a number above 0 and at most 1")
        for name in ("top_n_sigma", "mirostat_tau", "dry_multiplier"):
            value = getattr(self, name)
            need(number(value) and 0 <= value < math.inf, name, "a number, 0 (off) or larger")
        for name in ("xtc_probability", "xtc_threshold"):
            need(number(getattr(self, name)) and 0 <= getattr(self, name) <= 1, name, "a number between 0 and 1")
        need(number(self.mirostat_eta) and 0 < self.mirostat_eta <= 1, "mirostat_eta", "a number above 0 and at most 1")
        need(
            number(self.repetition_penalty) and 0 < self.repetition_penalty <= 100,
            "repetition_penalty",
            "a number above 0 and at most 100",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            need(number(getattr(self, name)) and -100 <= getattr(self, name) <= 100, name, "between -100 and 100")
        need(number(self.dry_base) and 1 <= self.dry_base < math.inf, "dry_base", "a number, 1 or larger")
        length = self.dry_allowed_length
        need(whole(length) and length >= 1, "dry_allowed_length", "a whole number, 1 or larger")
        for name in ("penalty_range", "dry_range"):
            value = getattr(self, name)
            need(whole(value) and value >= 0, name, "a whole number, 0 (no limit) or larger")
        for name in ("dry_sequence_breakers", "banned_tokens"):
            ids = getattr(self, name)
            fits = isinstance(ids, tuple | list) and all(whole(each) and each >= 0 for each in ids)
            need(fits, name, "a tuple of token ids")
            bounded(ids, MOST_IDS, name, "tokens")
        pairs = self.logit_bias
        fits = isinstance(pairs, tuple | list) and all(
            isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs
        )
        fits = fits and all(whole(token) and token >= 0 for token, _ in pairs)
        fits = fits and all(number(amount) and -100 <= amount <= 100 for _, amount in pairs)
        fits = fits and len({token for token, _ in pairs}) == len(pairs)
        need(fits, "logit_bias", "pairs of a token id, each once, and a number between -100 and 100")
        bounded(pairs, MOST_IDS, "logit_bias", "tokens")
        seed, most = self.seed, self.max_tokens
        least = whole(self.min_tokens) and self.min_tokens >= 0
        need(least, "min_tokens", "a whole number, 0 or larger")
        need(isinstance(self.ignore_eos, bool), "ignore_eos", "True or False")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            need(value is None or (whole(value) and value >= 0), name, "a whole number, 0 or larger")
        need(whole(self.n) and 1 <= self.n <= MOST_CHOICES, "n", f"a whole number from 1 to {MOST_CHOICES}")
        best = self.best_of
        fits = best is None or (whole(best) and self.n <= best <= MOST_CHOICES)
        need(fits, "best_of", f"a whole number from n = {self.n} to {MOST_CHOICES}")
        need(seed is None or (whole(seed) and 0 <= seed < 1 << 64), "seed", "a whole number from 0 to 2^64 - 1")
        need(most is None or (whole(most) and most >= 1), "max_tokens", "a whole number, 1 or larger")
        # A string is a sequence of strings too: each of its characters would end the answer.
        texts = isinstance(self.stop, tuple | list) and all(isinstance(text, str) and text for text in self.stop)
        need(texts, "stop", "a tuple of strings of at least one character")
        bounded(self.stop, MOST_STOPS, "stop", "strings")
        for text in self.stop:
            bounded(text, LONGEST_STOP, "A stop string", "characters")
        need(most is None or self.min_tokens <= most, "min_tokens", f"at most max_tokens = {most}")
        if self.mirostat_tau > 0:
            for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0), ("typical_p", 1), ("top_n_sigma", 0)):
                if getattr(self, name) != off:
                    raise UsageError(
                        f"mirostat_tau takes the place of {name}, which is {getattr(self, name)!r}.",
                        remedy=f"Set {name} to {off} beside mirostat_tau.",
                    )
            if self.xtc_probability > 0:
                raise UsageError("mirostat_tau and xtc_probability undo each other.", remedy="Leave one of them out.")


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the natural logarithm of the probability that the model itself gave it, before any penalty, filter
    or temperature; `top`: the likeliest tokens there and theirs, largest first, equals by the lower id."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Score:
    """How likely a model finds a given answer: the natural logarithm of its probability, that of each of its tokens
    (with the likeliest token in its place as `top`), and whether every token is the likeliest, so that greedy decoding
    would have given this answer."""

    logprob: float
    greedy: bool
    tokens: tuple[TokenLogprob, ...]


GrammarKind = Literal["json_schema", "json_object", "regex", "lark", "choice", "pythonic"]


@dataclass(frozen=True)
class Grammar:
    """The form an answer must have. `puna.engine.grammar` says what is honoured.

    `text` is the JSON schema; nothing for "json_object" (any one object); the regular expression, which the whole
    answer matches; the Lark grammar; for "choice", a JSON list of the strings the answer may be; or, for "pythonic",
    `{"tools": {name: schema}, "many": true}`: calls of these tools in Python's notation.
    Raises UsageError for an unknown kind, and for a text where none is wanted or none where one is.
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise UsageError(
                f"There is no grammar of the kind {self.kind!r:.80}.",
                remedy=f"The kinds are {', '.join(get_args(GrammarKind))}.",
            )
        if not isinstance(self.text, str) or bool(self.text) == (self.kind == "json_object"):
            wanted = "takes no text" if self.kind == "json_object" else "needs its text"
            raise UsageError(
                f"A grammar of the kind {self.kind} {wanted}.",
                remedy='For an object of a given form, use "json_schema".',
            )


@dataclass(frozen=True)
class Timings:
    """Seconds: from the request to its first token, and from there to the last; rates in tokens a second."""

    prefill_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class Answer:
    """A finished answer. `token_ids` are the answer's own, the stop token left out."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason
    timings: Timings
    model: str
    kernels: str
    kv_type: str
    notes: tuple[str, ...] = field(default=())


SPECULATIONS = ("off", "lookup")
"""How tokens may be guessed without a draft model: not at all, or from what the text said before."""


class SamplingOptions(TypedDict, total=False):
    """`Sampling`'s fields as keywords, for `LLM.stream(prompt, temperature=0)`; a test holds the two together."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    max_tokens: int | None
    stop: tuple[str, ...]
    typical_p: float
    top_n_sigma: float
    xtc_probability: float
    xtc_threshold: float
    mirostat_tau: float
    mirostat_eta: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    penalty_range: int
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_range: int
    dry_sequence_breakers: tuple[int, ...]
    logit_bias: tuple[tuple[int, float], ...]
    banned_tokens: tuple[int, ...]
    min_tokens: int
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    n: int
    best_of: int | None


ROLES = ("system", "user", "assistant", "tool")
"""Who speaks in a conversation; "tool" is what came of a call that the assistant made."""


@dataclass(frozen=True)
class Tool:
    """Something that a model may call: its name, what it does, and the JSON schema, as text, of its arguments (an
    object). `strict`: the arguments are held to the schema also where the model itself chooses to call."""

    name: str
    description: str = ""
    parameters: str = '{"type": "object", "properties": {}}'
    strict: bool = False


@dataclass(frozen=True)
class ToolCall:
    """A call that a model made. `arguments` is JSON text, an object where the model kept to the form; `id` tells
    calls apart."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture as it came: the bytes of a PNG, JPEG, WebP or GIF file. Whether they are one is found out where it is
    read (`puna.text.pictures`); raises ChatFormatError for what cannot be one."""

    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.data, bytes) or not self.data:
            what = "no bytes at all" if self.data == b"" else f"a {type(self.data).__name__}"
            raise ChatFormatError(f"A picture is {what}.", remedy="A picture is the bytes of an image file.")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the bytes: what tells it from others."""
        import hashlib  # loads OpenSSL, which takes longer than this whole file

        return hashlib.sha256(self.data).digest()


@dataclass(frozen=True)
class Message:
    """One message. role is one of `ROLES`; raises ChatFormatError for any other.

    An assistant's message may hold calls beside its text or in its place; a tool's answers the call `tool_call_id`.
    `pictures` stand in its text: (how many characters of it stand before, the picture), in order. Raises
    ChatFormatError for one that stands elsewhere.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    pictures: tuple[tuple[int, Picture], ...] = ()

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ChatFormatError(f"A message has the role {self.role!r}.", remedy=f"Roles are {', '.join(ROLES)}.")
        if not isinstance(self.content, str):
            raise ChatFormatError(
                f"The content of a message is a {type(self.content).__name__}.", remedy="Content is text."
            )
        least = 0
        for entry in self.pictures if isinstance(self.pictures, tuple) else (self.pictures,):
            fits = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Picture)
            fits = fits and isinstance(entry[0], int) and least <= entry[0] <= len(self.content)
            if not fits:
                raise ChatFormatError(
                    f"The pictures of a message of {len(self.content)} characters hold {entry!r:.80}.",
                    remedy="Each is (characters of the text before it, Picture), and none stands before the last one.",
                )
            least = entry[0]

    @property
    def marked(self) -> str:
        """The text with `[picture]` where one stands, for logs."""
        at, parts = 0, list[str]()
        for offset, _ in self.pictures:
            parts += (self.content[at:offset], "[picture]")
            at = offset
        return "".join((*parts, self.content[at:]))


@dataclass(frozen=True)
class Infill:
    """A gap to be filled: what stands before it and after it. `suffix_first`: the model reads what stands after first,
    another order that it was trained on."""

    prefix: str
    suffix: str
    suffix_first: bool = False


@dataclass(frozen=True)
class Category:
    """A kind of content that a guard model calls unsafe: its code ("S1"), its name, and what belongs to it."""

    code: str
    name: str
    description: str = ""


@dataclass(frozen=True)
class Judge:
    """A conversation whose last message a guard model judges, by these categories; none: those it was trained on."""

    messages: tuple[Message, ...]
    categories: tuple[Category, ...] = ()


Prompt = str | tuple[Message, ...] | tuple[int, ...] | Infill | Judge
"""A text, a conversation, token ids taken as they are, a gap to be filled, or what a guard is to judge."""

ToolChoice = Literal["auto", "none", "required"]
"""Whether a model may, must not or must call a tool."""


@dataclass(frozen=True)
class Request:
    """What a caller asks of a `Backend`.

    `prompt` is one of `Prompt`'s kinds; `raw` applies no chat format to a text.
    `namespace` says whose it is: prompts are remembered for later requests of the same namespace only. A larger
    `priority` goes first; after `timeout` seconds the answer ends with what is there, finish reason "deadline".
    `grammar` is the form that every answer must have; `adapter` the name of a LoRA adapter that was loaded.
    `tools` are told to the model in a conversation; "required" makes it call one, "none" keeps it from calling, and
    where `callable_tools` names some, it may call no other. Without `parallel_tool_calls` it calls one at most.
    Raises UsageError for a timeout that is no such number, and for tools that contradict each other.
    """

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    raw: bool = False
    grammar: Grammar | None = None
    namespace: str = ""
    priority: int = 0
    timeout: float | None = None
    adapter: str | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    callable_tools: tuple[str, ...] = ()
    parallel_tool_calls: bool = True

    def __post_init__(self) -> None:
        late = self.timeout
        if late is not None and not (isinstance(late, Real) and not isinstance(late, bool) and 0 <= late <= 1 << 31):
            raise UsageError(
                f"timeout must be a number of seconds from 0 to 2^31, not {late!r:.80}.",
                remedy="Leave it out for no deadline.",
            )
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise UsageError("Two tools have the same name.", remedy="Give each its own.")
        if unknown := sorted(set(self.callable_tools) - set(names)):
            raise UsageError(f"{unknown[0]!r:.80} is no tool of this request.", remedy="Name one of its tools.")
        if self.tool_choice == "required" and not self.tools:
            raise UsageError("A tool must be called, and there is none.", remedy="Give tools, or leave it out.")


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: its prompt's, those of them that were remembered and not computed, and all answers'."""

    prompt_tokens: int
    reused_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class ToolCallPiece:
    """A piece of a call under way: `index` says of which; the first of a call brings `id` and `name`, and the
    `arguments` of all pieces together are the call's JSON text."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Event:
    """A piece of an answer. `choice` says of which, where several were asked for.

    `text` is certain: whole characters, no part of a stop string, and none of a call of a tool, which comes as
    `tool_calls`. `token_ids` may be ahead of it. Before the first token, events without either say how much of the
    prompt has been read (`prefilled`). `prompt_logprobs`, where asked for, are those of the prompt's tokens from its
    second on. `finish` stands in the last event of a choice, `usage` in the last of all.
    """

    choice: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    prefilled: int = 0
    finish: FinishReason | None = None
    usage: Usage | None = None
    tool_calls: tuple[ToolCallPiece, ...] = ()
    stopped_by: str = ""
    """In the last event of a choice: the stop string that ended it, "" where none did."""
    refusal: str = ""
    """In the last event of a choice that a guard kept back: why, for the client to read."""


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model without loading it, for lists and for clients that choose.

    `name` is what a request names; `format` is "gguf" or "safetensors" and the like; `quantization` is most weights'
    type ("Q4_K_M", "BF16"); `nbytes` its files', `modified` their time (seconds since 1970), `digest` tells two models
    apart (hexadecimal SHA-256). `chat`: it has a chat format; `tools`: that format can tell it about tools; `sees`:
    it takes images; `infills`: it was trained to fill in the middle; `guards`: the version of Llama Guard that it is
    (`puna.text.guard`), "" for none. `template` is its chat template in Jinja,
    `bos_token` and `eos_token` are the texts of the tokens that begin and end a text.
    """

    name: str
    format: str = ""
    family: str = ""
    parameters: int = 0
    quantization: str = ""
    nbytes: int = 0
    modified: float = 0.0
    digest: str = ""
    context_length: int = 0
    vocab_size: int = 0
    embedding_length: int = 0
    chat: bool = False
    tools: bool = False
    sees: bool = False
    infills: bool = False
    guards: str = ""
    template: str | None = None
    bos_token: str = ""
    eos_token: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Embeddings:
    """A vector a text, and the tokens of all the texts together."""

    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int


@dataclass(frozen=True)
class Activity:
    """What a backend is doing. Of now: `running` and `waiting` answers, the pages of its cache, and those of layers
    that see one chunk only (`local_`). Since it was made: steps, tokens, preemptions, evictions, and the seconds that
    went into scheduling, computing and sampling."""

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    pages_free: int = 0
    page_tokens: int = 0
    page_bytes: int = 0
    steps: int = 0
    computed_tokens: int = 0
    reused_tokens: int = 0
    made_tokens: int = 0
    guessed_tokens: int = 0
    right_guesses: int = 0
    preemptions: int = 0
    evictions: int = 0
    schedule_seconds: float = 0.0
    run_seconds: float = 0.0
    sample_seconds: float = 0.0
    kernels: str = ""
    kv_type: str = ""
    local_pages_total: int = 0
    local_pages_used: int = 0
    local_pages_cached: int = 0
    local_pages_free: int = 0
    local_page_bytes: int = 0


class Backend(Protocol):
    """Whatever answers requests: a model on this machine, a script that plays one, a service elsewhere.

    Every method may raise PunaError; none blocks the event loop.
    """

    @property
    def card(self) -> ModelCard:
        """What it is."""

    def generate(self, request: Request) -> AsyncIterator[Event]:
        """The answer, piece by piece. Raises PunaError; closing the iterator early cancels the request."""

    async def embed(
        self,
        texts: Sequence[str | tuple[int, ...]],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        namespace: str = "",
        priority: int = 0,
    ) -> Embeddings:
        """A vector for each text (no chat format is applied)."""

    async def score(
        self,
        prompt: Prompt,
        continuations: Sequence[str | tuple[int, ...]],
        *,
        raw: bool = False,
        namespace: str = "",
        priority: int = 0,
    ) -> tuple[Score, ...]:
        """How likely the model finds each continuation of the prompt."""

    async def encode(self, prompt: Prompt, *, raw: bool = False, tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        """The token ids that `generate` would start from."""

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids. Raises TokenizerError for an id that is none."""

    async def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The conversation as the text that the model sees. Raises ChatFormatError where it has no chat format."""

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for; empty where it stands for no text."""

    async def activity(self) -> Activity:
        """What it is doing now."""

    async def close(self) -> None:
        """End every answer under way and give back what the backend holds. A second close does nothing."""


@dataclass(frozen=True)
class ModelState:
    """A model that may be asked for, and how it stands: `loaded`; whether it `fits` the memory beside what must stay,
    else `why` not; seconds since somebody used it (`idle`, of a loaded one), and when it will be unloaded."""

    card: ModelCard
    loaded: bool = False
    fits: bool = True
    why: str = ""
    idle: float = 0.0
    unload_in: float | None = None
    resident: int = 0
    """Bytes that it takes of the memory, weights and cache, as far as they are known; 0 where it is not loaded."""


@runtime_checkable
class Models(Protocol):
    """The models that a server answers for: one, or many that are loaded when they are asked for."""

    async def states(self) -> list[ModelState]:
        """Every model that may be asked for, the default first."""

    def use(self, name: str, *, keep_alive: float | None = None) -> AbstractAsyncContextManager[Backend]:
        """The backend of a model, loaded first where it is not, and kept until the context ends.

        "" is the default. `keep_alive` is how many seconds it stays afterwards without use (below 0: for good).
        Raises UnknownModelError, NoRoomError with the arithmetic, and what loading raises.
        """

    async def unload(self, name: str) -> None:
        """Unload a model once nobody uses it; nothing where it is not loaded. Raises UnknownModelError."""

    async def close(self) -> None:
        """Unload all. A second close does nothing."""
