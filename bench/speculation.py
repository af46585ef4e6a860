"""How much faster does prompt lookup make an answer that repeats its prompt with changes? Tokens a second of decoding.

The prompt holds a text, the answer is the text with every n-th word changed. No small model edits faithfully, so the
answer is forced, a token at a time, by a constraint that allows only the next one: the model is computed, logits are
masked and drawn, guesses are proposed, confirmed and refused as for a model that writes this answer. What it does not
measure is whether a model would. Words and the marks between them are the tokens, numbered as they come.

With `--draft TYPE` it is another question: what a draft model does, of which only trained models can tell. The one that
is there, `cria`, is drafted by itself, packed as TYPE. A draft that costs as much as its model cannot pay, so the
figures to read are `right`, the share of its guesses that were right, and how little is lost by finding out.

    python bench/speculation.py --model 1b.gguf --record
    python bench/speculation.py --draft Q4_0 --record
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent))
import common

from puna.engine.draft import DraftModel
from puna.engine.engine import Engine
from puna.engine.native_runner import host_runner
from puna.engine.speculation import PromptLookup
from puna.kernels import ops
from puna.types import Sampling
from puna.weights.find import find_model
from puna.weights.load import load

TEXT = Path(__file__).parent.parent / "LICENSE"
FIRST = 300


class Written:
    """Allows one answer (see engine.sequence.Constraint), and tells no one what comes."""

    finished = False

    def __init__(self, answer: list[int], vocabulary: int) -> None:
        self._answer, self._at = answer, 0
        self._words = -(-vocabulary // 32)

    def mask(self) -> npt.NDArray[np.uint32]:
        mask = np.zeros(self._words, np.uint32)
        token = self._answer[self._at]
        mask[token // 32] = np.uint32(1) << np.uint32(token % 32)
        return mask

    def accept(self, token: int) -> None:
        assert token == self._answer[self._at]
        self._at += 1

    def forced(self) -> list[int]:
        return []

    def copy(self) -> Written:
        return copy.copy(self)  # the answer itself never changes


def edited(tokens: list[int], every: int, draw: random.Random, fresh: int) -> list[int]:
    """The tokens with every n-th changed: another, one more, or none in its place, in turns. `every` 0: as it is."""
    answer: list[int] = []
    for i, token in enumerate(tokens):
        if not every or i % every != every - 1:
            answer.append(token)
        elif (kind := i // every % 3) < 2:
            answer += [draw.randrange(FIRST, fresh), token][: 1 + kind]
    return answer


def drafted(options: argparse.Namespace) -> dict[str, Any]:
    """cria's own stories, greedy and sampled, with its packed form as a draft and without, in turns."""
    ops.select()
    path = find_model("cria")
    large = load(path, dtype="fp32")
    small = load(path, quant=options.draft)
    runner, draft = (host_runner(each.config, each.weights) for each in (large, small))
    prompts = [
        large.tokenizer.encode(text, bos=True)
        for text in ("Once upon a time", "The dog ran to the park", "Lily had a red ball", "One day, Tom and his mom")
    ]
    room = runner.config.context_length // runner.page + 1

    def speed(sampling: Sampling, speculate: bool) -> tuple[float, float, float, list[list[int]]]:
        """Tokens a second, guesses a step, the share that was right, and the answers, one after another."""
        engine = Engine(
            runner,
            pages=room,
            prefix_cache=False,
            speculate=DraftModel(Engine(draft, pages=room)) if speculate else None,
        )
        answers: list[list[int]] = []
        began = time.perf_counter()
        for prompt in prompts:
            engine.submit(prompt, sampling)
            answers.append([])
            while not engine.idle:
                for report in engine.step():
                    if report.error is not None:
                        raise report.error
                    answers[-1] += report.tokens
        seconds, counts = time.perf_counter() - began, engine.statistics()
        guessed = counts.guessed_tokens
        return counts.made_tokens / seconds, guessed / counts.steps, counts.right_guesses / max(guessed, 1), answers

    row: dict[str, Any] = {
        "question": f"speculation cria drafted by its {options.draft}",
        **{key: getattr(options, key) for key in ("tokens", "turns")},
    }
    for name, sampling in {
        "greedy": Sampling(temperature=0.0, max_tokens=options.tokens, ignore_eos=True),
        "sampled": Sampling(seed=1, max_tokens=options.tokens, ignore_eos=True),
    }.items():
        taken: dict[bool, list[tuple[float, float, float, list[list[int]]]]] = {True: [], False: []}
        for turn in range(options.turns):
            for speculate in (True, False) if turn % 2 else (False, True):
                taken[speculate].append(speed(sampling, speculate))
        speeds, bases = [each[0] for each in taken[True]], [each[0] for each in taken[False]]
        row[name] = {
            "tokens_per_second": round(statistics.median(speeds), 1),
            "plain": round(statistics.median(bases), 1),
            "ratio": round(common.ratio(speeds, bases)["median"], 3),
            "guesses_a_step": round(statistics.median(each[1] for each in taken[True]), 2),
            "right": round(statistics.median(each[2] for each in taken[True]), 3),
            "same_answers": all(a[3] == b[3] for a, b in zip(taken[True], taken[False], strict=True)),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF; `puna bench --shape` makes one")
    parser.add_argument("--draft", help="in place of a model: cria is drafted by itself, packed as this type")
    parser.add_argument("--tokens", type=int, default=256, help="of the text")
    parser.add_argument("--every", default="0,32,16,8", help="which token is changed")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/speculation.jsonl")
    options = parser.parse_args()
    if (options.model is None) == (options.draft is None):
        parser.error("give --model or --draft")
    if options.draft is not None:
        common.record("speculation", drafted(options) | common.pedigree(), options.record)
        return
    room = options.streams * (3 * options.tokens + 128)
    # Two engines, one runner: each allocates the cache anew, so they are made turn by turn.
    runner = common.runner(options.model)
    vocabulary = runner.config.vocab_size
    words = re.findall(r"\w+|[^\w\s]", TEXT.read_text(encoding="utf-8"))[: options.tokens]
    ids = {word: FIRST + i for i, word in enumerate(dict.fromkeys(words))}
    text = [ids[word] for word in words]

    def speed(answers: list[list[int]], speculate: bool) -> tuple[float, float, float]:
        """Tokens a second from the first token on, guesses a step that made tokens, the share that was right."""
        engine = Engine(
            runner, pages=-(-room // runner.page), prefix_cache=False, speculate=PromptLookup if speculate else None
        )
        for i in range(6):  # the price of a row is known after some steps of different sizes
            engine.submit(text[: 1 + i], Sampling(temperature=0.0, max_tokens=3, ignore_eos=True))
            while not engine.idle:
                engine.step()
        for answer in answers:
            sampling = Sampling(temperature=0.0, max_tokens=len(answer))
            engine.submit(text, sampling, constraint=Written(answer, vocabulary))
        going = len(answers)
        before = engine.statistics()
        while engine.statistics().made_tokens < before.made_tokens + going:
            engine.step()
        before = engine.statistics()
        began = time.perf_counter()
        while not engine.idle:
            for report in engine.step():
                if report.error is not None:
                    raise report.error
        seconds = time.perf_counter() - began
        after = engine.statistics()
        guessed = after.guessed_tokens - before.guessed_tokens
        right = after.right_guesses - before.right_guesses
        steps = after.steps - before.steps
        return (after.made_tokens - before.made_tokens) / seconds, guessed / steps, right / max(guessed, 1)

    row: dict[str, Any] = {
        "question": f"speculation {options.model.stem}",
        **{key: getattr(options, key) for key in ("tokens", "streams", "turns")},
    }
    for every in map(int, options.every.split(",")):
        draw = random.Random(every)
        plain: list[tuple[float, float, float]] = []
        guessing: list[tuple[float, float, float]] = []
        for turn in range(options.turns):
            answers = [edited(text, every, draw, FIRST + len(ids)) for _ in range(options.streams)]
            for speculate in (True, False) if turn % 2 else (False, True):
                (guessing if speculate else plain).append(speed(answers, speculate))
        speeds, bases = [each[0] for each in guessing], [each[0] for each in plain]
        row[f"every {every} changed" if every else "nothing changed"] = {
            "tokens_per_second": round(statistics.median(speeds), 2),
            "plain": round(statistics.median(bases), 2),
            "ratio": round(common.ratio(speeds, bases)["median"], 3),
            "guesses_a_step": round(statistics.median(each[1] for each in guessing), 2),
            "right": round(statistics.median(each[2] for each in guessing), 3),
        }
    common.record("speculation", row | common.pedigree(), options.record)


if __name__ == "__main__":
    main()
