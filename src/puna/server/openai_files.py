"""`/v1/files`: what batches read and write.

What it is: upload, list, look at, read and delete, after https://platform.openai.com/docs/api-reference/files.
What it is not: a place for any file: its purpose is `batch`; nothing else here reads files.
What is surprising: a file's name is only ever told again; contents are rows of the store.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Depends, Query
from fastapi import Request as HttpRequest
from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from puna.server.caller import Caller, needs
from puna.server.openai_parts import RESPONSES
from puna.server.problems import RequestError
from puna.server.service import new_id
from puna.server.store import PIECE_BYTES, File, Store, store_of

router = APIRouter()

MAX_LIST = 100
"""Entries of a list at most, where a client asks for more; the default of a client that says nothing is 20."""


class FileObject(BaseModel):
    """A file, as OpenAI tells of it."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """That a file is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool


def described(file: File) -> FileObject:
    """A file as it is told."""
    return FileObject(
        id=file.id,
        bytes=file.size,
        created_at=file.created,
        expires_at=file.expires,
        filename=file.name,
        purpose="batch_output" if file.purpose == "batch_output" else "batch",
    )


def lifetime(anchor: object, seconds: object, param: str) -> int | None:
    """Seconds after which a file is forgotten, None for never. Raises RequestError for what OpenAI's API refuses too:
    an hour at least, thirty days at most, from when it was made."""
    if anchor is None and seconds is None:
        return None
    text = str(seconds)
    if anchor != "created_at" or not (text.isascii() and text.isdigit() and len(text) < 9):
        raise RequestError(f"{param} needs the anchor created_at and seconds.", code="invalid_value", param=param)
    if not 3600 <= int(text) <= 2592000:
        raise RequestError(f"{param}.seconds must be from 3600 to 2592000.", code="invalid_value", param=param)
    return int(text)


_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                }
            }
        },
    }
}


@router.post("/v1/files", responses=RESPONSES, tags=["OpenAI"], openapi_extra=_FORM)
async def upload(
    http: HttpRequest,
    caller: Annotated[Caller, Depends(needs("batch"))],
    store: Annotated[Store, Depends(store_of)],
) -> FileObject:
    """Upload a file."""
    try:
        async with http.form(max_files=1, max_fields=8) as form:
            return described(await _kept(form, caller, store))
    except HTTPException as error:  # a body that is no form, or one of too many parts
        raise RequestError(f"The form cannot be read: {error.detail}.", code="invalid_value", param="file") from error


async def _kept(form: FormData, caller: Caller, store: Store) -> File:
    known = {"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"}
    if unknown := sorted(set(form) - known):
        name = unknown[0][:200]
        raise RequestError(f"The field {name} is not honoured here.", code="unsupported_parameter", param=name)
    file, purpose = form.get("file"), form.get("purpose")
    if not isinstance(file, UploadFile):
        raise RequestError("file is missing, or is no file.", code="invalid_value", param="file")
    if purpose != "batch":
        raise RequestError(
            f"purpose must be batch, not {purpose!s:.40}.",
            remedy="Files are for /v1/batches here.",
            code="unsupported_parameter",
            param="purpose",
        )
    seconds = lifetime(form.get("expires_after[anchor]"), form.get("expires_after[seconds]"), "expires_after")
    expires = None if seconds is None else int(time.time()) + seconds
    name = (file.filename or "file.jsonl")[:255]

    def keep() -> File:
        return store.add_file(caller.key, name, "batch", new_id("file-"), _read(file.file), expires)

    return await asyncio.to_thread(keep)


def _read(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(PIECE_BYTES):
        yield piece


@router.get("/v1/files", responses=RESPONSES, tags=["OpenAI"])
async def files(
    caller: Annotated[Caller, Depends(needs("batch"))],
    store: Annotated[Store, Depends(store_of)],
    purpose: Annotated[str | None, Query(max_length=40)] = None,
    after: Annotated[str | None, Query(max_length=80)] = None,
    limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
    order: Literal["asc", "desc"] = "desc",
) -> FileList:
    """The files of this key."""
    found = await asyncio.to_thread(
        lambda: store.files(caller.key, purpose=purpose, after=after, limit=limit + 1, newest=order == "desc")
    )
    made = [described(file) for file in found[:limit]]
    return FileList(
        data=made,
        first_id=made[0].id if made else None,
        last_id=made[-1].id if made else None,
        has_more=len(found) > limit,
    )


@router.get("/v1/files/{file_id}", responses=RESPONSES, tags=["OpenAI"])
async def file(
    file_id: str, caller: Annotated[Caller, Depends(needs("batch"))], store: Annotated[Store, Depends(store_of)]
) -> FileObject:
    """What is known of a file."""
    return described(await found(store, caller, file_id))


@router.get(
    "/v1/files/{file_id}/content",
    responses={**RESPONSES, 200: {"content": {"application/octet-stream": {}}, "description": "The content."}},
    response_class=Response,
    tags=["OpenAI"],
)
async def content(
    file_id: str, caller: Annotated[Caller, Depends(needs("batch"))], store: Annotated[Store, Depends(store_of)]
) -> Response:
    """The content of a file."""
    kept = await found(store, caller, file_id)

    async def pieces() -> AsyncGenerator[bytes]:
        number = 0
        while piece := await asyncio.to_thread(store.piece, kept.id, number):
            yield piece
            number += 1

    # Never as a page: what a client uploaded must not run in a browser under this address.
    headers = {"Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff"}
    return StreamingResponse(pieces(), media_type="application/octet-stream", headers=headers)


@router.delete("/v1/files/{file_id}", responses=RESPONSES, tags=["OpenAI"])
async def delete(
    file_id: str, caller: Annotated[Caller, Depends(needs("batch"))], store: Annotated[Store, Depends(store_of)]
) -> FileDeleted:
    """Forget a file."""
    if not await asyncio.to_thread(store.delete_file, caller.key, file_id):
        raise unknown("file", file_id)
    return FileDeleted(id=file_id, deleted=True)


async def found(store: Store, caller: Caller, file_id: str) -> File:
    """A file of this caller's. Raises RequestError 404, for another's too."""
    kept = await asyncio.to_thread(store.file, caller.key, file_id)
    if kept is None:
        raise unknown("file", file_id)
    return kept


def unknown(what: str, number: str) -> RequestError:
    """The error for what is not there, or is another's."""
    return RequestError(f"There is no {what} {number!r:.100}.", status=404, code="not_found", param=f"{what}_id")


def listed(made: list[Any], limit: int) -> dict[str, Any]:
    """A page of a list, of which one more than `limit` was looked up."""
    data = made[:limit]
    ids = [one["id"] for one in data]
    return {
        "object": "list",
        "data": data,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": len(made) > limit,
    }
