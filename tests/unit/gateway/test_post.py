"""What an engine's thread tells reaches the right readers, in order, by one call a step; readers who are behind get it
joined."""

from __future__ import annotations

import asyncio

import pytest

from puna.engine.progress import Progress
from puna.engine.sampler import Draw
from puna.errors import StoppedError
from puna.gateway.post import PACE, Mail, Post, joined


def test_a_step_is_carried_by_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        loop, post = asyncio.get_running_loop(), Post()
        calls: list[object] = []
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a: (calls.append(a), call(*a))[1])
        boxes = [Mail(post) for _ in range(3)]

        def step() -> None:
            with post:
                for n, box in enumerate(boxes):
                    box.put(Progress(n, 0, (n,)))
                assert calls == []

        await asyncio.to_thread(step)
        mine = [call for call in calls if call[0] == post._deliver]  # type: ignore[index]
        assert len(mine) == 1
        assert [(await box.get()).tokens for box in boxes] == [(0,), (1,), (2,)]  # type: ignore[union-attr]
        boxes[1].put(StoppedError("The end."))  # outside of a step, at once
        with pytest.raises(StoppedError):
            raise await boxes[1].get()  # type: ignore[misc]

    asyncio.run(scene())


def test_what_comes_while_nobody_reads_is_one_piece_a_choice() -> None:
    async def scene() -> None:
        box = Mail(Post())
        for item in (
            Progress(7, 0, (), prefilled=4),
            Progress(7, 0, (1,), prefilled=4),
            Progress(7, 0, (2, 3), prefilled=4),
            Progress(7, 1, (4,), prefilled=4),
            Progress(7, 0, (5,), finish="length", prefilled=4),
        ):
            box.put(item)
        assert await box.get() == Progress(7, 0, (), prefilled=4)
        assert await box.get() == Progress(7, 0, (1, 2, 3), prefilled=4)
        assert await box.get() == Progress(7, 1, (4,), prefilled=4)
        assert await box.get() == Progress(7, 0, (5,), finish="length", prefilled=4)

    asyncio.run(scene())


def test_only_reports_of_one_kind_are_joined() -> None:
    one, draw = Progress(7, 0, (1,)), Draw(2, -0.5)
    assert joined(one, Progress(7, 0, (2,), finish="stop")) == Progress(7, 0, (1, 2), finish="stop")
    told = Progress(7, 0, (1,), (draw,))
    assert joined(told, told) == Progress(7, 0, (1, 1), (draw, draw))
    for other in (
        told, Progress(8, 0, (2,)), Progress(7, 1, (2,)), Progress(7, 0), StoppedError("The end."),
        Progress(7, 0, (2,), error=StoppedError("The end.")), Progress(7, 0, (2,), prompt_logprobs=(draw,)),
    ):  # fmt: skip
        assert joined(one, other) is None
    assert joined(Progress(7, 0, (1,), finish="stop"), one) is None
    assert joined(StoppedError("The end."), one) is None


def test_a_reader_whose_loop_is_closed_is_gone() -> None:
    post = Post()

    async def box() -> Mail:
        return Mail(post)

    gone = asyncio.run(box())
    with pytest.raises(RuntimeError, match="closed"):
        gone.put(Progress(1, 0, (1,)))


def test_tokens_in_the_middle_of_an_answer_come_by_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        loop, post = asyncio.get_running_loop(), Post()
        box, timers = Mail(post), []
        wakes: list[object] = []
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a: (wakes.append(a), call(*a))[1])
        monkeypatch.setattr(loop, "call_later", lambda seconds, *a: timers.append((seconds, a)))

        def step(*items: Progress) -> None:
            with post:
                for item in items:
                    box.put(item)

        step(Progress(1, 0, (), prefilled=3))
        step(Progress(1, 0, (1,), prefilled=3))  # the first token: at once
        assert len(wakes) == 2
        await asyncio.sleep(0)
        assert (await box.get(), await box.get()) == (
            Progress(1, 0, (), prefilled=3), Progress(1, 0, (1,), prefilled=3),
        )  # fmt: skip
        [(seconds, (late, of))] = timers
        assert seconds == PACE
        step(Progress(1, 0, (2,), prefilled=3))
        step(Progress(1, 0, (3,), prefilled=3))
        assert len(wakes) == 2, "nobody is woken for them"
        late(of)
        assert await box.get() == Progress(1, 0, (2, 3), prefilled=3)
        assert len(timers) == 2, "and so on while tokens come"
        step(Progress(1, 0, (4,), prefilled=3), Progress(1, 1, (5,), prefilled=3))  # a choice's first: both at once
        assert len(wakes) == 3
        step(Progress(1, 0, (6,), finish="length", prefilled=3))
        assert len(wakes) == 4
        await asyncio.sleep(0)
        assert [(await box.get()).tokens for _ in range(3)] == [(4,), (5,), (6,)]  # type: ignore[union-attr]
        late(of)  # nothing came: it ends
        assert len(timers) == 2
        step(Progress(1, 1, (7,), prefilled=3))
        assert len(wakes) == 5, "after a while without any, a token is delivered at once"

    asyncio.run(scene())
