"""How soon does `puna run cria` show its first token, how large is the core, how long do --help and import take?

Each figure is the median of several runs of the whole process, in a fresh interpreter each time; the install size is
that of a virtual environment made for the purpose, pip and setuptools left out.

    python bench/startup.py --runs 11 --record
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common

SCRIPT = str(Path(sys.executable).parent / "puna")


def first_byte(command: list[str]) -> float:
    """Seconds from starting a process to its first byte on stdout; the rest is read and thrown away."""
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - began
        process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return seconds


def whole(command: list[str]) -> float:
    """Seconds a process takes."""
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def install_mb() -> float:
    """Megabytes of site-packages after installing the core into a fresh environment, without pip and setuptools."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = str(Path(folder) / "bin" / "python")
        root = Path(__file__).resolve().parent.parent
        subprocess.run([python, "-m", "pip", "install", "--quiet", str(root)], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools", "pip"], check=True)
        size = 0
        for file in (Path(folder) / "lib").rglob("*"):
            if file.is_file() and not file.is_symlink():
                size += file.stat().st_size
        return size / 1e6


def make_run_s() -> float:
    """Seconds of `make run` in a fresh clone: environment, compiler, installation, story."""
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(root), folder], check=True)
        return whole(["make", "-C", folder, "run"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/startup.jsonl")
    options = parser.parse_args()
    story = [SCRIPT, "run", "cria", "Once upon a time", "--max-tokens", "8", "--seed", "7"]
    commands: dict[str, Any] = {
        "first_token_s": lambda: first_byte(story),
        "help_s": lambda: whole([SCRIPT, "--help"]),
        "import_puna_llm_s": lambda: whole([sys.executable, "-c", "import puna.llm"]),
        "bare_python_s": lambda: whole([sys.executable, "-c", "pass"]),
    }
    row: dict[str, Any] = {"question": "startup"}
    for name, run in commands.items():
        run()
        row[name] = common.summary([run() for _ in range(options.runs)])
    row["core_install_mb"] = install_mb()
    row["fresh_make_run_s"] = make_run_s()
    common.record("startup", row | common.pedigree(), options.record)


if __name__ == "__main__":
    main()
