"""`puna plan`: what a model takes, whether that fits, and how fast it will be there.

What it is: a machine, a model and a load put to the arithmetic of `puna.forecast`, and its figures as a table.
What it is not: a measurement; `puna bench` is.
What is surprising: a model that is not here is planned from the catalog's facts, with the types that
`puna convert --type` would give its weights; one that is here has the sizes of its own file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from puna import forecast
from puna.catalog import market
from puna.catalog import models as catalog
from puna.cli import terminal
from puna.engine.runner import PAGE, settled_kv_type
from puna.errors import PunaError, UsageError
from puna.forecast import Load, Machine
from puna.kernels import ops
from puna.models.config import DecoderConfig
from puna.models.known import config_of
from puna.models.registry import definition
from puna.settings import PlanSettings
from puna.weights import limits, mixes
from puna.weights.checkpoint import open_checkpoint
from puna.weights.find import find_model
from puna.weights.pack import kind_of

USUAL = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M")
"""Types that stand side by side, largest first."""

SHORT = 8192
"""Tokens of a long conversation, where nobody says how many."""

MOST_USERS = 1 << 16
THIS, DESCRIBED = "this machine", "as described"
SAID = {THIS: "measured", DESCRIBED: "as you say"}
"""Where a machine's numbers are from; a card's are from its data sheet."""

MOST = 1e6
"""Of gigabytes, gigabytes a second and 10^12 operations a second: a thousand times the largest machine's."""

BAR = 32
"""Characters of the picture of a memory."""


@dataclass(frozen=True)
class Candidate:
    """A form in which a model may be had: its type, and the block type and bytes of each weight."""

    name: str
    kinds: Mapping[str, str]
    sizes: Mapping[str, int]

    @property
    def product(self) -> str:
        """The kind of product that most of its weights take."""
        bytes_by = Counter[str]()
        for name, kind in self.kinds.items():
            bytes_by[kind] += self.sizes[name]
        kind = bytes_by.most_common(1)[0][0]
        return {"F32": "fp32", "F16": "fp32", "BF16": "bf16"}.get(kind, "int8")


def main(settings: PlanSettings) -> int:
    """Run the command."""
    if settings.users < 1 or settings.users > MOST_USERS:
        raise UsageError(f"--users {settings.users}: from 1 to {MOST_USERS}.", remedy="How many ask at once?")
    if not 0 < settings.disk <= MOST:
        raise UsageError(
            "--disk must be above 0 (and below a million).", remedy="A usual SSD reads 1 to 5 gigabytes a second."
        )
    config, candidates, notes = wanted(settings)
    if settings.context is not None and not 1 <= settings.context <= config.context_length:
        raise UsageError(
            f"--context {settings.context}: {settings.model} takes from 1 to {config.context_length} tokens.",
            remedy="Leave it out for 8192, or what the model takes if that is less.",
        )
    load = Load(settings.context or min(SHORT, config.context_length), settings.users)
    machine = machine_of(settings)
    document = described(settings, config, candidates, load, machine, notes)
    if settings.json:
        terminal.document(document)
    else:
        show(document)
    return 0


def wanted(settings: PlanSettings) -> tuple[DecoderConfig, list[Candidate], list[str]]:
    """The model's numbers, the forms to plan for, and notes. Raises what finding and reading a model raises."""
    entry = catalog.find(settings.model)
    try:
        checkpoint = open_checkpoint(find_model(settings.model))
    except PunaError:
        if entry is None:
            raise
        config = config_of(entry)
        notes = [f"{entry.name} is not on this machine: its sizes are the catalog's"]
        types = (settings.quant,) if settings.quant else USUAL
        return config, [packed_as(name, config) for name in types], notes
    config = checkpoint.config
    if settings.quant is not None:
        return config, [packed_as(settings.quant, config)], []
    kinds = {name: kind_of(tensor.dtype) for name, tensor in checkpoint.tensors.items()}
    sizes = {name: tensor.nbytes for name, tensor in checkpoint.tensors.items()}
    return config, [Candidate("as stored", kinds, sizes)], []


def packed_as(name: str, config: DecoderConfig) -> Candidate:
    """The model in a type of `puna convert --type`."""
    shapes = definition(config).shapes(config)
    chosen, _ = mixes.choose(mixes.find(name, "--quant"), config, shapes)
    kinds = {parameter: chosen.get(parameter, "BF16") for parameter in shapes}  # a vision encoder stays as released
    return Candidate(name, kinds, forecast.weight_bytes(shapes, kinds))


