"""From words to settings: types, places, mixtures, mistakes; and that no flag is dead or undocumented."""

from __future__ import annotations

import ast
import contextlib
import inspect
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.cli import flags
from puna.errors import UsageError
from puna.llm import LLM
from puna.settings import COMMANDS, ConvertSettings, RemoveSettings, RunSettings, Settings, ShowSettings
from puna.types import Sampling
from puna.weights.convert import LAYOUTS
from puna.weights.mixes import MIXES
from puna.weights.safetensors import DTYPES

SOURCE = Path(__file__).resolve().parents[3] / "src" / "puna"


def test_nothing_typed_gives_every_default() -> None:
    read = flags.read(RunSettings, [])
    assert read == RunSettings()
    assert read.sampling() == Sampling()


def test_every_type_of_flag() -> None:
    words = ["M", "--max-tokens", "5", "--temperature=0", "--stop", "a", "--stop", "b", "--tokenizer", "t.bin", "--raw"]
    read = flags.read(RunSettings, [*words, "a prompt"])
    assert (read.model, read.prompt, read.max_tokens, read.temperature) == ("M", "a prompt", 5, 0.0)
    assert (read.stop, read.tokenizer, read.raw, read.json) == (("a", "b"), Path("t.bin"), True, False)
    assert flags.read(RemoveSettings, ["-y", "x"]) == RemoveSettings(name="x", yes=True)


@pytest.mark.parametrize(
    "words", [["M", "--raw", ""], ["--raw", "M", ""], ["M", "", "--raw"], ["--raw", "--", "M", ""]]
)
def test_flags_and_places_mix(words: list[str]) -> None:
    assert flags.read(RunSettings, words) == RunSettings(model="M", prompt="", raw=True)


def test_dashes_that_are_not_flags() -> None:
    assert flags.read(RunSettings, ["M", "-"]).prompt == "-"
    assert flags.read(RunSettings, ["M", "-5"]).prompt == "-5"
    assert flags.read(RunSettings, ["M", "- one thing"]).prompt == "- one thing"
    assert flags.read(RunSettings, ["M", "-hello world"]).prompt == "-hello world"
    assert flags.read(RunSettings, ["M", "--system", "-h is a flag", ""]).system == "-h is a flag"
    assert flags.read(RunSettings, ["M", "--system=Be kind."]).system == "Be kind."
    assert flags.read(RunSettings, ["--raw", "M", "--", "--seed"]) == RunSettings(model="M", prompt="--seed", raw=True)


@pytest.mark.parametrize(
    ("kind", "words", "message", "remedy"),
    [
        (RunSettings, ["--temprature", "0"], "no flag '--temprature'", "--temperature"),
        (RunSettings, ["--max_tokens", "0"], "no flag '--max_tokens'", "--max-tokens"),
        (RunSettings, ["--temp", "0"], "no flag '--temp'", ""),
        (RunSettings, ["-x"], "no flag '-x'", "after --"),
        (RunSettings, ["--raw=1"], "--raw", ""),
        (RunSettings, ["--seed"], "--seed: expected one argument", "--help"),
        (RunSettings, ["--seed", "1", "--seed", "2"], "--seed: is given twice", ""),
        (RunSettings, ["--seed", "x"], "--seed: must be a whole number, not 'x'", ""),
        (RunSettings, ["--top-p", "much"], "--top-p: must be a number, not 'much'", ""),
        (RunSettings, ["--dtype", "int8"], "--dtype: must be one of auto, fp32, bf16, fp16, not 'int8'", ""),
        (RunSettings, ["M", "Once", "upon"], "'upon' is one argument too many", "quotes"),
        (ShowSettings, [], "needs MODEL", "Usage: puna show MODEL"),
        (ShowSettings, [""], 'MODEL is empty: ""', "Usage: puna show MODEL"),
        (RemoveSettings, ["", "-y"], 'NAME is empty: ""', "Usage: puna rm NAME"),
        (ConvertSettings, ["M", "--to", "ggml", "-o", "x"], "one of safetensors, meta, gguf, not 'ggml'", ""),
        (ConvertSettings, ["M"], "needs --to and --output", "--to safetensors|meta"),
        (ConvertSettings, ["M", "--to", "meta", "-o", "x", "--type", "IQ4_XS"], "Q2_K, not 'IQ4_XS'", ""),
    ],
)
def test_mistakes_are_named_with_a_remedy(kind: type[Settings], words: list[str], message: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        flags.read(kind, words)
    assert message in caught.value.message
    assert remedy in caught.value.remedy


@given(
    st.lists(st.text(max_size=12) | st.sampled_from(["--seed", "--stop", "-y", "--", "--json", "-", "-1"]), max_size=6)
)
@settings(max_examples=60, deadline=None)
def test_any_words_give_settings_or_a_typed_refusal(words: list[str]) -> None:
    for kind in (RunSettings, ConvertSettings):
        with contextlib.suppress(UsageError, flags.HelpWanted):
            assert isinstance(flags.read(kind, words), kind)


def test_a_value_out_of_range_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="top_p must be "):
        flags.read(RunSettings, ["--top-p", "2"]).sampling()
    with pytest.raises(UsageError, match="max_tokens must be "):
        flags.read(RunSettings, ["--max-tokens", "0"]).sampling()


@pytest.mark.parametrize("kind", COMMANDS.values(), ids=COMMANDS.keys())
def test_help_shows_every_flag_and_the_usage(kind: type[Settings]) -> None:
    with pytest.raises(flags.HelpWanted) as wanted:
        flags.read(kind, ["--help"])
    text = str(wanted.value)
    for each in fields(kind):
        assert flags.spelling(each) in text
        assert flags.flag(each).help.split()[0] in text
    assert flags.summary(kind) in text


@pytest.mark.parametrize("kind", COMMANDS.values(), ids=COMMANDS.keys())
def test_no_flag_is_dead(kind: type[Settings]) -> None:
    """Every field is read by the command's own module (or, for `run`, by the chat); `debug` is main's, and `config` the
    parser's."""
    modules = {"run": ("run", "chat")}.get(kind.command, (kind.command.replace(" ", "_"),))
    read = {"debug", "config"} | ({each.name for each in fields(Sampling)} if kind is RunSettings else set())
    for name in modules:
        for node in ast.walk(ast.parse((SOURCE / "cli" / f"{name}.py").read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("settings", "self.settings"):
                read.add(node.attr)
    assert {each.name for each in fields(kind)} - read == set()


def test_facts_that_stand_in_two_rows_agree() -> None:
    signature = inspect.signature(LLM.__init__).parameters
    for name in ("dtype", "quant", "device", "kernels", "tokenizer"):
        assert getattr(RunSettings(), name) == signature[name].default
    choices = {each.name: flags.flag(each).choices for each in fields(ConvertSettings)}
    assert choices["to"] == LAYOUTS
    assert choices["type"] == tuple(MIXES)
    assert set(choices["type"]) > set(DTYPES)
