"""`puna bench`: the document that scripts rely on, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from puna.bench import compare

Puna = Callable[..., Any]

ROW = {
    "work", "engine", "version", "median", "spread", "unit", "count", "share_of_limit", "limit", "gb_s", "gop_s",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "PAUSE", 0.0)


def test_the_document(puna: Puna) -> None:
    only = "decode,decode_8_streams,prefill_512,load,first_token,cold_start,peak_memory"
    said = puna("bench", "--pairs", "1", "--threads", "1", "--only", only, "--json")
    assert said.code == 0
    found = said.json()
    assert (found["model"], found["random_weights"], found["threads"]) == ("cria", False, 1)
    assert all(set(row) == ROW for row in found["results"])
    rows = {row["work"]: row for row in found["results"]}
    # cria's context of 512 has no room for a prompt of 512 and what follows.
    assert {"decode", "decode_8_streams", "load", "first_token", "cold_start"} <= set(rows)
    assert (found["ratios"], found["pairs"]) == ({}, [])
    for work, row in rows.items():
        assert row["engine"] == "puna"
        low, high = row["spread"]
        assert 0 < low <= row["median"] <= high < math.inf, work
    assert rows["decode"]["unit"] == "tokens/s"
    assert rows["cold_start"]["median"] > rows["load"]["median"] > 0
    assert "decode: trying puna" in said.err
    if found["machine"]:
        assert {"read", "fp32"} <= set(found["machine"])
        share = rows["decode"]["share_of_limit"]
        assert rows["decode"]["limit"] in ("memory", "arithmetic")
        if rows["decode"]["limit"] == "memory":
            assert share == pytest.approx(rows["decode"]["gb_s"] * 1e9 / found["machine"]["read"])


def test_made_up_weights_and_the_table(puna: Puna) -> None:
    said = puna("bench", "--shape", "cria", "--type", "Q8_0", "--pairs", "1", "--only", "prefill_512")
    assert said.code == 0
    assert "writing" in said.err
    assert said.out.startswith("model    cria (Q8_0, ")
    assert "\nprefill_512 " in said.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("cria", "--shape", "cria"), "MODEL and --shape are both given"),
        (("cria", "--type", "Q8_0"), "there is no --shape"),
        (("--shape", "nothing"), "--shape nothing: no such shape"),
        (("--shape", "cria", "--type", "Q9"), "--type Q9: no such type"),
        (("--against", "vllm"), "--against vllm: no such engine"),
        (("--only", "dance"), "--only dance: no such work"),
        (("--only", "decode", "--full"), "--only and --full are both given"),
        (("--pairs", "0"), "--pairs must be 1 or larger"),
        (("--threads", "0"), "--threads must lie between"),
        (("--peer-python", "python"), "--against names no peer"),
        (("no/such/file.gguf",), "no such file"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(puna: Puna, arguments: tuple[str, ...], said: str) -> None:
    found = puna("bench", *arguments, "--json")
    assert found.code == 2
    assert said in found.json()["error"]["message"]


def test_a_peer_that_is_not_installed(puna: Puna, monkeypatch: pytest.MonkeyPatch) -> None:
    from puna.bench import engines

    monkeypatch.setitem(engines.PEERS, "openvino", "no-such-package")
    found = puna("bench", "--against", "openvino", "--json")
    assert found.code == 2
    assert "--against openvino needs the package no-such-package" in found.json()["error"]["message"]
