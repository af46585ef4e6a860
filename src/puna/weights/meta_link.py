"""Models by the signed link that Meta mails: Meta's own checkpoints in Meta's own folder layout.

What it is: what Meta's download.sh and `llama download` do (a link with `*` in it, the asterisk replaced by each file's
path), with resume, MD5 checks against Meta's checklist.chk, and errors that say what happened to the link.
What it is not: the way to request a link; that is https://www.llama.com/llama-downloads.
What is surprising: the server answers 403 for an expired link and for a file that does not exist alike, and refuses
HEAD. So the expiry is read from the link itself (CloudFront's policy, base64 JSON), and sizes are known only when a
file begins to arrive: totals are estimated from the parameter count. The folders changed name over time
(`Meta-Llama-3.1-8B`, later `Llama-3.1-8B`): the catalog lists both and the first that answers is taken. A MODEL's files
come whole or not at all: each arrives as `NAME.part`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from puna.catalog import models as catalog
from puna.errors import HubError, StorageError, UnreachableError
from puna.settings import puna_home
from puna.weights import installed as books
from puna.weights.fetch import Meter, Progress, fetch, free_space, hash_file
from puna.weights.hub import Pulled

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx2

_REQUEST_PAGE = "https://www.llama.com/llama-downloads"
_CHECKLIST = "checklist.chk"
_MAX_CHECKLIST = 1 << 20  # bytes
_LINE = re.compile(r"([0-9a-fA-F]{32})[ \t]+\*?([\w.-]+)")
_SHARD = re.compile(r"consolidated\.\d\d\.pth")


class _NotThere(Exception):  # noqa: N818 - an answer, turned into a HubError by who asked
    """The server refuses a file (403 or 404)."""

    def __init__(self, status: int) -> None:
        super().__init__(str(status))
        self.status = status


class _Md5AndSha256:
    """Both digests in one pass; `hexdigest` gives them joined by a colon."""

    def __init__(self) -> None:
        self._md5, self._sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()

    def update(self, data: bytes, /) -> None:
        self._md5.update(data)
        self._sha256.update(data)

    def hexdigest(self) -> str:
        return f"{self._md5.hexdigest()}:{self._sha256.hexdigest()}"


def pull_meta(
    signed_url: str,
    model: str,
    dest: Path | None = None,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> Pulled:
    """Fetch `params.json`, `tokenizer.model`, `checklist.chk` and every `consolidated.NN.pth` of a model.

    Args:
        signed_url: the link from Meta's mail, with its `*`.
        model: the model's name in the catalog (`llama3.1:8b`).
        dest: the folder for the files; None is `PUNA_HOME/meta/NAME`.
        progress: hears of every chunk. `bytes_total` is an estimate here.

    Raises:
        HubError: the link is not one, has expired or is for another model; a wrong checksum (the file is named, and
            removed so that the next pull fetches it again).
        UnreachableError: no connection, or a server in trouble.
        StorageError: no room, or a folder that cannot be written.
    """
    import httpx2

    entry = catalog.lookup(model)
    if not entry.meta_folders:
        raise HubError(
            f"Where Meta's links keep {entry.short_name} is not known.",
            remedy=f"`puna pull {entry.short_name}` fetches it from the hub ({entry.hub_id}).",
        )
    template = _template(signed_url)
    folder = dest if dest is not None else puna_home() / "meta" / entry.hub_id.split("/")[1].removesuffix("-hf")
    folder = folder.expanduser().absolute()
    shards = [f"consolidated.{shard:02d}.pth" for shard in range(entry.meta_shards)]
    names = ["params.json", "tokenizer.model", *shards]
    # Llama 2's tokenizer lies beside the models' folders, with a checklist of its own.
    apart = entry.generation == "llama2"
    expected = entry.download_bytes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(folder, expected, entry.short_name)
        with httpx2.Client() as client:
            job = _Job(client, template, folder, Meter(expected, len(names) + 1 + apart, progress))
            at = job.find_folder(entry)
            sums = job.checklist(_CHECKLIST)
            listed = sorted(name for name in sums if _SHARD.fullmatch(name))
            if listed != shards:
                raise HubError(
                    f"Meta's checklist for {at} lists {len(listed)} weight files, and {entry.short_name} has "
                    f"{entry.meta_shards}.",
                    remedy="The link may be for another model: ask for one at " + _REQUEST_PAGE + ".",
                )
            tokenizer = f"{at}/tokenizer.model"
            if apart:
                tokenizer = "tokenizer.model"
                job.get("tokenizer_checklist.chk", "tokenizer_checklist.chk", "")
                sums |= job.checklist("tokenizer_checklist.chk")
            books.write_record(job.record(entry.short_name, planned=names))
            for name in names:
                if name not in sums:
                    raise HubError(
                        f"Meta's checklist for {at} has no checksum for {name}.",
                        remedy="Ask for a new link at " + _REQUEST_PAGE + ".",
                    )
                job.get(tokenizer if name == "tokenizer.model" else f"{at}/{name}", name, sums[name])
            record = job.record(entry.short_name)
            books.write_record(record)
    except _NotThere as error:
        raise HubError(
            f"Meta's server refuses a file of {entry.short_name} (it answers {error.status}).",
            remedy="The link may be for another model, or used up: a link allows a few downloads of each file. Ask for "
            f"a new one at {_REQUEST_PAGE}; the next pull continues where this one stopped.",
        ) from error
    except httpx2.HTTPError as error:
        raise UnreachableError(
            f"{entry.short_name} could not be fetched from {urlsplit(template).hostname}: "
            f"{error or type(error).__name__}.",
            remedy="See that the machine is online, and pull again: it continues where it stopped.",
        ) from error
    except OSError as error:
        raise StorageError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}.",
            remedy="Make room, or name another folder, and pull again: it continues where it stopped.",
        ) from error
    return Pulled(
        name=entry.short_name,
        path=folder,
        revision="",
        commit="",
        files=record.files,
        bytes_total=sum(file.size for file in record.files),
        bytes_fetched=job.bytes_fetched,
    )


class _Job:
    """One model's files on their way into a folder."""

    def __init__(self, client: httpx2.Client, template: str, folder: Path, meter: Meter) -> None:
        self.bytes_fetched = 0
        self._client, self._template, self._folder, self._meter = client, template, folder, meter
        self._stop = threading.Event()  # never set: this runs in the caller's thread, where Ctrl-C is an exception
        self._files: list[books.PulledFile] = []

    def find_folder(self, entry: catalog.CatalogEntry) -> str:
        """The folder on the server, found by fetching its checklist."""
        for candidate in entry.meta_folders[:-1]:
            try:
                self.get(f"{candidate}/{_CHECKLIST}", _CHECKLIST, "")
            except _NotThere:
                continue
            return candidate
        self.get(f"{entry.meta_folders[-1]}/{_CHECKLIST}", _CHECKLIST, "")
        return entry.meta_folders[-1]

    def get(self, remote: str, name: str, md5: str) -> None:
        """Have `name` in the folder, checked if its `md5` is known; fetched anew if it is not.

        Raises:
            HubError: its MD5 is another.
            _NotThere: the server refuses it.
        """
        path, part = self._folder / name, self._folder / f"{name}.part"
        here = bool(md5) and path.exists()
        if here:
            found = hash_file(path, _Md5AndSha256(), stop=self._stop, advance=self._advance(name, checking=True))
        else:
            if not md5:
                part.unlink(missing_ok=True)
            held = part.stat().st_size if part.exists() else 0
            found = fetch(
                self._client,
                self._template.replace("*", remote),
                part,
                new_digest=_Md5AndSha256,
                size=None,
                refuse=_refused,
                stop=self._stop,
                advance=self._advance(name),
            )
            self.bytes_fetched += max(part.stat().st_size - held, 0)
        found_md5, _, sha256 = found.partition(":")
        if md5 and found_md5 != md5:
            (path if here else part).unlink()
            raise HubError(
                f"{name} in {self._folder} is damaged: its MD5 is {found_md5}, Meta's checklist says {md5}.",
                remedy="It was removed. Pull again to fetch it anew.",
            )
        if not here:
            os.replace(part, path)
        stat = path.stat()
        self._files.append(books.PulledFile(name, stat.st_size, f"md5:{found_md5}", sha256, stat.st_mtime_ns))
        self._meter.advance(name, 0, finished=True)

    def checklist(self, name: str) -> dict[str, str]:
        """File name to MD5 (lower case), from a checklist that was fetched.

        Raises:
            HubError: it is not a checklist.
        """
        path = self._folder / name
        text = path.read_bytes()[:_MAX_CHECKLIST].decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        found = [_LINE.fullmatch(line) for line in lines]
        if not lines or None in found:
            path.unlink()
            raise HubError(
                f"What Meta's server sent as {name} is not a checklist of MD5 sums.",
                remedy=f"See that the link is whole, or ask for a new one at {_REQUEST_PAGE}.",
            )
        return {match[2]: match[1].lower() for match in found if match is not None}

    def record(self, short_name: str, *, planned: list[str] | None = None) -> books.Record:
        """The record of the finished pull; or of one that still has `planned` files to fetch."""
        to_come = tuple(books.PulledFile(name, 0, "", "", 0) for name in planned or ())
        return books.Record(
            name=short_name,
            source="meta",
            folder=str(self._folder),
            revision="",
            commit="",
            pulled=books.now(),
            complete=planned is None,
            files=(*self._files, *to_come),
        )

    def _advance(self, name: str, *, checking: bool = False) -> Callable[[int], None]:
        return lambda change: self._meter.advance(name, change, checking=checking)


