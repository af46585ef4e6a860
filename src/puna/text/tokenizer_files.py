"""The small JSON files beside a tokenizer, and how any file of a stranger is read.

What it is: tokenizer_config.json, special_tokens_map.json, generation_config.json and the chat template's own files,
read strictly into `Beside`.
What it is not: a reader of tokenizers.
What is surprising: a config that says null about a token says that there is none; one that says nothing leaves it to
the names the family uses. `Unsaid` keeps the two apart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.errors import TokenizerError

MAX_CONFIG_BYTES = 16 << 20
"""The largest JSON file beside a tokenizer that is read; the largest real one has 0.3 MB."""

REMEDY_FETCH = "Fetch the file again from where the model came from; compare its size and sha256 with the source."


class Unsaid:
    """The config says nothing about this token, which is not the same as saying null."""


@dataclass(frozen=True)
class Beside:
    """What the small JSON files beside a tokenizer say about it."""

    bos_token: str | Unsaid | None = field(default_factory=Unsaid)
    eos_token: str | Unsaid | None = field(default_factory=Unsaid)
    adds_bos: bool | None = None
    chat_template: str | None = None
    template_place: Path | None = None  # a file that holds the template itself; else it lies in the folder
    eos_ids: tuple[int, ...] = ()
    added: Mapping[int, str] = field(default_factory=dict)


def read_limited(path: Path, limit: int) -> bytes:
    """The bytes of a file; TokenizerError where it cannot be read, or is longer than limit (then it is not read)."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(limit + 1) if size <= limit else b""  # a pipe claims no size, hence the + 1
    except OSError as error:
        raise TokenizerError(
            f"{path} cannot be read: {error.strerror or error}.", remedy="Check the path and its permissions."
        ) from error
    if max(size, len(data)) > limit:
        raise TokenizerError(
            f"{path} is larger than {limit >> 20} MiB, more than any such file is.", remedy=REMEDY_FETCH
        )
    return data


def _read_text(path: Path) -> str:
    data = read_limited(path, MAX_CONFIG_BYTES)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text ({error}).", remedy=REMEDY_FETCH) from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON ({error}).", remedy=REMEDY_FETCH) from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} does not hold a JSON object.", remedy=REMEDY_FETCH)
    return value


def _wrong(path: Path, key: str, expected: str, value: object) -> TokenizerError:
    return TokenizerError(f"{path}: {key} must be {expected}, not {str(value)[:80]!r}.", remedy=REMEDY_FETCH)


def _token_name(path: Path, key: str, value: object) -> str | None:
    """A token as the hub's files spell one: a string, an AddedToken object with "content", or null."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise _wrong(path, key, 'a string, an object with "content", or null', value)
    return value


def read_beside(folder: Path) -> Beside:
    """What the files in a folder say; TokenizerError, naming file and key, for a damaged one."""
    config_path, map_path = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config, special_map = _read_json(config_path), _read_json(map_path)
    tokens: dict[str, str | Unsaid | None] = {}
    for key in ("bos_token", "eos_token"):
        tokens[key] = Unsaid()
        for path, values in ((config_path, config), (map_path, special_map)):
            if key in values:
                tokens[key] = _token_name(path, key, values[key])
                break
    added: dict[int, str] = {}
    entries = config.get("added_tokens_decoder", {})
    if not isinstance(entries, dict):
        raise _wrong(config_path, "added_tokens_decoder", "an object", entries)
    for key, entry in entries.items():
        name = _token_name(config_path, f"added_tokens_decoder[{key[:20]}]", entry)
        if name is None or not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise _wrong(config_path, "added_tokens_decoder", "ids with their tokens", key)
        added[int(key)] = name
    adds_bos = config.get("add_bos_token")
    if not isinstance(adds_bos, bool | None):
        raise _wrong(config_path, "add_bos_token", "true, false or null", adds_bos)
    return Beside(
        adds_bos=adds_bos,
        bos_token=tokens["bos_token"],
        eos_token=tokens["eos_token"],
        chat_template=_read_chat_template(folder, config_path, config),
        eos_ids=_read_eos_ids(folder / "generation_config.json"),
        added=added,
    )


def _read_chat_template(folder: Path, config_path: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template.json, else tokenizer_config.json's: transformers' own order."""
    if (folder / "chat_template.jinja").is_file():
        return _read_text(folder / "chat_template.jinja")
    path, value = folder / "chat_template.json", _read_json(folder / "chat_template.json").get("chat_template")
    if value is None:
        path, value = config_path, config.get("chat_template")
    if isinstance(value, list):  # several named ones: the one called default is the one for chat
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
        if value is None:
            raise _wrong(path, "chat_template", 'one template, or a list in which one is named "default"', list(named))
    if value is not None and not isinstance(value, str):
        raise _wrong(path, "chat_template", "a string", value)
    return value


def _read_eos_ids(path: Path) -> tuple[int, ...]:
    value = _read_json(path).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool):
            raise _wrong(path, "eos_token_id", "an integer or a list of integers", value)
    return tuple(ids)
