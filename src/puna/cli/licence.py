"""`puna licence`: what a model's licence says to a case, clause by clause."""

from __future__ import annotations

import textwrap

from puna.catalog import models as catalog
from puna.catalog.facts import correction, facts
from puna.catalog.licence import NO_ADVICE, Licence, Reading, licence_of, notice_file, read
from puna.cli import terminal
from puna.errors import CatalogError, UsageError
from puna.settings import LicenceSettings


def main(settings: LicenceSettings) -> int:
    """Run the command."""
    licence, sees = _of(settings.model)
    if settings.notice:
        if settings.users is not None or settings.region is not None or settings.use:
            raise UsageError("--notice goes alone.", remedy="The Notice file is the same in every case.")
        if not licence.notice:
            raise UsageError(f"{licence.name} asks for no Notice file.", remedy="It gives no right to pass copies on.")
        text = notice_file(licence)
        if settings.json:
            terminal.document({"model": settings.model, "licence": licence.name, "notice": text})
        else:
            terminal.say(text)
        return 0
    reading = read(licence, sees=sees, users=settings.users, region=settings.region, uses=settings.use)
    if settings.json:
        terminal.document(_document(settings.model, reading))
    else:
        _tell(settings.model, reading)
    return 0


def _of(name: str) -> tuple[Licence, bool]:
    """The agreement of a Llama of the catalog, or of one that lies on this machine, and whether it takes pictures."""
    entry = catalog.find(name)
    if entry is not None:
        return licence_of(entry), facts(entry).sees
    from pathlib import Path

    from puna.weights.checkpoint import open_checkpoint
    from puna.weights.find import find_model
    from puna.weights.notices import agreement_of

    if not Path(name).exists() and ("/" not in name or correction(name) is not None):
        catalog.lookup(name)  # raises, and says what was meant
    checkpoint = open_checkpoint(find_model(name))
    licence = agreement_of(checkpoint)
    if licence is None:
        raise CatalogError(
            f"{name:.200}: nothing says under which of Meta's agreements it came.",
            remedy="A LICENSE file beside it would; or name the Llama it was made from.",
        )
    return licence, getattr(checkpoint.config, "vision", None) is not None


def _document(model: str, reading: Reading) -> dict[str, object]:
    return {
        "model": model,
        "licence": reading.licence.name,
        "version_date": reading.licence.version_date.isoformat(),
        "text": reading.licence.text,
        "policy": reading.licence.policy or None,
        "verdict": reading.verdict,
        "findings": [
            {
                "about": each.about,
                "verdict": each.verdict,
                "says": each.says,
                "clauses": [{"place": clause.place, "words": clause.words} for clause in each.clauses],
            }
            for each in reading.findings
        ],
        "notice": reading.licence.notice or None,
        "advice": NO_ADVICE,
    }


def _tell(model: str, reading: Reading) -> None:
    licence = reading.licence
    terminal.facts(
        [
            ("model", model),
            ("licence", f"{licence.name}, {licence.version_date}"),
            ("its text", licence.text),
            *([("use policy", licence.policy)] if licence.policy else []),
            ("in your case", reading.verdict),
        ]
    )
    for each in reading.findings:
        terminal.say(f"\n{each.about}: {each.verdict}\n")
        terminal.say(_wrapped("  ", each.says))
        for clause in each.clauses:
            where = "use policy, after the prohibited uses" if clause.place == "policy" else f"section {clause.place}"
            terminal.say(_wrapped("    ", f"{where}: “{clause.words}”"))
    terminal.note("\n" + NO_ADVICE)


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(text, 110, initial_indent=head, subsequent_indent=head, break_long_words=False) + "\n"
