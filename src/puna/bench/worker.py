"""One engine in a process of its own, seen from here: ask, and it answers.

What it is not: the engine; see `protocol` for the other end.
What is surprising: the engine's interpreter need not be this one (peers may live in another environment), so it is
started by a line of Python that takes Puna from here, and all else from there. What it says on stderr is kept, and its
end is shown when it fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.errors import DeviceError, PunaError

_START = (
    "import runpy, sys; root = sys.argv.pop(1); sys.path.insert(0, root); import puna; sys.path.remove(root); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
_MODULES = {"llama-cpp-python": "llama_cpp", "openvino-genai": "openvino_genai"}  # where it is not the package's name
_SAID = 1500  # characters of an engine's stderr that are shown


@dataclass(frozen=True)
class EngineSpec:
    """How to start an engine: its name for people, the module that is it, that module's arguments, the interpreter."""

    name: str
    module: str
    arguments: dict[str, Any] = field(default_factory=dict)
    python: str = sys.executable


class Worker:
    """A running engine. A context manager: leaving it ends the process."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        root = str(Path(__file__).resolve().parents[2])
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [spec.python, "-c", _START, root, spec.module, json.dumps(spec.arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, encoding="utf-8",
        )  # fmt: skip

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """Its answer to a request. Raises PunaError, with what the engine said, when it failed or has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **what}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: reading says so
        line = self._process.stdout.readline()
        if not line:
            raise self._failed(do, f"it ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._failed(do, answer["error"])
        return answer

    def peak_bytes(self) -> int | None:
        """The most memory that the process has held so far (mapped files that were read included).

        None where the system does not say. Not getrusage: a child's figure starts from its parent's size.
        """
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), None)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=30)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._said.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _failed(self, do: str, why: str) -> PunaError:
        self._said.seek(0)
        said = self._said.read().decode("utf-8", "replace").strip()[-_SAID:]
        return PunaError(f"{self.spec.name} failed at {do!r}: {why}.", remedy=said and f"It said:\n{said}")


def check_installed(engine: str, package: str, python: str) -> None:
    """Raise DeviceError, naming what to install, where an engine's package is not there. Nothing is imported."""
    module = _MODULES.get(package, package)
    check = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        absent = subprocess.run([python, "-c", check], capture_output=True).returncode
    except OSError as error:
        raise DeviceError(
            f"--peer-python {python}: {error.strerror}.", remedy="Name the Python that has the peers installed."
        ) from error
    if absent:
        raise DeviceError(
            f"--against {engine} needs the package {package}, which {python} does not have.",
            remedy=f"`pip install {package}`; in an environment of its own if you like, whose Python --peer-python "
            "names. Puna's checkout lists all peers in the dependency group `bench`.",
        )
