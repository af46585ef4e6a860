"""`puna serve`: models over HTTP.

What it is: from flags and a configuration file to models, an application and a process, and what a person is told.
What it is not: HTTP (`puna.server`), or the keeping of models (`puna.gateway.fleet`).
What is surprising: the socket is bound before a model is loaded, so that a port which is taken costs no wait; it
listens once the models that were named are there.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import typing
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import fields
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from puna.cli import config_file, flags, terminal
from puna.errors import UsageError
from puna.plan import BUDGET_SHARE
from puna.settings import RunSettings, ServeSettings, audit_file, server_database, server_key, server_state
from puna.weights.heap import one_heap
from puna.weights.limits import available

if TYPE_CHECKING:
    from puna.gateway.fleet import Fleet
    from puna.gateway.shelf import ModelOptions
    from puna.server.door import Door
    from puna.server.guarding import Guarding
    from puna.server.observe import LogForm
    from puna.types import Backend


def main(settings: ServeSettings) -> int:
    """Run the command."""
    _check(settings)
    if settings.print_config:
        print(config_file.written(settings), end="")
        return 0
    one_heap()
    import asyncio

    from puna.gateway.fleet import Fleet
    from puna.gateway.shelf import LocalShelf
    from puna.server.process import is_loopback, listen

    shelf = LocalShelf(
        _with_guard(settings),
        on_demand=settings.on_demand,
        aliases=dict(_pairs("--alias", settings.alias)),
        options=options_of(settings.option),
        device=settings.device,
        kernels=settings.kernels,
        invariant=settings.invariant,
        said=lambda text: terminal.note(f"note: {text}"),
    )
    bound = listen(settings.host, settings.port)
    try:
        door = _door(settings, alone=is_loopback(bound))
        fleet = Fleet(shelf, memory=_budget(settings), keep_alive=settings.keep_alive, available=available)
        asyncio.run(_serve(settings, fleet, bound, door))
    finally:
        bound.close()
    terminal.note("Stopped.")
    return 0


def _door(settings: ServeSettings, *, alone: bool) -> Door:
    """Who is let in; `alone` says that only this machine can reach the server. Raises UsageError where others could, no
    key is there, and nobody said that none is wanted."""
    from puna.server.door import OPEN_PATHS, Door
    from puna.server.keys import KeyStore
    from puna.server.page_routes import PREFIX

    single = settings.api_key or server_key()
    store = None if settings.no_key else KeyStore(server_database(settings.database))
    if settings.no_key and single is not None:
        raise UsageError("--no-key, and there is a key.", remedy="Leave --no-key, --api-key or PUNA_API_KEY out.")
    if not alone and not settings.no_key and single is None and store is not None and not store.every():
        store.close()
        raise UsageError(
            f"--host {settings.host} lets other machines in, and there are no keys.",
            remedy="Make one with `puna keys add NAME`, or leave --host out to serve this machine only. --no-key lets "
            "everybody in.",
        )
    return Door(
        store,
        single,
        hosts=frozenset({socket.gethostname(), *settings.allow_host}),
        origins=frozenset(settings.allow_origin),
        open_paths=OPEN_PATHS | {"/"},
        open_prefixes=(PREFIX,),
        loopback_only=not settings.no_key,
    )


async def _serve(settings: ServeSettings, fleet: Fleet, bound: socket.socket, door: Door) -> None:
    from puna.server import process
    from puna.server.app import create_app
    from puna.server.elsewhere import Fetcher
    from puna.server.observe import Observatory
    from puna.server.traces import traces

    pictures = Fetcher(_image_hosts(settings))

    def loading(name: str) -> None:
        terminal.note(f"Loading {name} ...")

    with _ended_by_signals():
        await fleet.start(loading)
        first = (await fleet.states())[0].card.name
    seeing = Observatory(
        log=cast("LogForm", settings.log),
        audit=audit_file() if settings.audit else None,
        log_prompts=settings.log_prompts,
        traces=traces(),
    )
    limits = process.Limits(settings.drain_seconds, settings.connections)

    def ready() -> None:
        _said(settings, process.url_of(bound), first, door)

    try:
        async with AsyncExitStack() as stack:
            guard = None
            if settings.guard is not None:
                with _ended_by_signals():
                    # Held as long as the server runs, so that it is never unloaded.
                    backend = await stack.enter_async_context(fleet.use(settings.guard))
                guard = _guard(settings, backend)
            app = create_app(fleet, door=door, observatory=seeing, state=server_state(), guard=guard, pictures=pictures)
            await process.serve(app, fleet, bound, limits, ready=ready)
    finally:
        await fleet.close()


def _image_hosts(settings: ServeSettings) -> list[str]:
    """The hosts of each --image-hosts. Raises UsageError for what is none."""
    from puna.server.elsewhere import host_of

    return [host_of(name) for word in settings.image_hosts for name in word.split(",")]


def _with_guard(settings: ServeSettings) -> tuple[str, ...]:
    """The models that are served: the guard is one of them. Without names all that were pulled are, and so is it."""
    if settings.guard is None or not settings.models or settings.guard in settings.models:
        return settings.models
    return (*settings.models, settings.guard)


def _guard(settings: ServeSettings, backend: Backend) -> Guarding:
    """The guard as the flags have it. Raises UsageError for a model that is none, and for categories."""
    from puna.server.guarding import Guarding
    from puna.text.guard import categories

    guard = Guarding(backend, before=settings.guard_judges != "answered", after=settings.guard_judges != "asked")
    if settings.guard_off or settings.guard_category:
        added = _pairs("--guard-category", settings.guard_category)
        guard.categories = categories(backend.card.guards, off=settings.guard_off, added=added)
    return guard


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """While models are loaded there is nothing to drain: a signal ends the process at once."""

    def end(number: int, frame: FrameType | None) -> None:
        terminal.note("Stopped while loading.")
        os._exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _said(settings: ServeSettings, url: str, model: str, door: Door) -> None:
    """Where it is, which key to use, and a line that works."""
    if settings.no_key:
        key, told = None, "none is needed: everybody is let in who can reach it"
    elif settings.api_key is not None:
        key, told = settings.api_key, settings.api_key
    elif server_key() is not None:
        key, told = "$PUNA_API_KEY", "the one in PUNA_API_KEY"
    elif door.keys is not None and door.keys.every():
        key, told = "YOUR_KEY", "one that `puna keys add` has shown"
    else:
        key, told = None, "none is needed, until `puna keys add` makes one; it answers this machine only"
    body = json.dumps({"model": model, "prompt": "Once upon a time", "max_tokens": 40})
    header = "" if key is None else f' -H "Authorization: Bearer {key}"'
    curl = f"curl {url}/v1/completions{header} -H 'Content-Type: application/json' -d '{body}'"
    terminal.note(f"Puna answers at {url} (OpenAI's API at {url}/v1, a page to chat at {url}/)")
    terminal.note(f"Key: {told}")
    terminal.note(f"Try: {curl}")
    terminal.note("Ctrl-C ends it")
    if settings.json:
        terminal.document({"url": url, "key": settings.api_key, "model": model, "curl": curl, "pid": os.getpid()})
        sys.stdout.flush()


def _budget(settings: ServeSettings) -> int | None:
    """Bytes that models may take. On another device the device's memory counts, which each model looks at itself."""
    if settings.memory is not None:
        return int(settings.memory * 1e9)
    free = available() if settings.device == "cpu" else None
    return None if free is None else int(BUDGET_SHARE * free)


