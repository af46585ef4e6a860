"""`puna list`: the models on this machine, as the records of `puna pull` have them and the disk still does."""

from __future__ import annotations

from puna.cli import terminal
from puna.settings import ListSettings
from puna.weights.installed import InstalledModel, installed


def main(settings: ListSettings) -> int:
    """Run the command."""
    models = installed()
    if settings.json:
        terminal.document(
            {
                "models": [
                    {
                        "name": model.name,
                        "short_name": model.short_name,
                        "source": model.source,
                        "folder": str(model.folder),
                        "size_bytes": model.size_bytes,
                        "complete": model.complete,
                        "revision": model.revision,
                        "commit": model.commit,
                        "pulled": model.pulled.isoformat() if model.pulled else None,
                    }
                    for model in models
                ]
            }
        )
        return 0
    if not models:
        terminal.note("There is no model on this machine. `puna models` lists those that `puna pull` can fetch.")
        return 0
    terminal.table(("NAME", "SHORT NAME", "SIZE", "PULLED", "STATE", "FROM"), [_row(model) for model in models])
    return 0


def _row(model: InstalledModel) -> tuple[str, ...]:
    return (
        model.name,
        model.short_name,
        terminal.size(model.size_bytes),
        f"{model.pulled:%Y-%m-%d}" if model.pulled else "",
        "whole" if model.complete else "not whole: pull it again",
        " ".join(filter(None, (model.source, model.revision, model.commit[:12]))),
    )
