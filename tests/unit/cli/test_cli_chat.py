"""The chat: what is sent each turn, its commands, saved sessions as strangers' files, and keys at a real terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import ScriptedLLM

from puna.cli.chat import HELP, Session, chat, load_session
from puna.errors import PunaError, UsageError, UserError
from puna.llm import Restored
from puna.settings import RunSettings
from puna.text.chat import ChatFormat
from puna.types import Message, Sampling

Talk = Callable[..., tuple[str, str]]


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str]) -> Talk:
    """Hold a chat of these entries; gives stdout and stderr."""

    def hold(llm: Any, *entries: str | type[BaseException], **options: Any) -> tuple[str, str]:
        lines: Iterator[Any] = iter(entries)

        def ask(prompt: str) -> str:
            line = next(lines, EOFError)
            if isinstance(line, str):
                return line
            raise line

        capsys.readouterr()
        assert chat(llm, RunSettings(model="cria", **options), ask=ask) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return hold


def sent(llm: ScriptedLLM) -> list[list[tuple[str, str]]]:
    """What the model was sent, turn by turn."""
    return [[(message.role, message.content) for message in prompt] for prompt, _ in llm.asked]


def test_every_turn_sends_what_came_before(talk: Talk) -> None:
    llm = ScriptedLLM(["A", "B"])
    out, err = talk(llm, "one", "two", system="S", temperature=0.0)
    assert out == "AB\nAB\n\n"
    assert sent(llm) == [
        [("user", "one")],
        [("user", "one"), ("assistant", "AB"), ("user", "two")],
    ]
    assert {options["system"] for _, options in llm.asked} == {"S"}
    assert {options["temperature"] for _, options in llm.asked} == {0.0}
    assert "cria · " in err
    assert "context 64 tokens" in err


def test_without_a_chat_format_each_text_stands_alone(talk: Talk) -> None:
    llm = ScriptedLLM([" b"], chat=False)
    out, err = talk(llm, "a", "c")
    assert out == "a b\nc b\n\n"
    assert [prompt for prompt, _ in llm.asked] == ["a", "c"]
    assert all(options["raw"] for _, options in llm.asked)
    assert "it has no chat format" in err
    assert "--raw" in talk(ScriptedLLM(), "a", raw=True)[1]


def test_a_system_message_without_a_place_is_refused_at_once(talk: Talk) -> None:
    with pytest.raises(UserError, match="system message cannot be honoured"):
        talk(ScriptedLLM(chat=False), "a", system="S")


def test_entries_of_several_lines(talk: Talk) -> None:
    llm = ScriptedLLM()
    talk(llm, "a\\", "b", '"""c', "", 'd"""', '"""e"""', '"""/f', '"""', "//g", "  ", "/exit", "h")
    said = [prompt[-1].content for prompt, _ in llm.asked]
    assert said == ["a\nb", "c\n\nd", "e", "/f", "/g"]


def test_commands(talk: Talk) -> None:
    llm = ScriptedLLM(["A"])
    out, err = talk(
        llm, "/help", "/system", "/system Be kind.", "/system", "one", "/clear", "/system none", "two", "/hlp"
    )
    assert HELP in err
    assert "(no system message)" in err
    assert "Be kind." in err
    assert [options["system"] for _, options in llm.asked] == ["Be kind.", None]
    assert sent(llm)[1] == [("user", "two")]
    assert "There is no command /hlp.\nDid you mean /help?" in err
    assert out == "A\nA\n\n"


def test_settings_can_be_changed(talk: Talk) -> None:
    llm = ScriptedLLM()
    words = ["/set temperature 0.5", "/set top-k 4", "/set seed 3", "/set max_tokens 9", "/set stop end of it"]
    _, err = talk(llm, *words, "one", "/set seed none", "/set max_tokens none", "/set stop none", "two")
    first, second = (options for _, options in llm.asked)
    assert (first["temperature"], first["top_k"], first["seed"]) == (0.5, 4, 3)
    assert (first["max_tokens"], first["stop"]) == (9, ("end of it",))
    assert (second["max_tokens"], second["stop"]) == (None, ())
    assert "seed 3" in err
    assert "stop 'end of it'\n" in err
    _, err = talk(llm, "/set temprature 1", "/set temperature", "/set temperature hot", "/set top_p 3", "/set")
    assert "Did you mean temperature?" in err
    assert "/set temperature needs a value.\nFor example: /set temperature 0.7" in err
    assert "temperature must be a number, not 'hot'.\nFor example: /set temperature 0.7" in err
    assert "top_p must be " in err
    assert "temperature 0.7  top_p 0.95" in err
    assert "repetition_penalty" not in err  # shown only where it does something
    _, err = talk(llm, "/set repetition-penalty 1.2", "/set mirostat_tau 5", "/set n 2")
    assert "min_p 0.0  repetition_penalty 1.2  seed none" in err
    assert "mirostat_tau takes the place of top_p, which is 0.95.\nSet top_p to 1 beside mirostat_tau." in err
    assert "There is no setting n." in err


def test_regenerate_asks_the_same_again(talk: Talk) -> None:
    llm = ScriptedLLM(["A"])
    _, err = talk(llm, "/regenerate", "one", "two", "/regenerate", "three")
    assert "nothing to answer again" in err
    assert sent(llm)[1] == sent(llm)[2]
    assert len(sent(llm)[3]) == 5
    seeds = [options["seed"] for _, options in llm.asked]
    assert len(set(seeds)) == len(seeds)
    assert "same answer" in talk(llm, "one", "/regenerate", seed=1)[1]


def test_a_regeneration_that_fails_loses_nothing(talk: Talk) -> None:
    llm = ScriptedLLM(["A"])
    llm.error = None
    entries = iter(["one", "/regenerate", "two"])

    def ask(prompt: str) -> str:
        entry = next(entries, None)
        if entry is None:
            raise EOFError
        llm.error = PunaError("broken") if entry == "/regenerate" else None
        return entry

    assert chat(llm, RunSettings(), ask=ask) == 0  # type: ignore[arg-type]
    assert sent(llm)[2] == [("user", "one"), ("assistant", "A"), ("user", "two")]


def test_a_full_context_is_said_and_nothing_is_cut(talk: Talk) -> None:
    llm = ScriptedLLM(["A"])
    _, err = talk(llm, "x" * 40, "y" * 30, "z", "/clear", "y" * 30)
    assert "It exceeds the context by 8 tokens.\nNothing was sent. /clear forgets" in err
    assert [prompt[-1].content[0] for prompt, _ in llm.asked] == ["x", "y", "z", "y"]
    assert len(sent(llm)[2]) == 3  # the message that did not fit was not kept
    assert (
        "/clear" not in talk(llm, "x" * 80)[1].partition("exceeds")[2]
    )  # alone it is too long: clearing does not help


def test_an_error_in_the_middle_ends_the_turn_only(talk: Talk) -> None:
    llm = ScriptedLLM(["A"], error=PunaError("The weights are damaged."))
    out, err = talk(llm, "one", "two")
    assert err.count("The weights are damaged.") == 2
    assert out == "A\nA\n\n"
    assert len(sent(llm)[1]) == 1


def test_interrupted_at_the_prompt_goes_on(talk: Talk) -> None:
    llm = ScriptedLLM(["A"])
    out, err = talk(llm, KeyboardInterrupt, '"""a', KeyboardInterrupt, "b")
    assert out == "\n\nA\n\n"
    assert err.count("(Ctrl-D or /exit leaves)") == 2
    assert sent(llm) == [[("user", "b")]]


