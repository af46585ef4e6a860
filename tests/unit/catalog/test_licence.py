"""What licences say to a case; and every clause stands where it is said to, in Meta's own text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from puna.catalog import licence as module
from puna.catalog import models
from puna.catalog.facts import facts
from puna.catalog.licence import EUROPEAN_UNION, Licence, Reading, licence_of, licences, named_by, notice_file
from puna.errors import UsageError


def read(entry: models.CatalogEntry, **case: Any) -> Reading:
    """What the licence of a model of the catalog says to a case."""
    return module.read(licence_of(entry), sees=facts(entry).sees, **case)


def plain(text: str) -> str:
    """A text without Markdown's marks, in one line."""
    return re.sub(r"\s+", " ", re.sub(r"[*\\]", "", text.replace("-\n", "-")))


def sections(text: str) -> dict[str, str]:
    """An agreement by its places: 1, 1.a, 1.b, 1.b.iii. A place's text ends where the next one begins."""
    found: dict[str, str] = {}
    top = letter = ""
    at = "head"
    for line in re.sub(r"[*\\]", "", text).splitlines():
        head = re.match(r"\s*(?:(\d)|([abc])|(iii|ii|iv|i|v))\.\s", line)
        if head and head[1]:
            top, letter, at = head[1], "", head[1]
        elif head and top and head[2]:
            letter = head[2]
            at = f"{top}.{letter}"
        elif head and letter:
            at = f"{top}.{letter}.{head[3]}"
        found[at] = found.get(at, "") + "\n" + line
    return {place: plain(words) for place, words in found.items()}


def files(folder: Path, licence: Licence) -> tuple[str, str]:
    """The texts of an agreement and of its use policy."""
    stem = licence.id.replace(".", "_")
    folder = folder / "licenses"
    return (folder / f"{stem}.LICENSE.txt").read_text(), (folder / f"{stem}.USE_POLICY.md").read_text()


COMMUNITY = [licence for licence in licences().values() if licence.clauses]


@pytest.mark.parametrize("licence", COMMUNITY, ids=lambda each: each.id)
def test_each_clause_stands_at_its_place(licence: Licence, reference: Path) -> None:
    agreement, policy = files(reference, licence)
    places = sections(agreement)
    assert {"1.a", "1.b.i", "1.b.iii", "1.b.iv", "2", "5.a", "5.c"} <= set(places)
    for topic, clause in licence.clauses.items():
        where = plain(policy) if clause.place == "policy" else places[clause.place]
        assert plain(clause.words) in where, topic
    assert plain(licence.notice) in places["1.b.iii"]
    assert named_by(agreement) is licence
    assert f"{licence.version_date:%B} {licence.version_date.day}, {licence.version_date.year}" in plain(
        agreement[:400]
    )
    if licence.built_with:
        assert f"display “{licence.built_with}”" in places["1.b.i"]
        assert f"include “{licence.prefix}” at the beginning" in places["1.b.i"]
    assert ("1.b.v" in places) == (licence.id in ("llama2", "llama3"))
    assert ("European Union" in policy) == ("union" in licence.clauses)
    link = re.sub(r"[\[\]()]", " ", plain(agreement))
    assert licence.policy in link


def test_the_catalog_and_the_licences_call_them_alike() -> None:
    for entry in models.entries():
        assert licences()[entry.licence].name == entry.licence_name


def verdict(reading: Reading, about: str) -> str:
    [found] = [each for each in reading.findings if each.about == about]
    return found.verdict


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("llama2:7b", "forbidden"),
        ("codellama:34b", "forbidden"),
        ("llama3:8b", "forbidden"),
        ("llama3.1:8b", "on conditions"),
        ("llama3.2:1b", "on conditions"),
        ("llama3.3:70b", "on conditions"),
        ("llama4:scout", "on conditions"),
    ],
)
def test_outputs_may_train_others_from_3_1_on(name: str, outputs: str) -> None:
    reading = read(models.lookup(name), uses=["outputs-to-train"])
    assert verdict(reading, "outputs-to-train") == outputs
    [finding] = [each for each in reading.findings if each.about == "outputs-to-train"]
    assert finding.clauses[0].place == ("1.b.v" if outputs == "forbidden" else "1.b.i")
    assert reading.verdict == outputs


