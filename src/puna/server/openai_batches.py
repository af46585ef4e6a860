"""`/v1/batches`: many requests from a file, answered when nobody else wants the model.

What it is: the routes, after https://platform.openai.com/docs/api-reference/batch, and `Worker`, which answers.
What it is not: a queue of its own for the engine: lines are ordinary requests of a low priority.
What is surprising: each line's answer is committed to the store before anything else is done with it, and a line that
has one is never asked again: after a crash, of whatever kind, the work goes on with the lines that have none. A line
that is refused for want of room (429, 503) is asked again, until the batch's day is over.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Query
from fastapi import Request as HttpRequest
from pydantic import ValidationError

from puna.errors import PunaError
from puna.server import bodies, openai_chat, openai_completions, openai_embeddings, openai_responses
from puna.server.bodies import Body, RequestBody
from puna.server.caller import SCOPES, Caller, Scope, needs
from puna.server.openai_files import found, lifetime, listed, unknown
from puna.server.openai_parts import RESPONSES, metadata_checked
from puna.server.problems import RequestError, problem_of, shaped
from puna.server.service import Service, new_id
from puna.server.store import Batch, Line, Store, store_of

LOG = logging.getLogger("puna.server")

router = APIRouter()

PRIORITY = -100
"""Of a line's request: after everybody who waits for an answer."""

AT_ONCE = 16
"""Lines under way at once, of all batches together; and of one batch, those that wait to be asked again included."""

MAX_LINES = 50_000
"""Lines of a batch, as in OpenAI's API."""

DAY = 24 * 3600
"""Seconds that a batch may take."""

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
"""Seconds until a line that found no room is asked again: twice as long each time, up to the second."""

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]

Complete = Callable[[Service, Store, Caller, dict[str, Any]], Awaitable[dict[str, Any]]]


async def _chat(service: Service, store: Store, caller: Caller, body: dict[str, Any]) -> dict[str, Any]:
    made = openai_chat.ChatBody.model_validate(body)
    return await openai_chat.complete(service, caller, made, PRIORITY)


async def _completions(service: Service, store: Store, caller: Caller, body: dict[str, Any]) -> dict[str, Any]:
    made = openai_completions.CompletionBody.model_validate(body)
    return await openai_completions.complete(service, caller, made, PRIORITY)


async def _embeddings(service: Service, store: Store, caller: Caller, body: dict[str, Any]) -> dict[str, Any]:
    made = openai_embeddings.EmbeddingBody.model_validate(body)
    return await openai_embeddings.complete(service, caller, made, PRIORITY)


async def _responses(service: Service, store: Store, caller: Caller, body: dict[str, Any]) -> dict[str, Any]:
    made = openai_responses.ResponseBody.model_validate(body)
    return await openai_responses.complete(service, store, caller, made, PRIORITY)


ENDPOINTS: dict[str, Complete] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completions,
    "/v1/embeddings": _embeddings,
    "/v1/responses": _responses,
}
"""What a line may ask for."""


class ExpiresAfter(Body):
    """When the files of a batch are forgotten."""

    anchor: Literal["created_at"]
    seconds: int


class BatchBody(RequestBody):
    """A batch to be."""

    input_file_id: str
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


def described(batch: Batch, counts: dict[str, int]) -> dict[str, Any]:
    """A batch as it is told."""
    about = dict(batch.about)
    about.pop("output_seconds", None)
    told = about.pop("counts", None) or counts
    done, failed = told.get("done", 0), told.get("failed", 0)
    total = done + failed + told.get("waiting", 0)
    return {
        "id": batch.id,
        "object": "batch",
        "status": batch.status,
        "created_at": batch.created,
        **about,
        "request_counts": {"total": total, "completed": done, "failed": failed},
    }


@router.post("/v1/batches", responses=RESPONSES, tags=["OpenAI"])
async def create(
    body: BatchBody,
    http: HttpRequest,
    caller: Annotated[Caller, Depends(needs("batch"))],
    store: Annotated[Store, Depends(store_of)],
) -> dict[str, Any]:
    """Begin a batch."""
    if "infer" not in caller.scopes:
        needs("infer")(http)
    expiry = body.output_expires_after
    seconds = None if expiry is None else lifetime(expiry.anchor, expiry.seconds, "output_expires_after")
    await found(store, caller, body.input_file_id)
    now = int(time.time())
    about = {
        "endpoint": body.endpoint,
        "input_file_id": body.input_file_id,
        "completion_window": body.completion_window,
        "expires_at": now + DAY,
        "metadata": metadata_checked(body.metadata),
        "output_seconds": seconds,
    }
    batch = Batch(new_id("batch_"), caller.key, _written(caller), "validating", now, about)
    await asyncio.to_thread(store.add_batch, batch)
    worker: Worker = http.app.state.worker
    worker.look()
    return described(batch, {})


