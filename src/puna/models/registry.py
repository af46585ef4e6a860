"""Which module computes a config: the one place where a model's kind is asked.

What it is: `definition(config)`, and what a definition consists of.
What it is not: a registry that others add to at run time. A new model is a line here and a module.
What is surprising: a definition is the module itself. Its functions have the same signatures as those of
`models.decoder`, whose docstrings say what each does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from puna.models import decoder, llama3_vision, llama4
from puna.models.config import DecoderConfig
from puna.models.llama3_vision_config import MllamaConfig
from puna.models.llama4_config import Llama4Config
from puna.models.tree import KVCache, Placed


class Definition(Protocol):
    """The functions of a model's module; `weights` is the tree that its `build` makes of its own config."""

    def forward(
        self,
        weights: Any,
        config: Any,
        tokens: Any,
        table: Any = None,
        cache: KVCache | None = None,
        placed: Sequence[Placed] = (),
    ) -> Any:
        """Hidden states; see `decoder.forward`. ValueError for pictures in `placed` where the model sees none."""

    def logits(self, weights: Any, hidden: Any) -> Any:
        """Scores over the vocabulary."""

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape of every parameter, those of the vision encoder too."""

    def parameter_count(self, config: Any) -> int:
        """How many parameters that is."""

    def build(self, config: Any, parameter: Callable[[str], Any]) -> Any:
        """The tree."""

    def make_cache(
        self, config: Any, pages: int, page: int, zeros: Callable[[tuple[int, ...]], Any], local: int | None = None
    ) -> KVCache:
        """An empty cache."""


class Seeing(Protocol):
    """What the module of a model that sees has besides."""

    def see(self, weights: Any, config: Any, pixels: Any) -> Any:
        """What is seen in a picture, for `Placed.sight`. ValueError for pixels of another size."""

    def sight_bytes(self, config: Any, pixels: Any) -> int:
        """The bytes that takes."""


def seeing(config: DecoderConfig) -> Seeing | None:
    """The module that sees for models of this config; None where they are blind, or came without their encoder."""
    if isinstance(config, MllamaConfig) and config.vision is not None:
        return llama3_vision
    return llama4 if isinstance(config, Llama4Config) and config.vision is not None else None


def definition(config: DecoderConfig) -> Definition:
    """The module that computes models of this config."""
    if isinstance(config, MllamaConfig):
        return llama3_vision
    return llama4 if isinstance(config, Llama4Config) else decoder