def machine_of(settings: PlanSettings) -> Machine:
    """This machine, measured, or the one that the flags name. Raises UsageError for one that is not known."""
    own = {
        name: value
        for name, value in (
            ("memory", settings.memory), ("bandwidth", settings.bandwidth), ("peak", settings.peak),
        )
        if value is not None
    }  # fmt: skip
    for name, value in own.items():
        if not 0 < value <= MOST:
            raise UsageError(
                f"--{name} must be above 0 (and below a million).", remedy="Leave it out for the machine's own."
            )
    disk = settings.disk * 1e9
    if settings.machine is None and len(own) < 3:
        ops.select()
        from puna.bench.probes import Probes

        found = Probes().limits()
        memory = limits.available()
        if not found and not {"bandwidth", "peak"} <= own.keys():
            raise UsageError(
                "The C++ kernels, which measure a machine, are not built here.",
                remedy="Say --bandwidth and --peak, or name a --machine.",
            )
        if memory is None and "memory" not in own:
            raise UsageError("This system does not say how much memory is available.", remedy="Say --memory.")
        read = found.pop("read", 0.0)
        machine = Machine(THIS, memory or 0, read, found, disk, measured=True)
    elif settings.machine is None:
        machine = Machine(DESCRIBED, 0, 0.0, {}, disk, measured=True)
    else:
        machine = _card(settings.machine, disk)
    return Machine(
        machine.name,
        int(own["memory"] * 1e9) if "memory" in own else machine.memory,
        own["bandwidth"] * 1e9 if "bandwidth" in own else machine.read,
        dict.fromkeys(("int8", "bf16", "fp32"), own["peak"] * 1e12) if "peak" in own else machine.peaks,
        disk,
        machine.cards,
        machine.measured,
    )


def _card(name: str, disk: float) -> Machine:
    split = re.fullmatch(r"(?:([1-9][0-9]{0,3})x)?(.+)", name.strip().lower())
    gpus = market.market().gpus
    card = None if split is None else gpus.get(split[2])
    if split is None or card is None:
        raise UsageError(
            f"--machine {name:.80}: no such card in the catalog.",
            remedy=f"One of: {', '.join(gpus)}; 2x before it says two.",
        )
    peak = card.peak * 1e12
    return Machine(
        card.name, int(card.memory * 1e9), card.bandwidth * 1e9, {"int8": peak, "bf16": peak, "fp32": peak}, disk,
        cards=int(split[1] or 1),
    )  # fmt: skip


