"""What commands show: JSON documents, tables, sizes, notes on stderr, and a sign of life while a person waits.

What it is: the few shapes of output that several commands share.
What it is not: colourful where nobody sees it; rich is imported only for a terminal.
What is surprising: the sign of life appears only after half a second, from a thread, so that a quick model never pays
for importing rich.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE = 0.5
"""Seconds a person waits before a sign of life appears."""

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def console(stream: TextIO) -> Console:
    """A rich console on a stream: colours only at a terminal, and none where NO_COLOR is set (rich's own rule)."""
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, emoji=False)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sits at the other end."""
    return stream is not None and not stream.closed and stream.isatty()


def document(data: Any) -> None:
    """Print the one JSON document of `--json`, on one line and in ASCII, whatever the terminal speaks."""
    print(json.dumps(data, allow_nan=False))


def say(text: str, stream: TextIO | None = None) -> None:
    """Write text as it comes, to stdout unless told otherwise, at once and without a line end.

    A terminal obeys control characters (it can be made to retitle, overwrite or fill a clipboard), and what is shown
    was made by a model or read from a stranger's file: there they appear as their codes. A pipe gets the text as it is.
    """
    stream = stream or sys.stdout
    stream.write(text.translate(_CONTROL) if is_terminal(stream) else text)
    stream.flush()


def note(text: str) -> None:
    """Tell a person something beside the output."""
    say(text + "\n", sys.stderr)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under headers in aligned columns that `grep` and `awk` can read; nothing is cut to fit a terminal."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in (headers, *rows):
        say("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")


def report(
    headers: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), spare: Sequence[int] = ()
) -> None:
    """A table that a person at a terminal enjoys: rules, numbers to the right, cells that wrap; elsewhere as `table`.

    `numbers` are the columns that hold numbers, `spare` those that a terminal too narrow for all does without, the
    first one first; a note names them.
    """
    if not is_terminal(sys.stdout):
        table(headers, rows)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = console(sys.stdout)
    room = out.width - 2  # a rule begins and ends one column beside the text
    columns = {at: [row[at].translate(_CONTROL) for row in rows] for at in range(len(headers))}
    left_out = []
    for at in spare:
        if sum(max(_longest(cells, headers[i])) + _GAP for i, cells in columns.items()) > room + _GAP:
            left_out.append(headers[at])
            del columns[at]
    widths = _fitted([_longest(cells, headers[at]) for at, cells in columns.items()], room)
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    for at, width in zip(columns, widths, strict=True):
        side: Literal["left", "right"] = "right" if at in numbers else "left"
        drawn.add_column(Text(headers[at]), justify=side, overflow="fold", width=width)
    for cells in zip(*columns.values(), strict=True):
        drawn.add_row(*map(Text, cells))
    out.print(drawn)
    if left_out:
        note(f"A wider terminal shows {', '.join(left_out)} too.")


_GAP = 2
"""Columns of a terminal between two columns of a table."""
_FOLDED = 30
"""A word of more letters than this may be folded where a table is narrow."""


def _longest(cells: Sequence[str], header: str) -> tuple[int, int]:
    """The longest cell, and the longest word of them and of the header: a header may wrap as long as no word does. A
    word longer than _FOLDED (an address) is no reason to keep a column wide."""
    words = [word for text in (*cells, header) for word in text.split()]
    return max(map(len, cells), default=0), min(max(map(len, words), default=0), _FOLDED)


def _fitted(columns: Sequence[tuple[int, int]], room: int) -> list[int]:
    """The width of each column of (longest cell, longest word): the widest give way first, none below its words."""
    widths = [max(column) for column in columns]
    while sum(widths) + _GAP * (len(widths) - 1) > room:
        able = [at for at, (_, word) in enumerate(columns) if widths[at] > word]
        if not able:
            break
        widths[max(able, key=lambda at: widths[at])] -= 1
    return widths


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one pair a line, the values aligned."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        say(f"{name:<{width}}  {value}".rstrip() + "\n")


def size(count: float) -> str:
    """Bytes as a person reads them, in powers of a thousand, as disks and downloads are sold: `2.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def quantity(count: float) -> str:
    """A number of parameters or tokens: `260K`, `1.24B`."""
    for unit in ("", "K", "M"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}B" if count < 1000 else f"{count:,.0f}B"


@contextmanager
def bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar over bytes at a terminal, moved by `show(what is being done, bytes done, bytes in all)`; None elsewhere."""
    if not is_terminal(sys.stderr):
        yield None
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(compact=True),
    )
    with progress.Progress(*columns, console=console(sys.stderr), transient=True) as shown:
        task = shown.add_task("", total=None)
        # A total that was estimated (Meta's servers do not say) may turn out too small.
        yield lambda doing, done, total: shown.update(task, description=doing, completed=done, total=max(done, total))


class Waiting:
    """A context in which a person at a terminal sees, after half a second, what is going on; `done()` ends it early."""

    def __init__(self, say: Callable[[], str]) -> None:
        self._say = say
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Waiting:
        if is_terminal(sys.stderr):
            self._thread = threading.Thread(target=self._show, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.done()

    def done(self) -> None:
        """Take the sign away; the line is as it was. May be called twice."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _show(self) -> None:
        if self._done.wait(PATIENCE):
            return
        from rich.text import Text

        # As Text: in a plain str rich takes a path's square brackets for its markup.
        with console(sys.stderr).status(Text(self._say())) as status:
            while not self._done.wait(0.2):
                status.update(Text(self._say()))
