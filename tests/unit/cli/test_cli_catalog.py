"""The commands about choosing: models, cost, recommend, licence."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from puna.catalog.market import OVERRIDES, market
from puna.cli import chart

Puna = Callable[..., Any]


def short(said: Any) -> list[str]:
    """The short names of a table."""
    return [line.split()[0] for line in said.out.splitlines()[1:]]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--generation", "llama3.3"), ["llama3.3:70b"]),
        (("--modality", "image", "--licence", "llama4"), ["llama4:scout", "llama4:maverick", "llama-guard4:12b"]),
        (("--context", "1000000"), ["llama4:scout", "llama4:maverick"]),
        (("--language", "ar"), ["llama4:scout", "llama4:maverick"]),
        (("--max-memory", "3"), ["llama3.2:1b", "llama3.2:3b", "llama-guard3:1b"]),
        (("--max-memory", "3", "--context", "20000"), ["llama3.2:1b", "llama-guard3:1b"]),
        (("--generation", "llama4", "--sort", "size"), ["llama4:scout", "llama4:maverick"]),
        (("--generation", "llama4", "--sort", "score"), ["llama4:maverick", "llama4:scout"]),
        (("--generation", "llama3.2", "--sort", "memory"), ["llama3.2:1b", "llama3.2:3b"]),
    ],
)
def test_filters_and_orders(puna: Puna, flags: tuple[str, ...], names: list[str]) -> None:
    assert short(puna("models", *flags)) == names
    sizes = {row["short_name"] for row in puna("models", *flags, "--json").json()["models"]}
    assert set(names) <= sizes


def test_orders_over_the_whole_family(puna: Puna) -> None:
    by_score = short(puna("models", "--sort", "score"))
    assert by_score[:2] == ["llama4:maverick", "llama3.1:405b"]
    assert short(puna("models", "--sort", "context"))[0] == "llama4:scout"
    assert short(puna("models", "--sort", "released"))[0] == "llama-guard4:12b"
    assert short(puna("models", "--sort", "price"))[0] == "llama3.2:1b"
    assert puna("models", "--generation", "llama4", "--context", "99999999").err.startswith("No model")


@pytest.mark.parametrize(
    ("words", "message", "remedy"),
    [
        (("models", "--generation", "llama9"), "--generation 'llama9'", "llama3.1"),
        (("models", "--licence", "mit"), "--licence 'mit'", "llama2"),
        (("models", "--benchmark", "Elo"), "--benchmark 'Elo'", "MMLU"),
        (("models", "llama4.1"), "never released a Llama 4.1", "llama4:scout"),
        (("models", "gpt5"), "no model called 'gpt5'", "gpt-5"),
        (("models", "llama3.1:9b"), "no model called", "llama3.1:8b"),
        (("models", "--hosted", "--generation", "llama4"), "--generation does not go with --hosted", "family"),
        (("models", "--hosted", "--sort", "score"), "--sort score", "price"),
        (("models", "--picture", "a.png"), "is written as SVG", ".svg"),
        (("cost", "llama4.1"), "never released", "llama4:maverick"),
        (("cost", "llama3.1:8b", "--gpu", "gtx970"), "--gpu 'gtx970'", "rtx4090"),
        (("cost", "llama3.1:8b", "--rent", "1", "--price", "1"), "--rent does not go with", "Rent it or buy it"),
        (("cost", "llama3.1:8b", "--gpu", "l40s", "--buy"), "no price to buy", "--price"),
        (("cost", "llama3.1:8b", "--gpu", "mi300x"), "no rent", "--rent"),
        (("cost", "llama3.1:8b", "--speed-in", "5"), "go together", "puna bench"),
        (("cost", "llama3.1:8b", "--speed-in", "5", "--speed-out", "0"), "--speed-out 0.0", ""),
        (("cost", "llama3.1:8b", "--rent", "nan"), "--rent nan", ""),
        (("cost", "llama3.1:8b", "--requests", "0"), "no work", "--requests"),
        (("cost", "llama3.1:8b", "--cached", "2"), "--cached 2.0", ""),
        (("cost", "llama2:7b", "--in", "5000"), "longer than llama2:7b's context", "puna models"),
        (("cost", "gpt-5", "--gpu", "h100"), "--gpu does not go with GPT-5", ""),
        (("cost", "deepseek-v3"), "DeepSeek V3 retired on 2025-09-05", "catalog.toml"),
        (("cost", "gpt-5", "--in", "300000"), "GPT-5 takes 272,000 tokens in at most", "catalog.toml"),
        (("cost", "llama3.1:8b", "--against", "gpt-5", "--out", "130000", "--in", "1"), "128,000 tokens out", ""),
        (("cost", "llama3.1:8b", "--against", "llama1:7b"), "No offer of llama1:7b", "catalog.toml"),
        (("cost", "llama3.1:8b", "--requests", "9" * 400), "--requests 9999", ""),
        (("cost", "llama3.1:8b", "--utilisation", "1e-300"), "more than 1,000,000 copies", "--utilisation"),
        (("cost", "llama3.1:8b", "--speed-in", "5e-324", "--speed-out", "1"), "--speed-in 5e-324", ""),
        (("cost", "llama3.1:8b", "--rent", "1e308"), "--rent 1e+308", ""),
        (("cost", "llama3.3:70b", "--gpus", "1", "--gpu", "rtx4090"), "does not fit 1 ×", "--gpus"),
        (("recommend", "--task", "poetry"), "must be one of", ""),
        (("recommend", "--show", "0"), "--show 0", ""),
        (("licence", "llama4.1"), "never released", "llama4:scout"),
        (("licence", "llama3.1:8b", "--use", "sell"), "--use sell", "distribute"),
        (("licence", "llama3.1:8b", "--notice", "--region", "EU"), "--notice goes alone", ""),
        (("licence", "llama1:7b", "--notice"), "asks for no Notice", ""),
    ],
)
def test_what_is_refused_is_named(puna: Puna, words: tuple[str, ...], message: str, remedy: str) -> None:
    said = puna(*words, "--json")
    assert said.code == 2
    error = said.json()["error"]
    assert message in error["message"]
    assert remedy in error["remedy"]


def test_one_model_whole(puna: Puna) -> None:
    text = puna("models", "llama4:scout").out
    for part in (
        "10,485,760",
        "108,641,793,536, 871,932,416 of them for pictures; 17,172,894,720 serve a token (16 experts)",
        "MMLU-Pro 74.3 (instruct, 0-shot)",
        "2024-08",
        "Groq: $0.11 in",
    ):
        assert part in text
    assert "articles give to Llama 4 are Scout's alone" in text
    [item] = puna("models", "llama4:scout", "--json").json()["models"]
    assert item["experts"] == 16
    assert {score["source"]["name"] for score in item["scores"]} == {"Llama 4 model card"}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", price["source"]["date"]) for price in item["prices"])
    gone = puna("models", "llama3.3:70b").out
    assert "Groq: $0.59 in, $0.79 out, ended on 2026-08-16" in gone


def test_a_hosted_model_whole_and_the_list_of_them(puna: Puna) -> None:
    text = puna("models", "GPT-5").out
    assert "272,000" in text
    assert "128,000" in text
    lines = {line.split()[0]: line for line in puna("models", "--hosted").out.splitlines()}
    assert "retired on 2025-09-05" in lines["deepseek-v3"]
    assert "0.27 / 1.1" in lines["deepseek-v3"]
    assert "1M" in lines["gemini-2.5-pro"]
    rows = puna("models", "--hosted", "--json", "--sort", "price").json()["models"]
    assert rows[0]["short_name"] == "gpt-6-luna"
    assert [row["short_name"] for row in rows if row["retired"]] != []


def test_who_serves_and_who_rents(puna: Puna) -> None:
    text = puna("models", "--hosts").out
    assert re.search(r"^Anyscale .*ended its shared endpoints on 1 August 2024", text, re.MULTILINE)
    assert re.search(r"^h100 .* 80 GB +12.29 +Microsoft Azure +2026-11-09 +8 together", text, re.MULTILINE)
    document = puna("models", "--hosts", "--json").json()
    assert {host["name"] for host in document["hosts"]} >= {"Together", "Replicate", "AWS Bedrock", "Google", "Groq"}
    assert all(rent["source"]["date"] for rent in document["rents"])
    assert {rent["host"] for rent in document["rents"]} >= {"RunPod", "Vast.ai", "Lambda"}
    for words in (("--hosted",), ("--sort", "price"), ("--context", "5")):
        assert puna("models", "--hosts", *words).code == 2


def test_models_side_by_side(puna: Puna) -> None:
    lines = puna("models", "llama3.3:70b", "llama4:scout", "gpt-5").out.splitlines()
    assert lines[0].split() == ["llama3.3:70b", "llama4:scout", "gpt-5"]
    rows = {line[:44].strip(): line[44:].split() for line in lines[1:]}
    # A score is a row only in the setup that more than one of them has.
    assert any(name.startswith("MMLU-Pro (instruct, 0-shot)") for name in rows)
    assert not any("5-shot, chain of thought" in name for name in rows)
    items = puna("models", "llama3.3:70b", "gpt-5", "--json").json()["models"]
    assert [item["short_name"] for item in items] == ["llama3.3:70b", "gpt-5"]


def numbers(svg: ET.Element, tag: str, *names: str) -> list[list[float]]:
    """The attributes of each element of a kind."""
    space = "{http://www.w3.org/2000/svg}"
    return [[float(each.get(name, "nan")) for name in names] for each in svg.iter(space + tag)]


@pytest.mark.parametrize("against", ["score", "context"])
def test_the_picture_is_well_made(puna: Puna, tmp_path: Path, against: str) -> None:
    path = tmp_path / "cost.svg"
    said = puna("models", "--picture", str(path), "--against", against)
    assert (said.code, said.out) == (0, "")
    text = path.read_text()
    assert "prefers-color-scheme: dark" in text
    svg = ET.fromstring(text)
    dots = [dot for dot in numbers(svg, "circle", "cx", "cy") if dot[1] > 60]
    drawn = int(re.findall(r": (\d+) models", said.err)[0])
    assert len(dots) == drawn > (5 if against == "score" else 25)
    for x, y in dots:
        assert chart.LEFT < x < chart.WIDTH - chart.RIGHT
        assert chart.TOP <= y <= chart.HEIGHT - chart.BOTTOM
    tips = [each.text or "" for each in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert len(tips) == drawn
    assert all("a million tokens at" in tip for tip in tips)
    if against == "score":
        # Dearer is to the right, better is higher.
        place = dict(zip((tip.split(":  ")[0].split(": $")[0] for tip in tips), dots, strict=True))
        assert place["llama3.1:405b"][0] > place["llama3.1:8b"][0]
        assert place["llama3.1:405b"][1] < place["llama3.1:8b"][1]


def test_the_picture_escapes_what_a_person_wrote(tmp_path: Path, home: Path, puna: Puna) -> None:
    home.mkdir()
    (home / OVERRIDES).write_text(
        '[models.x]\nname = "<script>&"\nmaker = "M"\ncontext_in = 5000\nsource = "s"\ndate = 2026-01-01\n'
        '[[prices]]\nmodel = "x"\nhost = "openai"\ninput = 7\noutput = 7\nsource = "s"\ndate = 2026-01-01\n'
    )
    assert puna("models", "--picture", str(tmp_path / "a.svg"), "--against", "context").code == 0
    text = (tmp_path / "a.svg").read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;&amp;" in text
    ET.fromstring(text)


def test_labels_do_not_cover_each_other() -> None:
    points = [chart.Point(f"model-{n}", 1 + n % 3, 10.0 + n % 2, True, "") for n in range(30)]
    places = [(200.0 + 8 * n, 300.0 + 5 * (n % 4)) for n in range(30)]
    found = [
        (float(x), float(y), anchor, name)
        for x, y, anchor, name in re.findall(
            r'x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)', "".join(chart._labels(points, places))
        )
    ]
    assert 5 < len(found) < 30
    boxes = []
    for x, y, anchor, name in found:
        wide = 7.1 * len(name)
        left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        boxes.append((left, y - 12, left + wide, y + 4))
    assert not any(chart._overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_what_a_month_costs(puna: Puna) -> None:
    words = ("cost", "llama3.1:8b", "--requests", "1000000", "--in", "1000", "--out", "300", "--against", "gpt-5")
    document = puna(*words, "--rent", "2", "--speed-in", "5000", "--speed-out", "1000", "--json").json()
    costs = {(row["model"], row["host"]): row["usd_a_month"] for row in document["hosted"]}
    assert costs["gpt-5", "OpenAI"] == pytest.approx(1000 * 1.25 + 300 * 10)
    assert costs["llama3.1:8b", "AWS Bedrock"] == pytest.approx(1300 * 0.22)
    assert ("llama3.1:8b", "Groq") not in costs  # ended
    assert list(costs.values()) == sorted(costs.values())
    own = document["self_hosted"]
    # 1000 / 5000 + 300 / 1000 = 0.5 s: 5,256,000 requests a month
    assert own["requests_a_copy"] == pytest.approx(5_256_000)
    assert own["usd_a_month"] == pytest.approx(1460)
    cheapest = min(costs.values()) / 1e6
    assert own["break_even_requests"] == pytest.approx(1460 / cheapest)
    assert own["break_even_utilisation"] == pytest.approx(1460 / cheapest / 5_256_000)
    assert own["speed_is_measured"] is True
    text = puna(*words, "--rent", "2", "--speed-in", "5000", "--speed-out", "1000").out
    assert "a request: 1,000 / 5,000 + 300 / 1,000 = 0.5 s of the machine" in text
    assert "1 × $2 an hour × 730 hours = $1,460.00 a month" in text
    assert "break-even with Novita" in text


def test_what_a_hosted_model_costs_with_cache_and_batches(puna: Puna) -> None:
    said = puna(
        "cost", "gpt-5", "--requests", "1000", "--in", "10000", "--out", "1000", "--cached", "0.8", "--batch", "1"
    )
    # 2M × 1.25 / 2 + 8M × 0.125 / 2 + 1M × 10 / 2
    assert "6.75" in said.out
    assert "the cache saves $4.50 a month" in said.out
    assert "batches saves $6.75 a month" in said.out
    assert puna("cost", "gpt-5", "--json").json()["self_hosted"] is None
    # GPT-5 takes 272,000 tokens in and no more.
    assert puna("cost", "gpt-5", "--in", "272001").code == 2


def test_buying_a_machine(puna: Puna) -> None:
    own = puna(
        "cost", "llama3.1:8b", "--gpu", "rtx4090", "--price", "3600", "--months", "36", "--power", "1000",
        "--electricity", "0.2", "--json",
    ).json()["self_hosted"]  # fmt: skip
    assert own["usd_a_month"] == pytest.approx(100 + 146)
    assert own["rented"] is False
    assert own["speed_is_measured"] is False
    assert (
        puna("cost", "llama3.1:8b", "--gpu", "rtx4090", "--buy", "--json")
        .json()["self_hosted"]["source"]
        .endswith(market().gpus["rtx4090"].source.date.isoformat())
    )


def test_a_recommendation_is_explained(puna: Puna) -> None:
    said = puna("recommend", "--memory", "16", "--show", "2")
    assert said.out.startswith("1. llama3.1:8b")
    assert "your 16 GB hold it as Q8_0" in said.out
    assert "\n   - behind " in said.out
    assert "ruled out\n" in said.out
    assert "puna licence llama3.1:8b" in said.err
    document = puna("recommend", "--memory", "16", "--privacy", "any", "--json").json()
    first = document["choices"][0]
    assert sum(first["points"].values()) == pytest.approx(first["total"], abs=0.02)
    assert first["for"]
    assert document["excluded"]
    assert puna("recommend", "--memory", "16", "--privacy", "any", "--json").json() == document
    assert "No Llama can be recommended" in puna("recommend", "--memory", "0.1").err


def test_a_licence_is_read_to_a_case(puna: Puna) -> None:
    said = puna("licence", "llama3.2-vision:11b", "--region", "DE", "--users", "800000000")
    assert "in your case  not granted" in said.out
    assert "section 2: “is greater than 700 million" in " ".join(said.out.split())
    assert "not legal advice" in said.err
    document = puna("licence", "llama2:7b", "--use", "outputs-to-train", "--json").json()
    assert document["verdict"] == "forbidden"
    assert document["findings"][-1]["clauses"][0]["place"] == "1.b.v"
    assert "not legal advice" in document["advice"]
    notice = puna("licence", "llama3.3:70b", "--notice").out
    assert notice.splitlines()[0] == (
        "Llama 3.3 is licensed under the Llama 3.3 Community License, Copyright © Meta Platforms, Inc. "
        "All Rights Reserved."
    )


def test_a_persons_prices_go_before_puna(puna: Puna, home: Path) -> None:
    home.mkdir()
    (home / OVERRIDES).write_text(
        '[[prices]]\nmodel = "llama3.1:8b"\nhost = "aws"\ninput = 0.001\noutput = 0.001\nsource = "our contract"\n'
        f"date = {date(2026, 2, 3)}\n"
    )
    rows = puna("cost", "llama3.1:8b", "--json").json()["hosted"]
    assert rows[0]["host"] == "AWS Bedrock"
    assert rows[0]["source"] == {"name": "our contract", "date": "2026-02-03"}
    (home / OVERRIDES).write_text("[[prices]]\nmodel = 3\n")
    for words in (("models",), ("cost", "gpt-5"), ("recommend",)):
        said = puna(*words)
        assert said.code == 2
        assert OVERRIDES in said.err
        assert "Traceback" not in said.err
    # A licence needs no prices.
    assert puna("licence", "llama3.1:8b").code == 0


def test_the_licence_of_a_model_that_lies_here(puna: Puna, tmp_path: Path, reference: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for file in (reference / "checkpoints" / "stories260K").glob("*.bin"):
        (folder / file.name).write_bytes(file.read_bytes())
    assert (
        puna("convert", str(folder / "stories260K.bin"), "--to", "safetensors", "-o", str(tmp_path / "hub")).code == 0
    )
    said = puna("licence", str(tmp_path / "hub"))
    assert said.code == 2
    assert "nothing says under which" in said.err
    (tmp_path / "hub" / "LICENSE").write_text("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n")
    document = puna("licence", str(tmp_path / "hub"), "--region", "DE", "--json").json()
    assert document["licence"] == "Llama 3.2 Community License Agreement"
    # It takes text alone.
    assert document["verdict"] == "on conditions"
    assert puna("licence", str(tmp_path / "absent")).code == 2


@pytest.mark.parametrize("words", [("models",), ("models", "--hosted"), ("models", "--hosts")])
def test_a_table_fits_a_terminal_of_100_columns(
    puna: Puna, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr("puna.cli.terminal.is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "100")
    said = puna(*words)
    assert max(map(len, said.out.splitlines())) <= 100
    if words == ("models",):
        [line] = [line for line in said.out.splitlines() if "llama3.2-vision:11b" in line]
        assert "0.16 / 0.16" in line
        assert "A wider terminal shows LICENCE, FORMS, RELEASED too." in said.err
    if words[-1] == "--hosts":
        assert "Cloudflare" in said.out
        assert "MODELS" in said.out
    monkeypatch.setenv("COLUMNS", "220")
    assert "A wider terminal" not in puna(*words).err
