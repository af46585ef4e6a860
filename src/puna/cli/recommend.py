"""`puna recommend`: the ranking, with every point and what speaks against each choice."""

from __future__ import annotations

import textwrap
from datetime import date

from puna.catalog.cost import Work
from puna.catalog.market import market
from puna.catalog.recommend import COST, KNOWLEDGE, PRIVATE, QUALITY, Advice, Case, recommend
from puna.cli import terminal
from puna.errors import UsageError
from puna.settings import RecommendSettings


def main(settings: RecommendSettings) -> int:
    """Run the command."""
    if settings.show < 1:
        raise UsageError(f"--show {settings.show}: must be at least 1.")
    case = Case(
        settings.task,
        settings.privacy,
        settings.context,
        Work(settings.requests, settings.tokens_in, settings.tokens_out),
        settings.budget,
        settings.memory,
        settings.language,
        settings.region,
        settings.users,
    )
    advice = recommend(case, market(), date.today())
    if settings.json:
        terminal.document(
            {
                "choices": [
                    {
                        "short_name": choice.entry.short_name,
                        "points": {name: round(value, 2) for name, value in choice.points.items()},
                        "total": round(choice.total, 2),
                        "where": choice.way.where,
                        "usd_a_month": choice.way.usd,
                        "quant": choice.way.quant or None,
                        "for": list(choice.reasons),
                        "against": list(choice.against),
                    }
                    for choice in advice.choices
                ],
                "excluded": [{"short_name": name, "because": why} for name, why in advice.excluded],
                "beside": [{"name": model.id, "usd_a_month": usd} for model, usd in advice.beside],
            }
        )
        return 0
    _tell(settings, advice)
    return 0


def _tell(settings: RecommendSettings, advice: Advice) -> None:
    if not advice.choices:
        terminal.note("No Llama can be recommended for this. What ruled each out:")
    for rank, choice in enumerate(advice.choices[: settings.show], 1):
        points = choice.points
        most = {"quality": QUALITY, "cost": COST, "privacy": PRIVATE, "knowledge": KNOWLEDGE}
        parts = ", ".join(f"{name} {value:.0f}/{most[name]}" for name, value in points.items())
        terminal.say(f"{rank}. {choice.entry.short_name}  {choice.total:.0f} points ({parts})\n")
        for sign, lines in (("+", choice.reasons), ("-", choice.against)):
            for line in lines:
                terminal.say(_wrapped(f"   {sign} ", line))
        terminal.say("\n")
    rest = advice.choices[settings.show :]
    if rest:
        terminal.say(
            _wrapped("then ", ", ".join(f"{each.entry.short_name} ({each.total:.0f})" for each in rest)) + "\n"
        )
    if advice.excluded:
        # Several may be out for one reason.
        because: dict[str, list[str]] = {}
        for name, why in advice.excluded:
            because.setdefault(why, []).append(name)
        terminal.say("ruled out\n")
        for why, names in because.items():
            terminal.say(_wrapped("   ", f"{', '.join(names)}: {why}"))
    if advice.beside:
        terminal.say("\nhosted models beside them, not ranked: no score of them is in the catalog\n")
        for model, usd in advice.beside:
            ends = f", retires on {model.retires}" if model.retires else ""
            terminal.say(f"   {model.name}: ${usd:,.2f} a month{ends}\n")
    if advice.choices:
        terminal.note(f"`puna licence {advice.choices[0].entry.short_name}` says what its licence asks for.")


def _wrapped(head: str, text: str) -> str:
    return (
        textwrap.fill(text, 110, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False) + "\n"
    )