@router.get("/v1/batches", responses=RESPONSES, tags=["OpenAI"])
async def batches(
    caller: Annotated[Caller, Depends(needs("batch"))],
    store: Annotated[Store, Depends(store_of)],
    after: Annotated[str | None, Query(max_length=80)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """The batches of this key, the newest first."""
    some = await asyncio.to_thread(lambda: store.batches(caller.key, after=after, limit=limit + 1))
    return listed([described(batch, await asyncio.to_thread(store.counts, batch.id)) for batch in some], limit)


@router.get("/v1/batches/{batch_id}", responses=RESPONSES, tags=["OpenAI"])
async def batch(
    batch_id: str, caller: Annotated[Caller, Depends(needs("batch"))], store: Annotated[Store, Depends(store_of)]
) -> dict[str, Any]:
    """How a batch stands."""
    one = await asyncio.to_thread(store.batch, batch_id, caller.key)
    if one is None:
        raise unknown("batch", batch_id)
    return described(one, await asyncio.to_thread(store.counts, batch_id))


@router.post("/v1/batches/{batch_id}/cancel", responses=RESPONSES, tags=["OpenAI"])
async def cancel(
    batch_id: str,
    http: HttpRequest,
    caller: Annotated[Caller, Depends(needs("batch"))],
    store: Annotated[Store, Depends(store_of)],
) -> dict[str, Any]:
    """End a batch; what is answered already can be read."""
    if await asyncio.to_thread(store.batch, batch_id, caller.key) is None:
        raise unknown("batch", batch_id)
    now = int(time.time())
    one = await asyncio.to_thread(
        lambda: store.turn(batch_id, "cancelling", ("validating", "in_progress"), cancelling_at=now)
    )
    if one.status not in ("cancelling", "cancelled"):
        raise RequestError(f"The batch is {one.status} already.", status=409, code="invalid_state", param="batch_id")
    worker: Worker = http.app.state.worker
    worker.look()
    return described(one, await asyncio.to_thread(store.counts, batch_id))


def _written(caller: Caller) -> dict[str, Any]:
    return {
        "key": caller.key,
        "name": caller.name,
        "scopes": sorted(caller.scopes),
        "models": None if caller.models is None else sorted(caller.models),
        "namespace": caller.namespace,
        "priority": caller.priority,
    }


def _caller(told: dict[str, Any]) -> Caller:
    models = told["models"]
    return Caller(
        told["key"],
        told["name"],
        frozenset(cast("Scope", scope) for scope in told["scopes"] if scope in SCOPES),
        None if models is None else frozenset(models),
        told["namespace"],
        told["priority"],
    )


class Worker:
    """Answers batches, those that an earlier process left too."""

    def __init__(self, service: Service, store: Store) -> None:
        self._service, self._store = service, store
        self._news = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)  # fair: each batch gets its turn

    def look(self) -> None:
        """There may be something to do."""
        self._news.set()

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            while True:
                self._news.clear()
                await asyncio.to_thread(self._store.sweep)
                for batch in await asyncio.to_thread(self._store.unfinished):
                    task = self._tasks.get(batch.id)
                    if batch.status == "cancelling":
                        if task is not None:
                            task.cancel()
                            await asyncio.wait([task])
                        await self._end(batch, "cancelled")
                    elif task is None:
                        self._tasks[batch.id] = task = asyncio.create_task(self._whole(batch))
                        task.add_done_callback(partial(self._forget, batch.id))
                await self._wait()
        finally:
            every = list(self._tasks.values())
            for task in every:
                task.cancel()
            await asyncio.gather(*every, return_exceptions=True)

    def _forget(self, number: str, _: asyncio.Task[None]) -> None:
        self._tasks.pop(number, None)

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._news.wait(), 60)
        except TimeoutError:
            return  # files whose time is over are looked for now and then

    async def _whole(self, batch: Batch) -> None:
        """One batch to its end, unless this is cancelled."""
        try:
            if batch.status == "validating" and not await self._validate(batch):
                return
            over = batch.status == "finalizing" or await self._answer(batch)
            await self._end(batch, "completed" if over else "expired")
        except Exception:
            LOG.exception("batch %s failed", batch.id)
            await asyncio.to_thread(lambda: self._store.turn(batch.id, "failed", failed_at=int(time.time())))

    async def _validate(self, batch: Batch) -> bool:
        """Look through the file and keep its lines; False where something is wrong with it."""

        def look_through() -> list[dict[str, Any]]:
            lines, errors = checked(file_lines(self._store, batch.about["input_file_id"]), batch.about["endpoint"])
            now = int(time.time())
            if errors:
                told = {"object": "list", "data": errors}
                self._store.turn(batch.id, "failed", ("validating",), failed_at=now, errors=told)
            else:
                self._store.begin(batch.id, lines, in_progress_at=now)
            return errors

        return not await asyncio.to_thread(look_through)

    async def _answer(self, batch: Batch) -> bool:
        """Answer the lines that have no answer; False where the batch's time is over before that."""
        try:
            async with asyncio.timeout(batch.about["expires_at"] - time.time()), asyncio.TaskGroup() as group:
                last, few = -1, asyncio.Semaphore(AT_ONCE)
                while lines := await asyncio.to_thread(self._store.waiting, batch.id, last, 4 * AT_ONCE):
                    for line in lines:
                        await few.acquire()
                        task = group.create_task(self._line(batch, line))
                        task.add_done_callback(lambda _: few.release())
                    last = lines[-1].number
        except TimeoutError:
            return False
        return True

    async def _line(self, batch: Batch, line: Line) -> None:
        request, number, wait = json.loads(line.request), new_id("req_"), FIRST_WAIT
        while True:
            try:
                if request["body"].get("stream"):
                    raise RequestError(
                        "stream is not honoured in a batch.", code="unsupported_parameter", param="stream"
                    )
                complete = ENDPOINTS[batch.about["endpoint"]]
                async with self._slots:  # not while it waits: a key without tokens would keep all others from theirs
                    body = await complete(self._service, self._store, _caller(batch.caller), request["body"])
                status = 200
                break
            except Exception as error:
                if isinstance(error, ValidationError):
                    error = bodies.refusal(error.errors())
                problem = problem_of(error, number)
                if problem.status in (429, 503):
                    await asyncio.sleep(wait)
                    wait = min(2 * wait, LONGEST_WAIT)
                    continue
                if not isinstance(error, PunaError):
                    LOG.error("request %s of batch %s failed", number, batch.id, exc_info=error)
                status, body = problem.status, shaped(problem, "openai")
                break
        answer = {
            "id": new_id("batch_req_"),
            "custom_id": request["custom_id"],
            "response": {"status_code": status, "request_id": number, "body": body},
            "error": None,
        }
        state = "done" if status == 200 else "failed"
        await asyncio.to_thread(self._store.answer, batch.id, line.number, state, json.dumps(answer))

    async def _end(self, batch: Batch, status: Literal["completed", "expired", "cancelled"]) -> None:
        def end() -> None:
            now = int(time.time())
            if status == "completed":
                self._store.turn(batch.id, "finalizing", ("in_progress",), finalizing_at=now)
            if status == "expired":
                self._store.give_up(batch.id, _expired)
            seconds = batch.about["output_seconds"]
            files = {"done": ("output_file_id", new_id("file-")), "failed": ("error_file_id", new_id("file-"))}
            expires = None if seconds is None else now + seconds
            self._store.finish(batch.id, status, files, expires, **{f"{status}_at": now})

        await asyncio.to_thread(end)


