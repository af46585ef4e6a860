"""What a version's licence and use policy say to a case: how many users, where, for what.

What it is: `licences.toml` (places and words of Meta's agreements) and the few questions people ask of them, answered
with the clause's place and its own words.
What it is not: legal advice, or the agreements' texts, which are Meta's and are linked.
What is surprising: the 700 million monthly users are counted on the day the version was released, once: growing past
that later is not what section 2 speaks of. And the clause on the European Union stands in the use policy, not in the
agreement, and speaks of multimodal models alone; all of Llama 4 is multimodal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache

from puna.catalog.models import CatalogEntry
from puna.catalog.tables import read_resource
from puna.errors import CatalogError, UsageError

USES = ("outputs-to-train", "distribute", "multimodal")
"""What may be asked about."""

NO_ADVICE = "This is a reading aid and not legal advice: the agreement's own text decides, and a lawyer."

USERS = 700_000_000
"""Monthly active users above which Meta must be asked (section 2 of each agreement)."""

EUROPEAN_UNION = frozenset({
    "AT", "BE", "BG", "CY", "CZ", "DE", "DK", "EE", "ES", "FI", "FR", "GR", "HR", "HU", "IE", "IT", "LT", "LU", "LV",
    "MT", "NL", "PL", "PT", "RO", "SE", "SI", "SK",
    "AX", "GF", "GP", "MF", "MQ", "RE", "YT",
    "EL",
})  # fmt: skip
"""Member states, ISO 3166-1; the parts of France and Finland that have a code of their own and belong to the Union (the
Treaty on its Functioning, articles 349 and 355); and the Union's own code for Greece."""

ELSEWHERE = frozenset({
    "AD", "AE", "AF", "AG", "AI", "AL", "AM", "AO", "AQ", "AR", "AS", "AU", "AW", "AZ", "BA", "BB", "BD", "BF", "BH",
    "BI", "BJ", "BL", "BM", "BN", "BO", "BQ", "BR", "BS", "BT", "BV", "BW", "BY", "BZ", "CA", "CC", "CD", "CF", "CG",
    "CH", "CI", "CK", "CL", "CM", "CN", "CO", "CR", "CU", "CV", "CW", "CX", "DJ", "DM", "DO", "DZ", "EC", "EG", "EH",
    "ER", "ET", "FJ", "FK", "FM", "FO", "GA", "GB", "GD", "GE", "GG", "GH", "GI", "GL", "GM", "GN", "GQ", "GS", "GT",
    "GU", "GW", "GY", "HK", "HM", "HN", "HT", "ID", "IL", "IM", "IN", "IO", "IQ", "IR", "IS", "JE", "JM", "JO", "JP",
    "KE", "KG", "KH", "KI", "KM", "KN", "KP", "KR", "KW", "KY", "KZ", "LA", "LB", "LC", "LI", "LK", "LR", "LS", "LY",
    "MA", "MC", "MD", "ME", "MG", "MH", "MK", "ML", "MM", "MN", "MO", "MP", "MR", "MS", "MU", "MV", "MW", "MX", "MY",
    "MZ", "NA", "NC", "NE", "NF", "NG", "NI", "NO", "NP", "NR", "NU", "NZ", "OM", "PA", "PE", "PF", "PG", "PH", "PK",
    "PM", "PN", "PR", "PS", "PW", "PY", "QA", "RS", "RU", "RW", "SA", "SB", "SC", "SD", "SG", "SH", "SJ", "SL", "SM",
    "SN", "SO", "SR", "SS", "ST", "SV", "SX", "SY", "SZ", "TC", "TD", "TF", "TG", "TH", "TJ", "TK", "TL", "TM", "TN",
    "TO", "TR", "TT", "TV", "TW", "TZ", "UA", "UG", "UK", "UM", "US", "UY", "UZ", "VA", "VC", "VE", "VG", "VI", "VN",
    "VU", "WF", "WS", "XK", "YE", "ZA", "ZM", "ZW",
})  # fmt: skip
"""All other codes, and UK and XK, which are in use: a code that is none must not read as "not in the Union"."""

_RANK = ("not granted", "ask Meta", "forbidden", "on conditions", "allowed")
"""From worst to best."""


@dataclass(frozen=True, slots=True)
class Clause:
    """A clause of an agreement, or of its use policy, in its own words."""

    place: str
    words: str


