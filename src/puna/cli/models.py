"""`puna models`: the catalog as a table.

What it is not: what is on this machine; that is `puna list`.
"""

from __future__ import annotations

from puna.catalog import models as catalog
from puna.cli import terminal
from puna.settings import ModelsSettings


def main(settings: ModelsSettings) -> int:
    """Run the command."""
    if settings.json:
        terminal.document(
            {
                "models": [
                    {
                        "short_name": entry.short_name,
                        "name": entry.name,
                        "hub_id": entry.hub_id,
                        "generation": entry.generation,
                        "variant": entry.variant,
                        "parameters": entry.params,
                        "parameters_stated": entry.params_stated,
                        "context_length": entry.context_length,
                        "licence": entry.licence_name,
                        "gated": entry.gated,
                        "runnable": entry.runnable,
                        "not_runnable_because": entry.not_runnable_because,
                    }
                    for entry in catalog.entries()
                ]
            }
        )
        return 0
    terminal.table(
        ("SHORT NAME", "HUB ID", "PARAMETERS", "CONTEXT", "RUNS", "LICENCE"),
        [
            (
                entry.short_name,
                entry.hub_id,
                entry.params_stated,
                str(entry.context_length),
                "yes" if entry.runnable else "not yet",
                entry.licence_name.removesuffix(" License Agreement"),
            )
            for entry in catalog.entries()
        ],
    )
    return 0
