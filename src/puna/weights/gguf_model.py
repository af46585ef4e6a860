"""What a GGUF file says of a Llama: its config, its tensors, its vocabulary, and what its user should be told.

What it is: the place where the keys and names of the format meet the house's own.
What it is not: the container (`gguf`), the meaning of the `llama.*` keys (`models.config_gguf`), or an encoder
(`text.tokenizer_gguf`).
What is surprising: nothing is permuted on load. GGUF's q and k rows are in Meta's order, and the config says so.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from puna.errors import CheckpointError, TokenizerError
from puna.models import config_clip
from puna.models.config import Fields, ReadConfig
from puna.models.config_gguf import ARCHITECTURES, read_gguf
from puna.models.llama4_config import Llama4Config
from puna.text.tokenizer_files import Unsaid
from puna.text.words import Words
from puna.weights import names
from puna.weights.files import LazyTensor, shown
from puna.weights.gguf import FILE_TYPES, GGUF, MAGIC, PART_NAME, Metadata, read

if TYPE_CHECKING:
    from puna.text.tokenizer import Tokenizer
    from puna.text.tokenizer_gguf import StoredVocabulary

ROPE_FREQS = "rope_freqs.weight"

_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")
_LARGEST_ID = (1 << 24) - 1


def recognised(path: Path) -> bool:
    """Whether a file begins as a GGUF does. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


PROJECTOR = "mmproj"
"""The word in the names of files that hold the vision encoder of a model beside them."""


def projector_path(model: Path) -> Path:
    """What the file of a model's vision encoder is called."""
    return model.with_name(f"{PROJECTOR}-{model.name}")