def _expired(request: str) -> str:
    error = {"code": "batch_expired", "message": "The batch's time was over before this was answered."}
    told = {"id": new_id("batch_req_"), "custom_id": json.loads(request)["custom_id"], "response": None, "error": error}
    return json.dumps(told)


def file_lines(store: Store, file: str) -> Iterator[bytes]:
    """The lines of a file that are not empty."""
    held, number = b"", 0
    while piece := store.piece(file, number):
        *lines, held = (held + piece).split(b"\n")
        yield from (line for line in lines if line.strip())
        number += 1
    if held.strip():
        yield held


MOST_ERRORS = 100
"""Faults of a file that are told."""


def checked(lines: Iterator[bytes], endpoint: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The requests of a file as JSON, and what is wrong with it, as OpenAI tells it."""
    made: list[str] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()

    def wrong(number: int | None, code: str, message: str, param: str | None = None) -> None:
        errors.append({"code": code, "line": number, "message": message, "param": param})

    for number, line in enumerate(lines, 1):
        if number > MAX_LINES:
            wrong(None, "too_many_tasks", f"A batch has at most {MAX_LINES} lines.")
        if len(errors) >= MOST_ERRORS or number > MAX_LINES:
            break
        try:
            told = json.loads(line)
        except (ValueError, RecursionError):
            wrong(number, "invalid_json_line", "This line is not valid JSON.")
            continue
        if not isinstance(told, dict) or set(told) != {"custom_id", "method", "url", "body"}:
            wrong(number, "invalid_request", "A line is an object of custom_id, method, url and body.")
            continue
        name = told["custom_id"]
        if not isinstance(name, str) or not 1 <= len(name) <= 512:
            wrong(number, "invalid_custom_id", "custom_id is a text of 1 to 512 characters.", "custom_id")
        elif name in seen:
            wrong(number, "duplicate_custom_id", "The custom_id of this line was used before.", "custom_id")
        elif told["method"] != "POST":
            wrong(number, "invalid_method", "method must be POST.", "method")
        elif told["url"] != endpoint:
            wrong(number, "mismatched_endpoint", f"url must be {endpoint}, the batch's endpoint.", "url")
        elif not isinstance(told["body"], dict):
            wrong(number, "invalid_request", "body is not an object.", "body")
        else:
            seen.add(name)
            made.append(json.dumps({"custom_id": name, "body": told["body"]}))
    if not made and not errors:
        wrong(None, "empty_file", "The file has no lines.")
    return made, errors
