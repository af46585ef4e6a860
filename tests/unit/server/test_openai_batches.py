"""Files and batches through OpenAI's own client, over a socket, and over the end of a process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI
from openai.types import Batch as OpenAIBatch
from openai.types import FileObject

from puna.errors import QueueFullError
from puna.gateway.scripted import ScriptedBackend, encoded
from puna.server import openai_batches, store
from puna.server.app import create_app
from puna.server.openai_batches import MAX_LINES, PRIORITY, checked
from puna.server.problems import RequestError
from puna.server.store import Batch, Store
from puna.types import Event, Request, Usage

CHAT = "/v1/chat/completions"


def line(number: int, url: str = CHAT, **body: Any) -> str:
    body = body or {"messages": [{"role": "user", "content": f"q{number}"}]}
    return json.dumps({"custom_id": f"c{number}", "method": "POST", "url": url, "body": body})


async def echo(request: Request) -> AsyncGenerator[Event]:
    """Says what it was asked."""
    said = bytes(encoded(request.prompt)).decode()
    yield Event(text=said, finish="stop", usage=Usage(1, 0, 1))


def upload(client: OpenAI, *lines: str) -> str:
    return client.files.create(file=("../../etc/passwd", "\n".join(lines).encode()), purpose="batch").id


def finished(client: OpenAI, number: str) -> OpenAIBatch:
    until = time.monotonic() + 60
    while (batch := client.batches.retrieve(number)).status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < until, batch
        time.sleep(0.01)
    return batch


def told(client: OpenAI, file: str | None) -> dict[str, Any]:
    assert file is not None
    lines = [json.loads(one) for one in client.files.content(file).text.splitlines()]
    return {one["custom_id"]: one for one in lines}


def test_files(talk: Any, strictly: Any) -> None:
    client, _ = talk()
    raw = client.files.with_raw_response.create(file=("../../etc/passwd", b"x" * 3_000_000), purpose="batch")
    strictly(FileObject, json.loads(raw.content))
    file = raw.parse()
    assert (file.filename, file.bytes, file.purpose) == ("../../etc/passwd", 3_000_000, "batch")
    assert client.files.content(file.id).content == b"x" * 3_000_000
    assert client.files.retrieve(file.id) == file
    more = [client.files.create(file=b"y", purpose="batch").id for _ in range(3)]
    assert {one.id for one in client.files.list()} == {file.id, *more}
    page = client.files.list(limit=3)
    assert (len(page.data), page.has_more) == (3, True)
    assert len(list(client.files.list(limit=2))) == 4  # page by page
    assert client.files.list(purpose="batch_output").data == []
    assert client.files.delete(file.id).deleted
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(NotFoundError):
            ask(file.id)
    kept = client.files.create(file=b"y", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert kept.expires_at == kept.created_at + 3600


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({"purpose": "fine-tune"}, {"file": b"x"}, "purpose"),
        ({"purpose": "batch"}, {}, "file"),
        ({"purpose": "batch", "file": "x"}, {}, "file"),
        ({"purpose": "batch", "nonsense": "1"}, {"file": b"x"}, "nonsense"),
        (
            {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "5"},
            {"file": b"x"},
            "exp",
        ),
        ({"purpose": "batch"}, {"file": b"x", "other": b"y"}, "file"),
    ],
)
def test_uploads_that_are_refused(talk: Any, fields: dict[str, str], files: dict[str, bytes], param: str) -> None:
    client, _ = talk()
    response = httpx2.post(f"{client.base_url}files", data=fields, files=files or None)
    if not files:  # that is no form with files: the door does not let it in
        assert response.status_code == 415, response.text
        return
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)


def test_what_one_key_may_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_STORED_BYTES", 10)
    kept = Store()
    kept.add_file("a", "n", "batch", "f1", [b"12345", b"678"])
    with pytest.raises(RequestError) as caught:
        kept.add_file("a", "n", "batch", "f2", [b"123"])
    assert (caught.value.status, caught.value.code) == (413, "storage_full")
    assert kept.piece("f2", 0) is None
    with pytest.raises(RequestError):
        kept.add_response("a", "r", 1, {"x": 1})
    kept.add_file("b", "n", "batch", "f3", [b"123"])
    assert kept.file("a", "f3") is None
    assert kept.file("a", "f1") is not None
    kept.close()


def test_files_whose_time_is_over_are_forgotten() -> None:
    kept = Store()
    kept.add_file("a", "n", "batch", "old", [b"1"], int(time.time()) - 1)
    kept.add_file("a", "n", "batch", "new", [b"1"], int(time.time()) + 1000)
    assert kept.file("a", "old") is None
    assert [one.id for one in kept.files("a", purpose=None, after=None, limit=9, newest=True)] == ["new"]
    kept.sweep()
    assert (kept.piece("old", 0), kept.piece("new", 0)) == (None, b"1")
    kept.close()


def test_a_batch_of_chats(talk: Any, strictly: Any) -> None:
    client, backend = talk(echo)
    lines = [line(i) for i in range(40)] + [line(40, messages=[], model="scripted"), line(41, nonsense=1, messages=[])]
    raw = client.batches.with_raw_response.create(
        input_file_id=upload(client, *lines), endpoint=CHAT, completion_window="24h", metadata={"a": "b"}
    )
    strictly(OpenAIBatch, json.loads(raw.content))
    batch = finished(client, raw.parse().id)
    strictly(OpenAIBatch, batch.to_dict(mode="json"))
    assert (batch.status, batch.metadata) == ("completed", {"a": "b"})
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (42, 40, 2)
    done = told(client, batch.output_file_id)
    assert set(done) == {f"c{i}" for i in range(40)}
    for i in range(40):
        answer = done[f"c{i}"]["response"]
        assert answer["status_code"] == 200
        assert answer["body"]["choices"][0]["message"]["content"] == f"user: q{i}\n"
    failed = told(client, batch.error_file_id)
    assert failed["c41"]["response"]["body"]["error"]["param"] == "nonsense"
    assert failed["c40"]["response"]["status_code"] == 400
    assert {request.priority for request in backend.requests} == {PRIORITY}
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
    assert [one.id for one in client.batches.list()] == [batch.id]
    with pytest.raises(APIStatusError, match="completed already"):
        client.batches.cancel(batch.id)


@pytest.mark.parametrize(
    ("url", "body", "got"),
    [
        ("/v1/completions", {"prompt": "x"}, lambda body: body["choices"][0]["text"] == "x"),
        ("/v1/embeddings", {"input": "x"}, lambda body: len(body["data"][0]["embedding"]) == 8),
        ("/v1/responses", {"input": "x"}, lambda body: body["output"][0]["content"][0]["text"] == "user: x\n"),
    ],
)
def test_batches_of_other_endpoints(talk: Any, url: Any, body: dict[str, Any], got: Callable[[Any], bool]) -> None:
    client, _ = talk(echo)
    lines = [line(1, url, **body), line(2, url, **body, stream=True)]
    made = client.batches.create(input_file_id=upload(client, *lines), endpoint=url, completion_window="24h")
    batch = finished(client, made.id)
    assert got(told(client, batch.output_file_id)["c1"]["response"]["body"])
    assert told(client, batch.error_file_id)["c2"]["response"]["body"]["error"]["param"] == "stream"


def test_a_file_with_faults_fails_the_batch(talk: Any, strictly: Any) -> None:
    client, _ = talk()
    faults = ["{", "[]", line(1), line(1), line(2, "/v1/embeddings"), "[" * 100_000]
    made = client.batches.create(input_file_id=upload(client, *faults), endpoint=CHAT, completion_window="24h")
    batch = finished(client, made.id)
    strictly(OpenAIBatch, batch.to_dict(mode="json"))
    assert batch.status == "failed"
    assert [(one.line, one.code) for one in batch.errors.data] == [
        (1, "invalid_json_line"), (2, "invalid_request"), (4, "duplicate_custom_id"), (5, "mismatched_endpoint"),
        (6, "invalid_json_line"),
    ]  # fmt: skip
    empty = client.batches.create(input_file_id=upload(client, ""), endpoint=CHAT, completion_window="24h")
    assert finished(client, empty.id).errors.data[0].code == "empty_file"
    many = checked((line(i).encode() for i in range(MAX_LINES + 1)), CHAT)[1]
    assert [one["code"] for one in many] == ["too_many_tasks"]
    with pytest.raises(NotFoundError):
        client.batches.create(input_file_id="file-none", endpoint=CHAT, completion_window="24h")
    with pytest.raises(BadRequestError):
        client.batches.create(input_file_id="x", endpoint="/v1/audio", completion_window="24h")  # type: ignore[arg-type]
    for ask in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(NotFoundError):
            ask("batch_none")


def test_a_batch_that_is_cancelled_keeps_what_was_answered(talk: Any, eventually: Any) -> None:
    async def script(request: Request) -> AsyncGenerator[Event]:
        if "q0" not in bytes(encoded(request.prompt)).decode():
            await asyncio.Event().wait()
        yield Event(text="yes", finish="stop", usage=Usage(1, 0, 1))

    client, backend = talk(script)
    made = client.batches.create(
        input_file_id=upload(client, *[line(i) for i in range(40)]), endpoint=CHAT, completion_window="24h"
    )
    eventually(lambda: client.batches.retrieve(made.id).request_counts.completed == 1 and backend.running > 1)
    assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
    batch = finished(client, made.id)
    assert (batch.status, batch.error_file_id) == ("cancelled", None)
    assert set(told(client, batch.output_file_id)) == {"c0"}
    assert batch.request_counts.total == 40
    eventually(lambda: backend.running == 0)


def test_a_line_without_room_is_asked_again(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_batches, "FIRST_WAIT", 0.001)
    left = [3]

    async def script(request: Request) -> AsyncGenerator[Event]:
        if left[0]:
            left[0] -= 1
            raise QueueFullError("Full.")
        yield Event(text="yes", finish="stop", usage=Usage(1, 0, 1))

    client, _ = talk(script)
    made = client.batches.create(input_file_id=upload(client, line(1)), endpoint=CHAT, completion_window="24h")
    assert finished(client, made.id).request_counts.completed == 1
    assert left == [0]


def test_a_batch_whose_day_is_over(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(request: Request) -> AsyncGenerator[Event]:
        await asyncio.Event().wait()
        yield Event()

    monkeypatch.setattr(openai_batches, "DAY", 1)
    client, backend = talk(script)
    made = client.batches.create(input_file_id=upload(client, line(1), line(2)), endpoint=CHAT, completion_window="24h")
    batch = finished(client, made.id)
    assert batch.status == "expired"
    assert told(client, batch.error_file_id)["c2"]["error"]["code"] == "batch_expired"
    assert batch.request_counts.failed == 2
    assert backend.running == 0


CHILD = """
import asyncio, sys
from pathlib import Path
import uvicorn
from puna.gateway.scripted import ScriptedBackend, encoded
from puna.server.app import create_app
from puna.types import Event, Usage