@dataclass(frozen=True, slots=True)
class Licence:
    """One agreement. `notice` is the line a Notice file must have, `built_with` what a product must show, `prefix` how
    the name of a model made with it must begin; each empty where the agreement asks for none."""

    id: str
    name: str
    version_date: date
    text: str
    policy: str
    notice: str
    built_with: str
    prefix: str
    clauses: Mapping[str, Clause]


@dataclass(frozen=True, slots=True)
class Finding:
    """An answer to one question: the verdict, what must be done, and the clauses it rests on."""

    about: str
    verdict: str
    says: str
    clauses: tuple[Clause, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """All answers to a case; `verdict` is the strictest of them."""

    licence: Licence
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """The strictest finding's verdict."""
        return min((each.verdict for each in self.findings), key=_RANK.index)


@cache
def licences() -> Mapping[str, Licence]:
    """Every agreement, by the id that models.json uses."""
    table = read_resource("licences.toml")
    found = {}
    for name, each in table.named("licences"):
        clauses = {}
        if (said := each.table_or_none("clauses")) is not None:
            for topic in (
                "grant",
                "copy",
                "built_with",
                "prefix",
                "notice",
                "law",
                "outputs",
                "users",
                "product",
                "marks",
                "suing",
                "union",
            ):
                match said.texts(topic):
                    case (place, words):
                        clauses[topic] = Clause(place, words)
                    case ():
                        pass
                    case other:
                        raise CatalogError(f"{said.where}: {topic} is not [place, words]: {other!r:.80}")
            said.finish()
        day = each.day_or_none("version_date")
        assert day is not None
        found[name] = Licence(
            name,
            each.text("name"),
            day,
            each.text("text"),
            each.text_or("policy"),
            each.text_or("notice"),
            each.text_or("built_with"),
            each.text_or("prefix"),
            clauses,
        )
        each.finish()
    table.finish()
    return found


def licence_of(entry: CatalogEntry) -> Licence:
    """The agreement a checkpoint came under."""
    return licences()[entry.licence]


def named_by(text: str) -> Licence | None:
    """The agreement whose text begins like this (a LICENSE file); None for any other."""
    head = " ".join(text[:400].split()).upper()
    for each in licences().values():
        version = each.id.removeprefix("llama")
        if re.search(rf"LLAMA {re.escape(version)} COMMUNITY LICENSE", head):
            return each
    return None


def read(
    licence: Licence, *, sees: bool, users: int | None = None, region: str | None = None, uses: Sequence[str] = ()
) -> Reading:
    """What a licence says to a case of a model that takes pictures (`sees`) or not; with no `uses`, about all of them.

    `users` are the monthly active users of all of the licensee's products in the month before the version's release;
    `region` is EU or a two-letter country code: where the individual is domiciled, or the company has its principal
    place of business. Raises UsageError for a use or a region that there is not.
    """
    for use in uses:
        if use not in USES:
            raise UsageError(f"--use {use:.40}: there is no such use.", remedy=f"One of {', '.join(USES)}.")
    where = None if region is None else region.strip().upper()
    if where is not None and where != "EU" and where not in EUROPEAN_UNION | ELSEWHERE:
        raise UsageError(
            f"--region {region!r:.40}: is no region.", remedy="Write EU, or a country's two letters: DE, US."
        )
    if users is not None and users < 0:
        raise UsageError(f"--users {users}: must not be below 0.", remedy="Monthly active users.")
    if not licence.clauses:
        return Reading(licence, (_research(licence),))
    asked = tuple(uses) or USES
    found = [_granted(licence), _users(licence, users)]
    if "multimodal" in asked or sees:
        found.append(_union(licence, sees, where))
    if "outputs-to-train" in asked:
        found.append(_outputs(licence))
    if "distribute" in asked:
        found.append(_distribute(licence))
    return Reading(licence, tuple(found))


def _research(licence: Licence) -> Finding:
    return Finding(
        "use",
        "not granted",
        "Meta gave the weights of Llama 1 to researchers who asked, one by one, for non-commercial research. Unless "
        "Meta granted you that licence you have none; the copies on the hub are other people's. (The GPL beside "
        "the code is the code's.) Its terms are not public, so no clause can be cited here.",
        (),
    )


def _granted(licence: Licence) -> Finding:
    return Finding(
        "use",
        "on conditions",
        "You may use, change and redistribute the model, also commercially, within the law and Meta's use policy "
        f"({licence.policy}); a lawsuit against Meta over it ends the licence.",
        tuple(licence.clauses[topic] for topic in ("grant", "law", "suing")),
    )


def _users(licence: Licence, users: int | None) -> Finding:
    day = licence.version_date
    month = f"{(day.replace(day=1) - date.resolution):%B %Y}"
    counted = (
        f"counted in {month}, the month before the version's release on {day}, over all products of you and your "
        "affiliates"
    )
    clauses = (licence.clauses["users"], licence.clauses["product"])
    if users is not None and users > USERS:
        says = (
            f"{users:,} monthly users are more than 700 million ({counted}): ask Meta for a licence first. Who has the "
            "model from a licensee as part of an integrated end user product need not (1.b.ii)."
        )
        return Finding("users", "ask Meta", says, clauses)
    if users is not None:
        says = f"{users:,} monthly users are not more than 700 million ({counted})."
        return Finding("users", "allowed", says, clauses)
    says = f"Whoever had more than 700 million monthly users ({counted}) must ask Meta for a licence."
    return Finding("users", "on conditions", says, clauses)


def _union(licence: Licence, sees: bool, where: str | None) -> Finding:
    clause = licence.clauses.get("union")
    clauses = () if clause is None else (clause,)
    if not sees:
        says = "This model takes text only; the clause on the European Union speaks of multimodal models."
        if clause is None:
            says = "This model takes text only, and this version's policy has no clause on the European Union."
        return Finding("multimodal", "allowed", says, clauses)
    if clause is None:
        return Finding("multimodal", "allowed", "This version's policy has no clause on multimodal models.", ())
    if where == "EU" or where in EUROPEAN_UNION:
        says = (
            "The rights of section 1.a are not granted to individuals domiciled in, or companies with their principal "
            "place of business in, the European Union. Using a product of somebody else that has the model inside is "
            "not restricted."
        )
        return Finding("multimodal", "not granted", says, clauses)
    if where is None:
        says = (
            "Not for individuals domiciled in, or companies with their principal place of business in, the European "
            "Union (end users of products excepted). Say --region for your case."
        )
        return Finding("multimodal", "on conditions", says, clauses)
    return Finding("multimodal", "allowed", f"{where} is not in the European Union.", clauses)


def _outputs(licence: Licence) -> Finding:
    if licence.clauses["outputs"].place == "1.b.v":
        whose = "Meta Llama 3" if licence.id == "llama3" else "Llama 2"
        says = (
            f"Neither the model nor its outputs may be used to improve another large language model, except {whose} "
            "itself and what derives from it. (From Llama 3.1 on this is allowed, under conditions.)"
        )
        return Finding("outputs-to-train", "forbidden", says, (licence.clauses["outputs"],))
    says = (
        "Outputs may train and improve other models. If such a model is distributed or made available, its name must "
        f"begin with “{licence.prefix}”. A product that contains the Llama itself must show “{licence.built_with}”."
    )
    return Finding("outputs-to-train", "on conditions", says, (licence.clauses["outputs"], licence.clauses["prefix"]))


def _distribute(licence: Licence) -> Finding:
    duties = ["give a copy of the agreement with it"]
    topics = ["copy"]
    if licence.built_with:
        duties.append(f"show “{licence.built_with}” on a website, in the interface or the documentation")
        duties.append(f"let the name of a model made with it begin with “{licence.prefix}”")
        topics += ["built_with", "prefix"]
    duties.append(f"keep a file “Notice” that says “{licence.notice}”")
    topics.append("notice")
    says = "You may pass on the model, and what derives from it, and must: " + "; ".join(duties) + "."
    if "marks" in licence.clauses:
        topics.append("marks")
    return Finding("distribute", "on conditions", says, tuple(licence.clauses[topic] for topic in topics))


def notice_file(licence: Licence) -> str:
    """What the Notice file of a copy says: the line that the agreement demands, and where its text is."""
    lines = [licence.notice, ""]
    if licence.built_with:
        lines += [
            f"Who distributes this, or offers a product that contains it, shows “{licence.built_with}” and lets the",
            f"name of a model made with it begin with “{licence.prefix}” (section {licence.clauses['prefix'].place}).",
        ]
    lines += [
        f"A copy of the agreement goes with it (section {licence.clauses['copy'].place}): {licence.text}",
        f"Acceptable use policy: {licence.policy}",
    ]
    return "\n".join(lines) + "\n"
