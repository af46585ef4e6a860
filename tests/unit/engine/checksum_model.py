"""The checksum model: a runner whose next token is a hash of what its cache really holds, and its plain definition.

What it is: `ChecksumRunner` writes token ids into pages and reads them back through the page table, so a wrong page,
position or count, a stale prefix or a page shared by mistake changes every later answer. `plainly` gives the answer of
one request alone, from its tokens. `Traffic` compares the two over random requests. Pictures are numbers that are
added to what is written: to the picture's own tokens, or to all from it on (`Pixels.spreads`).

With a `chunk` it has a layer more that sees its chunk only, in pages of its own. What that writes of a token depends on
all before it, as in a model, so a page of the same words after other ones is a wrong page.
What it is not: a model of time, or of numbers.
What is surprising: choices differ although nothing is random: choice c takes the token 7 * c after the hash's.
"""

from __future__ import annotations

import math
import random
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from puna.engine import turns as turns_module
from puna.engine.draft import DraftModel
from puna.engine.engine import Engine
from puna.engine.pictures import Run, Shown, keys
from puna.engine.prefix import common
from puna.engine.runner import Batch, window
from puna.engine.sampler import Draw
from puna.engine.speculation import PromptLookup, StepCost
from puna.errors import AdapterError, QueueFullError, UsageError
from puna.models.config import DecoderConfig
from puna.models.rope import Rope
from puna.types import Sampling

VOCAB = 61
CONTEXT = 96
WORD = 1 << 64
CONFIG = DecoderConfig(
    generation="llama2", vocab_size=VOCAB, dim=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden_dim=24,
    norm_eps=1e-5, rope=Rope(4, 10000.0), context_length=CONTEXT,
)  # fmt: skip

# WEIGHTS[p, i] = 31^(p - i) for i <= p, so that a row's product with tokens is the polynomial hash of the first p + 1.
WEIGHTS = np.array([[pow(31, p - i, WORD) if i <= p else 0 for i in range(CONTEXT)] for p in range(CONTEXT)], np.uint64)
ONE_HOT = np.eye(VOCAB, dtype=np.float32)
MIX = 0x9E3779B97F4A7C15
LOCAL = 0xD1B54A32D192ED03


class Salts(dict[int, int]):
    """Adapters: each adds a number to every token that is written."""

    def load(self, number: int, pairs: Any) -> None:
        assert number not in self
        self[number] = pairs["salt"]

    def drop(self, number: int) -> None:
        del self[number]


@dataclass(frozen=True)
class Pixels:
    """A picture as this model takes it: a number, its tokens, and whether all that follows attends to it."""

    number: int
    tokens: int
    spreads: bool

    def shown(self, at: int) -> Shown:
        """It in a prompt. Its features stand in its tokens but for the first and the last, in two runs."""
        digest = self.number.to_bytes(32, "big")
        half, end = at + 1 + (self.tokens - 2) // 2, at + self.tokens - 1
        runs = () if self.spreads else (Run(at + 1, 0, half - at - 1), Run(half, half - at - 1, end - half))
        return Shown(at, self.tokens, digest, self, runs)


