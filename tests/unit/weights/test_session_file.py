"""Session files: what was written comes back, and nothing else ever does."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import puna
from puna.errors import CheckpointError, UsageError
from puna.weights.checkpoint import open_checkpoint
from puna.weights.embedded import embedded_folder
from puna.weights.session_file import model_identity, open_session, write_session

PAGES = [bytes([i + 200]) * 100 for i in range(7)]
TOKENS = [3 * i % 50 for i in range(31)]
IDENTITY = {"model": "m", "kv_type": "fp16"}


def save(path: Path, pages: list[bytes] = PAGES, tokens: list[int] = TOKENS) -> bytes:
    write_session(path, IDENTITY, tokens, iter(pages), count=len(pages), page=4, page_bytes=100)
    return path.read_bytes()


def loaded(path: Path) -> tuple[tuple[int, ...], list[bytes]]:
    found = open_session(path, 50)
    assert (found.identity, found.page, found.page_bytes) == (IDENTITY, 4, 100)
    return found.tokens, [bytes(page) for page in found.pages()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("session") / "a"
    return path, save(path)


@pytest.mark.parametrize("count", range(8))
def test_what_was_written_comes_back(tmp_path: Path, count: int) -> None:
    save(tmp_path / "a", PAGES[:count])
    assert loaded(tmp_path / "a") == (tuple(TOKENS), PAGES[:count])


def test_pages_begin_at_multiples_of_64(whole: tuple[Path, bytes]) -> None:
    _, data = whole
    assert [data.index(page) % 64 for page in PAGES] == [0] * 7
    assert len(data) == data.index(PAGES[-1]) + 100


def test_an_empty_text(tmp_path: Path) -> None:
    save(tmp_path / "a", [], [])
    assert loaded(tmp_path / "a") == ((), [])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_changed_byte_costs_its_page_or_everything(whole: tuple[Path, bytes], data: st.DataObject) -> None:
    path, good = whole
    at = data.draw(st.integers(0, len(good) - 1))
    value = data.draw(st.integers(1, 255))
    path.write_bytes(good[:at] + bytes([good[at] ^ value]) + good[at + 1 :])
    first = good.index(PAGES[0])
    if at >= first:
        tokens, pages = loaded(path)
        page, place = divmod(at - first, 128)
        # what stands between two pages belongs to neither
        assert (tokens, pages) == (tuple(TOKENS), PAGES[:page] if place < 100 else PAGES)
        return
    if at >= first - len(good[:first]) + len(good[:first].rstrip(b"\0")):
        assert loaded(path) == (tuple(TOKENS), PAGES)  # between head and pages
        return
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        open_session(path, 50)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_cut_file_gives_what_is_whole(whole: tuple[Path, bytes], data: st.DataObject) -> None:
    path, good = whole
    size = data.draw(st.integers(0, len(good) - 1))
    path.write_bytes(good[:size])
    first = good.index(PAGES[0])
    if size < first - 64:
        with pytest.raises(CheckpointError):
            open_session(path, 50)
    elif size >= first:
        assert loaded(path) == (tuple(TOKENS), PAGES[: (size - first + 28) // 128])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused_by_a_typed_error(whole: tuple[Path, bytes], data: bytes) -> None:
    path, _ = whole
    for start in (b"", b"PUNASESS\x01\0\0\0"):
        path.write_bytes(start + data)
        with pytest.raises(CheckpointError, match="a"):
            open_session(path, 50)


def signed(header: bytes, rest: bytes = b"", version: int = 1, length: int | None = None) -> bytes:
    import hashlib

    head = b"PUNASESS" + version.to_bytes(4, "little") + (length or len(header)).to_bytes(4, "little") + header + rest
    return head + hashlib.sha256(head).digest()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (signed(b"{}", version=2), "version 2"),
        (signed(b"{}", length=1 << 31), "longer than a header"),
        (signed(b"[]"), "a JSON object was expected"),
        (signed(b'{"page": 1, "page": 1}'), "stands there twice"),
        (signed(b"{}"), "other keys"),
        (signed(b'{"identity": 3, "page": 1, "page_bytes": 1, "tokens": 0, "pages": 0}'), "identity"),
        (signed(b'{"identity": {"a": 1}, "page": 1, "page_bytes": 1, "tokens": 0, "pages": 0}'), "identity"),
        (signed(b'{"identity": {}, "page": 0, "page_bytes": 1, "tokens": 0, "pages": 0}'), "fit each other"),
        (signed(b'{"identity": {}, "page": 1.0, "page_bytes": 1, "tokens": 0, "pages": 0}'), "do not fit it"),
        (signed(b'{"identity": {}, "page": true, "page_bytes": 1, "tokens": 0, "pages": 0}'), "do not fit it"),
        (signed(b'{"identity": {}, "page": 1, "page_bytes": 1, "tokens": -1, "pages": 0}'), "do not fit it"),
        (signed(b'{"identity": {}, "page": 1, "page_bytes": 1, "tokens": 99999999999, "pages": 0}'), "do not fit it"),
        (signed(b'{"identity": {}, "page": 1, "page_bytes": 9, "tokens": 1, "pages": 2}', bytes(68)), "each other"),
        (signed(b'{"identity": {}, "page": 1, "page_bytes": 9, "tokens": 90, "pages": 0}'), "cut short"),
        (signed(b'{"identity": {}, "page": 1, "page_bytes": 9, "tokens": 1, "pages": 0}', b"\x32\0\0\0"), "vocabulary"),
        (signed(b'{"identity": {}, "page": 1, "page_bytes": 9, "tokens": 1, "pages": 0}', b"\xff" * 4), "vocabulary"),
        (signed(b'{"identity": {}, "page": 1, "page_bytes": 9, "tokens": 0, "pages": 0}') + b"x", "longer than"),
    ],
)
def test_a_head_that_proves_itself_is_still_checked(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(CheckpointError, match=said):
        open_session(tmp_path / "a", 50)


def test_what_is_no_file_or_another_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_session(tmp_path / "none", 50)
    with pytest.raises(CheckpointError, match="no such file"):
        open_session(tmp_path, 50)
    (tmp_path / "mine").write_text("a diary")
    for path in (tmp_path / "mine", tmp_path):
        with pytest.raises(UsageError, match="no saved session"):
            save(path)
    assert (tmp_path / "mine").read_text() == "a diary"


def test_an_older_session_stays_until_the_new_one_is_whole(whole: tuple[Path, bytes], tmp_path: Path) -> None:
    def failing() -> object:
        yield PAGES[0]
        raise KeyboardInterrupt

    old = save(tmp_path / "a", PAGES[:2])
    with pytest.raises(KeyboardInterrupt):
        write_session(tmp_path / "a", IDENTITY, TOKENS, failing(), count=7, page=4, page_bytes=100)  # type: ignore[arg-type]
    assert (tmp_path / "a").read_bytes() == old
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
    save(tmp_path / "a")
    assert loaded(tmp_path / "a")[1] == PAGES


WRITER = """
import sys, time
from pathlib import Path
from puna.weights.session_file import write_session
def pages():
    for i in range(7):
        yield bytes([i]) * 100
        if i == 4:
            print("now", flush=True)
            time.sleep(60)
