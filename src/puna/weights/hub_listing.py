"""What a repository of the hub has, and which of its files Puna fetches.

What it is: `list_files`: a revision to its commit and the files worth fetching, from the hub's answer, which is a
stranger's until checked.
What it is not: the fetching (`hub_job.py`), or the choice among several GGUFs (`hub_gguf.py`).
What is surprising: nothing is fetched that Puna does not read: never pickles (but Meta's own, when they are asked for)
or code, and of two forms of the same weights only one.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from puna import __version__
from puna.errors import HubError, UnreachableError
from puna.weights import hub_gguf
from puna.weights.fetch import git_blob_sha1

if TYPE_CHECKING:
    from puna.weights.fetch import Digest

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# What Puna reads beside the weights. Licences travel with the weights, as Meta's agreements ask.
_LICENCE = re.compile(r"(LICENSE|USE_POLICY|NOTICE)[\w.-]{0,16}", re.ASCII)
_BESIDE = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|tokenizer\.model"
    r"|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)|adapter_config\.json"
    r"|adapter_model\.safetensors|" + _LICENCE.pattern,
    re.ASCII,
)
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors", re.ASCII)  # five digits mostly, R1's Llamas have six
INDEX = "model.safetensors.index.json"
_SAFETENSORS = re.compile(r"[\w][\w.-]*\.safetensors", re.ASCII)
_ORIGINAL = re.compile(r"(original/)?(params\.json|tokenizer\.model|consolidated\.\d\d\.pth|checklist\.chk)", re.ASCII)

_MAX_FILES = 10_000  # entries of a listing; the largest real repository has some hundreds
_API_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub lists it: LFS files have a `sha256`, the others only git's name for them."""

    path: str
    size: int
    sha256: str
    git_sha1: str

    @property
    def blob(self) -> str:
        """Its name in the cache's `blobs` folder, which is the ETag the hub gives it."""
        return self.sha256 or self.git_sha1

    @property
    def checksum(self) -> str:
        return f"sha256:{self.sha256}" if self.sha256 else f"git-sha1:{self.git_sha1}"

    def new_digest(self) -> Digest:
        return hashlib.sha256() if self.sha256 else git_blob_sha1(self.size)


@dataclass(frozen=True, slots=True)
class Listing:
    """What of a repository is to be fetched.

    `gguf` is the GGUF model among the files, if they are one's; `passed_over` are the labels of the others that the
    repository has, where none was named.
    """

    commit: str
    files: list[RemoteFile]
    gguf: hub_gguf.HubGGUF | None = None
    passed_over: tuple[str, ...] = ()


def list_files(hub_id: str, tag: str | None, revision: str, endpoint: str, original: bool) -> Listing:
    """The commit a revision is at, and those of its files that Puna fetches; `tag` names a GGUF among them.

    Raises:
        UnreachableError: the answer is not a hub's.
        HubError: the repository has no weights that Puna reads, or several GGUFs and none was named.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(endpoint=endpoint, library_name="puna", library_version=__version__)

    def tree(folder: str | None, listed: dict[str, RemoteFile], *, recursive: bool = False) -> list[str]:
        """Adds the files of a folder to `listed`; the folders in it."""
        folders = []
        for item in api.list_repo_tree(hub_id, folder, revision=commit, recursive=recursive):
            if hasattr(item, "blob_id"):
                listed[item.path] = _remote_file(item)
            else:
                folders.append(item.path)
            if len(listed) + len(folders) > _MAX_FILES:
                raise ValueError(f"it lists more than {_MAX_FILES} files")
        return folders

    listed: dict[str, RemoteFile] = {}
    try:
        commit = api.model_info(hub_id, revision=revision, timeout=_API_SECONDS).sha
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise ValueError(f"the commit is {commit!r}")
        if original:
            if "original" in tree(None, listed):
                tree("original", listed)
        elif tag is not None or (tree(None, listed) and not any(map(_SAFETENSORS.fullmatch, listed))):
            # GGUFs of many parts lie in folders.
            tree(None, listed, recursive=True)
    except (HfHubHTTPError, HFValidationError):
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnreachableError(
            f"{endpoint} does not answer as a hub does: {error}.",
            remedy="See what HF_ENDPOINT is set to; a proxy's log-in page answers like this too.",
        ) from error
    if tag is not None or (not original and not any(map(_SAFETENSORS.fullmatch, listed))):
        models = hub_gguf.models_of(hub_id, listed)
        if tag is not None or models:
            chosen = hub_gguf.choose(hub_id, models, tag)
            paths = sorted({*chosen.files, *filter(_LICENCE.fullmatch, listed)})
            others = () if tag is not None else tuple(each.label for each in models if each != chosen)
            return Listing(commit, [listed[path] for path in paths], chosen, others)
    return Listing(commit, _wanted(hub_id, listed, original))


def _remote_file(item: Any) -> RemoteFile:
    sha256 = item.lfs.sha256 if item.lfs is not None else ""
    size = item.lfs.size if item.lfs is not None else item.size
    if sha256 and not _SHA256.fullmatch(sha256):
        raise ValueError(f"the checksum of {item.path} is {sha256!r}")
    if not _COMMIT.fullmatch(item.blob_id):
        raise ValueError(f"the blob id of {item.path} is {item.blob_id!r}")
    if type(size) is not int or size < 0:
        raise ValueError(f"the size of {item.path} is {size!r}")
    return RemoteFile(item.path, size, sha256, item.blob_id)


def _wanted(hub_id: str, listed: dict[str, RemoteFile], original: bool) -> list[RemoteFile]:
    """The files to fetch.

    Raises:
        HubError: there are no weights of a kind that Puna fetches; says what there is instead.
    """
    names = {path for path in listed if _BESIDE.fullmatch(path)}
    if original:
        weights = {path for path in listed if _ORIGINAL.fullmatch(path)}
        if any(path.startswith("original/") for path in weights):
            weights = {path for path in weights if path.startswith("original/")}
        if not any(path.endswith(".pth") for path in weights):
            raise HubError(
                f"{hub_id} has none of Meta's original files (consolidated.NN.pth).", remedy="Pull it without them."
            )
    elif "model.safetensors" in listed:
        weights = {"model.safetensors"}
    elif INDEX in listed:
        shards = {path for path in listed if _SHARD.fullmatch(path)}
        # The index itself says how the shards are called, and is not here yet: without the usual names, all of them.
        shards = shards or {path for path in listed if _SAFETENSORS.fullmatch(path)}
        weights = {INDEX, *shards} if shards else set()
    else:
        weights = {path for path in listed if _SAFETENSORS.fullmatch(path)}
    if not weights:
        others = sorted(path for path in listed if path.endswith((".bin", ".pt", ".pth")))
        instead = f"; it has {', '.join(others[:3])}" if others else ""
        remedy = "Pull a repository with safetensors or GGUF"
        if any(_ORIGINAL.fullmatch(path) and path.endswith(".pth") for path in listed):
            remedy += ", or this one's original files"
        raise HubError(f"{hub_id} has no safetensors or GGUF weights{instead}.", remedy=f"{remedy}.")
    return [listed[path] for path in sorted(names | weights)]
