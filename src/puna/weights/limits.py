"""What the system lets this process have: the control group's limits, and memory.

What it is: facts read from Linux's files at this moment; elsewhere every answer is that nothing is known.
What it is not: a budget. Who loads a model decides what to do with them.
What is surprising: in a container the machine's own figures mislead, so the control group's stand beside them.
"""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def read_text(path: Path) -> str:
    """A file of the system, empty where this system has none such."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cgroup_limit(file: str, membership: str, root: Path = CGROUPS) -> str | None:
    """The contents of a control group's `file` (such as `cpu.max`), the nearest to this process that is not `max`.

    `membership` is `/proc/self/cgroup`'s text; version 2 of control groups only (its line begins with `0::`).
    """
    line = next((line for line in membership.splitlines() if line.startswith("0::")), None)
    if line is None:
        return None
    group = root / line[3:].lstrip("/")
    while group == root or root in group.parents:
        text = read_text(group / file)
        if text and not text.startswith("max"):
            return text.strip()
        group = group.parent
    return None


def memory() -> dict[str, int | None]:
    """Bytes of memory: the machine's, those available on it, and those that the control group allows."""
    info = {
        key: int(value.split()[0]) * 1024
        for key, _, value in (line.partition(":") for line in read_text(Path("/proc/meminfo")).splitlines())
        if value.strip().endswith("kB")
    }
    limit = cgroup_limit("memory.max", read_text(Path("/proc/self/cgroup")))
    return {
        "total_bytes": info.get("MemTotal"),
        "available_bytes": info.get("MemAvailable"),
        "limit_bytes": int(limit) if limit else None,
    }


def available() -> int | None:
    """Bytes of memory that a model may take: what is available, or what the control group allows if that is less."""
    found = memory()
    known = [value for value in (found["available_bytes"], found["limit_bytes"]) if value is not None]
    return min(known, default=None)
