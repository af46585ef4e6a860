"""The table of docs/concepts/long-context.md is what `puna.forecast` says: as a script it prints the table."""

from __future__ import annotations

from pathlib import Path

from puna import forecast
from puna.catalog import models as catalog
from puna.cli.plan import largest_context, packed_as
from puna.engine.runner import PAGE
from puna.models.known import config_of

PAGE_FILE = Path(__file__).resolve().parents[2] / "docs" / "concepts" / "long-context.md"
ROOM = 24 << 30
MODELS = ("llama3.2:1b", "llama3.2:3b", "llama2:7b", "llama3.1:8b", "llama2:13b", "llama3.3:70b", "llama4:scout")


def table() -> str:
    """Tokens that one user may have in 24 GiB, weights in Q4_K_M."""
    lines = ["| model | it takes | fp32 | fp16, bf16 | q8_0 |", "|---|---|---|---|---|"]
    for name in MODELS:
        entry = catalog.find(name)
        assert entry is not None
        config = config_of(entry)
        weights = sum(packed_as("Q4_K_M", config).sizes.values())
        row = [name, f"{config.context_length:,}"]
        for kv in ("fp32", "fp16", "q8_0"):
            load = forecast.Load(1)
            need = forecast.footprint(config, weights, kv, load, PAGE)
            room = ROOM - need.total + need.cache
            most = largest_context(config, kv, load, room)
            row.append(f"{most:,}" if most else "-")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def test_the_table_is_what_the_forecast_says() -> None:
    assert table() in PAGE_FILE.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(table())
