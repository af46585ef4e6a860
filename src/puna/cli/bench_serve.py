"""`puna bench serve`: a load on any OpenAI server, and how long its clients wait.

What it is: flags to a load (`puna.bench.serve`), and its figures to a table, a document or a picture.
What it is not: a start of a server.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from puna.cli import terminal
from puna.errors import PunaError, UsageError
from puna.settings import BenchServeSettings, key_to_send


def main(settings: BenchServeSettings) -> int:
    """Run the command. Returns 1 where no request was answered."""
    import asyncio

    from puna.bench import serve

    if not settings.url.startswith(("http://", "https://")):
        raise UsageError(f"{settings.url!r:.100} is no address.", remedy="It begins with http:// or https://.")
    load = serve.checked(
        serve.ServerLoad(
            requests=settings.requests,
            warmup=settings.warmup,
            clients=settings.clients,
            rate=settings.rate,
            prompt=settings.prompt,
            shared=settings.shared,
            new=settings.new,
            ignore_eos=settings.ignore_eos,
            seed=settings.seed,
            chat=settings.endpoint == "chat",
            first_within=None if settings.ttft_ms is None else settings.ttft_ms / 1000,
            between_within=None if settings.itl_ms is None else settings.itl_ms / 1000,
            timeout=settings.timeout,
        )
    )
    key = settings.api_key or key_to_send()
    model, asked = asyncio.run(serve.put(settings.url, load, model=settings.model, api_key=key, said=terminal.note))
    found = serve.figures(asked, load)
    if settings.plot is not None:
        try:
            settings.plot.write_text(serve.picture(asked, f"{model} at {settings.url}"), encoding="utf-8")
        except OSError as error:
            raise PunaError(
                f"{settings.plot} cannot be written: {error.strerror or error}.", remedy="Check --plot."
            ) from error
    if settings.json:
        terminal.document({"url": settings.url, "model": model, "load": asdict(load), **found})
    else:
        show(model, found)
    return 0 if found["answered"] else 1


def show(model: str, found: dict[str, Any]) -> None:
    """The table for people."""
    errors = ", ".join(f"{count} × {name}" for name, count in found["errors"].items())
    terminal.facts(
        [
            ("model", model),
            ("answered", f"{found['answered']} of {found['requests']} in {found['seconds']:.1f} s"),
            ("errors", errors or "none"),
            ("requests", f"{found['requests_per_second']:.2f} a second, {found['good_per_second']:.2f} good ones"),
            (
                "tokens",
                f"{found['completion_tokens_per_second']:.1f} made a second, {found['tokens_per_second']:.1f} with "
                "those read",
            ),
        ]
    )
    print()
    rows = [
        (name, *(f"{found[key][each] * 1000:.4g}" for each in ("mean", "p50", "p90", "p95", "p99", "max")))
        for key, name in (("first", "to the first piece"), ("between", "between pieces"), ("whole", "whole answer"))
    ]
    terminal.table(("MILLISECONDS", "MEAN", "P50", "P90", "P95", "P99", "MAX"), rows)