state, asked, most = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
begun = 0

async def script(request):
    global begun
    begun += 1
    if begun > most:
        await asyncio.Event().wait()  # in the middle, until the process is killed
    said = bytes(encoded(request.prompt)).decode()
    with asked.open("a") as log:
        log.write(said)
    yield Event(text=said, finish="stop", usage=Usage(1, 0, 1))

server = uvicorn.Server(uvicorn.Config(create_app(ScriptedBackend(script), state=state), port=0, log_level="error"))

async def main():
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await serving

asyncio.run(main())
"""


def child(folder: Path, most: int) -> tuple[subprocess.Popen[str], OpenAI]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder / "state"), str(folder / "asked"), str(most)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    port = process.stdout.readline().strip()
    assert port, "the child did not start"
    return process, OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def test_a_batch_survives_kill_9(tmp_path: Path) -> None:
    process, client = child(tmp_path, 20)
    try:
        file = upload(client, *[line(i) for i in range(50)])
        number = client.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h").id
        until = time.monotonic() + 60
        while client.batches.retrieve(number).request_counts.completed < 20:
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        client.close()
    before = (tmp_path / "asked").read_text().splitlines()
    assert len(before) == 20
    process, client = child(tmp_path, 1000)
    try:
        batch = finished(client, number)
        assert (batch.status, batch.request_counts.completed) == ("completed", 50)
        lines = [json.loads(one) for one in client.files.content(batch.output_file_id).text.splitlines()]
    finally:
        process.terminate()
        process.wait()
        client.close()
    assert sorted(one["custom_id"] for one in lines) == sorted(f"c{i}" for i in range(50))
    asked = (tmp_path / "asked").read_text().splitlines()
    assert sorted(asked) == sorted(f"user: q{i}" for i in range(50))  # none twice


def test_a_batch_that_stopped_anywhere_goes_on(serve: Any, tmp_path: Path) -> None:
    """As if the process had ended in each of its states."""
    kept = Store(tmp_path)
    about = {
        "endpoint": CHAT, "completion_window": "24h", "expires_at": int(time.time()) + 1000, "metadata": {},
        "output_seconds": None,
    }  # fmt: skip
    caller = openai_batches._written(openai_batches.Caller())
    states = ("validating", "in_progress", "finalizing", "cancelling")
    for status in states:
        kept.add_file("", "n", "batch", f"file-{status}", [f"{line(1)}\n{line(2)}".encode()])
        kept.add_batch(Batch(status, "", caller, "validating", 1, {**about, "input_file_id": f"file-{status}"}))
        if status != "validating":
            kept.begin(
                status, [json.dumps({"custom_id": f"c{i}", "body": json.loads(line(i))["body"]}) for i in (1, 2)]
            )
            assert kept.answer(status, 0, "done", json.dumps({"custom_id": "c1", "kept": True}))
            assert not kept.answer(status, 0, "done", "twice")
            if status == "finalizing":
                kept.answer(status, 1, "failed", json.dumps({"custom_id": "c2"}))
            kept.turn(status, status)
    kept.close()
    backend = ScriptedBackend(echo)
    with OpenAI(base_url=f"{serve(create_app(backend, state=tmp_path))}/v1", api_key="x", max_retries=0) as client:
        ends = {status: finished(client, status) for status in states}
        assert [ends[status].status for status in states] == ["completed", "completed", "completed", "cancelled"]
        assert set(told(client, ends["validating"].output_file_id)) == {"c1", "c2"}
        assert told(client, ends["in_progress"].output_file_id)["c1"]["kept"]
        assert set(told(client, ends["finalizing"].error_file_id)) == {"c2"}
        assert set(told(client, ends["cancelling"].output_file_id)) == {"c1"}
    assert len(backend.requests) == 3


def test_the_event_loop_is_not_held_by_the_store(talk: Any) -> None:
    client, _ = talk()
    threads = []
    real = Store.add_file

    def seen(*args: Any, **more: Any) -> Any:
        threads.append(threading.current_thread().name)
        return real(*args, **more)

    Store.add_file = seen  # type: ignore[method-assign]
    try:
        client.files.create(file=b"x", purpose="batch")
    finally:
        Store.add_file = real  # type: ignore[method-assign]
    assert threads
    assert all(name.startswith("asyncio_") for name in threads)
