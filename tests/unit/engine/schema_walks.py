"""Random answers through a grammar, and a judge of them that nobody here wrote.

What it is: `walk`, which draws tokens from the masks of a constraint until the answer ends; `judge`, which asks the
jsonschema library; `Outcome` counts.
What it is not: a sampler. Long answers are led to an end by taking what closes.
What is surprising: numbers are read as decimals. As floats, 0.3 is no multiple of 0.1.
"""

from __future__ import annotations

import decimal
import json
import random
import re
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
from jsonschema.validators import validator_for

from puna.engine.grammar import Constraint

VALIDATORS = {
    "draft3": jsonschema.Draft3Validator,
    "draft4": jsonschema.Draft4Validator,
    "draft6": jsonschema.Draft6Validator,
    "draft7": jsonschema.Draft7Validator,
    "draft2019-09": jsonschema.Draft201909Validator,
    "draft2020-12": jsonschema.Draft202012Validator,
}

_CLOSING = ('"', "}", "]", '"}', '"]', "]}", "}}", '", ', '": ')


def allowed(constraint: Constraint, vocab_size: int) -> np.ndarray[Any, Any]:
    bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
    assert not bits[vocab_size:].any(), "a bit beyond the vocabulary"
    return np.flatnonzero(bits)


def walk(
    constraint: Constraint,
    vocabulary: Sequence[bytes],
    stop_ids: frozenset[int],
    draw: random.Random,
    *,
    wander: int = 40,
    most: int = 400,
) -> bytes | None:
    """The bytes of one answer, or None where it had no end after `most` tokens. Every token is checked for having text.

    After `wander` tokens the shortest way out is taken: a stop, what closes, else the shortest token.
    """
    out = []
    for count in range(most):
        ids = allowed(constraint, len(vocabulary))
        assert len(ids), f"nothing may follow {b''.join(out)!r}"
        stops = [i for i in ids.tolist() if i in stop_ids] if len(ids) < 1000 else [i for i in stop_ids if i in ids]
        assert bool(stops) == constraint.may_end
        if stops and (count >= wander or len(stops) == len(ids) or draw.random() < 0.3):
            return b"".join(out)
        texts = ids if not stops else np.setdiff1d(ids, list(stop_ids))
        if count >= wander:
            few = texts[:: max(1, len(texts) // 2000)].tolist() + texts[:600].tolist()
            token = min(few, key=lambda i: (vocabulary[i] not in {c.encode() for c in _CLOSING}, len(vocabulary[i])))
        else:
            token = int(draw.choice(texts))
        assert vocabulary[token], f"token {token} has no text"
        constraint.accept(token)
        out.append(vocabulary[token])
    return None


def judge(schema: Any, draft: str | None, text: bytes) -> str | None:
    """What is wrong with an instance, or None. Raises re.error where Python cannot read one of the patterns."""
    decimal.getcontext().prec = 5000  # digits: a remainder needs all of the quotient's
    written = json.loads(text.decode(), parse_float=_number)
    schema = json.loads(json.dumps(schema), parse_float=decimal.Decimal)
    kind = VALIDATORS[draft] if draft else validator_for(schema, default=jsonschema.Draft202012Validator)
    validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
    error = next(iter(validator.iter_errors(written)), None)
    return None if error is None else f"{text.decode()!r:.200}: {error.message:.200}"


def _number(text: str) -> decimal.Decimal | float:
    try:
        return decimal.Decimal(text)
    except decimal.InvalidOperation:  # an exponent of twenty digits
        return float(text)


def style(instance: Any) -> str:
    """An instance in the one way that JSON is written in."""
    return json.dumps(instance, ensure_ascii=False)


def takes(constraint: Constraint, vocabulary_ids: dict[bytes, int], text: str) -> bool:
    """Whether a grammar takes a text, given byte by byte."""
    if re.search("[\ud800-\udfff]", text):
        return False
    own = constraint.copy()
    ids = [vocabulary_ids[bytes([byte])] for byte in text.encode()]
    return own.valid(ids) == len(ids) and _ends(own, ids)


def _ends(own: Constraint, ids: list[int]) -> bool:
    for i in ids:
        own.accept(i)
    return own.may_end
