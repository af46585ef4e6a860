"""How much one request may ask for, in one place.

What it is: constants that protocols' bodies are checked against, and `Limits`, what an operator may set.
What it is not: limits of a key (`keys.py`), or of the engine, which has its own (queue, context, choices).
What is surprising: each is far above what people send; they are there so that nobody's one request takes the memory or
the processor of all the others. What is above one is refused, never cut.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_STOPS = 16
"""Stop strings of a request: each is looked for in every piece of text. OpenAI allows 4, Anthropic's clients send
more."""

MAX_STOP_CHARS = 1000
"""Characters of one stop string: so much text may have to be held back."""

MAX_N = 16
"""Answers to one prompt, `best_of` too: each is a sequence of the engine's, and holds pages of its cache."""

MAX_LOGPROBS = 20
"""Likeliest tokens told beside each token, as in OpenAI's API."""

MAX_LOGIT_BIAS = 1024
"""Entries of `logit_bias`: OpenAI allows 300; each is applied at every step."""

MAX_TOOLS = 128
"""Tools of a request, as in OpenAI's API: each one's schema is compiled into the answer's grammar."""

MAX_SCHEMA_BYTES = 256 << 10
"""Bytes of one JSON schema, regular expression or grammar: compiling costs more than its length."""

MAX_INPUTS = 2048
"""Texts in one request for embeddings or in one list of prompts, as in OpenAI's API."""

MAX_DOCUMENTS = 1000
"""Documents of one request for a ranking: each is read by the model."""

MAX_PICTURES = 16
"""Pictures of a request: each is decoded to some 20 MB, and seeing it takes as long as reading a thousand tokens."""

MAX_MODEL_NAME = 256
"""Characters of a model's name; it stands in error texts and log lines."""

MAX_BODY = 32 << 20
"""Bytes of a request's body unless an operator says otherwise: a context of a million tokens is some 5 MB of text."""

MAX_DEPTH = 64
"""Objects and arrays inside one another in a JSON body: a parser that calls itself for each must not run out of stack,
and schemas that people write are less than half as deep."""

MAX_HEADERS = 100
"""Header lines of a request, as in Apache's default: each costs an object before any rule can look at it."""

MAX_HEADER_BYTES = 32 << 10
"""Bytes of all header lines together; a cookie jar of a browser has at most some 16 KB. The HTTP parser has a limit of
its own below which this one speaks in the protocol's words."""

MAX_TARGET_BYTES = 8 << 10
"""Bytes of a path with its query, as most proxies have it."""

MAX_FETCHED = MAX_BODY
"""Bytes of all pictures of a request that are fetched from elsewhere: as many as it could have brought itself."""

MAX_HELD = 8 * MAX_BODY
"""Bytes of fetched pictures of all requests under way: a request of a hundred bytes may ask for `MAX_FETCHED`."""

MAX_HOPS = 3
"""Redirects that are followed to a picture."""

PICTURES_AT_ONCE = 8
"""Pictures that are being fetched; others wait."""

PICTURE_SECONDS = 10.0
"""How long one may take, with all redirects."""

HEAD_SECONDS = 30.0
"""How long a request's head may take from its first byte, and the first one from the connection on."""

BODY_SECONDS = 30.0
"""How long the next piece of a body may take: a client that sends a byte a minute holds a connection for ever."""

WHOLE_BODY_SECONDS = 300.0
"""How long a whole body may take, so that a byte every `BODY_SECONDS` does not hold one either."""


SEND_SECONDS = 60.0
"""How long a client may take nothing of its answer: one that never reads would hold the answer's place for ever."""


@dataclass(frozen=True)
class Limits:
    """What an operator may set. Counts are of one request, times in seconds, sizes in bytes."""

    body: int = MAX_BODY
    """Bytes of a body: what is larger is refused as soon as it is seen (413)."""

    bodies: int = 8 * MAX_BODY
    """Bytes of all bodies of requests under way, where they are larger than `small_body`; what is more is told to come
    again (503). Half of it at most is one key's."""

    small_body: int = 64 << 10
    """Bytes of a body that are always taken."""

    depth: int = MAX_DEPTH
    """Nested objects and arrays of a JSON body."""

    headers: int = MAX_HEADERS
    """Header lines."""

    header_bytes: int = MAX_HEADER_BYTES
    """Bytes of all header lines together."""

    target: int = MAX_TARGET_BYTES
    """Bytes of a path with its query."""

    head_seconds: float = HEAD_SECONDS
    """For the whole head of a request."""

    body_seconds: float = BODY_SECONDS
    """For the next piece of a body."""

    whole_body_seconds: float = WHOLE_BODY_SECONDS
    """For a whole body."""

    send_seconds: float = SEND_SECONDS
    """For a client to take the next bytes of an answer."""

    bad_keys: int = 20
    """Wrong keys from one address within a minute; then it waits, whatever it sends. A person mistypes a few times, and
    nobody guesses 32 random bytes: this keeps one from loading the server by trying."""

    addresses: int = 4096
    """How many addresses wrong keys are counted of; the oldest is forgotten first, so that a sender of many addresses
    takes no memory."""
