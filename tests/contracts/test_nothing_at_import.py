"""Importing Puna does nothing: no file but code is opened, no thread or process starts, no socket, nothing heavy loads.

What it is: every module of the package (but the few made of a heavy library) imported in one fresh interpreter under an
audit hook (PEP 578).
What is surprising: NumPy is imported before the hook, because what NumPy opens is NumPy's affair; threads started in
C++ raise no audit event (nor does any thread before Python 3.12), so starting one from Python is watched by hand, and
on Linux the kernel's own count is compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

import pytest

HEAVY = (
    "torch", "triton", "transformers", "tokenizers", "tiktoken", "sentencepiece", "jinja2", "huggingface_hub", "rich",
    "safetensors", "httpx", "requests", "regex", "asyncio.base_events",
)  # fmt: skip
LATE = (
    "puna.kernels.torch_ops", "puna.kernels.triton", "puna.engine.torch_runner", "puna.train",  # torch's
    "puna.text.template",  # jinja2's
    "puna.gateway", "puna.bench.serve",  # asyncio's
    "puna.server",  # FastAPI's
)  # fmt: skip
"""Modules made of a heavy library, imported inside functions when their turn comes. They are not imported here, so that
a module which imports one of them outside a function is found."""
EXTENSION = "puna.kernels._cpu"

WATCH = """
import _thread, importlib, json, sys, threading
import numpy

def threads():
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))
    except FileNotFoundError:  # not Linux
        return 1

modules, heavy, extension = json.loads(sys.argv[1])
before = threads()
events, watching = [], True

def hook(event, arguments):
    if not watching:
        return
    kind = event.split(".")[0]
    if event == "open":
        path = str(arguments[0])
        if not path.endswith((".py", ".pyc", ".so", ".pyd", ".dylib")) and ".dist-info" not in path:
            events.append(f"opened {path}")
    elif kind in ("socket", "subprocess", "urllib", "http", "shutil", "tempfile", "sqlite3", "webbrowser"):
        events.append(event)
    elif event in ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.putenv", "os.mkdir", "os.remove",
                   "os.rename", "os.chdir", "os.chmod", "mmap.__new__", "signal.signal"):
        events.append(f"{event} {arguments}")

def watched(start):
    def noting(*arguments, **named):
        events.append("a thread started")
        return start(*arguments, **named)
    return noting

_thread.start_new_thread = watched(_thread.start_new_thread)
threading.Thread.start = watched(threading.Thread.start)
sys.addaudithook(hook)
for name in modules:
    try:
        importlib.import_module(name)
    except ImportError as error:
        if error.name != extension:  # running without the compiled extension is a supported state
            raise
watching = False
if threads() != before:
    events.append(f"{threads() - before} native threads started")
print(json.dumps([events, [name for name in heavy if name in sys.modules]]))
"""


def watch(child: Callable[..., str], modules: list[str]) -> tuple[list[str], list[str]]:
    """(what importing these modules did that it must not, heavy modules it loaded)."""
    events, heavy = json.loads(child(WATCH, json.dumps([modules, HEAVY, EXTENSION])))
    return events, heavy


def test_importing_every_module_does_nothing(child: Callable[..., str], sources: Mapping[PurePosixPath, Any]) -> None:
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in sources]
    names = [n for n in names if not any(n == t or n.startswith(f"{t}.") for t in LATE) and n != "puna.__main__"]
    assert {"puna.kernels.ops", "puna.models.decoder", "puna.errors"} <= set(names)
    assert watch(child, names) == ([], [])


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("open(__file__.replace('.py', '.json')).read()", "opened"),
        ("import threading; threading.Thread(target=int).start()", "a thread started"),
        ("import _thread; _thread.start_new_thread(int, ())", "a thread started"),
        ("import socket; socket.getaddrinfo('localhost', 80)", "socket.getaddrinfo"),
        ("import subprocess, sys; subprocess.run([sys.executable, '-c', ''])", "subprocess.Popen"),
        ("import os; os.environ['A'] = 'b'", "os.putenv"),
    ],
)
def test_a_busy_import_is_found(child: Callable[..., str], tmp_path: Any, code: str, said: str) -> None:
    (tmp_path / "busy.json").write_text("{}")
    (tmp_path / "busy.py").write_text(code)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{WATCH}"
    events, _ = json.loads(child(program, json.dumps([["busy"], HEAVY, EXTENSION])))
    assert any(said in event for event in events), events


def test_a_heavy_import_is_found(child: Callable[..., str], tmp_path: Any) -> None:
    (tmp_path / "jinja2.py").write_text("")
    (tmp_path / "busy.py").write_text("import jinja2")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{WATCH}"
    _, heavy = json.loads(child(program, json.dumps([["busy"], HEAVY, EXTENSION])))
    assert heavy == ["jinja2"]
