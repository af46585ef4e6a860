"""`puna rm`: remove a model that was pulled, after asking.

What is surprising: what it asks goes to stderr, so that stdout keeps to `--json`'s document.
"""

from __future__ import annotations

import sys

from puna.cli import terminal
from puna.errors import PunaError, UsageError
from puna.settings import RemoveSettings


def main(settings: RemoveSettings) -> int:
    """Run the command. Raises UsageError where it may not ask, PunaError where the person says no."""
    from puna.weights.hub import removable, remove

    removable(settings.name)  # nobody is asked about what is not there
    if not settings.yes:
        if not terminal.is_terminal(sys.stdin):
            raise UsageError(
                f"Removing {settings.name} needs a yes, and stdin is not a terminal.",
                remedy="Add --yes if you mean it.",
            )
        print(f"Remove {settings.name} and its files? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise PunaError(f"{settings.name} was not removed.", remedy="Answer y, or add --yes.")
    freed = remove(settings.name)
    if settings.json:
        terminal.document({"name": settings.name, "bytes_freed": freed})
    else:
        terminal.note(f"{settings.name} is removed; {terminal.size(freed)} are free again.")
    return 0