write_session(Path(sys.argv[1]), {}, list(range(30)), pages(), count=7, page=4, page_bytes=100)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX's")
def test_a_writer_that_is_killed_leaves_nothing_that_is_believed(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(puna.__file__).resolve().parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "a")], stdout=subprocess.PIPE, env=environment
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"now\n"
        writer.kill()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.unfinished")
    assert left.stat().st_size > 400  # it was under way
    with pytest.raises(CheckpointError, match="not a saved session"):
        open_session(left, 50)


def test_pages_are_written_and_read_a_few_at_a_time(tmp_path: Path) -> None:
    """60 pages of 1 MB pass through less than 12."""
    tracemalloc = pytest.importorskip("tracemalloc")
    page = np.random.default_rng(0).bytes(1 << 20)
    tracemalloc.start()
    write_session(
        tmp_path / "a", {}, [0] * 60, (bytes(bytearray(page)) for _ in range(60)), count=60, page=1, page_bytes=1 << 20
    )
    assert sum(bytes(got[:9]) == page[:9] for got in open_session(tmp_path / "a", 1).pages()) == 60
    assert tracemalloc.get_traced_memory()[1] < 12 << 20
    tracemalloc.stop()


def test_models_are_told_apart() -> None:
    checkpoint = open_checkpoint(embedded_folder())
    same = open_checkpoint(embedded_folder())
    known = model_identity(checkpoint, "auto", "")
    assert model_identity(same, "auto", "") == known
    name, tensor = next(item for item in checkpoint.tensors.items() if item[0].endswith("down.weight"))
    stored = tensor.read()

    def changed(at: int) -> str:
        bits = np.array(getattr(stored, "bits", stored)).view(np.uint16).reshape(-1).copy()
        bits[at] ^= 1
        other = replace(tensor, read=lambda: bits)
        return model_identity(replace(checkpoint, tensors={**checkpoint.tensors, name: other}), "auto", "")

    others = {
        changed(0),
        changed(-1),
        model_identity(checkpoint, "fp32", ""),
        model_identity(checkpoint, "auto", "Q8_0"),
    }
    longer = replace(checkpoint.config, context_length=checkpoint.config.context_length * 2)
    other = replace(checkpoint, read_config=replace(checkpoint.read_config, config=longer))
    others.add(model_identity(other, "auto", ""))
    assert len(others | {known}) == 6
    began = time.perf_counter()
    model_identity(checkpoint)
    assert time.perf_counter() - began < 0.5


