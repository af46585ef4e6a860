"""`puna convert`: write a model in another format, with a bar for people at a terminal.

What it is not: the writers, which are `puna.weights`'s; they write whole or not at all.
"""

from __future__ import annotations

from puna.cli import terminal
from puna.settings import ConvertSettings
from puna.weights.convert import convert
from puna.weights.find import find_model
from puna.weights.safetensors import DTYPES


def main(settings: ConvertSettings) -> int:
    """Run the command."""
    with terminal.bar() as show:
        made = convert(
            find_model(settings.source),
            settings.output,
            to=settings.to,
            dtype="auto" if settings.type is None else DTYPES[settings.type],
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
        terminal.note(f"{made.path}: {len(made.files)} files, {terminal.size(made.nbytes)} of weights")
    return 0
