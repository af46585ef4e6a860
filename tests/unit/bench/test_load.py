"""The load of many clients, on an engine that is plain arithmetic: a clock that the engine itself moves."""

from __future__ import annotations

import pytest

from puna.bench.load import Load, percentile, put


class Clockwork:
    """Every step takes a second and gives each of its first `slots` requests a token."""

    def __init__(self, slots: int) -> None:
        self.now, self.slots, self.number = 0.0, slots, 0
        self.open: dict[int, int] = {}
        self.prompts: list[list[int]] = []
        self.most = 0

    def clock(self) -> float:
        return self.now

    def submit(self, prompt: list[int], new: int) -> int:
        self.prompts.append(prompt)
        self.number += 1
        self.open[self.number] = new
        self.most = max(self.most, len(self.open))
        return self.number

    def advance(self) -> dict[int, int]:
        self.now += 1
        came = dict.fromkeys(list(self.open)[: self.slots], 1)
        for request in came:
            self.open[request] -= 1
            if not self.open[request]:
                del self.open[request]
        return came


def test_a_closed_loop_keeps_its_clients_busy() -> None:
    engine = Clockwork(slots=4)
    figures = put(engine, Load(requests=8, clients=4, prompt=10, new=5), range(100), engine.clock)
    assert engine.most == 4
    assert figures == {
        "tokens_per_second": 8 * 15 / 10, "requests_per_second": 0.8, "makespan": 10,
        "first_p50": 1, "first_p90": 1, "between_p50": 1, "between_p90": 1,
    }  # fmt: skip


def test_waiting_counts_from_when_a_request_was_due() -> None:
    engine = Clockwork(slots=1)  # one at a time, 5 seconds each: the fourth waits for three others
    figures = put(engine, Load(requests=4, clients=1, prompt=10, new=5, rate=1e9), range(100), engine.clock)
    assert figures["makespan"] == pytest.approx(20)
    assert figures["first_p90"] == pytest.approx(1 + 0.9 * 15)


def test_prompts_share_their_beginning_and_nothing_else() -> None:
    engine = Clockwork(slots=4)
    put(engine, Load(requests=4, clients=4, prompt=10, new=1, shared=6), range(1000), engine.clock)
    assert {tuple(prompt[:6]) for prompt in engine.prompts} == {tuple(engine.prompts[0][:6])}
    assert len({tuple(prompt[6:]) for prompt in engine.prompts}) == 4
    assert {len(prompt) for prompt in engine.prompts} == {10}


def test_percentiles_lie_between_neighbours() -> None:
    assert [percentile([1, 2, 3, 4, 5], share) for share in (0, 50, 90, 100)] == [1, 3, pytest.approx(4.6), 5]
    assert percentile([], 90) == 0
