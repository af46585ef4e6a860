"""From what a person types for MODEL to where the model lies.

What it is: one rule, used by every command: `cria`, then a path that exists, then a pulled model's name.
What it is not: a download. A model that was never pulled is an error that says how to pull it.
What is surprising: a file named like a hub id wins over the hub; only one named `cria` needs its `./`.
"""

from __future__ import annotations

import re
from pathlib import Path

from puna.errors import CheckpointError
from puna.settings import typed_path
from puna.weights.embedded import EMBEDDED, embedded_folder

_SUFFIXES = {".bin", ".pt", ".pth", ".safetensors", ".gguf"}
_HUB_FILE = re.compile(r"[^/:]+/[^/:]+:[^/:]+")


def find_model(model: str) -> Path:
    """The file or folder of a model: `cria`, a path, a hub id (`org/name`, `org/name:Q4_K_M`) or a short name.

    Raises CheckpointError for a path that is not there, HubError for a name that is unknown or not pulled yet.
    """
    if model == EMBEDDED:
        return embedded_folder()
    path = typed_path(model)
    try:
        if path.exists():
            return path
    except OSError as error:
        raise CheckpointError(f"{model}: cannot be read ({error.strerror or error}).", remedy="Check it.") from error
    if looks_like_path(model):
        raise CheckpointError(
            f"{model}: no such file or folder.", remedy="Check the path; `puna list` shows models that were pulled."
        )
    from puna.weights.hub import resolve

    return resolve(model)


def looks_like_path(model: str) -> bool:
    """Whether a person who typed this meant a path, be there one or not.

    A hub id has one slash, between two names, and after a colon it may name a file.
    """
    return (
        model.startswith((".", "/", "~"))
        or model.endswith("/")
        or "\\" in model
        or model.count("/") > 1
        or (Path(model).suffix in _SUFFIXES and not _HUB_FILE.fullmatch(model))
    )