def test_a_saved_session_goes_on(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "chat file.json"
    talk(ScriptedLLM(["Grüß", " 🦙"]), "one", "/set temperature 0.25", "/set stop a", f"/save {file}", system="S")
    llm = ScriptedLLM(["B"])
    _, err = talk(llm, "lost", f"/load {file}", "two")
    assert "(loaded: 1 turns" in err
    prompt, options = llm.asked[1]
    assert [(message.role, message.content) for message in prompt] == [
        ("user", "one"),
        ("assistant", "Grüß 🦙"),
        ("user", "two"),
    ]
    assert (options["system"], options["temperature"], options["stop"]) == ("S", 0.25, ("a",))
    assert "and this model's session is texts" in talk(ScriptedLLM(chat=False), f"/load {file}")[1]
    assert "needs a file's name" in talk(llm, "/save")[1]
    assert "cannot be written" in talk(llm, f"/save {tmp_path}")[1]
    assert "no such home folder" in talk(llm, "/save ~nobody-of-that-name/x")[1]


def test_saving_writes_over_sessions_and_over_nothing_else(tmp_path: Path) -> None:
    file, other = tmp_path / "s.json", tmp_path / "notes.md"
    session = Session("m", False, Sampling(), "one")
    session.save(file)
    replace(session, system="two").save(file)
    assert load_session(file).system == "two"
    other.write_text("mine")
    with pytest.raises(UsageError, match="no saved chat"):
        session.save(other)
    with pytest.raises(UsageError, match="cannot be written"):
        replace(session, system="\ud800").save(file)
    assert (other.read_text(), load_session(file).system) == ("mine", "two")
    assert {path.name for path in tmp_path.iterdir()} == {"s.json", "notes.md"}


SAVED: dict[str, Any] = {
    "format": "puna-chat",
    "version": 1,
    "model": "m",
    "mode": "chat",
    "system": None,
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    "sampling": {"temperature": 0, "seed": None, "stop": ["x"]},
}


def test_a_session_file_that_is_right(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps(SAVED))
    assert load_session(file) == Session(
        "m", False, Sampling(temperature=0, stop=("x",)), None, [Message("user", "a"), Message("assistant", "b")]
    )
    replace(load_session(file), system="é").save(file)
    assert load_session(file).system == "é"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version"),
        ({"mode": "song"}, "mode"),
        ({"model": 3}, "model"),
        ({"system": ["x"]}, "system"),
        ({"messages": {}}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "b"}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}, {}]}, "messages[0]"),
        ({"messages": ["a", "b"]}, "messages[0]"),
        ({"sampling": []}, "sampling"),
        ({"sampling": {"temperature": "hot"}}, "sampling.temperature"),
        ({"sampling": {"temperature": True}}, "sampling.temperature"),
        ({"sampling": {"temperature": -1}}, "temperature must be "),
        ({"sampling": {"top_k": None}}, "sampling.top_k"),
        ({"sampling": {"top_k": 1.5}}, "sampling.top_k"),
        ({"sampling": {"stop": "x"}}, "sampling.stop"),
        ({"sampling": {"colour": 1}}, "sampling.colour"),
        ({"more": 1}, "the keys"),
    ],
)
def test_a_session_file_that_is_wrong_names_the_key(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps(SAVED | change))
    with pytest.raises(UserError) as caught:
        load_session(file)
    assert key in caught.value.message


