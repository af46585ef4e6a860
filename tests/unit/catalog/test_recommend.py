"""Recommendations: what a case rules out, why, and that the order follows from published scores and prices."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from puna.catalog.cost import Work
from puna.catalog.market import market
from puna.catalog.recommend import COST, KNOWLEDGE, PRIVATE, QUALITY, TASKS, Advice, Case, recommend
from puna.errors import UsageError

TODAY = date(2026, 11, 24)
CASE = Case("chat", "local", 8192, Work(10_000, 1000, 300))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUNA_HOME", str(tmp_path))


def ask(**changes: object) -> Advice:
    return recommend(replace(CASE, **changes), market(), TODAY)  # type: ignore[arg-type]


def names(advice: Advice) -> list[str]:
    return [choice.entry.short_name for choice in advice.choices]


def reason(advice: Advice, name: str) -> str:
    return dict(advice.excluded)[name]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("privacy", ["local", "rented", "any"])
def test_every_model_is_ranked_or_ruled_out_with_a_reason(task: str, privacy: str) -> None:
    advice = ask(task=task, privacy=privacy, context=4096)
    told = names(advice) + [name for name, _ in advice.excluded]
    assert len(told) == len(set(told)) > 2
    assert all(why for _, why in advice.excluded)
    for choice in advice.choices:
        assert choice.reasons
        limits = {"quality": QUALITY, "cost": COST, "privacy": PRIVATE, "knowledge": KNOWLEDGE}
        assert choice.points.keys() == limits.keys()
        assert all(0 <= value <= limits[name] for name, value in choice.points.items())
        assert choice.total == sum(choice.points.values())
        assert choice.way.where in {"local": ("local",), "rented": ("rented",), "any": ("hosted", "rented")}[privacy]
    totals = [choice.total for choice in advice.choices]
    assert totals == sorted(totals, reverse=True)
    assert advice == ask(task=task, privacy=privacy, context=4096)


def test_memory_rules_out_what_does_not_fit() -> None:
    advice = ask(memory=16.0)
    assert names(advice)[0] == "llama3.1:8b"
    assert "16 GB are here" in reason(advice, "llama3.3:70b")
    # 0.9 × 16 GB hold 8.5 bits a weight and 8,192 tokens
    assert advice.choices[0].way.quant == "Q8_0"
    assert ask(memory=8.0).choices[0].way.quant == "Q5_K_M"
    assert names(ask(memory=0.5)) == []


def test_context_language_and_licence_rule_out() -> None:
    assert "8,192" in reason(ask(context=10_000), "llama3:8b")
    assert names(ask(context=2_000_000)) == ["llama4:scout"]
    advice = ask(language="ar")
    assert set(names(advice)) == {"llama4:scout", "llama4:maverick"}
    assert "does not support ar" in reason(advice, "llama3.3:70b")
    union = ask(task="vision", region="DE")
    assert names(union) == []
    assert "European Union" in reason(union, "llama4:scout")
    assert set(names(ask(task="vision", region="US"))) == {
        "llama3.2-vision:11b", "llama3.2-vision:90b", "llama4:scout", "llama4:maverick",
    }  # fmt: skip
    assert names(ask(users=800_000_000)) == []
    assert "research only" in reason(ask(context=2048), "llama1:65b")


def test_a_budget_rules_out_and_says_the_price() -> None:
    advice = ask(privacy="rented", budget=500.0)
    assert all(choice.way.usd <= 500 for choice in advice.choices)
    assert "a month at least" in reason(advice, "llama3.1:405b")
    assert names(ask(privacy="any", budget=1.0))
    assert all(choice.way.where == "hosted" for choice in ask(privacy="any", budget=1.0).choices)


def test_quality_is_an_order_of_published_scores() -> None:
    def quality(task: str) -> dict[str, float]:
        return {choice.entry.short_name: choice.points["quality"] for choice in ask(task=task).choices}

    chat = quality("chat")
    assert chat["llama4:maverick"] == QUALITY
    assert (
        chat["llama3.1:405b"] > chat["llama3.1:70b"] > chat["llama3.1:8b"] > chat["llama3.2:3b"] > chat["llama3.2:1b"]
    )
    # Scout beats 405B on the only setup they share, and so all that 405B beats.
    assert chat["llama4:scout"] > chat["llama3.1:405b"]
    assert chat["llama3.2:1b"] == 0
    code = quality("code")
    assert code["llama3.1:405b"] > 0
    assert code["codellama:34b"] == 0
    [unscored] = [c for c in ask(task="code").choices if c.entry.short_name == "codellama:34b"]
    assert any("no published score" in line for line in unscored.against)


def test_guards_and_infilling_have_their_own_candidates() -> None:
    guards = names(ask(task="moderation", context=4096))
    assert guards[0] == "llama-guard4:12b"
    assert all(name.startswith("llama-guard") for name in guards)
    assert set(names(ask(task="infill"))) == {"codellama:7b-base", "codellama:13b-base", "codellama:70b-base"}


def test_hosted_models_stand_beside_where_text_may_go_there() -> None:
    assert ask().beside == ()
    beside = ask(privacy="any").beside
    found = {model.id: usd for model, usd in beside}
    # 10M in at 1.25 and 3M out at 10
    assert found["gpt-5"] == pytest.approx(10 * 1.25 + 3 * 10)
    assert "deepseek-v3" not in found
    assert [usd for _, usd in beside] == sorted(found.values())
    assert "gpt-5" not in {m.id for m, _ in ask(privacy="any", context=300_000).beside}
    later = recommend(replace(CASE, privacy="any"), market(), date(2027, 1, 1))
    assert "gpt-5" not in {m.id for m, _ in later.beside}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "poetry"}, "--task 'poetry'"),
        ({"privacy": "none"}, "--privacy 'none'"),
        ({"context": 0}, "--context 0"),
        ({"budget": -1.0}, "--budget -1.0"),
        ({"memory": float("nan")}, "--memory nan"),
        ({"language": "tlh"}, "--language 'tlh'"),
        ({"region": "Mars"}, "--region 'Mars'"),
    ],
)
def test_a_case_that_is_none(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        ask(**changes)
    assert message in caught.value.message