def models_in(folder: Path) -> list[Path]:
    """The GGUF models of a folder, each by its file or by its first part; vision encoders are not among them."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.gguf")):
        if PROJECTOR in path.name.lower():
            continue
        part = PART_NAME.fullmatch(path.name)
        found.setdefault(f"{part['stem']}/{part['count']}" if part else path.name, path)
    return list(found.values())


def config_of(whole: GGUF) -> tuple[ReadConfig, dict[str, LazyTensor], tuple[str, ...]]:
    """The config, the tensors by GGUF's names (without the rope's), and notes.

    Raises CheckpointError for tensors that are missing or of the wrong type, ConfigError for the metadata.
    """
    source = str(whole.path)
    embedding = whole.tensors.get(names.foreign("embedding", "gguf"))
    if whole.metadata["general.architecture"] == config_clip.ARCHITECTURE:
        raise CheckpointError(
            f"{source}: the vision encoder of a model, not the model.",
            remedy="Name the model's own GGUF; this file is read from beside it.",
        )
    if whole.metadata["general.architecture"] == "mllama":
        raise CheckpointError(
            f"{source}: a Llama 3.2 Vision as Ollama packs it (mllama), which Puna does not read: its gates are stored "
            "as their hyperbolic tangents, and its vision encoder in a file that says nothing of this one.",
            remedy="Fetch the model in Hugging Face's or Meta's layout.",
        )
    if embedding is None and whole.metadata["general.architecture"] in ARCHITECTURES:
        what = "it holds no weights, only a vocabulary" if not whole.tensors else "token_embd.weight is missing"
        raise CheckpointError(f"{source}: {what}.", remedy="Name the file of the model; --tokenizer takes this one.")
    stored = {name: tensor.lazy() for name, tensor in whole.tensors.items()}
    factors = stored.pop(ROPE_FREQS, None)
    if factors is not None and (factors.dtype != "fp32" or len(factors.shape) != 1):
        raise CheckpointError(f"{source}: {ROPE_FREQS} must be a row of float32.", remedy="Fetch the file again.")
    biased = {name.split(".")[2] for name in stored if re.fullmatch(r"blk\.\d+\.\w+\.bias", name)}
    read_config = read_gguf(
        whole.metadata,
        source,
        vocab_size=embedding.shape[0] if embedding is not None else 0,
        tied_head=names.foreign("head", "gguf") not in stored,
        attention_bias=bool(biased & {"attn_q", "attn_k", "attn_v", "attn_output"}),
        mlp_bias=bool(biased & {"ffn_gate", "ffn_up", "ffn_down"}),
        rope_factors=None if factors is None else np.asarray(factors.read(), np.float32),
    )
    f = Fields(whole.metadata, source)
    ids = [f.integer(key, least=0, most=_LARGEST_ID) for key in _keys("tokenizer.ggml.", _STOPS) if f.has(key)]
    bos = "tokenizer.ggml.bos_token_id"
    read_config = dataclasses.replace(
        read_config,
        bos_id=f.integer(bos, least=0, most=_LARGEST_ID) if f.has(bos) else None,
        eos_ids=tuple(dict.fromkeys(ids)),
    )
    notes = _notes(whole.metadata, f)
    if isinstance(read_config.config, Llama4Config):
        read_config, seen, more = _with_projector(whole.path, read_config, read_config.config)
        return read_config, stored | seen, (*notes, *more)
    return read_config, stored, notes


def _with_projector(
    path: Path, read_config: ReadConfig, text: Llama4Config
) -> tuple[ReadConfig, dict[str, LazyTensor], tuple[str, ...]]:
    """The config with its vision encoder, and that one's tensors, where its file lies beside the model's.

    The one that has the model's name is taken, else the only one of the model's width. Raises CheckpointError and
    ConfigError for a file that is damaged.
    """
    named = projector_path(path)
    beside = sorted(p for p in path.parent.glob("*.gguf") if PROJECTOR in p.name.lower() and p != path)
    fitting = []
    for place in [named] if named in beside else beside:
        found = read(place)
        if found.metadata["general.architecture"] != config_clip.ARCHITECTURE:
            continue
        if config_clip.text_width(found.metadata, str(place)) == text.dim:
            fitting.append(found)
    if len(fitting) > 1:
        listed = ", ".join(shown(found.path.name) for found in fitting)
        return read_config, {}, (f"several vision encoders lie beside it ({listed}), so it sees nothing: keep one",)
    if not fitting:
        return read_config, {}, ()
    tensors = {name: tensor.lazy() for name, tensor in fitting[0].tensors.items()}
    adapter = tensors.get("mm.model.mlp.1.weight")
    if adapter is None or len(adapter.shape) != 2:
        raise CheckpointError(f"{fitting[0].path}: mm.model.mlp.1.weight is missing.", remedy="Fetch the file again.")
    vision, unknown = config_clip.read_clip(fitting[0].metadata, str(fitting[0].path), output_dim=adapter.shape[0])
    config = dataclasses.replace(text, vision=vision)
    read_config = dataclasses.replace(read_config, config=config, unknown=(*read_config.unknown, *unknown))
    return read_config, tensors, (f"its vision encoder is read from {shown(fitting[0].path.name)}",)


def _keys(prefix: str, keys: tuple[str, ...]) -> list[str]:
    return [prefix + key for key in keys]


def _notes(metadata: Mapping[str, Any], f: Fields) -> tuple[str, ...]:
    notes = []
    if f.boolean("tokenizer.ggml.add_eos_token", False):
        notes.append("the file asks for an end-of-text token after every text (add_eos_token), which is not added")
    model, rule = (metadata.get(f"tokenizer.ggml.{key}", "default") for key in ("model", "pre"))
    if isinstance(model, str) and isinstance(rule, str) and (model, rule) == ("gpt2", "default"):
        notes.append("the file does not name the rule by which text is cut into words; Llama 3's is used")
    return tuple(notes)


def file_type(metadata: Mapping[str, Any]) -> str | None:
    """The name of the mix of types (`Q4_K_M`) that `general.file_type` stands for; None where it says nothing known."""
    value = metadata.get("general.file_type")
    return FILE_TYPES.get(value) if type(value) is int else None


_LONGEST_TITLE = 255
"""Characters of a model's name that are looked at, as many as a file's name may have."""

_CHAT_NAMES = {
    "llama2": re.compile(r"llama[-_ ]?v?2\b.*chat", re.IGNORECASE),
    "codellama": re.compile(r"code[-_ ]?llama.*instruct", re.IGNORECASE),
    "llama3": re.compile(r"llama[-_ ]?3.*instruct", re.IGNORECASE),
}


def named_for_chat(whole: GGUF | None, generation: str) -> bool:
    """Whether a GGUF is called as one of Meta's chat models is, by its file or by `general.name`."""
    pattern = _CHAT_NAMES.get(generation.partition(".")[0])
    if whole is None or pattern is None:
        return False
    called = (whole.path.name, whole.metadata.get("general.name"))
    # A name is short; on a megabyte of "llama2 llama2 ..." the search would take hours.
    return any(pattern.search(name[:_LONGEST_TITLE]) for name in called if isinstance(name, str))