def options_of(words: tuple[str, ...]) -> dict[str, ModelOptions]:
    """The options of each model, from MODEL.KEY=VALUE words. Raises UsageError naming what is unknown."""
    from puna.gateway.shelf import ModelOptions

    known = {each.name.replace("_", "-"): each for each in fields(RunSettings)}
    known = {key: each for key, each in known.items() if each.name in ModelOptions.__dataclass_fields__}
    types = typing.get_type_hints(RunSettings)
    found: dict[str, dict[str, Any]] = {}
    for name, word in _pairs("--option", words):
        model, _, key = name.rpartition(".")
        if not model or key not in known:
            near = flags.suggestion(key.replace("_", "-"), list(known))
            raise UsageError(
                f"--option {name}: {key!r:.80} is no option of a model.",
                remedy=near or f"It is MODEL.KEY=VALUE, and the keys are {', '.join(known)}.",
            )
        each = known[key]
        choices = flags.flag(each).choices
        if choices and word not in choices:
            raise UsageError(
                f"--option {name} must be one of {', '.join(choices)}, not {word!r:.80}.", remedy="Choose one."
            )
        if each.name in found.setdefault(model, {}):
            raise UsageError(f"--option {name} is given twice.", remedy="Leave one out.")
        found[model][each.name] = flags.value(f"--option {name}", types[each.name], word, "Check its value.")
    return {model: ModelOptions(**values) for model, values in found.items()}


def _pairs(flag: str, words: tuple[str, ...]) -> list[tuple[str, str]]:
    pairs = [(name, value) for name, _, value in (word.partition("=") for word in words)]
    for name, value in pairs:
        if not name or not value:
            raise UsageError(f"{flag} takes NAME=VALUE, not {name or value!r:.80}.", remedy="Put a = between the two.")
    if flag == "--alias" and len({name for name, _ in pairs}) < len(pairs):
        raise UsageError("An alias is given twice.", remedy="Leave one out.")
    return pairs


def _check(settings: ServeSettings) -> None:
    """Refuse what cannot be honoured. Raises UsageError."""

    def need(fits: bool, name: str, what: str) -> None:
        if not fits:
            raise UsageError(
                f"--{name.replace('_', '-')} must be {what}, not {getattr(settings, name)!r:.80}.",
                remedy="Leave it out for the default.",
            )

    need(0 <= settings.port <= 65535, "port", "a port, 0 to 65535")
    need(settings.memory is None or 0 < settings.memory <= 1e9, "memory", "gigabytes, more than 0")
    need(-1e9 <= settings.keep_alive <= 1e9, "keep_alive", "seconds")
    need(0 <= settings.drain_seconds <= 1e6, "drain_seconds", "seconds, 0 or more")
    need(1 <= settings.connections <= 1_000_000, "connections", "a whole number, 1 or larger")
    if settings.on_demand and not settings.models:
        raise UsageError("--on-demand, and no model is named.", remedy="Without names all are on demand: leave it out.")
    if "" in settings.models:
        raise UsageError('MODEL is empty: ""', remedy="Name a model, or none at all.")
    options_of(settings.option)
    _image_hosts(settings)
    _pairs("--alias", settings.alias)
    _pairs("--guard-category", settings.guard_category)
    if settings.guard is None:
        for name in ("guard_judges", "guard_off", "guard_category"):
            if getattr(settings, name) != getattr(ServeSettings, name):
                raise UsageError(
                    f"--{name.replace('_', '-')} goes with --guard.", remedy="Name a guard, or leave it out."
                )