def described(
    settings: PlanSettings,
    config: DecoderConfig,
    candidates: list[Candidate],
    load: Load,
    machine: Machine,
    notes: list[str],
) -> dict[str, Any]:
    """What `--json` prints: bytes, tokens, seconds."""
    model = definition(config)
    shapes = model.shapes(config)
    room = machine.memory * machine.cards
    rows = []
    for candidate in candidates:
        all_fp32 = set(candidate.kinds.values()) == {"F32"}
        kv_type = settled_kv_type(settings.kv_type, config, all_fp32=all_fp32)
        need = forecast.footprint(config, sum(candidate.sizes.values()), kv_type, load, PAGE)
        fast = forecast.speed(
            config, shapes, candidate.sizes, candidate.product, kv_type, load, PAGE, machine
        )  # fmt: skip
        spare = room - need.total
        rows.append(
            {
                "type": candidate.name,
                "kv_type": kv_type,
                "weights_bytes": need.weights,
                "cache_bytes": need.cache,
                "activations_bytes": need.activations,
                "program_bytes": need.program,
                "total_bytes": need.total,
                "fits": spare >= 0,
                "spare_bytes": spare,
                "largest_context": largest_context(config, kv_type, load, spare + need.cache),
                "most_users": most_users(config, kv_type, load, spare + need.cache),
                "load_seconds": fast.load,
                "first_token_seconds": fast.first_token,
                "prefill_tokens_per_second": fast.prefill,
                "decode_tokens_per_second": fast.decode,
                "decode_tokens_per_second_all": fast.decode_all,
            }
        )
    active = model.parameter_count(config)
    if experts := getattr(config, "experts", 0):
        routed = sum(_count(shape) for name, shape in shapes.items() if ".experts." in name)
        active -= routed - routed * getattr(config, "experts_per_token", 1) // experts
    if not machine.measured:
        notes.append(
            f"the speeds are {forecast.CARD_READS:.0%} of the data sheet's bandwidth and "
            f"{forecast.CARD_MULTIPLIES:.0%} of its products: nothing was measured"
        )
        notes.append(
            "Puna itself computes on one card, with the weights in bf16: packed types, and several cards as the sum of "
            "them, are planned as for an engine that has both"
        )
    return {
        "model": settings.model,
        "generation": config.generation,
        "parameters": model.parameter_count(config),
        "active_parameters": active,
        "context_length": config.context_length,
        "context": load.context,
        "users": load.users,
        "chunk": config.chunk,
        "machine": asdict(machine) | {"room_bytes": room},
        "plans": rows,
        "notes": notes,
    }


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def largest_context(config: DecoderConfig, kv_type: str, load: Load, room: int) -> int:
    """Tokens that each user may have where so many bytes are there for the cache; 0 where not a page."""
    low, high = 0, config.context_length
    while low < high:
        middle = (low + high + 1) // 2
        if load.users * forecast.cache_bytes(config, kv_type, middle, PAGE) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def most_users(config: DecoderConfig, kv_type: str, load: Load, room: int) -> int:
    """Users of `load.context` tokens each that so many bytes of cache hold."""
    return max(0, room // forecast.cache_bytes(config, kv_type, load.context, PAGE))


def show(document: dict[str, Any]) -> None:
    """The table for people, and a picture of the memory."""
    machine = document["machine"]
    active = document["active_parameters"]
    parts = f"{terminal.quantity(document['parameters'])} parameters"
    if active != document["parameters"]:
        parts += f", {terminal.quantity(active)} of them read for a token"
    cards = f"{machine['cards']} x " if machine["cards"] > 1 else ""
    peak = max(machine["peaks"].values(), default=0.0)
    terminal.facts(
        [
            ("model", f"{document['model']} ({document['generation']}): {parts}"),
            (
                "load",
                f"{document['users']} user{'s' if document['users'] > 1 else ''} with {document['context']:,} tokens "
                f"each, of {document['context_length']:,} that it takes",
            ),
            (
                "machine",
                f"{cards}{machine['name']}: {terminal.size(machine['memory'])}, {machine['read'] / 1e9:,.0f} GB/s, "
                f"{peak / 1e12:,.1f} TOP/s ({SAID.get(machine['name'], 'data sheet')})",
            ),
        ]
    )
    print()
    several = document["users"] > 1
    terminal.table(
        (
            "TYPE", "WEIGHTS", "KV CACHE", "ALL", "FITS", "FIRST TOKEN", "PROMPT/S", "ANSWER/S",
            *(("ALL USERS/S",) if several else ()), "CONTEXT UP TO", "LOAD",
        ),
        [
            (
                row["type"],
                terminal.size(row["weights_bytes"]),
                terminal.size(row["cache_bytes"]),
                terminal.size(row["total_bytes"]),
                "yes" if row["fits"] else "no",
                _seconds(row["first_token_seconds"]),
                _rate(row["prefill_tokens_per_second"]),
                _rate(row["decode_tokens_per_second"]),
                *((_rate(row["decode_tokens_per_second_all"]),) if several else ()),
                f"{row['largest_context']:,}" if row["largest_context"] else "-",
                _seconds(row["load_seconds"]),
            )
            for row in document["plans"]
        ],
    )  # fmt: skip
    print()
    for row in document["plans"]:
        print(f"{row['type']:>9}  {picture(row, machine['room_bytes'])}")
    print(f"{'':>9}  {'w weights, k cache, a activations and program, . free, ! too much'}")
    for note in document["notes"]:
        terminal.note(f"Note: {note}.")


def picture(row: Mapping[str, Any], room: int) -> str:
    """A memory as a bar: `wwwwkka....`, and `!` for what goes beyond it."""
    scale = BAR / room if room else 0.0
    other = row["activations_bytes"] + row["program_bytes"]
    bar, end = "", 0.0
    for letter, nbytes in (("w", row["weights_bytes"]), ("k", row["cache_bytes"]), ("a", other)):
        end += nbytes * scale
        bar += letter * max(0, min(BAR, round(end)) - len(bar))
    return f"[{bar.ljust(BAR, '.')}]" + ("!" if not row["fits"] else "")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:,.0f} s" if value < 600 else f"{value / 60:,.0f} min"


def _rate(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"
