"""`puna doctor`: what this machine has, and which implementation each operation uses, and why.

What it is: facts, read from the system at this moment.
What it is not: a repair. Nothing is changed, and torch is not imported unless `--device` asks for a device of its.
What is surprising: in a container the machine's own figures mislead, so the control group's limits stand beside them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from puna import __version__
from puna.cli import terminal
from puna.engine import native_runner
from puna.kernels import ops
from puna.plan import SHARE
from puna.settings import DoctorSettings, puna_home
from puna.weights.fetch import free_space
from puna.weights.limits import available, cgroup_limit, memory, read_text

PACKAGES = (
    "numpy", "tokenizers", "tiktoken", "sentencepiece", "huggingface_hub", "jinja2", "rich", "llguidance", "torch",
)  # fmt: skip
ISA_FLAGS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip


def main(settings: DoctorSettings) -> int:
    """Run the command."""
    ops.select(settings.kernels)
    found = report(settings.device)
    if settings.json:
        terminal.document(found)
        return 0
    terminal.facts(_lines(found))
    print()
    terminal.table(("OPERATION", "IMPLEMENTATION", "WHY"), [tuple(row.values()) for row in found["operations"]])
    return 0


def report(device: str) -> dict[str, Any]:
    """What `--json` prints: plain data, memory and room in bytes. Raises DeviceError for a device that is not there."""
    return {
        "puna": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "memory": memory(),
        "cache_bytes": None if (free := available()) is None else int(SHARE * free),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": _device(device),
        "folders": {"PUNA_HOME": _folder(puna_home()), "hub cache": _folder(_hub_cache())},
        "kernels": ops.summary(),
        "steps": dict(zip(("implementation", "reason"), native_runner.steps(), strict=True)),
        "operations": [asdict(choice) for choice in ops.table()],
    }


def _cpu() -> dict[str, Any]:
    info = {
        key.strip(): value.strip()
        for key, colon, value in (line.partition(":") for line in read_text(Path("/proc/cpuinfo")).splitlines())
        if colon
    }
    flags = (info.get("flags") or info.get("Features") or "").split()
    quota = (cgroup_limit("cpu.max", read_text(Path("/proc/self/cgroup"))) or "").split()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": ops.machine(),
        "instruction_sets": [name for name in ISA_FLAGS if name in flags],
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "quota_cores": int(quota[0]) / int(quota[1]) if len(quota) == 2 else None,
        "threads": ops.threads(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(device: str) -> dict[str, str]:
    if device == "cpu":
        return {"name": "cpu", "description": "the CPU, without torch"}
    from puna.llm import torch_engine

    return {"name": device, "description": torch_engine(device).describe(device)}


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _folder(path: Path) -> dict[str, Any]:
    """A folder and the room on its disk."""
    return {"path": str(path), "exists": path.exists(), "free_bytes": free_space(path)}


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, memory = found["cpu"], found["memory"]
    quota = "" if cpu["quota_cores"] is None else f", {cpu['quota_cores']:g} allowed by the control group"
    usable = "" if cpu["usable_cores"] == cpu["cores"] else f", {cpu['usable_cores']} usable"
    lines = [
        ("puna", f"{found['puna']}, Python {found['python']} ({sys.executable}), {found['platform']}"),
        ("CPU", f"{cpu['name']} ({cpu['architecture']}): {cpu['cores']} cores{usable}{quota}"),
        ("instructions", " ".join(cpu["instruction_sets"]) or "not known on this platform"),
        ("kernels", f"{found['kernels']}, threads: {cpu['threads'] or 'as NumPy has it'}"),
        ("a step", f"{found['steps']['implementation']}: {found['steps']['reason']}"),
    ]
    if memory["total_bytes"] is not None:
        limit = "" if memory["limit_bytes"] is None else f", {terminal.size(memory['limit_bytes'])} allowed"
        lines.append(
            (
                "memory",
                f"{terminal.size(memory['total_bytes'])}, {terminal.size(memory['available_bytes'])} available{limit}",
            )
        )
    if found["cache_bytes"] is not None:
        what = f"{terminal.size(found['cache_bytes'])} at most: half of what is available, less half of the weights"
        lines.append(("KV cache", what))
    installed = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    missing = ", ".join(name for name, version in found["packages"].items() if not version)
    lines += [
        ("packages", installed),
        ("not installed", missing or "(none)"),
        ("device", f"{found['device']['name']}: {found['device']['description']}"),
    ]
    for name, folder in found["folders"].items():
        there = "" if folder["exists"] else " (not there yet)"
        lines.append((name, f"{folder['path']}{there}, {terminal.size(folder['free_bytes'])} free"))
    return lines
