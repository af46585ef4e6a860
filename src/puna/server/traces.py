"""Traces: one span a call of a model, as OpenTelemetry's conventions for generative AI name things.

What it is: a span begun and ended, sent by OTLP where the standard OTEL_ variables name an endpoint.
What it is not: metrics or logs, or an instrumentation of HTTP: the span's parent is the client's own (`traceparent`).
What is surprising: without an endpoint, OpenTelemetry is not even imported. The conventions are those of
https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/; they are still in development there. No prompt and no
answer is in a span.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from puna import __version__
from puna.settings import traces_wanted

LOG = logging.getLogger("puna.server")


class Traces:
    """Begins spans. `exporter` is who gets them (default: OTLP over HTTP, as the environment has it)."""

    def __init__(self, exporter: Any = None) -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource({"service.name": "puna"}).merge(OTELResourceDetector().detect())  # OTEL_SERVICE_NAME wins
        self._provider = TracerProvider(resource=resource)
        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        else:
            self._provider.add_span_processor(SimpleSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("puna", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._kind = SpanKind.SERVER
        self._failed: Callable[[str], Any] = lambda what: Status(StatusCode.ERROR, what)

    def begin(self, operation: str, model: str, id: str, stream: bool, parent: dict[str, str]) -> Any:
        """A span that begins now; `parent` has the client's traceparent and tracestate, where it sent any."""
        return self._tracer.start_span(
            f"{operation} {model}",
            self._propagator.extract(parent),
            self._kind,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "puna",
                "gen_ai.request.model": model,
                "gen_ai.request.stream": stream,
                "gen_ai.response.id": id,
            },
        )

    def end(
        self, span: Any, *, model: str, finishes: list[str], prompt: int, reused: int, made: int, error: str,
        first: float | None,
    ) -> None:  # fmt: skip
        """End it with what came of it."""
        span.set_attribute("gen_ai.response.model", model)
        span.set_attribute("gen_ai.usage.input_tokens", prompt)
        span.set_attribute("gen_ai.usage.output_tokens", made)
        span.set_attribute("gen_ai.usage.cache_read.input_tokens", reused)
        if finishes:
            span.set_attribute("gen_ai.response.finish_reasons", finishes)
        if first is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", first)
        if error:
            span.set_attribute("error.type", error)
            span.set_status(self._failed(error))
        span.end()

    def close(self) -> None:
        """Send what was not sent. Blocks."""
        self._provider.shutdown()


def traces() -> Traces | None:
    """Traces where the environment asks for them, else None; where it asks and cannot have them, the log says so."""
    if not traces_wanted():
        return None
    try:
        return Traces()
    except ImportError as error:
        LOG.error("traces are asked for by OTEL_ variables and need pip install 'puna[otel]': %s", error)
        return None
