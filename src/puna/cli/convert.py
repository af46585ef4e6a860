"""`puna convert`: write a model in another format, with a bar for people at a terminal.

What it is not: the writers, which are `puna.weights`'s; they write whole or not at all.
What is surprising: SIGTERM ends it as an exception, so that the half-written file, which may be large, is removed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from puna.cli import terminal
from puna.errors import UsageError
from puna.settings import ConvertSettings
from puna.weights.convert import convert
from puna.weights.find import find_model
from puna.weights.safetensors import DTYPES


def main(settings: ConvertSettings) -> int:
    """Run the command."""
    dtype = settings.type or "auto"
    if settings.to != "gguf" and settings.type is not None:
        if settings.type not in DTYPES:
            raise UsageError(
                f"--type {settings.type}: --to {settings.to} holds {', '.join(DTYPES)} only.",
                remedy="Leave --type out, or write a GGUF file with --to gguf.",
            )
        dtype = DTYPES[settings.type]
    with _terminated_tidily(), terminal.bar() as show:
        made = convert(
            find_model(settings.source),
            settings.output,
            to=settings.to,
            dtype=dtype,
            tokenizer=settings.tokenizer,
            progress=None if show is None else lambda done, total: show(f"writing {settings.output.name}", done, total),
        )
    for text in made.notes:
        terminal.note(f"note: {text}")
    if settings.json:
        terminal.document(
            {
                "path": str(made.path),
                "format": made.layout,
                "files": list(made.files),
                "weights_bytes": made.nbytes,
                "notes": list(made.notes),
            }
        )
    else:
        files = f"{len(made.files)} files, " if len(made.files) > 1 else ""
        terminal.note(f"{made.path}: {files}{terminal.size(made.nbytes)} of weights")
    return 0


@contextmanager
def _terminated_tidily() -> Iterator[None]:
    """SIGTERM as SystemExit with the status that shells give it, while the block runs. Only a main thread can ask."""

    def stop(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
