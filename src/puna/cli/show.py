"""`puna show`: what a model is, from its files and the catalog, and the memory it needs.

What it is not: a load. The checkpoint is opened and checked, its weights are not read.
What is surprising: memory is counted for the CPU, where weights stay as stored and the KV cache is what
`--kv-type auto` makes; it grows with the conversation, so the figure for the whole context is a limit, not a start.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.catalog import models as catalog
from puna.cli import terminal
from puna.engine.runner import PAGE, local_page_bytes, page_bytes, settled_kv_type, window
from puna.models.config import DecoderConfig
from puna.models.llama3_vision_config import MllamaConfig
from puna.models.llama4_config import Llama4Config
from puna.models.registry import definition
from puna.plan import conversation_bytes
from puna.settings import ShowSettings
from puna.weights import gguf_model
from puna.weights.checkpoint import Checkpoint, open_checkpoint
from puna.weights.files import shown as shown_word
from puna.weights.find import find_model
from puna.weights.load import chat_format_of, notes_on, read_words

if TYPE_CHECKING:
    from puna.text.tokenizer import Tokenizer
    from puna.weights.gguf import GGUF

SHORT = 8192
"""Tokens of a long conversation; what most people's memory must hold, whatever the model could."""


def main(settings: ShowSettings) -> int:
    """Run the command."""
    path = find_model(settings.model)
    shown = describe(settings.model, open_checkpoint(path), settings.tokenizer)
    if settings.json:
        terminal.document(shown)
    else:
        terminal.facts(_lines(shown))
    return 0


def describe(name: str, checkpoint: Checkpoint, tokenizer: Path | None = None) -> dict[str, Any]:
    """What `--json` prints for a checkpoint: plain data, sizes in bytes, lengths in tokens."""
    config = checkpoint.config
    words, chat_format = _text(checkpoint, tokenizer or checkpoint.tokenizer)
    lengths = sorted({min(SHORT, config.context_length), config.context_length})
    all_fp32 = all(tensor.dtype == "fp32" for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2)
    kv_type = settled_kv_type("auto", config, all_fp32=all_fp32)
    caches = {str(length): kv_cache_bytes(config, length, kv_type) for length in lengths}
    return {
        "name": name,
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "architecture": architecture(config),
        "generation": config.generation,
        "parameters": definition(config).parameter_count(config),
        "context_length": config.context_length,
        "config": asdict(config),
        "dtypes": dict(Counter(tensor.dtype for tensor in checkpoint.tensors.values())),
        "chat_format": chat_format,
        "tokenizer": None
        if words is None
        else {"kind": words.kind, "path": str(words.source), "vocabulary": words.vocab_size},
        "licence": licence(name, checkpoint.folder, checkpoint.gguf),
        "gguf": None if checkpoint.gguf is None else _gguf(checkpoint.gguf),
        "file_bytes": _file_bytes(checkpoint),
        "memory": {
            "weights_bytes": checkpoint.nbytes,
            "kv_type": kv_type,
            "kv_cache_bytes": caches,
            "total_bytes": {length: checkpoint.nbytes + cache for length, cache in caches.items()},
        },
        "notes": notes_on(checkpoint, "auto"),
    }


def architecture(config: DecoderConfig) -> str:
    """What kind of model a config is of, in a few words."""
    if isinstance(config, Llama4Config):
        kind = "Llama 4 decoder"
        if config.moe_layers:
            kind += f", {config.experts} experts in {len(config.moe_layers)} layers, {config.experts_per_token} a token"
        sees = config.vision is not None
    elif isinstance(config, MllamaConfig):
        kind = f"Llama 3.2 Vision decoder, {len(config.cross_layers)} layers that attend to the picture"
        sees = config.vision is not None
    else:
        kind, sees = "dense Llama decoder", False
    return f"{kind}{', with a vision encoder' if sees else ''} ({config.generation})"


def kv_cache_bytes(config: DecoderConfig, positions: int, kv_type: str) -> int:
    """Bytes of the CPU's KV cache of that type for one conversation of that many tokens."""
    pages = page_bytes(config, kv_type), local_page_bytes(config, kv_type)
    return conversation_bytes(positions, PAGE, *pages, window(config))


def licence(name: str, folder: Path, whole: GGUF | None = None) -> str | None:
    """The licence's name from the catalog, else what a GGUF says, else the first line of a LICENSE file beside it."""
    if (entry := catalog.find(name)) is not None:
        return entry.licence_name
    if whole is not None and (said := gguf_model.licence(whole.metadata)) is not None:
        return said
    for path in sorted(p for p in folder.iterdir() if p.name.upper().startswith(("LICENSE", "LICENCE"))):
        if path.is_file():
            with path.open("rb") as file:
                lines = file.read(4096).decode("utf-8", errors="replace").splitlines()
            first = next((line.strip() for line in lines if line.strip()), "")
            return f"{first[:100]} ({path.name})" if first else path.name
    return None


def _gguf(whole: GGUF) -> dict[str, Any]:
    """What a GGUF says of itself."""
    name = whole.metadata.get("general.name")
    return {
        "version": whole.version,
        "parts": len(whole.files),
        "name": name[:200] if isinstance(name, str) else None,
        "file_type": gguf_model.file_type(whole.metadata),
    }


def _text(checkpoint: Checkpoint, file: Path | None) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer, if there is one, and the name of the chat format, if the model has one."""
    if file is None:
        return None, None
    words = read_words(checkpoint, file)
    found = chat_format_of(checkpoint, words)
    return words, None if found is None else found.name


def _file_bytes(checkpoint: Checkpoint) -> int:
    """Bytes on disk of the files the weights lie in."""
    return sum(path.stat().st_size for path in checkpoint.files)


def _lines(shown: dict[str, Any]) -> list[tuple[str, str]]:
    config, tokenizer, memory = shown["config"], shown["tokenizer"], shown["memory"]
    count, gguf = shown["parameters"], shown["gguf"] or {"name": None, "file_type": None}
    mix = f"{gguf['file_type']}: " if gguf["file_type"] else ""
    lines = [
        ("model", shown["name"]),
        ("path", f"{shown['path']} ({shown['format']}, {terminal.size(shown['file_bytes'])})"),
        ("architecture", shown["architecture"]),
        ("parameters", f"{count:,} ({terminal.quantity(count)})"),
        (
            "sizes",
            f"{config['layers']} layers, width {config['dim']}, feed-forward {config['hidden_dim']}, {config['heads']} "
            f"heads of {config['head_dim']}, {config['kv_heads']} key/value heads, vocabulary {config['vocab_size']}",
        ),
        ("context", f"{shown['context_length']} tokens"),
        ("weights", mix + ", ".join(f"{number} × {dtype}" for dtype, number in shown["dtypes"].items())),
        ("chat format", shown["chat_format"] or "none: it continues text"),
        (
            "tokenizer",
            f"{tokenizer['kind']}, {tokenizer['vocabulary']} tokens, {tokenizer['path']}"
            if tokenizer
            else "none beside the weights: name one with --tokenizer",
        ),
        ("licence", shown["licence"] or "not known: there is no LICENSE file beside the weights"),
    ]
    if gguf["name"]:
        lines.insert(1, ("called", shown_word(gguf["name"])))
    for length, total in memory["total_bytes"].items():
        cache = memory["kv_cache_bytes"][length]
        lines.append(
            (
                "memory",
                f"{terminal.size(total)} with {length} tokens of context ({terminal.size(memory['weights_bytes'])} of "
                f"weights, {terminal.size(cache)} of {memory['kv_type']} KV cache)",
            )
        )
    return lines + [("note", text) for text in shown["notes"]]
