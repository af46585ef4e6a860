"""What can go wrong on the way to a model of the hub, each with its next step.

What it is: one context, `explained`, that turns what huggingface_hub, the connection and the disk raise into a
`HubError`; an `UnreachableError` or a `StorageError` where whoever asked could not have known better.
What it is not: what Puna itself finds wrong (a checksum, a listing); whoever finds that words it.
What is surprising: most of huggingface_hub's errors are an OSError too, so the order of the questions matters.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING

from puna.catalog import models as catalog
from puna.errors import HubError, StorageError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def explained(hub_id: str, revision: str, endpoint: str) -> Iterator[None]:
    """Turn what huggingface_hub, the connection and the disk raise into a `HubError` with the next step."""
    import httpx2
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (OSError, httpx2.HTTPError, HFValidationError) as error:
        raise _explain(error, hub_id, revision, endpoint) from error


def _explain(error: BaseException, hub_id: str, revision: str, endpoint: str) -> HubError:
    """The `HubError` for an error on the way to a model."""
    from huggingface_hub import errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        # huggingface_hub's "not in the cache either"; why it asked the cache at all is the cause.
        return _explain(error.__cause__, hub_id, revision, endpoint)
    entry = catalog.find(hub_id)
    page = entry.licence_page if entry else f"{catalog.HUB_PAGE}/{hub_id}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN to a token from https://huggingface.co/settings/tokens"
    if isinstance(error, errors.GatedRepoError):
        licence = f" under the {entry.licence_name}" if entry else ""
        if get_token():
            return HubError(
                f"{hub_id} is gated{licence}, and the account of your token has no access to it.",
                remedy=f"Accept the licence at {page} with that account and wait until access is granted, then pull "
                "again. A fine-grained token also needs the right to read gated repositories.",
            )
        return HubError(
            f"{hub_id} is gated{licence}: its publisher gives it to those who accept the licence.",
            remedy=f"Accept the licence at {page}, then {log_in}; pull again after that.",
        )
    if isinstance(error, errors.DisabledRepoError):
        return HubError(f"{hub_id} was disabled by the hub.", remedy=f"See {page}.")
    if isinstance(error, errors.RepositoryNotFoundError):
        hidden = "" if get_token() else f" If it is private, {log_in}."
        return HubError(
            f"There is no model {hub_id} on {endpoint}, or it is private.",
            remedy=f"See that the name is right.{hidden}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{hub_id} has no revision {revision!r}.", remedy=f"{page}/tree/main shows its branches and tags."
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return HubError(
            f"A file that {hub_id} lists at {revision} is not there.",
            remedy="The repository may just have changed: pull again.",
        )
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{hub_id!r} is not a hub id: {error}", remedy="A hub id has the form org/name.")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return HubError(
                "The hub does not accept your token.",
                remedy="It may have expired or been revoked: `hf auth login` stores a new one (HF_TOKEN, where it is "
                "set, goes before the stored one).",
            )
        if status == 403:
            return HubError(
                f"The hub forbids access to {hub_id} ({error.server_message or '403'}).",
                remedy=f"See {page}; a fine-grained token needs the right to read this repository.",
            )
        if status == 429:
            return UnreachableError(
                f"{endpoint} asks to wait: too many requests.",
                remedy=f"Pull again in some minutes{'' if get_token() else f', or {log_in}'}.",
            )
        if status >= 500:
            return UnreachableError(
                f"{endpoint} has trouble of its own (it answers {status}).",
                remedy="Pull again later: it continues where it stopped.",
            )
        return HubError(f"{endpoint} refuses {hub_id} (it answers {status}).", remedy=f"See {page}.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UnreachableError(
            f"{hub_id} cannot be pulled: HF_HUB_OFFLINE is set.",
            remedy="Unset it to pull. A model that is already on this machine runs without it.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"The disk is full ({error.filename or 'in the hub cache'}).",
            remedy="Make room, or set HF_HUB_CACHE to a folder on a larger disk, and pull again: "
            "it continues where it stopped.",
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(
            f"{error.filename or 'The hub cache'} cannot be written: {error.strerror}.",
            remedy="See that the folder is yours, or set HF_HUB_CACHE to one that is.",
        )
    return UnreachableError(
        f"{hub_id} could not be fetched from {endpoint}: {error or type(error).__name__}.",
        remedy="See that the machine is online (and what HF_ENDPOINT and the proxy variables are set to), and pull "
        "again: it continues where it stopped.",
    )
