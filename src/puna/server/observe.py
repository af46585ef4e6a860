"""Seeing what the server does: the observer of every call and of every request.

What it is: the one place where something is measured; metrics, traces, the log and the audit log get it from here.
What it is not: a judge. Whatever fails here is counted and logged, and no call fails of it.
What is surprising: prompts are kept nowhere unless an operator asked for them, and answers never.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from puna.server import journal
from puna.server.exchange import CURRENT, Exchange
from puna.server.metrics import BETWEEN_TOKENS, Metrics
from puna.server.service import Call
from puna.server.traces import Traces
from puna.types import Event, Infill, Judge, Message, Request, Usage

LOG = logging.getLogger("puna.server")

LogForm = Literal["off", "line", "json"]
"""How requests are logged on stderr: not at all, a short line, or a line of JSON."""

PROMPT_CHARS = 100_000
"""Of a prompt in a log, where prompts are asked for at all; a mark says where it was cut."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ENDS = {"stop": "stop", "length": "length", "context": "length", "cancelled": "abort", "deadline": "abort",
         "filtered": "filtered"}  # fmt: skip


class Observatory:
    """See service.Observer, door.Looker.

    `log` says how requests are logged on stderr, `audit` is the file that calls are written to; `log_prompts` puts
    prompts into both. `traces` are where spans go.
    """

    def __init__(
        self,
        *,
        log: LogForm = "off",
        audit: Path | None = None,
        log_prompts: bool = False,
        traces: Traces | None = None,
    ) -> None:
        self.metrics = Metrics()
        self.began = time.monotonic()
        self.open: dict[int, Watcher] = {}
        """The calls under way."""
        self._form, self.log_prompts, self.traces = log, log_prompts, traces
        self._log = None if log == "off" else journal.Journal()
        self._audit = None if audit is None else journal.Journal(audit)

    def begin(self, call: Call, request: Request | None = None, model: str = "") -> Watcher:
        """See service.Observer. `model` is the name of the model that answers."""
        return Watcher(self, call, request, model or call.model)

    def exchanged(self, exchange: Exchange) -> None:
        """See door.Looker."""
        self.safely(self._exchanged, exchange)

    def _exchanged(self, exchange: Exchange) -> None:
        route, method = exchange.route or "none", exchange.method if exchange.method in _METHODS else "other"
        self.metrics.http.labels(route, method, str(exchange.status)).inc()
        self.metrics.http_seconds.labels(route).observe(exchange.seconds)
        if exchange.refused:
            self.metrics.refused.labels(exchange.refused).inc()
        if self._log is None and self._audit is None:
            return
        record = record_of(exchange)
        if self._log is not None:
            self._log.write(journal.line(record) if self._form == "json" else human(exchange) + "\n")
        if self._audit is not None:
            self._audit.write(journal.line(record))

    def safely(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do it; what it raises is counted and logged, and goes no further."""
        try:
            work(*arguments)
        except Exception:
            self.metrics.failures.inc()
            LOG.exception("observing failed")

    async def close(self) -> None:
        """Write and send what is waiting."""
        for each in (self._log, self._audit, self.traces):
            if each is not None:
                await asyncio.to_thread(each.close)


class Watcher:
    """See service.Watch."""

    def __init__(self, observatory: Observatory, call: Call, request: Request | None, model: str) -> None:
        self._observatory, self.call, self.model = observatory, call, model
        self.prefilled = self.made = 0
        self.first: float | None = None
        self._last: dict[int, float] = {}
        self._gaps = [0] * (len(BETWEEN_TOKENS) + 1)
        self._gap_seconds = 0.0
        self._finishes: list[str] = []
        self._span: Any = None
        self._over = False
        self._exchange = CURRENT.get()
        observatory.open[id(self)] = self
        observatory.safely(self._begin, request)

    def _begin(self, request: Request | None) -> None:
        seen = self._exchange
        if seen is not None and self._observatory.log_prompts and request is not None:
            seen.prompts.append(_words(request))
        if (traces := self._observatory.traces) is not None:
            names = {"traceparent": seen.traceparent, "tracestate": seen.tracestate} if seen is not None else {}
            parent = {name: value for name, value in names.items() if value}
            self._span = traces.begin(self.call.operation, self.model, self.call.id, self.call.stream, parent)

    @property
    def state(self) -> str:
        """waiting (for its turn), reading (its prompt) or answering."""
        return "answering" if self.made else "reading" if self.prefilled else "waiting"

    def event(self, event: Event) -> None:
        """See service.Watch."""
        if event.token_ids:
            now = time.monotonic()
            self.made += len(event.token_ids)
            if self.first is None:
                self.first = now
            before = self._last.get(event.choice)
            self._last[event.choice] = now
            if before is not None:
                self._gaps[bisect_left(BETWEEN_TOKENS, now - before)] += 1
                self._gap_seconds += now - before
        if event.prefilled > self.prefilled:
            self.prefilled = event.prefilled
        if event.finish is not None:
            self._finishes.append(event.finish)

    def end(self, usage: Usage | None, error: BaseException | None) -> None:
        """See service.Watch."""
        self._observatory.open.pop(id(self), None)
        if not self._over:
            self._over = True
            self._observatory.safely(self._end, usage or Usage(0, 0, 0), error)

    def _end(self, usage: Usage, error: BaseException | None) -> None:
        metrics, now = self._observatory.metrics, time.monotonic()
        label = metrics.model(self.model)
        if error is None:
            reason = _ENDS.get(self._finishes[-1] if self._finishes else "stop", "stop")
            failed = ""
        else:
            left = isinstance(error, asyncio.CancelledError | GeneratorExit)
            reason, failed = ("abort", "") if left else ("error", type(error).__name__)
        metrics.calls.labels(label, self.call.operation).inc()
        metrics.success.labels(label, reason).inc()
        metrics.prompt_tokens.labels(label).inc(usage.prompt_tokens)
        metrics.prefix_queries.labels(label).inc(usage.prompt_tokens)
        metrics.prefix_hits.labels(label).inc(usage.reused_tokens)
        metrics.generation_tokens.labels(label).inc(usage.completion_tokens)
        metrics.request_prompt.labels(label).observe(usage.prompt_tokens)
        metrics.request_generation.labels(label).observe(usage.completion_tokens)
        metrics.whole.labels(label).observe(now - self.call.began)
        first = None if self.first is None else self.first - self.call.began
        if first is not None:
            metrics.first_token.labels(label).observe(first)
        if len(self._last):
            metrics.gaps.add(label, self._gaps, self._gap_seconds)
        if (seen := self._exchange) is not None:
            seen.operation, seen.model = self.call.operation, self.model
            seen.prompt_tokens += usage.prompt_tokens
            seen.reused_tokens += usage.reused_tokens
            seen.completion_tokens += usage.completion_tokens
            seen.first_token = first if seen.first_token is None else seen.first_token
            seen.finish = self._finishes[-1] if self._finishes else reason
            seen.error = failed
        if self._span is not None and self._observatory.traces is not None:
            self._observatory.traces.end(
                self._span, model=self.model, finishes=self._finishes, prompt=usage.prompt_tokens,
                reused=usage.reused_tokens, made=usage.completion_tokens, error=failed, first=first,
            )  # fmt: skip


def record_of(exchange: Exchange) -> dict[str, object]:
    """What a line of the log has of a request."""
    record: dict[str, object] = {
        "time": journal.now(),
        "event": "request",
        "id": exchange.id,
        "address": exchange.address,
        "key": exchange.key,
        "name": exchange.name,
        "method": exchange.method,
        "path": exchange.path,
        "route": exchange.route,
        "status": exchange.status,
        "seconds": round(exchange.seconds, 6),
    }
    if exchange.operation:
        record |= {
            "operation": exchange.operation,
            "model": exchange.model,
            "prompt_tokens": exchange.prompt_tokens,
            "reused_tokens": exchange.reused_tokens,
            "completion_tokens": exchange.completion_tokens,
            "first_token_seconds": None if exchange.first_token is None else round(exchange.first_token, 6),
            "finish": exchange.finish,
        }
    if exchange.error:
        record["error"] = exchange.error
    if exchange.refused:
        record["refused"] = exchange.refused
    if exchange.guard:
        record["guard"] = exchange.guard
    if exchange.prompts:
        record["prompts"] = exchange.prompts
    return record


def human(exchange: Exchange) -> str:
    """The same for a person, in one line; what a client sent is quoted so that it cannot draw on a terminal."""
    path = exchange.path if exchange.path.isascii() and exchange.path.isprintable() else ascii(exchange.path)
    parts = [str(exchange.status), exchange.method, path, f"{exchange.seconds:.3f} s"]
    if exchange.operation:
        parts.append(f"{exchange.model}: {exchange.prompt_tokens} read, {exchange.completion_tokens} made")
        if exchange.first_token is not None:
            parts.append(f"first after {exchange.first_token:.3f} s")
        parts.append(exchange.finish)
    parts += [word for word in (exchange.error, exchange.refused, exchange.name, exchange.id) if word]
    parts += [f"guard {found}" for found in exchange.guard if not found.endswith(": safe")]
    parts += [repr(prompt) for prompt in exchange.prompts]
    return "  ".join(parts)


def _words(request: Request) -> str:
    prompt = request.prompt
    if isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, Infill):
        text = f"{prompt.prefix}<FILL_ME>{prompt.suffix}"
    elif isinstance(prompt, Judge):
        text = "\n".join(f"{m.role}: {m.marked}" for m in prompt.messages)
    else:
        text = "\n".join(f"{m.role}: {m.marked}" if isinstance(m, Message) else str(m) for m in prompt)
    return text if len(text) <= PROMPT_CHARS else f"{text[:PROMPT_CHARS]}… ({len(text)} characters)"
