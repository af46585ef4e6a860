"""One backend as the models of a server.

What it is: `OneModel`, for a server of one model that is there from the start.
What it is not: loading on demand (`fleet.py`).
What is surprising: it is never unloaded, whatever `keep_alive` says: who gave the backend owns it until the close.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from puna.errors import UnknownModelError
from puna.types import Backend, ModelState


class OneModel:
    """See types.Models."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def states(self) -> list[ModelState]:
        """See types.Models."""
        return [ModelState(self._backend.card, loaded=True)]

    @asynccontextmanager
    async def use(self, name: str, *, keep_alive: float | None = None) -> AsyncIterator[Backend]:
        """See types.Models."""
        self._check(name)
        yield self._backend

    async def unload(self, name: str) -> None:
        """See types.Models. Refused in silence would be a lie: it stays. Raises UnknownModelError."""
        self._check(name)

    async def close(self) -> None:
        """See types.Models."""
        await self._backend.close()

    def _check(self, name: str) -> None:
        card = self._backend.card
        if name and name not in (card.name, *card.aliases):
            raise UnknownModelError(f"The model {name!r:.100} is not served here.", remedy=f"There is {card.name}.")
