"""Saved sessions: what an engine's cache has of a text goes to a file, and comes back after a restart.

What it is: the walk between an engine's pages and a file (`puna.weights.session_file` has the format), and `Restored`,
which says what came back. `LLM.save_session` and `LLM.load_session` are its callers.
What it is not: a judge of what a session belongs to: the caller brings its `identity`, texts by name (model, kernels,
type of cache), and a file of another identity is not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from puna.engine.engine import Engine
from puna.engine.runner import Runner
from puna.errors import CheckpointError


class Restored(NamedTuple):
    """What a saved session gave: its text, as token ids, and how many of them need not be computed again.

    `note` says why that is less than what was saved; empty where it is not.
    """

    token_ids: tuple[int, ...]
    tokens: int
    note: str = ""


def save(path: Path, identity: Mapping[str, str], ids: list[int], engine: Engine, runner: Runner) -> int:
    """Write the whole pages that the cache has of a text; returns their tokens. Errors as `LLM.save_session`."""
    from puna.weights.session_file import write_session

    kept = engine.kept(ids)
    write_session(
        path,
        identity,
        ids,
        kept.contents,
        count=kept.pages,
        page=runner.page,
        page_bytes=runner.page_bytes,
        local_pages=kept.local_pages,
        local_page_bytes=runner.local_page_bytes,
    )
    return kept.pages * runner.page


def load(path: Path, identity: Mapping[str, str], engine: Engine, runner: Runner) -> Restored:
    """Put a file's pages back into the cache, as far as they are good. Errors as `LLM.load_session`."""
    from puna.weights.session_file import open_session

    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.", remedy="Name a session that was saved.")
    try:
        saved = open_session(path, runner.config.vocab_size)
    except CheckpointError as error:
        return Restored((), 0, f"{error.message} Nothing of it is used")
    names = ("page", "page_bytes", "local_page_bytes")
    mine = dict(identity) | {name: getattr(runner, name) for name in names}
    its = dict(saved.identity) | {name: getattr(saved, name) for name in names}
    if others := [name for name in mine | its if mine.get(name) != its.get(name)]:
        return Restored((), 0, f"{path}: it was saved with another {', '.join(others)}. Nothing of it is used")
    tokens = engine.restore(saved.tokens, saved.pages())
    short = saved.page_count * saved.page - tokens
    why = "the file is damaged or cut short, or the cache has no more room"
    return Restored(saved.tokens, tokens, f"{path}: {short} tokens are computed again: {why}" if short else "")
