"""A load on a server that speaks OpenAI's protocol: many clients over HTTP, and how long each of them waits.

What it is: requests as a load says, streamed, and the arithmetic of what came back.
What it is not: a judge of texts, or a measurement of the engine alone (`puna bench`): HTTP and the server's protocol
are part of what clients wait for.
What is surprising: waiting counts from when a request was due (see `load.py`). A piece of a stream is not a token:
servers put several into one; tokens are what the server's `usage` says, and times are between pieces.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from puna.bench.load import arrivals_of, spread
from puna.errors import PunaError, UsageError

if TYPE_CHECKING:
    import httpx2

_COMMON = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part over new "
    "sound take only little work know place year live me back give most very after thing our just name good sentence "
    "man think say great where help through much before line right too mean old any same tell boy follow came want "
    "show also around form "
)
WORDS = tuple(_COMMON.split())
"""Common words: most tokenizers have each, with the space before it, as one token."""


@dataclass(frozen=True)
class ServerLoad:
    """What is put on a server. `rate` is in requests a second, 0 for `clients` that ask one after another; lengths
    are in words (prompt, shared) and tokens (new); limits of good answers in seconds, None for none."""

    requests: int
    warmup: int
    clients: int
    rate: float
    prompt: int
    shared: int
    new: int
    ignore_eos: bool = False
    seed: int = 0
    chat: bool = True
    first_within: float | None = None
    between_within: float | None = None
    timeout: float = 600.0


@dataclass
class Asked:
    """One request: when it was due, when its pieces came (seconds on one clock), and how it ended. `error` says in a
    word what went wrong, empty where nothing did."""

    due: float
    times: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""

    @property
    def first(self) -> float:
        """Seconds until the first piece."""
        return self.times[0] - self.due

    @property
    def gaps(self) -> list[float]:
        """Seconds between two pieces."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


async def put(
    url: str,
    load: ServerLoad,
    *,
    model: str | None = None,
    api_key: str | None = None,
    said: Callable[[str], None] = lambda text: None,
) -> tuple[str, list[Asked]]:
    """Put the load on the server at `url`; the model's name, and what became of each request that counts.

    Raises PunaError where the server cannot be reached or lists no model.
    """
    import httpx2

    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=base, headers=headers, timeout=load.timeout, limits=limits) as client:
        name = model or await _first_model(client, base)
        draw = random.Random(load.seed)
        shared = draw.choices(WORDS, k=min(load.shared, load.prompt))
        total = load.warmup + load.requests
        prompts = [" ".join([*shared, *draw.choices(WORDS, k=load.prompt - len(shared))]) for _ in range(total)]
        if load.warmup:
            said(f"{load.warmup} requests that do not count ...")
            await _closed_loop(client, name, load, prompts[: load.warmup])
        said(f"{load.requests} requests ...")
        prompts = prompts[load.warmup :]
        if load.rate:
            return name, await _arriving(client, name, load, prompts, arrivals_of(load.requests, load.rate, draw))
        return name, await _closed_loop(client, name, load, prompts)


def figures(asked: Sequence[Asked], load: ServerLoad) -> dict[str, Any]:
    """What came of a load, in seconds and tokens: counts, rates over the makespan, and the spreads of the time to the
    first piece, between pieces, and of whole answers. `good_per_second` counts answers within the limits."""
    done = [one for one in asked if not one.error]
    span = max((one.end for one in asked), default=0.0) - min((one.due for one in asked), default=0.0)
    per_second = 1 / span if span > 0 else 0.0
    good = [
        one
        for one in done
        if (load.first_within is None or one.first <= load.first_within)
        and (load.between_within is None or not one.gaps or sum(one.gaps) / len(one.gaps) <= load.between_within)
    ]
    read, made = sum(one.prompt_tokens for one in done), sum(one.completion_tokens for one in done)
    return {
        "requests": len(asked),
        "answered": len(done),
        "errors": dict(Counter(one.error for one in asked if one.error)),
        "seconds": span,
        "requests_per_second": len(done) * per_second,
        "good": len(good),
        "good_per_second": len(good) * per_second,
        "prompt_tokens": read,
        "completion_tokens": made,
        "completion_tokens_per_second": made * per_second,
        "tokens_per_second": (read + made) * per_second,
        "first": spread([one.first for one in done]),
        "between": spread([gap for one in done for gap in one.gaps]),
        "whole": spread([one.end - one.due for one in done]),
    }


async def _first_model(client: httpx2.AsyncClient, base: str) -> str:
    import httpx2

    try:
        answer = await client.get("/v1/models")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise PunaError(f"{base} cannot be reached: {error}.", remedy="Check the address, and that it runs.") from error
    try:
        data = answer.json()["data"] if answer.status_code == 200 else []
        names = [str(each["id"]) for each in data]
    except (ValueError, KeyError, TypeError):
        names = []
    if not names:
        raise PunaError(
            f"{base}/v1/models gives no model (status {answer.status_code}).", remedy="Name one with --model, or a key."
        )
    return names[0]


async def _closed_loop(client: httpx2.AsyncClient, model: str, load: ServerLoad, prompts: Sequence[str]) -> list[Asked]:
    left, asked = list(reversed(prompts)), []

    async def one_client() -> None:
        while left:
            prompt, one = left.pop(), Asked(time.perf_counter())
            asked.append(one)
            await _ask(client, model, load, prompt, one)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(load.clients, len(prompts))):
            group.create_task(one_client())
    return asked