@pytest.mark.parametrize(
    ("name", "region", "expected"),
    [
        ("llama3.2-vision:11b", "EU", "not granted"),
        ("llama3.2-vision:90b", "de", "not granted"),
        ("llama4:scout", "FR", "not granted"),
        ("llama-guard4:12b", "IE", "not granted"),
        ("llama-guard3-vision:11b", "EU", "not granted"),
        ("llama4:maverick", "US", "allowed"),
        ("llama4:maverick", "CH", "allowed"),
        ("llama4:maverick", "GB", "allowed"),
        ("llama4:maverick", None, "on conditions"),
        ("llama3.2:1b", "EU", "allowed"),
        ("llama3.3:70b", "DE", "allowed"),
        ("llama3.1:8b", "EU", "allowed"),
    ],
)
def test_the_union_clause_is_about_multimodal_models(name: str, region: str | None, expected: str) -> None:
    reading = read(models.lookup(name), region=region, uses=["multimodal"])
    assert verdict(reading, "multimodal") == expected


def test_a_model_that_sees_is_always_told_of_the_union() -> None:
    reading = read(models.lookup("llama4:scout"), region="ES", uses=["distribute"])
    assert reading.verdict == "not granted"
    [finding] = [each for each in reading.findings if each.about == "multimodal"]
    assert finding.clauses[0].place == "policy"
    assert "end users of a product" in finding.clauses[0].words


@pytest.mark.parametrize(
    ("users", "expected"), [(700_000_000, "allowed"), (700_000_001, "ask Meta"), (None, "on conditions")]
)
def test_seven_hundred_million(users: int | None, expected: str) -> None:
    reading = read(models.lookup("llama3.1:8b"), users=users)
    assert verdict(reading, "users") == expected
    [finding] = [each for each in reading.findings if each.about == "users"]
    assert finding.clauses[0].place == "2"
    assert "June 2024" in finding.says
    assert "2024-07-23" in finding.says


def test_distribution_asks_for_what_its_version_asks_for() -> None:
    def says(name: str) -> str:
        [finding] = [each for each in read(models.lookup(name)).findings if each.about == "distribute"]
        return finding.says

    assert "Built with" not in says("llama2:7b")
    assert "“Built with Meta Llama 3”" in says("llama3:8b")
    assert "begin with “Llama 3”" in says("llama3:8b")
    assert "“Built with Llama”" in says("llama3.3:70b")
    assert "Llama 4 is licensed under the Llama 4 Community License" in says("llama4:scout")


def test_llama_1_is_for_research() -> None:
    reading = read(models.lookup("llama1:7b"), users=5)
    assert reading.verdict == "not granted"
    assert "non-commercial research" in reading.findings[0].says


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"uses": ["sell"]}, "--use sell"),
        ({"region": "Germany"}, "--region 'Germany'"),
        ({"region": "EUR"}, "--region 'EUR'"),
        ({"region": "DW"}, "--region 'DW'"),
        ({"users": -1}, "--users -1"),
    ],
)
def test_a_case_that_is_none(case: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(models.lookup("llama3.1:8b"), **case)
    assert message in caught.value.message
    assert caught.value.remedy


def test_the_union_has_its_members() -> None:
    parts = {"AX", "GF", "GP", "MF", "MQ", "RE", "YT", "EL"}
    assert len(EUROPEAN_UNION - parts) == 27
    assert parts < EUROPEAN_UNION
    assert not EUROPEAN_UNION & module.ELSEWHERE
    # ISO 3166-1 has 249; EL, UK and XK are beside it
    assert len(EUROPEAN_UNION | module.ELSEWHERE) == 249 + 3
    assert {"GB", "CH", "NO", "US", "UK"} < module.ELSEWHERE


def test_a_notice_file_has_the_line_and_the_addresses() -> None:
    for licence in COMMUNITY:
        lines = notice_file(licence).splitlines()
        assert lines[0] == licence.notice
        assert any(licence.text in line for line in lines)
        assert any(licence.policy in line for line in lines)
        assert any(licence.built_with in line for line in lines) or not licence.built_with


@pytest.mark.parametrize("words", [(), ("GNU GENERAL PUBLIC LICENSE",), ("Apache License", "Version 2.0")])
def test_other_licences_are_none_of_metas(words: Sequence[str]) -> None:
    assert named_by("\n".join(words)) is None
    assert licences()["llama2"].version_date == date(2023, 7, 18)
