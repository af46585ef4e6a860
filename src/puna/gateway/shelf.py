"""The models on this machine as a fleet's shelf: which there are, what each takes, and its loading.

What it is: `LocalShelf`, a `fleet.Shelf` over files: those that were named, or all that were pulled.
What it is not: an owner of what is loaded.
What is surprising: only who starts the server names files. A request's name is looked up among the names that there
are, and never becomes a path.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from puna.catalog import models as catalog
from puna.engine.runner import PAGE, local_page_bytes, page_bytes, settled_kv_type, window
from puna.errors import UsageError
from puna.gateway.card import model_card
from puna.gateway.fleet import Described, Served
from puna.gateway.local import LocalBackend
from puna.kernels.blocks import TYPES as BLOCKS
from puna.llm import LLM, SEQUENCES
from puna.plan import model_need
from puna.types import DTYPES, KV_TYPES, SPECULATIONS, Backend
from puna.weights import mixes
from puna.weights.checkpoint import Checkpoint, open_checkpoint
from puna.weights.embedded import EMBEDDED
from puna.weights.files import ITEM_SIZE
from puna.weights.find import find_model, looks_like_path
from puna.weights.heap import trim_memory
from puna.weights.installed import InstalledModel, installed
from puna.weights.load import chat_format_of, tokenizer_of

BESIDES = 1500
"""Bytes a word of the vocabulary that a loaded model takes beside its weights: the tokenizer and its tables, mostly."""


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded, as for `puna.LLM`."""

    dtype: str = DTYPES[0]
    quant: str | None = None
    tokenizer: Path | None = None
    adapter: Path | None = None
    speculate: str = SPECULATIONS[0]
    draft: str | None = None
    kv_type: str = KV_TYPES[0]
    kv_memory: float | None = None