async def _arriving(
    client: httpx2.AsyncClient, model: str, load: ServerLoad, prompts: Sequence[str], arrivals: Sequence[float]
) -> list[Asked]:
    began, asked = time.perf_counter(), []
    async with asyncio.TaskGroup() as group:
        for prompt, arrival in zip(prompts, arrivals, strict=True):
            await asyncio.sleep(max(0.0, began + arrival - time.perf_counter()))
            one = Asked(began + arrival)
            asked.append(one)
            group.create_task(_ask(client, model, load, prompt, one))
    return asked


async def _ask(client: httpx2.AsyncClient, model: str, load: ServerLoad, prompt: str, one: Asked) -> None:
    """Send a request and read its stream; everything that goes wrong is noted."""
    import httpx2

    body: dict[str, Any] = {
        "model": model, "max_tokens": load.new, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    body |= {"messages": [{"role": "user", "content": prompt}]} if load.chat else {"prompt": prompt}
    if load.ignore_eos:
        body["ignore_eos"] = True
    path = "/v1/chat/completions" if load.chat else "/v1/completions"
    try:
        async with asyncio.timeout(load.timeout), client.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                one.error = _code(await answer.aread(), answer.status_code)
            else:
                one.error = await _read(answer, one)
    except TimeoutError:
        one.error = "timeout"
    except httpx2.TimeoutException:
        one.error = "timeout"
    except httpx2.HTTPError as error:
        one.error = type(error).__name__
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        one.error = "malformed"
    one.end = time.perf_counter()


async def _read(answer: httpx2.Response, one: Asked) -> str:
    """Read a stream of server-sent events to its end; what went wrong with it, in a word."""
    over = False
    async for line in answer.aiter_lines():
        if not line.startswith("data:"):
            continue
        text = line.removeprefix("data:").strip()
        if text == "[DONE]":
            over = True
            continue
        event = json.loads(text)
        if "error" in event:
            return _code(text.encode(), 0)
        now = time.perf_counter()
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            if choice.get("text") or delta.get("content") or delta.get("tool_calls"):
                one.times.append(now)
        if usage := event.get("usage"):
            one.prompt_tokens, one.completion_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    if not over:
        return "cut"
    return "" if one.times else "empty"


def _code(body: bytes, status: int) -> str:
    """What an error is called: its status, and the code that the server gives it."""
    try:
        error = json.loads(body)["error"]
        code = error.get("code") or error.get("type") or ""
    except (ValueError, KeyError, TypeError, AttributeError):
        code = ""
    return f"{status or 'in the stream'} {str(code)[:60]}".strip()


def checked(load: ServerLoad) -> ServerLoad:
    """The load, where it can be put on a server. Raises UsageError naming what cannot."""
    for name, least in (("requests", 1), ("warmup", 0), ("clients", 1), ("prompt", 1), ("shared", 0), ("new", 1)):
        if not least <= getattr(load, name) <= 1_000_000:
            raise UsageError(f"--{name} must be {least} or larger.", remedy="Leave it out for the default.")
    if load.shared > load.prompt:
        raise UsageError("--shared is longer than --prompt.", remedy="Make --prompt larger: it counts all words.")
    if not 0 <= load.rate <= 1e6 or not 0 < load.timeout <= 1e6:
        raise UsageError("--rate and --timeout are positive numbers.", remedy="Leave them out for the defaults.")
    return load


COLOURS = ("#1f6feb", "#bc4c00", "#1a7f37")


def picture(asked: Sequence[Asked], title: str) -> str:
    """The share of answers (pieces) that came within a time, as SVG: to the first piece, between pieces, whole."""
    done = [one for one in asked if not one.error]
    panels = (
        ("to the first piece", [one.first for one in done]),
        ("between two pieces", [gap for one in done for gap in one.gaps]),
        ("whole answer", [one.end - one.due for one in done]),
    )
    width, height, left, top = 260, 180, 40, 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{3 * (width + 60) + 20}" height="{height + 100}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="24" font-size="15">{_escaped(title)}</text>',
    ]
    for number, (name, values) in enumerate(panels):
        x, ordered = left + number * (width + 60), sorted(values)
        most = max(ordered, default=0.0) or 1.0
        parts.append(f'<g transform="translate({x},{top})">')
        parts.append(f'<rect width="{width}" height="{height}" fill="none" stroke="#999"/>')
        for share in (50, 90, 99):
            y = height * (1 - share / 100)
            parts.append(f'<line x1="0" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
            parts.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end" fill="#666">{share}</text>')
        points = [(0.0, float(height))]
        for i, value in enumerate(_thinned(ordered)):
            points.append((width * value / most, height * (1 - (i + 1) / min(len(ordered), _POINTS))))
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[number]}" stroke-width="2"/>')
        parts.append(f'<text x="0" y="{height + 18}">0</text>')
        parts.append(f'<text x="{width}" y="{height + 18}" text-anchor="end">{most * 1000:.4g} ms</text>')
        parts.append(f'<text x="{width / 2}" y="{height + 36}" text-anchor="middle">{name}</text></g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


_POINTS = 500


def _thinned(ordered: Sequence[float]) -> list[float]:
    """At most `_POINTS` of the values, evenly spread over their ranks, the last one among them."""
    count = min(len(ordered), _POINTS)
    return [ordered[(i + 1) * len(ordered) // count - 1] for i in range(count)]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