def _template(signed_url: str) -> str:
    """The link, found to be one and not to have expired.

    Raises:
        HubError: it is not, or it has.
    """
    url = signed_url.strip()
    parts = urlsplit(url)
    if parts.scheme not in ("https", "http") or not parts.hostname or parts.path.count("*") != 1 or url.count("*") != 1:
        raise HubError(
            "This is not a link of the kind that Meta mails: those begin with https:// and have one * in their path.",
            remedy="Copy the whole link from the mail and put it in single quotes, or the shell changes its * and &.",
        )
    expires = _expiry(parts.query)
    if expires is not None and expires <= datetime.now(UTC):
        raise HubError(
            f"The link expired on {expires:%Y-%m-%d at %H:%M} UTC.",
            remedy=f"Links last about a day. Ask for a new one at {_REQUEST_PAGE}; the next pull continues where the "
            "last one stopped.",
        )
    return url


def _expiry(query: str) -> datetime | None:
    """When CloudFront stops honouring a signed URL: `DateLessThan` of its policy, or None where it cannot be read.

    The policy is JSON in base64 with `-_~` for `+=/` (Amazon CloudFront developer guide, "Code examples for creating a
    signature for a signed URL").
    """
    fields = parse_qs(query)
    try:
        policy = fields["Policy"][0].replace("-", "+").replace("_", "=").replace("~", "/")
        epoch = json.loads(base64.b64decode(policy, validate=True))["Statement"][0]["Condition"]["DateLessThan"][
            "AWS:EpochTime"
        ]
        return datetime.fromtimestamp(int(epoch), UTC)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, OSError, binascii.Error, RecursionError):
        # Not a policy we can read: the server will judge the link.
        return None


def _make_room(folder: Path, expected: int, name: str) -> None:
    """Raises StorageError if the model will not fit beside what is already there."""
    here = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    free = free_space(folder)
    more = expected - here
    if more > free:
        raise StorageError(
            f"{name} needs about {more / 1e9:.1f} GB more in {folder}, where {free / 1e9:.1f} GB are free.",
            remedy="Make room, or name a folder on a larger disk.",
        )


def _refused(response: httpx2.Response) -> None:
    """Raise what a refusal by Meta's server means."""
    if response.status_code in (403, 404):
        raise _NotThere(response.status_code)
    in_trouble = response.status_code == 429 or response.status_code >= 500
    raise (UnreachableError if in_trouble else HubError)(
        f"Meta's server answers {response.status_code}.",
        remedy="Try again later: the next pull continues where this one stopped.",
    )
