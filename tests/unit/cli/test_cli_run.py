"""`puna run` with a prompt: what goes to the model, what comes out where; and the whole walk with a real model."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import scripted
from scripted import ScriptedLLM

from puna.cli import run
from puna.types import Infill, Sampling

Puna = Callable[..., Any]


def test_stdout_is_the_answer_and_nothing_else(puna: Puna, model: Puna) -> None:
    llm = model(ScriptedLLM(notes=["a key is unknown"]))
    said = puna("run", "cria", "Hi")
    assert (said.code, said.out, said.err) == (0, "Hello there", "note: a key is unknown\n")
    [(prompt, options)] = llm.asked
    assert (prompt, options["system"], options["raw"]) == ("Hi", None, False)


def test_every_option_reaches_the_model(puna: Puna, model: Puna) -> None:
    llm = model(ScriptedLLM())
    words = "--system S --max-tokens 9 --temperature 0.5 --top-p 0.4 --top-k 3 --min-p 0.2 --seed 5 --stop a --stop b "
    words += "--typical-p 0.9 --top-n-sigma 2 --xtc-probability 0.1 --xtc-threshold 0.2 --mirostat-eta 0.3 "
    words += "--repetition-penalty 1.1 --presence-penalty -0.5 --frequency-penalty 0.25 --penalty-range 64 "
    words += "--dry-multiplier 0.8 --dry-base 1.5 --dry-allowed-length 3 --dry-range 100 --min-tokens 7"
    assert puna("run", "cria", "Hi", *words.split()).code == 0
    [(prompt, options)] = llm.asked
    assert prompt == "Hi"
    assert options == {
        **asdict(Sampling()), "system": "S", "raw": False, "max_tokens": 9, "temperature": 0.5, "top_p": 0.4,
        "top_k": 3, "min_p": 0.2, "seed": 5, "stop": ("a", "b"), "typical_p": 0.9, "top_n_sigma": 2.0,
        "xtc_probability": 0.1, "xtc_threshold": 0.2, "mirostat_eta": 0.3, "repetition_penalty": 1.1,
        "presence_penalty": -0.5, "frequency_penalty": 0.25, "penalty_range": 64, "dry_multiplier": 0.8,
        "dry_base": 1.5, "dry_allowed_length": 3, "dry_range": 100, "min_tokens": 7,
    }  # fmt: skip
    assert puna("run", "cria", "Hi", "--mirostat-tau", "5", "--top-p", "1").code == 0
    assert llm.asked[1][1]["mirostat_tau"] == 5  # fmt: skip


def test_what_the_loader_gets(puna: Puna, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    class Recorded(ScriptedLLM):
        def __init__(self, model: str, **options: Any) -> None:
            super().__init__()
            given.append((model, options))

    monkeypatch.setattr("puna.llm.LLM", Recorded)
    puna(
        "run",
        "cria",
        "x",
        *["--dtype", "fp32", "--device", "cuda", "--kernels", "scalar", "--tokenizer", "t.bin", "--kv-type", "q8_0"],
        *["--adapter", "lora"],
    )
    options = {
        "dtype": "fp32", "quant": None, "device": "cuda", "kernels": "scalar", "tokenizer": Path("t.bin"),
        "kv_type": "q8_0", "kv_memory": None, "invariant": False, "adapter": Path("lora"),
        "speculate": "off", "draft": None,
    }  # fmt: skip
    assert given == [("cria", options)]


def test_kernels_of_the_cpu_are_refused_elsewhere(puna: Puna) -> None:
    said = puna("run", "cria", "x", "--device", "cuda", "--kernels", "scalar")
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("puna: --kernels scalar is about the CPU")


def test_pipes_speak_utf8_whatever_the_locale(
    program: Callable[..., subprocess.CompletedProcess[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = program(scripted.__file__, json.dumps({"pieces": ["Grüß 🦙"]}), "run", "cria", "x")
    assert done.stdout.decode() == "Grüß 🦙"


def test_json_is_one_document(puna: Puna, model: Puna) -> None:
    model(ScriptedLLM(notes=["n"]))
    said = puna("run", "cria", "Hi", "--json", "--seed", "7", "--verbose")
    assert said.json() == {
        "text": "Hello there",
        "token_ids": [0, 1],
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "finish_reason": "stop",
        "timings": {
            "prefill_seconds": 0.5,
            "decode_seconds": 1.0,
            "prefill_tokens_per_second": 2.0,
            "decode_tokens_per_second": 4.0,
        },
        "model": "cria",
        "kernels": "scripted",
        "kv_type": "fp16",
        "notes": ["n"],
        "seed": 7,
    }
    assert said.err == "note: n\n[2 tokens read in 0.50 s (2.0/s), 2 made in 1.00 s (4.0/s), scripted, fp16 cache]\n"


def test_a_seed_is_drawn_and_reported(puna: Puna, model: Puna) -> None:
    llm = model(ScriptedLLM())
    seeds = [puna("run", "cria", "Hi", "--json").json()["seed"] for _ in range(4)]
    assert [options["seed"] for _, options in llm.asked] == seeds
    assert len(set(seeds)) > 1


@pytest.mark.parametrize(
    ("finish", "words", "said"),
    [
        ("stop", [], ""),
        ("stop", ["--max-tokens", "1"], "[ended at --max-tokens 1]\n"),
        ("context", [], "[ended: the model's context of 64 tokens is full]\n"),
    ],
)
def test_an_answer_that_was_cut_says_so(puna: Puna, model: Puna, finish: Any, words: list[str], said: str) -> None:
    model(ScriptedLLM(finish=finish))
    assert puna("run", "cria", "Hi", *words).err == said


def test_a_prompt_too_long_is_an_input_error(puna: Puna, model: Puna) -> None:
    model(ScriptedLLM())
    said = puna("run", "cria", "x" * 70)
    assert (said.code, said.out, said.err) == (2, "", "puna: It exceeds the context by 7 tokens.\n")


def test_one_argument_with_spaces_is_a_prompt(puna: Puna, model: Puna, tmp_path: Path) -> None:
    llm = model(ScriptedLLM())
    said = puna("run", "Once upon a time.")
    assert said.out == "Hello there"
    assert said.err == "note: no MODEL is named, so cria gets this text\n"
    assert llm.asked[0][0] == "Once upon a time."
    folder = tmp_path / "my model"
    folder.mkdir()
    assert run._sorted_out(run.RunSettings(model=str(folder))).model == str(folder)
    assert run._sorted_out(run.RunSettings(model="x " * 5000)).model == "cria"


@pytest.mark.parametrize(
    "words", [["./my model"], ["my model.bin"], ["no-such-model"], ["nobody/nothing", "Hi"], ["", "Hi"]]
)
def test_names_that_are_no_models(puna: Puna, words: list[str]) -> None:
    said = puna("run", *words)
    assert (said.code, said.out) == (2, "")
    assert len(said.err.splitlines()) >= 2


def test_a_prompt_from_a_pipe(puna: Puna, model: Puna, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model(ScriptedLLM())

    def piped(data: bytes, *words: str) -> Any:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        return puna("run", "cria", *words)

    assert piped("Zwölf\n\r\n".encode()).code == 0
    assert piped(b"- one", "-").code == 0
    assert piped(b"not read", "given").code == 0
    assert [prompt for prompt, _ in llm.asked] == ["Zwölf\n", "- one", "given"]  # only the last line end is dropped
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"alone")))
    alone = puna("run", "-")
    assert (alone.code, alone.out, alone.err) == (0, "Hello there", "")
    assert llm.asked[-1][0] == "alone"
    empty = piped(b"\n", "--json")
    assert empty.code == 2
    assert "stdin is empty" in empty.json()["error"]["message"]
    assert "byte 3 is 0xff" in piped(b"abc\xff").err


def test_a_prompt_through_a_real_pipe(program: Callable[..., subprocess.CompletedProcess[bytes]]) -> None:
    done = program(scripted.__file__, json.dumps({"pieces": ["ok"]}), "run", "--json", stdin=b"Hello\n")
    assert json.loads(done.stdout)["prompt_tokens"] == 5


def test_at_a_terminal_a_continued_text_is_whole(scripted_program: Puna) -> None:
    """The text from its beginning, a line end after it, and control characters as their codes."""
    shown = scripted_program("run", "cria", "Once", "--raw", pieces=[" upon\x1b]0;x\x07", " a time"])
    assert shown.leave() == 0
    assert shown.shown == "Once upon\\x1b]0;x\\x07 a time\r\n"
    shown = scripted_program("run", "cria", "Hi", pieces=["Hello"])
    assert shown.leave() == 0
    assert shown.shown == "Hello\r\n"


def test_ctrl_c_ends_the_run(scripted_program: Puna) -> None:
    shown = scripted_program("run", "cria", "Hi", pieces=["Hello", " there"] * 100, delay=0.05)
    shown.until("Hello")
    shown.press("\x03")
    assert shown.leave() == 130
    assert shown.shown.endswith("[stopped]\r\n")
    assert "Traceback" not in shown.shown


def test_a_sign_of_life_while_waiting(scripted_program: Puna) -> None:
    shown = scripted_program("run", "cria", "Hi", pieces=["Hello"], delay=1.0)
    shown.until("Reading the prompt")
    shown.until("Hello")
    assert shown.leave() == 0


def test_a_real_model_through_the_whole_walk(puna: Puna, reference: Path) -> None:
    folder = reference / "checkpoints" / "stories260K"
    expected = json.loads((folder / "expected_greedy.json").read_text())["text"]
    words = ["run", str(folder / "stories260K.bin"), "", "--tokenizer", str(folder / "tok512.bin"), "--raw"]
    greedy = ["--temperature", "0", "--max-tokens", "24"]
    said = puna(*words, *greedy)
    assert said.code == 0
    assert len(said.out) > 40
    assert expected.startswith(said.out)
    as_json = puna(*words, *greedy, "--json").json()
    assert (as_json["text"], as_json["prompt_tokens"], as_json["completion_tokens"]) == (said.out, 1, 24)
    # The same seed gives the same answer, and the seed that was drawn and reported is such a seed.
    drawn = puna(*words, "--max-tokens", "24", "--json").json()
    again = puna(*words, "--max-tokens", "24", "--json", "--seed", str(drawn["seed"])).json()
    assert again["token_ids"] == drawn["token_ids"]
    stopped = puna(*words, *greedy, "--stop", " little").out
    assert stopped == expected.partition(" little")[0]
    said = puna(*words, "--system", "Be kind.")
    assert (said.code, said.out) == (2, "")
    assert "system message cannot be honoured" in said.err


def test_a_gap_is_taken_from_the_prompt(puna: Puna, model: Puna) -> None:
    llm = model(ScriptedLLM())
    said = puna("run", "cria", "a <FILL_ME> b", "--infill")
    assert (said.code, said.out) == (0, "Hello there")
    assert puna("run", "cria", "a<FILL_ME>", "--infill", "--suffix-first").code == 0
    assert [prompt for prompt, _ in llm.asked] == [Infill("a ", " b"), Infill("a", "", True)]
    for words, wrong in (
        (("no gap", "--infill"), "0 gaps"),
        (("<FILL_ME>", "--infill", "--raw"), "--raw"),
        (("<FILL_ME>", "--infill", "--system", "x"), "--system"),
        (("x", "--suffix-first"), "--suffix-first goes with --infill"),
    ):
        said = puna("run", "cria", *words)
        assert said.code == 2
        assert wrong in said.err


def test_a_model_that_fills_no_gap_says_so(puna: Puna) -> None:
    said = puna("run", "cria", "a <FILL_ME> b", "--infill")
    assert said.code == 2
    assert "cria was not trained to fill in the middle" in said.err


def test_images_are_shown_to_the_model(puna: Puna, model: Puna, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"A")
    (tmp_path / "b.png").write_bytes(b"B")
    llm = model(ScriptedLLM())
    files = ["--image", str(tmp_path / "a.png"), "--image", str(tmp_path / "b.png")]
    assert puna("run", "cria", "Hi", *files).code == 0
    assert llm.shown == [b"A", b"B"]
    said = puna("run", "cria", "Hi", "--image", str(tmp_path / "c.png"))
    assert (said.code, "c.png: no such file" in said.err) == (2, True)
    said = puna("run", "cria", "Hi", "--raw", *files)
    assert (said.code, "--image has no place beside --raw" in said.err) == (2, True)
    assert len(llm.shown) == 2


def test_a_blind_model_refuses_images(puna: Puna, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"A")
    said = puna("run", "cria", "Hi", "--image", str(tmp_path / "a.png"))
    assert (said.code, "takes no pictures" in said.err) == (2, True)
