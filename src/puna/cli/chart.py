"""The picture of `puna models --picture`: cost against context or a published score, as SVG written by hand.

What it is: a scatter of the cheapest price a million tokens (three in for one out, as chats are) to the right, on a
logarithmic scale, and what is got for it upwards.
What it is not: a plotting library. It draws this one picture.
What is surprising: the file has both a light and a dark palette, and whoever shows it chooses (`prefers-color-scheme`).
A label stands where it covers no point and no other label; one that finds no place is left out, and its point has a
tooltip all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from html import escape
from pathlib import Path

from puna.catalog import facts as family
from puna.catalog.market import Market
from puna.catalog.models import CatalogEntry
from puna.errors import CatalogError, UsageError

WIDTH, HEIGHT = 960, 600
LEFT, RIGHT, TOP, BOTTOM = 76, 28, 84, 88
IN_SHARE = 0.75
"""Three tokens in for one out."""

_STYLE = """
  svg { color-scheme: light dark }
  .ground { fill: #fcfcfb } .title { fill: #16181d; font-size: 20px; font-weight: 600 }
  .label, .axis { fill: #30343c } .small { fill: #666c78 } .grid { stroke: #e3e4e8 } .frame { stroke: #aab0bb }
  .llama { fill: #2563c9 } .other { fill: none; stroke: #b4530a; stroke-width: 2.2 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #15171b } .title { fill: #f2f3f5 } .label, .axis { fill: #d4d7dd } .small { fill: #9aa1ad }
    .grid { stroke: #2a2e35 } .frame { stroke: #565d69 } .llama { fill: #74a5f7 } .other { stroke: #f0a25b }
  }
  text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; font-size: 13px }
"""


@dataclass(frozen=True, slots=True)
class Point:
    """One model: dollars a million tokens, what it gives, whether it is a Llama, and the tooltip."""

    name: str
    usd: float
    value: float
    llama: bool
    tip: str


def write(
    path: Path, against: str, benchmark: str, shown: Sequence[CatalogEntry], prices: Market, today: date
) -> tuple[int, int]:
    """Draw `shown` (and, against context, the hosted models that are offered) into a new file or over an SVG.

    Gives how many models were drawn, and how many lack a price or a value. Raises UsageError for a path that is no
    .svg, CatalogError where there is nothing to draw.
    """
    if path.suffix.lower() != ".svg":
        raise UsageError(f"--picture {path}: is written as SVG.", remedy="Name a file that ends in .svg.")
    points, left_out = _points(against, benchmark, shown, prices, today)
    if not points:
        raise CatalogError(
            "No model of these has both a price and a value to draw.",
            remedy="Filter less, or choose another --benchmark.",
        )
    path.write_text(drawing(points, against, benchmark, max(p.source.date for p in prices.prices.values())), "utf-8")
    return len(points), left_out


def _points(
    against: str, benchmark: str, shown: Sequence[CatalogEntry], prices: Market, today: date
) -> tuple[list[Point], int]:
    which = family.widest(benchmark)
    found, left_out = [], 0
    candidates: list[tuple[str, str, float | None, bool]] = []
    for entry in shown:
        score = family.facts(entry).at(which)
        value = float(entry.context_length) if against == "context" else None if score is None else score.value
        candidates.append((family.size_of(entry), family.size_of(entry), value, True))
    if against == "context":
        candidates += [
            (model.id, model.name, model.context_in, False)
            for model in prices.models.values()
            if not model.retired(today)
        ]
    for name, label, value, llama in candidates:
        price = next((p for p in prices.prices_of(name) if not p.over(today)), None)
        if price is None or value is None:
            left_out += 1
            continue
        # At a host, the context is the host's.
        if against == "context" and price.context is not None:
            value = min(value, float(price.context))
        usd = IN_SHARE * price.input + (1 - IN_SHARE) * price.output
        where = f"{prices.hosts[price.host].name}, {price.source.date}"
        tip = f"{label}: ${price.input:g} in, ${price.output:g} out a million tokens at {where}"
        found.append(Point(label, usd, float(value), llama, tip))
    return found, left_out


def drawing(points: Sequence[Point], against: str, benchmark: str, day: date) -> str:
    """The SVG's text."""
    which = family.widest(benchmark)
    upwards = (
        "tokens of context at that host"
        if against == "context"
        else f"{which[0]} ({', '.join(filter(None, which[:0:-1]))})"
    )
    low, high = _decades([point.usd for point in points])
    logarithmic = against == "context"
    if logarithmic:
        bottom, top = (math.log2(f([point.value for point in points])) for f in (min, max))
        bottom, top = math.floor(bottom - 0.3), math.ceil(top + 0.3)
    else:
        bottom = 10 * math.floor((min(point.value for point in points) - 2) / 10)
        top = 10 * math.ceil((max(point.value for point in points) + 2) / 10)

    def x(usd: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(usd) - low) / (high - low)

    def y(value: float) -> float:
        at = math.log2(value) if logarithmic else value
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (at - bottom) / (top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Cost against {escape(upwards)}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text class="title" x="{LEFT}" y="36">What a model gives for its price</text>',
        f'<text class="small" x="{LEFT}" y="58">{escape(upwards)}; upper left is better</text>',
    ]
    for tick, text in _money_ticks(low, high):
        at = x(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="axis" x="{at:.1f}" y="{HEIGHT - BOTTOM + 22}" text-anchor="middle">{text}</text>')
    steps = range(bottom, top + 1) if logarithmic else range(bottom, top + 1, 10)
    for step in steps:
        if logarithmic and (step - bottom) % 2:
            continue
        value = 2.0**step if logarithmic else float(step)
        text = _context(value) if logarithmic else str(step)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="axis" x="{LEFT - 10}" y="{y(value) + 4.5:.1f}" text-anchor="end">{text}</text>')
    parts.append(f'<path class="frame" fill="none" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - BOTTOM + 46}" text-anchor="middle">'
        "dollars a million tokens, three in for one out, at the cheapest host</text>"
    )
    places = [(x(point.usd), y(point.value)) for point in points]
    for point, (px, py) in zip(points, places, strict=True):
        kind = "llama" if point.llama else "other"
        parts.append(
            f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="{6 if point.llama else 5}">'
            f"<title>{escape(point.tip)}</title></circle>"
        )
    parts += _labels(points, places)
    if any(not point.llama for point in points):
        parts.append(
            f'<circle class="llama" cx="{WIDTH - 196}" cy="31" r="6"/>'
            f'<text class="label" x="{WIDTH - 184}" y="36">Llama</text>'
        )
        parts.append(
            f'<circle class="other" cx="{WIDTH - 122}" cy="31" r="5"/>'
            f'<text class="label" x="{WIDTH - 110}" y="36">other, hosted</text>'
        )
    parts.append(
        f'<text class="small" x="{LEFT}" y="{HEIGHT - 14}">Prices as their sources had them up to {day}: '
        "`puna models NAME` names each.</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """The ends of the money axis, as powers of ten, with room beside the outermost points."""
    positive = [value for value in values if value > 0]
    if not positive:
        raise CatalogError("Nothing of these costs anything.", remedy="Draw others.")
    return math.log10(min(positive)) - 0.12, math.log10(max(positive)) + 0.22


def _money_ticks(low: float, high: float) -> list[tuple[float, str]]:
    ticks = []
    for power in range(math.floor(low), math.ceil(high) + 1):
        for factor in (1, 2, 5):
            value = factor * 10.0**power
            if low <= math.log10(value) <= high:
                ticks.append((value, f"${value:g}"))
    return ticks


def _context(value: float) -> str:
    return f"{value / 2**20:g}M" if value >= 2**20 else f"{value / 2**10:g}K"


def _labels(points: Sequence[Point], places: Sequence[tuple[float, float]]) -> list[str]:
    """A name beside each point where there is room: right, left, above, below, and the corners, in this order."""
    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in places]
    parts = []
    for point, (px, py) in sorted(zip(points, places, strict=True), key=lambda each: (-each[1][1], each[1][0])):
        wide = 7.1 * len(point.name)
        tries = [
            ("start", px + 11, py + 4.5), ("end", px - 11, py + 4.5), ("middle", px, py - 12), ("middle", px, py + 22),
            ("start", px + 8, py - 8), ("end", px - 8, py - 8), ("start", px + 8, py + 17), ("end", px - 8, py + 17),
            ("middle", px, py - 27), ("middle", px, py + 37),
        ]  # fmt: skip
        for anchor, at, line in tries:
            left = at if anchor == "start" else at - wide if anchor == "end" else at - wide / 2
            box = (left - 5, line - 12, left + wide + 5, line + 4)
            inside = box[0] > LEFT + 2 and box[2] < WIDTH - 4 and box[1] > TOP - 14 and box[3] < HEIGHT - BOTTOM - 1
            own = (px - 7, py - 7, px + 7, py + 7)
            if inside and not any(_overlap(box, other) for other in taken if other != own):
                taken.append(box)
                parts.append(
                    f'<text class="label" x="{at:.1f}" y="{line:.1f}" text-anchor="{anchor}">'
                    f"{escape(point.name)}</text>"
                )
                break
    return parts


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
