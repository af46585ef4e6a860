"""How a new file or folder appears: all of it, or nothing.

What it is: a hidden place beside the destination, which takes its name at the very end.
What it is not: a lock: two writers of one destination at one moment are not kept apart.
What is surprising: an interruption or a full disk removes the hidden place; a power cut or SIGKILL leaves it, and
nothing called as the destination.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from puna.errors import PunaError

SPARE = 1 << 26
"""Bytes besides the tensors that the disk must have: headers, tokenizer and configs."""


@contextmanager
def appearing(dest: Path, nbytes: int, *, replace: bool = False) -> Iterator[Path]:
    """A path beside `dest` to write to, a file or a folder; it becomes `dest` when the block ends without an error.

    `nbytes` is what its tensors take. A file that is at `dest` already is an error, or is replaced where `replace` says
    so. Raises PunaError where the disk has no room, or fails while it is written; then what is at `dest` is what was
    there before, and the folders above it that were made for it are gone.
    """
    absent = [parent for parent in dest.parents if not parent.exists()]  # deepest first
    unfinished = dest.parent / f".{dest.name}.unfinished-{secrets.token_hex(4)}"
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        needed, free = nbytes + SPARE, shutil.disk_usage(dest.parent).free
        if free < needed:
            raise PunaError(
                f"{dest}: it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there.",
                remedy="Make room, or name a place on another disk.",
            )
        yield unfinished
        if unfinished.is_dir():
            _sync_folder(unfinished)
        if dest.is_dir():
            dest.rmdir()
        elif dest.exists() and not replace:  # since it was looked for; a file would be replaced without a word
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        unfinished.replace(dest)
        _sync_folder(dest.parent)
    except OSError as error:
        raise PunaError(
            f"{dest}: could not be written ({error.strerror or error}).", remedy="Nothing was left there. Try again."
        ) from error
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)
        _remove_empty(absent)


def _remove_empty(folders: list[Path]) -> None:
    """Remove those of nested folders, deepest first, that are empty: what a conversion made and then had no use for."""
    for folder in folders:
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue  # the conversion failed before it was made
        except OSError:
            return  # the finished conversion, or what another program put there meanwhile, lies in it


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