LONGER = [*PAGES[:5], *(page + b"local" * 3 for page in PAGES[5:])]


def save_longer(path: Path, pages: list[bytes] = LONGER, local_pages: int = 2) -> bytes:
    write_session(
        path, IDENTITY, TOKENS, iter(pages), count=len(pages), page=4, page_bytes=100, local_pages=local_pages,
        local_page_bytes=15,
    )  # fmt: skip
    return path.read_bytes()


def test_the_last_pages_may_be_longer(tmp_path: Path) -> None:
    data = save_longer(tmp_path / "a")
    found = open_session(tmp_path / "a", 50)
    assert (found.page_count, found.local_pages, found.local_page_bytes) == (7, 2, 15)
    assert [bytes(page) for page in found.pages()] == LONGER
    assert [data.index(page) % 64 for page in LONGER] == [0] * 7
    assert len(data) == data.index(LONGER[-1]) + 115
    (tmp_path / "a").write_bytes(data[:-1])
    assert [bytes(page) for page in open_session(tmp_path / "a", 50).pages()] == LONGER[:-1]
    (tmp_path / "a").write_bytes(data + b"x")
    with pytest.raises(CheckpointError, match="longer than its head says"):
        open_session(tmp_path / "a", 50)
    save_longer(tmp_path / "b", [], 0)
    assert list(open_session(tmp_path / "b", 50).pages()) == []


@pytest.mark.parametrize(("old", "new"), [(b'"local_pages": 2', b'"local_pages": 8'), (b'_bytes": 15', b'_bytes": 0 ')])
def test_numbers_of_longer_pages_that_do_not_fit(tmp_path: Path, old: bytes, new: bytes) -> None:
    data = bytearray(save_longer(tmp_path / "a"))
    data[data.index(old) : data.index(old) + len(old)] = new
    head = data.index(PAGES[0]) // 64 * 64
    end = 16 + int.from_bytes(data[12:16], "little") + 4 * len(TOKENS) + 32 * 7
    assert end + 32 <= head
    data[end : end + 32] = hashlib.sha256(data[:end]).digest()
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(CheckpointError, match="do not fit each other"):
        open_session(tmp_path / "a", 50)
