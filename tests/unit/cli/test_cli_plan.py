"""`puna plan`: models that are here and models that are not, machines by name, what is refused, the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from puna import forecast
from puna.catalog import models as catalog
from puna.cli.plan import BAR, picture
from puna.models import llama4
from puna.models.known import config_of
from puna.models.llama4_config import Llama4Config
from puna.weights.checkpoint import open_checkpoint
from puna.weights.embedded import embedded_folder

Puna = Callable[..., Any]

FIXED = ("--memory", "16", "--bandwidth", "20", "--peak", "1")
"""A machine that is not measured."""


def test_a_model_that_is_here_has_the_sizes_of_its_file(puna: Puna) -> None:
    said = puna("plan", "cria", *FIXED, "--json")
    document = said.json()
    checkpoint = open_checkpoint(embedded_folder())
    [plan] = document["plans"]
    assert (said.code, plan["type"], plan["fits"]) == (0, "as stored", True)
    assert plan["weights_bytes"] == checkpoint.nbytes
    assert document["context"] == document["context_length"] == checkpoint.config.context_length == 512
    assert plan["total_bytes"] == sum(
        plan[f"{part}_bytes"] for part in ("weights", "cache", "activations", "program")
    )  # fmt: skip
    assert plan["spare_bytes"] == 16_000_000_000 - plan["total_bytes"]
    assert document["notes"] == []


def test_a_model_of_the_catalog_that_is_not_here(puna: Puna) -> None:
    document = puna("plan", "llama3.2:1b", *FIXED, "--json", "--context", "4096", "--users", "2").json()
    plans = {plan["type"]: plan for plan in document["plans"]}
    assert list(plans) == ["BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M"]
    assert document["parameters"] == document["active_parameters"] == 1_235_814_400
    norms = 33 * 2048  # are kept in float32
    assert plans["BF16"]["weights_bytes"] == 2 * 1_235_814_400 + 2 * norms
    assert plans["Q8_0"]["weights_bytes"] == (1_235_814_400 - norms) * 34 // 32 + 4 * norms
    # 16 layers of keys and values, 8 heads of 64 numbers, two users
    assert {plan["cache_bytes"] for plan in plans.values()} == {2 * 16 * 2 * 8 * 64 * 2 * 4096}
    assert document["notes"] == ["Llama-3.2-1B is not on this machine: its sizes are the catalog's"]
    packed = puna("plan", "llama3.2:1b", *FIXED, "--json", "--kv-type", "q8_0", "--quant", "Q4_K_M").json()["plans"]
    assert [plan["kv_type"] for plan in packed] == ["q8_0"]
    assert packed[0]["cache_bytes"] == 2 * 16 * 8 * (64 * 34 // 32) * 8192
    one, two = (document["plans"][1][key] for key in ("decode_tokens_per_second", "decode_tokens_per_second_all"))
    assert one < two < 2 * one


def test_a_mixture_reads_what_is_active_and_keeps_its_chunk(puna: Puna) -> None:
    flags = ("--machine", "2xh100", "--quant", "Q4_K_M", "--context", "10000000")
    document = puna("plan", "llama4:scout", *flags, "--json").json()
    entry = catalog.find("llama4:scout")
    assert entry is not None
    config = config_of(entry)
    assert isinstance(config, Llama4Config)
    shapes = llama4.shapes(config)
    experts = sum(a * b for name, (a, *more) in shapes.items() for b in more if ".experts." in name)
    assert document["active_parameters"] == document["parameters"] - experts * 15 // 16
    [plan] = document["plans"]
    pages = 156_250  # of 64 tokens; 12 of 48 layers are global, the others keep 128 pages
    assert plan["cache_bytes"] == 2 * 8 * 128 * 2 * 64 * (12 * pages + 36 * 128)
    machine = document["machine"]
    assert (machine["cards"], machine["measured"]) == (2, False)
    assert machine["room_bytes"] == 2 * machine["memory"] == 160_000_000_000
    assert not plan["fits"]
    assert plan["total_bytes"] > machine["room_bytes"]
    assert 0 < plan["largest_context"] < 10_000_000
    assert any("nothing was measured" in note for note in document["notes"])
    assert any("on one card" in note for note in document["notes"])
    # what it says fits does, and a token more does not
    fits = forecast.footprint(config, plan["weights_bytes"], "fp16", forecast.Load(plan["largest_context"]), 64)
    more = forecast.footprint(config, plan["weights_bytes"], "fp16", forecast.Load(plan["largest_context"] + 1), 64)
    assert fits.total <= machine["room_bytes"] < more.total


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--users", "0"), "--users 0"),
        (("--users", "100000000"), "--users"),
        (("--context", "0"), "--context 0"),
        (("--context", "513"), "--context 513"),
        (("--memory", "0"), "--memory"),
        (("--memory", "nan"), "--memory"),
        (("--memory", "inf"), "--memory"),
        (("--memory", "1e300"), "--memory"),
        (("--bandwidth", "-3"), "--bandwidth"),
        (("--peak", "nan"), "--peak"),
        (("--disk", "0"), "--disk"),
        (("--disk", "nan"), "--disk"),
        (("--machine", "h101"), "--machine h101"),
        (("--machine", "0xh100"), "--machine 0xh100"),
        (("--machine", "99999xh100"), "--machine 99999xh100"),
        (("--machine", ""), "--machine"),
        (("--quant", "Q9"), "--quant"),
        (("--kv-type", "int3"), "--kv-type"),
    ],
)
def test_what_is_refused_by_name(puna: Puna, flags: tuple[str, ...], named: str) -> None:
    others = [word for at in range(0, 6, 2) if FIXED[at] != flags[0] for word in FIXED[at : at + 2]]
    said = puna("plan", "cria", *(() if "--machine" in flags else others), *flags)
    assert said.code != 0
    assert named in said.err.splitlines()[0]
    assert "twice" not in said.err
    assert said.out == ""
    assert "Traceback" not in said.err


@pytest.mark.parametrize("name", ["llama2:7b", "llama3.1:405b", "llama3.2-vision:11b", "llama4:maverick"])
def test_every_kind_of_model_can_be_planned(puna: Puna, name: str) -> None:
    document = puna("plan", name, *FIXED, "--quant", "Q4_K_M", "--json").json()
    # 4 to 6 bits a parameter, and 16 of a vision encoder
    assert 0.5 < document["plans"][0]["weights_bytes"] / document["parameters"] < 0.75


def test_a_model_that_nobody_knows(puna: Puna) -> None:
    said = puna("plan", "llama9:1b", *FIXED)
    assert said.code != 0
    assert "llama9:1b" in said.err


def test_the_table_and_the_picture(puna: Puna) -> None:
    lines = puna("plan", "llama3.1:8b", "--memory", "10", *FIXED[2:], "--users", "2").out.splitlines()
    head = next(line for line in lines if line.startswith("TYPE"))
    words = ("WEIGHTS", "KV CACHE", "ALL", "FITS", "ALL USERS/S", "CONTEXT UP TO")
    assert [word for word in words if word in head] == list(words)
    row = next(line for line in lines if line.startswith("BF16"))
    assert (row.split()[7], "-" in row.split()) == ("no", True)
    assert any(line.strip().startswith("Q4_K_M  [www") and line.endswith("]") for line in lines)
    assert any(line.strip().startswith("BF16  [w") and line.endswith("]!") for line in lines)
    assert all(len(line) <= 120 for line in lines)


def test_a_memory_as_a_bar() -> None:
    row = {"weights_bytes": 50, "cache_bytes": 25, "activations_bytes": 10, "program_bytes": 2.5, "fits": True}
    assert picture(row, 100) == f"[{'w' * 16}{'k' * 8}{'a' * 4}{'.' * 4}]"
    assert picture(row | {"weights_bytes": 500, "fits": False}, 100) == f"[{'w' * BAR}]!"
    assert picture(row | {"fits": False}, 0) == f"[{'.' * BAR}]!"
