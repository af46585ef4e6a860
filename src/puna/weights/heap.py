"""What the C library does with memory that is freed, for a process that loads and unloads models.

What it is: two calls of glibc's; elsewhere they do nothing.
What it is not: an allocator. Weights that are mapped from files, and the cache, are no part of its heaps.
What is surprising: `one_heap` must come before the first thread, so before numpy is imported.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

_M_ARENA_MAX = -8  # malloc.h


def trim_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (glibc does)."""
    if (trim := _glibc("malloc_trim")) is not None:
        trim(0)


def one_heap() -> None:
    """Have all threads that begin from now on share the C library's first heap, where it would make more (glibc does).

    Each model is loaded by a thread of its own and computed by another. With a heap for each of them (up to 8 a core),
    what little outlives a model keeps pages of another heap every time, and a process that switches between models
    grows for hours (mallopt(3), M_ARENA_MAX).
    """
    if (mallopt := _glibc("mallopt")) is not None:
        mallopt(_M_ARENA_MAX, 1)


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library, None where that is not glibc."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - others have a mallopt of other numbers
        function: Callable[..., int] = getattr(library, name)
    except (AttributeError, OSError, TypeError):
        return None
    return function
