"""`puna pull`: fetch a model from the hub, or from Meta by a signed link, with a bar for people at a terminal.

What it is not: the download, which is `puna.weights`'s.
What is surprising: a byte that was here already counts as done, so a pull that continues starts where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from puna.catalog import models as catalog
from puna.cli import terminal
from puna.errors import UsageError
from puna.settings import PullSettings
from puna.weights.embedded import EMBEDDED

if TYPE_CHECKING:
    from puna.weights.fetch import Progress
    from puna.weights.hub import Pulled


def main(settings: PullSettings) -> int:
    """Run the command."""
    if settings.name == EMBEDDED:
        raise UsageError(
            f"{EMBEDDED} is inside the package: there is nothing to pull.", remedy=f"Run it: puna run {EMBEDDED}"
        )
    if settings.meta_url is not None and (settings.revision is not None or settings.original):
        raise UsageError(
            "--revision and --original are the hub's, and --meta-url fetches from Meta.",
            remedy="Leave them out: Meta's link has one revision, and its files are the original ones.",
        )
    _check_name(settings)
    with terminal.bar() as show:
        if show is None:
            terminal.note(f"Fetching {settings.name} ...")
        pulled = _pull(
            settings, None if show is None else lambda now: show(_doing(now), now.bytes_done, now.bytes_total)
        )
    if settings.json:
        terminal.document(
            {
                "name": pulled.name,
                "path": str(pulled.path),
                "folder": str(pulled.folder),
                "revision": pulled.revision,
                "commit": pulled.commit,
                "bytes_total": pulled.bytes_total,
                "bytes_fetched": pulled.bytes_fetched,
                "files": [{"path": each.path, "size": each.size, "sha256": each.sha256} for each in pulled.files],
            }
        )
        return 0
    fetched = f"{terminal.size(pulled.bytes_fetched)} fetched" if pulled.bytes_fetched else "nothing to fetch"
    terminal.note(f"{pulled.name} is here: {terminal.size(pulled.bytes_total)}, {fetched}, in {pulled.path}")
    terminal.note(f'Try: puna run {settings.name if catalog.find(settings.name) else pulled.name} "Hello"')
    return 0


def _check_name(settings: PullSettings) -> None:
    """Raises HubError for a name that no pull can be for, before anything says that it is being fetched."""
    from puna.weights.hub import hub_id_of

    if settings.meta_url is None:
        hub_id_of(settings.name)
    else:
        catalog.lookup(settings.name)


def _doing(now: Progress) -> str:
    return f"{'checking' if now.checking else 'fetching'} {now.file} ({now.files_done}/{now.files_total})"


def _pull(settings: PullSettings, progress: Callable[[Progress], None] | None) -> Pulled:
    if settings.meta_url is not None:
        from puna.weights.meta_link import pull_meta

        # From stdin the link stays out of the shell's history and the list of processes.
        url = sys.stdin.readline().strip() if settings.meta_url == "-" else settings.meta_url
        return pull_meta(url, settings.name, progress=progress)
    from puna.weights.hub import pull

    return pull(
        settings.name,
        revision=settings.revision,
        original=settings.original,
        progress=progress,
        say=lambda text: terminal.note(f"note: {text}"),
    )