def test_files_that_are_no_sessions(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    (tmp_path / "list").write_text("[]")
    llm = ScriptedLLM(["A"])
    entries = [f"/load {tmp_path / name}" for name in ("deep", "text", "list", "absent", ".")]
    out, err = talk(llm, "/load", "/load /dev/zero", *entries, "still here")
    assert out == "A\n\n"
    for name in ("deep", "text", "list", "absent"):
        assert str(tmp_path / name) in err


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*SAVED, "role", "content"]), inner)
        ),
        max_leaves=6,
    ),
    st.sampled_from(list(SAVED)),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_a_session_or_a_typed_error(tmp_path: Path, value: Any, key: str) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps(SAVED | {key: value}))
    try:
        load_session(file)
    except UserError:
        return


def test_a_second_turn_computes_only_what_is_new(reference: Path) -> None:
    """A real model given a plain chat format: the engine finds the first turn in its cache."""
    from puna.llm import LLM

    folder = reference / "checkpoints" / "stories260K"
    llm = LLM(folder / "stories260K.bin", tokenizer=folder / "tok512.bin")
    llm.chat_format = ChatFormat(
        "plain", lambda messages, *_: ["".join(f"{m.role}: {m.content}\n" for m in messages) + "assistant:"]
    )
    reused: list[int] = []
    entries = iter(["Once upon a time", "Then what?"])

    def ask(prompt: str) -> str:
        reused.append(llm._engine.statistics().reused_tokens)
        entry = next(entries, None)
        if entry is None:
            raise EOFError
        return entry

    assert chat(llm, RunSettings(temperature=0.0, max_tokens=8), ask=ask) == 0
    first = len(llm.encode([Message("user", "Once upon a time")]))
    assert reused[:2] == [0, 0]
    assert reused[2] >= first - 1


def test_ctrl_c_stops_the_answer_and_not_the_chat(scripted_program: Callable[..., Any], home: Path) -> None:
    shown = scripted_program("run", "cria", pieces=["Hello", " there"] * 100, delay=0.03)
    shown.until(">>> ")
    shown.press("first\n")
    shown.until("Hello there")
    shown.press("\x03")
    shown.until("[stopped]")
    shown.until(">>> ")
    shown.press("\x1b[A\n")  # the arrow key brings the last entry back
    shown.until("first")
    shown.until("Hello there")
    shown.press("\x03")
    shown.until(">>> ")
    shown.press("half a line")
    shown.until("half a line")  # echoed, so the line is being read: a Ctrl-C just before that can get lost
    shown.press("\x03")
    shown.until("(Ctrl-D or /exit leaves)")
    shown.until(">>> ")
    shown.press("\x04")
    assert shown.leave() == 0
    assert "Traceback" not in shown.shown
    history = home / "history"
    assert history.read_text().splitlines()[-1] == "first"
    assert history.stat().st_mode & 0o77 == 0


