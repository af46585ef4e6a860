"""What a person may set from outside: the one module that reads Puna's environment variables.

What it is not: the hub's settings. `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE` belong to
huggingface_hub, which reads them itself, so that Puna and every other program on the machine agree on them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def puna_home() -> Path:
    """The folder where Puna keeps its state: `PUNA_HOME`, else `puna` in the platform's data folder.

    The platform's data folder is `%LOCALAPPDATA%` on Windows, `~/Library/Application Support` on macOS, and
    `$XDG_DATA_HOME` or `~/.local/share` elsewhere. The folder is not created here. As the XDG base directory
    specification asks, a relative `XDG_DATA_HOME` is ignored.
    """
    if chosen := os.environ.get("PUNA_HOME"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        data = os.environ.get("LOCALAPPDATA", "")
        return (Path(data) if data else Path.home() / "AppData" / "Local") / "puna"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "puna"
    data = os.environ.get("XDG_DATA_HOME", "")
    return (Path(data) if Path(data).is_absolute() else Path.home() / ".local" / "share") / "puna"