class LocalShelf:
    """See fleet.Shelf.

    `named` models are served and stay, or come and go with `on_demand`; without any, all that were pulled and cria come
    and go. `aliases` are further names;
    `options` by a model's name or alias, those of "*" for models that have none. `device`, `kernels` and `invariant`
    are as for `puna.LLM`, and the process's: all models have the same. `said` is told what a user should know of a
    model once it is loaded. Raises UsageError for names that clash.
    """

    def __init__(
        self,
        named: Sequence[str] = (),
        *,
        on_demand: bool = False,
        aliases: Mapping[str, str] | None = None,
        options: Mapping[str, ModelOptions] | None = None,
        device: str = "cpu",
        kernels: str = "auto",
        invariant: bool = False,
        said: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._named, self._aliases, self._options = tuple(named), dict(aliases or {}), dict(options or {})
        self._stay = not on_demand
        self._device, self._kernels, self._invariant, self._said = device, kernels, invariant, said
        names = {name for served in self.served() for name in (served.name, *served.aliases, *served.untold)}
        for alias, of in self._aliases.items():
            if of not in names:
                raise UsageError(
                    f"The alias {alias} is for {of}, which is not served.",
                    remedy="Name that model on the command line.",
                )
            if alias in {served.name for served in self.served()}:
                raise UsageError(f"The alias {alias} is a model's name.", remedy="Choose another.")
        for name in self._options:
            if name != "*" and name not in names | self._aliases.keys():
                raise UsageError(f"There are options for {name}, which is not served.", remedy="Check the name.")

    def served(self) -> list[Served]:
        """See fleet.Shelf."""
        if self._named:
            found = [replace(_named(word), stays=self._stay) for word in dict.fromkeys(self._named)]
        else:
            rows = [row for row in installed() if row.complete and row.name != EMBEDDED]
            rows.sort(key=lambda row: -(row.pulled.timestamp() if row.pulled else 0.0))
            found = [*map(_pulled, rows), Served(EMBEDDED, source=EMBEDDED)]
        given: dict[str, Served] = {}
        for served in found:
            if served.name in given:
                if not served.untold:
                    continue  # pulled under two names
                raise UsageError(
                    f"Two models are called {served.name}: {given[served.name].source} and {served.source}.",
                    remedy="Serve one of them, or rename a file.",
                )
            own = {served.name, *served.aliases, *served.untold}
            more = tuple(alias for alias, of in self._aliases.items() if of in own)
            given[served.name] = replace(served, aliases=(*served.aliases, *more))
        return list(given.values())

    def describe(self, model: Served) -> Described:
        """See fleet.Shelf."""
        checkpoint, options = open_checkpoint(self._file_of(model)), self._of(model)
        config = checkpoint.config
        words = tokenizer_of(checkpoint, options.tokenizer)
        chat = chat_format_of(checkpoint, words)
        matrices = [tensor for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2]
        fp32 = options.dtype == "fp32" or (options.dtype == "auto" and all(each.dtype == "fp32" for each in matrices))
        kv_type = settled_kv_type(options.kv_type, config, all_fp32=fp32 and options.quant is None)
        weights = _weights_bytes(checkpoint, options) + BESIDES * config.vocab_size
        if options.draft is not None:
            draft = open_checkpoint(find_model(options.draft))
            context = -(-draft.config.context_length // PAGE)
            draft_page = page_bytes(draft.config, kv_type) + local_page_bytes(draft.config, kv_type)
            weights += draft.nbytes + context * draft_page + BESIDES * draft.config.vocab_size
        known = model_card(model.name, checkpoint, words, chat, dtype=options.dtype, quant=options.quant or "")
        card = replace(known, name=model.name, aliases=model.aliases)
        need = model_need(
            weights=weights,
            page=PAGE,
            page_bytes=page_bytes(config, kv_type),
            local_page_bytes=local_page_bytes(config, kv_type),
            window=window(config),
            context=config.context_length,
            sequences=SEQUENCES,
            cache=None if options.kv_memory is None else int(options.kv_memory * 1e9),
        )
        return Described(card, need)

    def load(self, model: Served, described: Described, cache: int | None) -> Backend:
        """See fleet.Shelf."""
        options = self._of(model)
        llm = LLM(
            self._file_of(model),
            dtype=options.dtype,
            quant=options.quant,
            device=self._device,
            kernels=self._kernels,
            invariant=self._invariant,
            speculate=options.speculate,
            draft=options.draft,
            kv_type=options.kv_type,
            kv_memory=options.kv_memory if cache is None else (cache + 0.5) / 1e9,
            tokenizer=options.tokenizer,
            adapter=options.adapter,
        )
        for text in llm.notes:
            self._said(f"{model.name}: {text}")
        return LocalBackend(llm, name=model.name)

    def unloaded(self) -> None:
        """See fleet.Shelf."""
        gc.collect()  # an engine and its parts know each other
        trim_memory()

    def _file_of(self, model: Served) -> Path:
        """Where it lies; of a pulled one's source the commit is what tells it from an older one."""
        return find_model(model.source if self._named else model.source.partition(" ")[0])

    def _of(self, model: Served) -> ModelOptions:
        names = (model.name, *model.aliases, *model.untold, "*")
        return next((self._options[name] for name in names if name in self._options), ModelOptions())


def _named(word: str) -> Served:
    """A model that was named, with the names that it goes by. A path is no name for others to see: they are told the
    file's or folder's. Raises what `find_model` does."""
    path = find_model(word)
    if looks_like_path(word) or (word != EMBEDDED and Path(word).exists()):
        path = path.absolute()
        plain = path.is_dir() or path.suffix == ".safetensors"  # those files are all called "model"
        name = (path if path.is_dir() else path.parent).name if plain else path.stem
        return Served(name or word, untold=(word,), source=word)
    entry = None if word == EMBEDDED else catalog.find(word)
    aliases = () if entry is None else (entry.short_name, entry.hub_id)
    return Served(word, tuple(alias for alias in aliases if alias != word), source=word)


def _pulled(row: InstalledModel) -> Served:
    names = [row.short_name, row.name] if row.short_name else [row.name]
    return Served(names[0], tuple(names[1:]), source=f"{row.name} {row.commit}".strip())


def _weights_bytes(checkpoint: Checkpoint, options: ModelOptions) -> int:
    """Bytes of the weights as they are loaded."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    if options.quant is not None:
        kinds, _ = mixes.choose(mixes.find(options.quant, "quant"), checkpoint.config, shapes)
        return sum(math.prod(shape[:-1]) * BLOCKS[kinds[name]].row_bytes(shape[-1]) for name, shape in shapes.items())
    if options.dtype != "auto":
        return sum(math.prod(shape) for shape in shapes.values()) * ITEM_SIZE[options.dtype]
    return checkpoint.nbytes
