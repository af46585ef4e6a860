"""The `puna` command: finds the subcommand, runs it, and turns what goes wrong into a message and an exit code.

What it is: dispatch. A subcommand's module (`run.py`, `show.py`, …) has `main(settings) -> int` and is imported only
when it is asked for, so `puna --help` costs what argparse costs.
What it is not: a place for a command's work.
What is surprising: with `--json` an error too is one JSON document on stdout, beside the message on stderr and the exit
code: `{"error": {"kind", "message", "remedy"}}`. Whoever reads stdout always gets a document.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence

from puna import __version__
from puna.cli import flags
from puna.errors import PunaError, UsageError
from puna.settings import COMMANDS, Settings, debug_wanted

INTERRUPTED = 130
EXIT_CODES = {
    0: "done",
    1: "anything else: a hub that cannot be reached, a full disk; also when nobody reads the output any more",
    2: "the input is at fault: a flag, a file, a prompt",
    INTERRUPTED: "interrupted (Ctrl-C)",
}
"""What `puna` returns, and what it means."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `puna` with these arguments (default: the process's own); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _speak_any_language()
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    as_json, debug = "--json" in own, "--debug" in own or debug_wanted()
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail(as_json, "Interrupted", "Interrupted.", "", INTERRUPTED)
    except BrokenPipeError:
        return _unread()
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc(file=sys.stderr)
        return _report(error, as_json)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"puna {__version__}")
        return 0
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    kind = COMMANDS.get(name)
    if kind is None:
        near = flags.suggestion(name, [*COMMANDS, "--help", "--version"])
        raise UsageError(f"puna has no command {name!r}.", remedy=near or "`puna --help` lists the commands.")
    try:
        settings = flags.read(kind, rest)
    except flags.HelpWanted as wanted:
        print(wanted)
        return 0
    return _run(name, settings)


def _run(name: str, settings: Settings) -> int:
    code: int = importlib.import_module(f"puna.cli.{name.replace(' ', '_')}").main(settings)
    return code


def overview() -> str:
    """What `puna --help` prints."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {flags.summary(settings)}" for name, settings in COMMANDS.items())
    return (
        "Usage: puna COMMAND [options]\n\n"
        "Run Meta's Llama family on hardware you own.\n\n"
        f"Commands:\n{commands}\n\n"
        "`puna COMMAND --help` describes one. `puna --version` prints the version.\n"
        'Try: puna run cria "Once upon a time"'
    )


def _report(error: Exception, as_json: bool) -> int:
    """What went wrong, for people and for programs; returns the exit code."""
    kind = type(error).__name__
    if isinstance(error, PunaError):
        return _fail(as_json, kind, error.message, error.remedy, error.exit_code)
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return _fail(as_json, kind, f"{error.strerror or error}{where}.", "", 1)
    if isinstance(error, MemoryError):
        remedy = "Use a smaller model, or close other programs. `puna show MODEL` says what a model needs."
        return _fail(as_json, kind, "There is not enough memory.", remedy, 1)
    return _fail(
        as_json,
        kind,
        f"Unexpected error: {kind}: {error}",
        "This is a fault in Puna. Please report it, with what --debug shows when added to the same command.",
        1,
    )


def _fail(as_json: bool, kind: str, message: str, remedy: str, code: int) -> int:
    try:
        from puna.cli import terminal

        terminal.note(f"puna: {message}")
        if remedy:
            terminal.note(remedy)
        if as_json:
            terminal.document({"error": {"kind": kind, "message": message, "remedy": remedy}})
        sys.stdout.flush()
    except BrokenPipeError:
        return _unread()
    return code


def _unread() -> int:
    """Nobody reads stdout any more (`| head`): end quietly, and keep the interpreter from flushing into the void."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except io.UnsupportedOperation:
        # stdout is not a file here (a test has put something in its place): there is nothing to redirect.
        return 1
    return 1


def _speak_any_language() -> None:
    """Pipes and files get UTF-8, as stdin is read; a terminal that lacks a character shows its code.

    A stream that was closed before the start (`>&-`, a program without a console) is None in Python: what is said
    there goes nowhere.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")
