"""The parts of cria's recipe that decide what the model sees: cleaning, the held-out split, batches, and the rate."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[3] / "recipes" / "cria"


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("prepare")


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("train")


def test_clean_makes_quotes_dashes_and_breaks_plain(prepare):
    raw = "\nTom said,  “Hi – it’s me…”  \r\n\r\nThe end. \n"
    assert prepare.clean(raw) == 'Tom said, "Hi - it\'s me..."\nThe end.'


@pytest.mark.parametrize(
    ("story", "why"),
    [
        ("Tom went to the", "cut off"),
        ('Tom said, "Hi.', "an open quote"),
        ("Tom ate a pi¡ata.", "a wrongly encoded letter"),
    ],
)
def test_clean_drops_what_is_broken(prepare, story, why):
    assert prepare.clean(story) is None, why
    assert prepare.clean("Tom ate a piñata.") is not None


def test_read_gives_each_story_once(prepare, tmp_path):
    file = tmp_path / "stories.txt"
    file.write_text("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n One. \n<|endoftext|>\nThree, cut\n", encoding="utf-8")
    assert prepare.read([file]) == (["One.", "Two."], 2)


def test_a_retold_story_is_not_held_out(prepare):
    known = "Once upon a time there was a red fox who lived in a big green wood with his mother and a small grey owl."
    retold = known.replace("red fox", "blue fox")
    other = "Once upon a time there was a red hen. She sat on seven eggs all day and all night until each one opened."
    assert prepare.without_overlap([retold, other], [known]) == [other]


def stories(lengths: list[int]) -> list[np.ndarray]:
    """Distinct stories as ids: 0, their number over and over, 1."""
    return [np.array([0, *[n + 2] * (length - 2), 1]) for n, length in enumerate(lengths)]


def test_batches_hold_every_story_once_within_the_size(train):
    given = stories([5, 9, 30, 7, 7, 12, 3, 40])
    made = train.batches(given, 20, 32, np.random.default_rng(3))
    rows = [row[row != train.PADDING].tolist() for batch in made for row in batch]
    assert sorted(rows) == sorted(story[:21].tolist() for story in given)
    assert all(batch.shape[0] * (batch.shape[1] - 1) <= 32 for batch in made)
    assert sum(int((batch == train.PADDING).sum()) for batch in made) < 20


def test_a_resumed_run_goes_on_with_the_batches_that_are_left(train):
    given = stories([5, 9, 30, 7, 7, 12, 3, 40])
    whole, rest = (train.endless(given, 20, 32, seed=1, skip=skip) for skip in (0, 7))
    expected = [next(whole) for _ in range(12)][7:]
    for (epoch, batch), (epoch_again, batch_again) in zip(expected, rest, strict=False):
        assert epoch == epoch_again
        np.testing.assert_array_equal(batch, batch_again)
    assert expected[-1][0] > 0


def test_the_rate_warms_up_stays_and_falls_to_zero(train):
    shares = [train.rate(step, warmup=2, steps=10, decay=4) for step in range(10)]
    assert shares == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_padding_does_not_count_in_the_loss(train):
    torch = pytest.importorskip("torch")
    weights = train.tree(train.CONFIG, train.initial(train.CONFIG, 1))
    rows = torch.tensor([[0, 5, 9, 1]])
    padded = torch.cat([rows, torch.full((1, 3), train.PADDING)], dim=1)
    assert train.loss(weights, train.CONFIG, padded).item() == pytest.approx(
        train.loss(weights, train.CONFIG, rows).item(), abs=1e-6
    )