class ChecksumRunner:
    """See Runner; `page` tokens a page. Where `chunk` is not 0 the first of two layers sees so many only."""

    sees = True
    kv_type = "fp32"
    page_bytes = 8
    local_page_bytes = 8

    def __init__(self, page: int = 4, chunk: int = 0) -> None:
        self.page = page
        self.config = replace(CONFIG, chunk=chunk, global_layers=(1,))
        self.window = window(self.config, page)
        self.most_local = 0
        self.adapters = Salts()
        self.computed = 0
        self.widest = 0
        self.most_rows = 0
        self.seen: list[Pixels] = []

    def allocate(self, pages: int, local: int | None = None) -> None:
        self.store = np.full((pages, self.page), 7777, np.uint64)
        self.local_store = np.full((local or 0, self.page), 8888, np.uint64)

    def copy_page(self, source: int, target: int, *, local: bool = False) -> None:
        store = self.local_store if local else self.store
        store[target] = store[source]

    def see(self, pixels: Pixels) -> Any:
        self.seen.append(pixels)
        return pixels.number if pixels.spreads else np.array(features(pixels), np.uint64)

    def sight_bytes(self, pixels: Pixels) -> int:
        return pixels.tokens

    def run(self, batch: Batch) -> np.ndarray:
        return ONE_HOT[[likeliest(value) for value in self.hashes(batch)]]

    def hidden(self, batch: Batch) -> np.ndarray:
        return np.array([state(value) for value in self.hashes(batch)], np.float32).reshape(-1, 8)

    def hashes(self, batch: Batch) -> list[int]:
        positions, starts, pages = batch.table
        owner = np.repeat(np.arange(len(pages)), starts[1:] - starts[:-1])
        assert len(owner) == len(batch.tokens) == len(positions)
        numbers = [-1] * len(pages) if batch.adapters is None else batch.adapters.tolist()
        salts = np.array([0 if number < 0 else self.adapters[number] for number in numbers], np.uint64)
        written = batch.tokens.astype(np.uint64) + salts[owner]
        for sequence, at, sight in batch.placed:
            mine = (owner == sequence) & (positions >= at)
            if isinstance(sight, int):
                written[mine] += np.uint64(sight)
            else:
                mine &= positions < at + len(sight)
                written[mine] += sight[positions[mine] - at]
        self.store[pages[owner, positions // self.page], positions % self.page] = written
        self.computed += len(batch.tokens)
        self.widest = max(self.widest, len(batch.tokens))
        texts = self.store[pages].reshape(len(pages), -1)[:, :CONTEXT]
        rows = batch.wanted
        self.most_rows = max(self.most_rows, len(rows))
        if self.config.chunk:
            return self.with_local(batch, owner, (texts[owner] * WEIGHTS[positions, : texts.shape[1]]).sum(1))
        hashes: list[int] = (texts[owner[rows]] * WEIGHTS[positions[rows], : texts.shape[1]]).sum(1).tolist()
        return hashes

    def with_local(self, batch: Batch, owner: np.ndarray, whole: np.ndarray) -> list[int]:
        """The hashes of the wanted rows, given what all layers but one make of each row."""
        positions, starts, _ = batch.table
        local, chunk, rows = batch.table.local, self.config.chunk, batch.wanted
        for b, start in enumerate(positions[starts[:-1]]):
            first, last = start // chunk * chunk // self.page, positions[starts[b + 1] - 1]
            assert last // chunk == start // chunk, "tokens of two chunks in a step"
            held = local[b, first : last // self.page + 1]
            assert (local[b, :first] == -1).all(), "a page that was given back is named"
            assert (held >= 0).all(), "a page that is seen was given back"
            self.most_local = max(self.most_local, len(held))
        self.local_store[local[owner, positions // self.page], positions % self.page] = whole
        texts = self.local_store[local].reshape(len(local), -1)[:, :CONTEXT]
        at = positions[rows]
        seen = np.arange(texts.shape[1]) >= (at // chunk * chunk)[:, None]
        near = (texts[owner[rows]] * WEIGHTS[at, : texts.shape[1]] * seen).sum(1)
        hashes: list[int] = (whole[rows] + near * np.uint64(LOCAL)).tolist()
        return hashes


def likeliest(value: int) -> int:
    """The token after a text of that hash."""
    return ((value * MIX % WORD) >> 40) % VOCAB


def state(value: int) -> list[int]:
    """The hidden state after it: whole numbers, so that sums are exact."""
    return [value >> 8 * i & 255 for i in range(8)]


class Hash:
    """Of a text that grows: all of it, and what is seen of its last chunk."""

    def __init__(self, chunk: int = 0) -> None:
        self.chunk = chunk
        self.length = self.whole = self.near = 0

    def add(self, word: int) -> int:
        self.whole = (self.whole * 31 + word) % WORD
        if not self.chunk:
            return self.whole
        self.near = (self.near * 31 * (self.length % self.chunk > 0) + self.whole) % WORD
        self.length += 1
        return (self.whole + self.near * LOCAL) % WORD


def features(pixels: Pixels) -> list[int]:
    """What is seen in a picture that has features of its own."""
    return [pixels.number * (offset + 1) for offset in range(pixels.tokens - 2)]


def words(tokens: list[int], salt: int = 0, pictures: tuple[Shown, ...] = ()) -> list[int]:
    """What is written of each token."""
    written = [token + salt for token in tokens]
    for each in pictures:
        seen = [each.pixels.number] * len(tokens) if each.pixels.spreads else [0, *features(each.pixels)]
        for i, value in enumerate(seen[: len(tokens) - each.at]):
            written[each.at + i] += value
    return written


def hashes(tokens: list[int], salt: int = 0, pictures: tuple[Shown, ...] = (), chunk: int = 0) -> list[int]:
    """Of each beginning of a text."""
    growing = Hash(chunk)
    return [growing.add(word) for word in words(tokens, salt, pictures)]


def embedded(tokens: list[int], pooling: str, salt: int = 0, chunk: int = 0) -> list[float]:
    """What an embedding must be."""
    states = np.array([state(value) for value in hashes(tokens, salt, chunk=chunk)], np.float64)
    vector = {"mean": states.sum(0) / len(tokens), "last": states[-1], "cls": states[0]}[pooling]
    return vector.astype(np.float32).tolist()


def known(tokens: list[int], start: int, salt: int = 0, chunk: int = 0) -> list[tuple[int, bool, int]]:
    """Of each token from `start` on: itself, whether it is the likeliest, and the likeliest."""
    return [
        (token, token == likeliest(value), likeliest(value))
        for token, value in zip(tokens[start:], hashes(tokens, salt, chunk=chunk)[start - 1 :], strict=False)
    ]


def told(draws: Any) -> list[tuple[int, bool, int]]:
    """The same of what the engine said, of draws with one likeliest."""
    largest = 1 - math.log(math.e + VOCAB - 1)
    for draw in draws:
        assert min(abs(draw.logprob - largest), abs(draw.logprob - largest + 1)) < 1e-5
    return [(draw.token, draw.logprob > largest - 0.5, draw.top[0][0]) for draw in draws]


class Doubtful(ChecksumRunner):
    """A draft of the model: after every fourth position it says something else."""

    def run(self, batch: Batch) -> np.ndarray:
        logits = super().run(batch)
        doubtful = batch.table.positions[batch.wanted] % 4 == 3
        return np.where(doubtful[:, None], np.roll(logits, 1, axis=1), logits)


class Rule:
    """A grammar of numbers: no multiple of 5; after one that is 3 modulo 11 come the two numbers after it."""

    finished = False
    allowed = np.array([sum(1 << b for b in range(32) if (32 * w + b) % 5) for w in range(2)], np.uint32)

    def __init__(self) -> None:
        self.last = 0

    def mask(self) -> np.ndarray:
        return self.allowed

    def accept(self, token: int) -> None:
        self.last = token

    def forced(self) -> list[int]:
        return [(self.last + 1) % VOCAB, (self.last + 2) % VOCAB] if self.last % 11 == 3 else []

    def copy(self) -> Rule:
        assert self.last == 0
        return Rule()


def sample(logits: np.ndarray, samplers: list[Any], masks: list[Any]) -> list[Draw]:
    """In place of `engine.sampler.sample`: greedy, 7 * choice further on, the next number that the mask allows."""
    draws = []
    for token, sampler, mask in zip(logits.argmax(1).tolist(), samplers, masks, strict=True):
        token = (token + 7 * sampler.choice) % VOCAB
        while mask is not None and not int(mask[token >> 5]) >> (token & 31) & 1:
            token = (token + 1) % VOCAB
        draws.append(Draw(token, 0.0, ()))
    return draws


def plainly(
    prompt: list[int],
    most: int | None,
    *,
    choice: int = 0,
    stop: frozenset[int] = frozenset(),
    ruled: bool = False,
    capacity: int = CONTEXT,
    salt: int = 0,
    chunk: int = 0,
    pictures: tuple[Shown, ...] = (),
) -> tuple[list[int], str]:
    """What the answer must be, and why it ends."""
    made: list[int] = []
    growing = Hash(chunk)
    for word in words(prompt, salt, pictures):
        value = growing.add(word)
    salt += sum(each.pixels.number for each in pictures if each.pixels.spreads)
    forced: list[int] = []
    while True:
        if forced:
            token = forced.pop(0)
        else:
            token = (likeliest(value) + 7 * choice) % VOCAB
            while ruled and token % 5 == 0:
                token = (token + 1) % VOCAB
            if ruled and token % 11 == 3:
                forced = [(token + 1) % VOCAB, (token + 2) % VOCAB]
        if token in stop:
            return made, "stop"
        made.append(token)
        value = growing.add(token + salt)
        if most is not None and len(made) == most:
            return made, "length"
        if most is None and len(prompt) + len(made) == capacity:
            return made, "context"


class HalfRight:
    """Guesses the truth (of choice 0 without a rule) for a while, then not."""

    def __init__(self, chunk: int = 0) -> None:
        self.random = random.Random(3)
        self.chunk = chunk

    def propose(self, tokens: list[int], most: int) -> list[int]:
        right = plainly(tokens, most, chunk=self.chunk)[0]
        at = self.random.randrange(2 * most)
        return right[:at] + [(token + 1) % VOCAB for token in right[at : at + 1]] + right[at + 1 :]


@dataclass
class Asked:
    """A request under way, as the test knows it."""

    space: tuple[str, int]
    prompt: list[int]
    expected: dict[int, tuple[list[int], str]]
    got: dict[int, list[int]]
    ruled: Future[Rule] | None = None
    deadline: float | None = None
    adapter: str | None = None
    of_prompt: list[tuple[int, bool, int]] | None = None
    """What is still to be told of the prompt's tokens."""
    embedding: list[float] | None = None
    scored: dict[int, list[tuple[int, bool, int]]] | None = None
    pictures: tuple[Shown, ...] = ()
    over: set[int] = field(default_factory=set)

    @property
    def known(self) -> list[int]:
        """The prompt as the prefix cache knows it."""
        return keys(self.prompt, self.pictures)


class Traffic:
    """Random requests on an engine of random size; `step` raises AssertionError for the first thing that is wrong.

    `chunked`: its model has a layer that sees one chunk only, of some size.
    """

    def __init__(self, seed: int, *, check: bool = True, chunked: bool = False) -> None:
        self.random = pick = random.Random(seed)
        self.luck = random.Random(seed)  # pictures have their own, so that the rest of the traffic is as without them
        self.now = 0.0
        page = pick.choice([1, 2, 4, 4, 8])
        self.pages = pick.randint(-(-24 // page), -(-120 // page))
        self.check = check
        small = pick.randint(-(-24 // page), -(-120 // page))
        self.chunk = pick.choice([1, 3, 4, 6, 8, 11, 16]) if chunked else 0
        self.runner = ChecksumRunner(page, self.chunk)
        self.local: int | None = None
        if chunked:
            self.local = pick.randint(self.runner.window, 3 * self.runner.window)
            if pick.random() < 0.1:  # fewer than a window: the context is what they hold
                self.local = -(-24 // page)
        self.draft = DraftModel(Engine(Doubtful(page, self.chunk), pages=small, step_tokens=16))
        self.engine = Engine(
            self.runner,
            pages=self.pages,
            local_pages=self.local,
            step_tokens=pick.choice([1, 3, 8, 24, 64]),
            max_running=pick.randint(1, 7),
            max_waiting=pick.randint(2, 8),
            logits_bytes=4 * VOCAB * pick.choice([1, 3, 20]),
            prefix_cache=pick.random() < 0.85,
            sight_bytes=self.luck.choice([1, 9, 1000]),
            speculate=pick.choice([None, PromptLookup, partial(HalfRight, self.chunk), self.draft]),
            clock=lambda: self.now,
        )
        self.stems = [[pick.randrange(VOCAB) for _ in range(12)] for _ in range(3)]
        self.asked: dict[int, Asked] = {}
        self.texts: dict[tuple[str, int], list[list[int]]] = {}
        self.salts: dict[str, int] = {}
        self.turns: list[tuple[str, list[int], tuple[Shown, ...]]] = []
        self.loads = self.refused = self.kinds = self.shown = 0
        self.busy = pick.choice([0.1, 0.3, 0.6])

    def submit(self) -> None:
        pick, engine = self.random, self.engine
        most = min(engine.capacity, 40)
        stem = pick.choice(self.stems)
        prompt = stem[: pick.randint(1, 12)] + [pick.randrange(VOCAB) for _ in range(pick.choice([0, 0, 1, 3, 10]))]
        prompt = prompt[: most - 2]
        adapter = pick.choice([None, None, *self.salts])
        salt = 0 if adapter is None else self.salts[adapter]
        if pick.random() < 0.2 and (earlier := self.texts.get(("", salt), [])[-4:]):  # the next turn of a chat
            prompt = [*pick.choice(earlier), 5][: most - 2]
            if min(prompt) < 0:  # keys of a picture
                prompt = stem[:5]
        room = most - len(prompt)
        answer = None if most == engine.capacity and pick.random() < 0.2 else pick.randint(1, min(room, 16))
        choices = pick.choice([1, 1, 1, 1, 2, 4])
        stop = frozenset(pick.sample(range(VOCAB), pick.choice([0, 0, 3])))
        ruled = pick.random() < 0.2
        future: Future[Rule] | None = Future() if ruled and pick.random() < 0.5 else None
        deadline = self.now + pick.randint(1, 30) if pick.random() < 0.05 else None
        namespace = pick.choice(["", "", "other"])
        asked = Asked((namespace, salt), prompt, {}, {}, future, deadline, adapter)
        common_to_all: dict[str, Any] = {
            "namespace": namespace, "priority": pick.choice([0, 0, 0, 1, 2]), "deadline": deadline, "adapter": adapter,
        }  # fmt: skip
        kind = pick.random()
        if kind < 0.2:
            self.kinds += 1
            try:
                number = self.other_kind(asked, room, common_to_all)
            except QueueFullError:
                return
            asked.ruled = None
            self.asked[number] = asked
            return
        if kind >= 0.35 and adapter is None and self.luck.random() < 0.25:
            self.show(asked, most - 2)
            prompt = asked.prompt
            answer = None if answer is None else min(answer, most - len(prompt))
        elif kind < 0.35:
            asked.of_prompt = known(prompt, 1, salt, self.chunk)
        try:
            number = engine.submit(
                prompt,
                Sampling(
                    temperature=0, max_tokens=answer, n=choices, prompt_logprobs=None if asked.of_prompt is None else 1
                ),
                stop_ids=stop,
                **common_to_all,
                constraint=future or (Rule() if ruled else None),
                pictures=asked.pictures,
            )
        except QueueFullError:
            return
        except UsageError:
            sizes = {each.digest: each.length for each in asked.pictures}
            assert len(sizes) > 1
            assert sum(sizes.values()) > engine._sights.budget
            return
        self.shown += bool(asked.pictures)
        for choice in range(choices):
            asked.got[choice] = []
            asked.expected[choice] = plainly(
                prompt, answer, choice=choice, stop=stop, ruled=ruled, capacity=engine.capacity, salt=salt,
                chunk=self.chunk,
                pictures=asked.pictures,
            )  # fmt: skip
        self.asked[number] = asked

    def show(self, asked: Asked, most: int) -> None:
        """Have it bring pictures, in an order that others have too; or have it go on where another's answer ended."""
        pick = self.luck
        space = asked.space[0]
        earlier = [each for each in self.turns[-6:] if each[0] == space and len(each[1]) < most]
        if earlier and pick.random() < 0.3:
            _, text, asked.pictures = pick.choice(earlier)
            asked.prompt = [*text, 5]
            return
        prompt = list(asked.prompt)
        made: list[Shown] = []
        album = [(3, 1), (1, 6), (2, 6), (4, 9), (1, 6), (2, 6)][pick.randrange(4) :]
        for number, tokens in album[: pick.choice([1, 1, 2, 3])]:
            spreads = tokens == 1 or pick.random() < 0.2
            at = len(prompt) if made else pick.choice([0, 4, len(prompt)])
            if at > len(prompt) or len(prompt) + tokens + 2 > most:
                break
            pixels = Pixels(1000 * number + 500 * spreads, tokens, spreads)
            prompt[at:at] = [VOCAB + 1] * tokens
            made.append(pixels.shown(at))
            prompt += [pick.randrange(2)] * pick.choice([0, 1])
        asked.prompt, asked.pictures = prompt, tuple(made)

    def other_kind(self, asked: Asked, room: int, options: dict[str, Any]) -> int:
        """Submit something that makes no tokens: given answers, or an embedding."""
        pick, prompt, salt = self.random, asked.prompt, asked.space[1]
        if pick.random() < 0.5:
            pooling: Any = pick.choice(["mean", "last", "cls"])
            asked.got, asked.expected = {0: []}, {0: ([], "length")}
            asked.embedding = embedded(prompt, pooling, salt, self.chunk)
            return self.engine.submit_embedding(prompt, pooling, **options)
        right = plainly(prompt, min(room, 8), salt=salt, chunk=self.chunk)[0]
        given = [
            right[: pick.randrange(len(right))] + [pick.randrange(VOCAB) for _ in range(pick.randint(0, 3))]
            for _ in range(pick.randint(1, 5))
        ]
        given = [each[:room] or [3] for each in given]
        asked.got = {choice: [] for choice in range(len(given))}
        asked.expected = {choice: (each, "length") for choice, each in enumerate(given)}
        asked.scored = {
            choice: known([*prompt, *each], len(prompt), salt, self.chunk) for choice, each in enumerate(given)
        }
        return self.engine.submit_score(prompt, given, **options)

    def adapt(self) -> None:
        """Load an adapter or unload one, where that is possible."""
        pick, engine = self.random, self.engine
        name = pick.choice("ab")
        in_use = any(asked.adapter == name for asked in self.asked.values())
        if name in self.salts:
            try:
                engine.unload_adapter(name)
                assert not in_use, "an adapter in use was unloaded"
                del self.salts[name]
            except AdapterError:
                assert in_use, "an adapter that nobody uses could not be unloaded"
            return
        reserved = engine.statistics().pages_reserved
        pages = pick.randint(1, 5)
        if (self.pages - reserved - pages) * engine._runner.page < 16:
            return
        salt = 1000 * (self.loads + 1)
        try:
            engine.load_adapter(name, {"salt": salt}, pages * 8 - pick.randrange(8))  # type: ignore[dict-item]
        except AdapterError:
            self.refused += 1
            return
        assert engine.statistics().pages_reserved == reserved + pages
        self.salts[name] = salt
        self.loads += 1

    def cancel(self) -> None:
        number = self.random.choice(list(self.asked))
        asked = self.asked[number]
        self.keep(asked)
        self.engine.cancel(number)
        del self.asked[number]

    def keep(self, asked: Asked) -> None:
        self.texts.setdefault(asked.space, []).extend(asked.known + got for got in asked.got.values())
        if asked.pictures and asked.got:
            self.turns.append((asked.space[0], asked.prompt + asked.got[0], asked.pictures))

    def step(self) -> None:
        self.now += 1
        for asked in self.asked.values():
            if asked.ruled is not None and not asked.ruled.done() and self.random.random() < 0.2:
                asked.ruled.set_result(Rule())
        for report in self.engine.step():
            assert report.error is None, report.error.__cause__ or report.error
            asked = self.asked[report.request]
            got, (expected, finish) = asked.got[report.choice], asked.expected[report.choice]
            if report.reused and not got:  # a cache may only have what this namespace said before
                others = (
                    a.known + made
                    for a in self.asked.values()
                    if a is not asked and a.space == asked.space
                    for made in a.got.values()
                )
                said = (*self.texts.get(asked.space, ()), *others)
                assert any(common(asked.known, text) >= report.reused for text in said), "reused what nobody said"
            got += report.tokens
            if asked.of_prompt is not None:
                news = told(report.prompt_logprobs)
                assert news == asked.of_prompt[: len(news)], "the prompt's own tokens"
                del asked.of_prompt[: len(news)]
                assert not got or not asked.of_prompt, "an answer before all of the prompt was told"
            if asked.scored is not None:
                news, due = told(report.logprobs or ()), asked.scored[report.choice]
                assert news == due[: len(news)], "a given answer's tokens"
                del due[: len(news)]
                got += [token for token, _, _ in news]
                assert bool(due) == (report.finish != "length")
            if asked.embedding is not None and report.finish == "length":
                assert report.embedding is not None
                assert report.embedding.tolist() == asked.embedding, "an embedding"
            assert got == expected[: len(got)], (got, expected)
            if report.finish == "deadline":
                assert asked.deadline is not None
                assert asked.deadline <= self.now
                asked.over.add(report.choice)
            elif report.finish is not None:
                assert (got, report.finish) == (expected, finish)
                asked.over.add(report.choice)
            if len(asked.over) == len(asked.expected):
                self.keep(asked)
                self.asked.pop(report.request, None)
        if self.check:
            self.engine.check()
            self.draft.check()

    def run(self, steps: int) -> int:
        """So many steps of traffic, then until all is answered; returns the steps taken."""
        pick, taken = self.random, 0
        while taken < steps or self.asked:
            if taken < steps and pick.random() < self.busy:
                self.submit()
            if self.asked and pick.random() < 0.02:
                self.cancel()
            if taken < steps and pick.random() < 0.03:
                self.adapt()
            self.step()
            taken += 1
            assert taken < steps + 3000, "somebody waits for ever"
        assert self.engine.idle
        for name in list(self.salts):
            self.engine.unload_adapter(name)
        self.engine.check()
        statistics = self.engine.statistics()
        assert (statistics.pages_used, statistics.running, statistics.waiting) == (0, 0, 0)
        assert statistics.pages_free + statistics.pages_cached == self.pages
        assert statistics.local_pages_used == 0
        assert statistics.local_pages_free + statistics.local_pages_cached == (self.local or 0)
        assert self.runner.most_local <= self.runner.window
        return taken


def install(patch: Any) -> None:
    """Have engines draw with the `sample` above, and a guess cost the same on every machine."""
    patch.setattr(turns_module, "sample", sample)
    patch.setattr(StepCost, "share", lambda self, rows: 0.05)
