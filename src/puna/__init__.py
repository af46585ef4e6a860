"""Puna: run Meta's Llama family on hardware you own.

`from puna import LLM` is the front door. Nothing is imported until it is asked for (PEP 562), so `import puna` costs
nothing and `puna --help` stays instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puna.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> object:
    if name == "LLM":
        from puna.llm import LLM

        return LLM
    raise AttributeError(f"module 'puna' has no attribute {name!r}")