def test_ctrl_c_before_the_first_token(scripted_program: Callable[..., Any], tmp_path: Path) -> None:
    shown = scripted_program("run", "cria", pieces=["Hello"], delay=3.0)
    shown.until(">>> ")
    shown.press("first\n")
    shown.until("Reading")
    shown.press("\x03")
    shown.until("the message is not kept")
    shown.until(">>> ")
    shown.press(f"/save {tmp_path / 's.json'}\n")
    shown.until("(saved: 0 turns)")
    shown.press("/exit\n")
    assert shown.leave() == 0


def test_no_colours_where_no_color_is_set(
    scripted_program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = scripted_program("run", "cria", pieces=["Hello"])
    shown.until(">>> ")
    shown.press("\x04")
    assert shown.leave() == 0
    assert "\x1b[1mcria" in shown.shown
    monkeypatch.setenv("NO_COLOR", "1")
    plain = scripted_program("run", "cria", pieces=["Hello"])
    plain.until(">>> ")
    plain.press("\x04")
    assert plain.leave() == 0
    assert "\x1b[3" not in plain.shown


def test_a_chat_that_cannot_be(scripted_program: Callable[..., Any]) -> None:
    shown = scripted_program("run", "cria", "--json", pieces=["Hello"])
    assert shown.leave() == 2
    assert "a chat has many" in shown.shown


def test_a_session_goes_on_where_it_was_with_what_was_computed(tmp_path: Path, talk: Talk) -> None:
    class Saving(ScriptedLLM):
        saved: dict[Path, list[int]] = {}  # noqa: RUF012

        def save_session(self, path: Path, ids: list[int]) -> int:
            path.touch()
            self.saved[path] = ids
            return len(ids)

        def load_session(self, path: Path) -> Any:
            return Restored(tuple(self.saved[path]), 2, "a page is damaged")

    file = tmp_path / "talk"
    talk(Saving(["A"]), "one", system="S", session=file)
    assert [len(ids) for ids in Saving.saved.values()] == [len("one") + 1]
    assert list(Saving.saved) == [tmp_path / "talk.cache"]
    llm = Saving(["B"])
    _, err = talk(llm, "two", session=file)
    assert sent(llm) == [[("user", "one"), ("assistant", "A"), ("user", "two")]]
    assert "note: a page is damaged" in err
    assert [message.content for message in load_session(file).messages] == ["one", "A", "two", "B"]
    (tmp_path / "other").write_text("a diary")
    with pytest.raises(UserError):
        talk(Saving(), "x", session=tmp_path / "other")
    assert (tmp_path / "other").read_text() == "a diary"


def test_images_go_with_the_next_message_and_into_the_session(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"A")
    (tmp_path / "b.png").write_bytes(b"B")
    llm, file = ScriptedLLM(["x"]), tmp_path / "chat.json"
    image = f"/image {tmp_path / 'a.png'}"
    _, err = talk(llm, image, f"/image {tmp_path / 'b.png'}", "what?", "and?", "/regenerate", f"/save {file}")
    assert "(2 pictures go with the next message)" in err
    shown = [[[picture.data for _, picture in message.pictures] for message in prompt] for prompt, _ in llm.asked]
    assert shown == [[[b"A", b"B"]], [[b"A", b"B"], [], []], [[b"A", b"B"], [], []]]
    assert [picture.data for _, picture in load_session(file).messages[0].pictures] == [b"A", b"B"]
    llm = ScriptedLLM(["x"])
    talk(llm, f"/load {file}", "more", "/clear", image, "/image none", "plain", image, "seen", "/regenerate")
    shown = [[[picture.data for _, picture in message.pictures] for message in prompt] for prompt, _ in llm.asked]
    assert shown == [
        [[b"A", b"B"], [], [], [], []], [[]], [[], [], [b"A"]], [[], [], [b"A"]],
    ]  # fmt: skip
    data = json.loads(file.read_text())
    for wrong in (7, [[1, "QQ=="]], [[0, "?"]], [[0, ""]], [["0", "QQ=="]], [[0]]):
        data["messages"][0]["pictures"] = wrong
        file.write_text(json.dumps(data))
        with pytest.raises(UsageError, match="pictures"):
            load_session(file)


def test_a_blind_model_says_so_when_a_picture_is_named(talk: Talk, tmp_path: Path) -> None:
    for llm in (ScriptedLLM(sees=False), ScriptedLLM(chat=False)):
        _, err = talk(llm, f"/image {tmp_path / 'none.png'}")
        assert "has no place for pictures" in err