def licence(metadata: Mapping[str, Any]) -> str | None:
    """What the file says of its licence, in one line: a name, an identifier, an address."""
    keys = _keys("general.license", ("", ".name", ".link"))
    said = [str(metadata[key]).strip() for key in keys if isinstance(metadata.get(key), str)]
    lines = [shown(text.splitlines()[0][:100]) for text in said if text]
    return ", ".join(dict.fromkeys(lines)) or None


def has_tokenizer(whole: GGUF) -> bool:
    """Whether there is a vocabulary in it."""
    return "tokenizer.ggml.tokens" in whole.metadata


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a GGUF file, which may hold nothing else.

    Raises CheckpointError for the file, TokenizerError or ConfigError for what it says.
    """
    return tokenizer_of(read(path))


def tokenizer_of(whole: GGUF) -> Tokenizer:
    """The tokenizer in a GGUF that is open. Raises TokenizerError naming the key, ConfigError for a value of a key."""
    from puna.text.tokenizer_gguf import read_vocabulary

    return read_vocabulary(_vocabulary(whole.metadata, whole.path))


def _vocabulary(metadata: Metadata, source: Path) -> StoredVocabulary:
    """The `tokenizer.*` keys as plain data."""
    from puna.text.tokenizer_gguf import StoredVocabulary

    f = Fields(metadata, str(source))

    def wrong(key: str, what: str) -> TokenizerError:
        return TokenizerError(f"{source}: {key!r} {what}.", remedy="Name another tokenizer with --tokenizer.")

    def text(key: str) -> str | None:
        value = metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise wrong(key, f"must be a text, not {value!r:.80}")
        return value

    def words(key: str) -> Words:
        value = metadata.get(key)
        if not isinstance(value, Words):
            raise wrong(key, "is missing" if value is None else "must be an array of texts")
        return value

    def numbers(key: str) -> np.ndarray[Any, Any] | None:
        value = metadata.get(key)
        if value is not None and not isinstance(value, np.ndarray):
            raise wrong(key, "must be an array of numbers")
        return value

    def token(key: str) -> int | Unsaid:
        return f.integer(key, least=0, most=_LARGEST_ID) if f.has(key) else Unsaid()

    model = text("tokenizer.ggml.model")
    if model is None:
        raise wrong("tokenizer.ggml.model", "is missing: there is no tokenizer in this file")
    for key in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.escape_whitespaces"):
        f.choice(key, (key.endswith("escape_whitespaces"),), None)
    if "tokenizer.ggml.precompiled_charsmap" in metadata:
        raise wrong("tokenizer.ggml.precompiled_charsmap", "asks for a normalization that no Llama has")
    stops = [f.integer(key, least=0, most=_LARGEST_ID) for key in _keys("tokenizer.ggml.", _STOPS[1:]) if f.has(key)]
    if (several := numbers("tokenizer.ggml.eos_token_ids")) is not None:
        if not np.issubdtype(several.dtype, np.integer):
            raise wrong("tokenizer.ggml.eos_token_ids", "must hold whole numbers")
        stops += several[:256].tolist()
    merges = "tokenizer.ggml.merges"
    return StoredVocabulary(
        source=source,
        model=model,
        pre=text("tokenizer.ggml.pre"),
        tokens=words("tokenizer.ggml.tokens"),
        types=numbers("tokenizer.ggml.token_type"),
        scores=numbers("tokenizer.ggml.scores"),
        merges=(lambda: words(merges)) if merges in metadata else None,
        merge_count=metadata.count(merges),
        bos_id=token("tokenizer.ggml.bos_token_id"),
        eos_id=token("tokenizer.ggml.eos_token_id"),
        stop_ids=tuple(stops),
        adds_bos=f.boolean("tokenizer.ggml.add_bos_token", True) if f.has("tokenizer.ggml.add_bos_token") else None,
        adds_space=f.boolean("tokenizer.ggml.add_space_prefix", True),
        chat_template=text("tokenizer.chat_template"),
    )
