"""What is known of a model, from its files alone, as a `types.ModelCard`.

What it is: `model_card`.
What it is not: loading; a checkpoint that was opened is enough, and its weights are not read but for the digest.
What is surprising: a path is no name. A model that was given by its path is called as its file or folder, so that
nobody who asks a server learns where its files lie.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from puna.models.registry import definition, seeing
from puna.types import ModelCard
from puna.weights import gguf_model
from puna.weights.load import guard_version, infills
from puna.weights.session_file import model_identity

if TYPE_CHECKING:
    from puna.text.chat import ChatFormat
    from puna.text.tokenizer import Tokenizer
    from puna.weights.checkpoint import Checkpoint

_STORED_AS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


def model_card(
    name: str,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    chat_format: ChatFormat | None = None,
    *,
    dtype: str = "auto",
    quant: str = "",
) -> ModelCard:
    """The card of a checkpoint under the name that it was found by; `dtype` and `quant` are what it is loaded as.

    Raises OSError where its files are gone.
    """
    config = checkpoint.config
    stats = [file.stat() for file in checkpoint.files]
    return ModelCard(
        name=_called(name, checkpoint),
        format=checkpoint.format,
        family=config.generation,
        parameters=definition(config).parameter_count(config),
        quantization=quant or _STORED_AS.get(dtype) or _quantization(checkpoint),
        nbytes=sum(stat.st_size for stat in stats),
        modified=max((stat.st_mtime for stat in stats), default=0.0),
        digest=model_identity(checkpoint, dtype, quant),
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        embedding_length=config.dim,
        chat=chat_format is not None,
        tools=chat_format is not None and chat_format.tells_tools,
        sees=chat_format is not None and chat_format.sees and seeing(config) is not None,
        infills=infills(config, tokenizer),
        guards=guard_version(name, checkpoint, tokenizer),
        template=None if chat_format is None else chat_format.template,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )


def _called(name: str, checkpoint: Checkpoint) -> str:
    path = Path(name)
    if not path.exists():  # a short name, or the hub's
        return name
    path = path.absolute()
    if path.is_dir():
        return path.name
    return path.parent.name if checkpoint.format == "safetensors" else path.stem  # those are all called "model"


def _quantization(checkpoint: Checkpoint) -> str:
    """The mix of types that a GGUF says it has, else the type that most bytes have."""
    said = None if checkpoint.gguf is None else gguf_model.file_type(checkpoint.gguf.metadata)
    if said is not None:
        return said
    kinds: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        kinds[tensor.dtype] += tensor.nbytes
    most = max(kinds, key=lambda kind: (kinds[kind], kind))
    return _STORED_AS.get(most, most)
