"""Pulling from a hub: the real huggingface_hub client against a hub on the loopback interface."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hub_server import COMMIT, LATER_COMMIT, FakeHub, Repository, git_sha1
from huggingface_hub import constants, hf_hub_download

from puna.errors import HubError, StorageError, UnreachableError
from puna.weights import fetch as fetch_module
from puna.weights import hub_job, hub_listing
from puna.weights.fetch import Progress
from puna.weights.hub import pull, remove, resolve
from puna.weights.installed import installed, read_record

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "herd/tiny"
GATED = "meta-llama/Llama-3.2-1B-Instruct"
WEIGHTS = bytes(range(256)) * 12_000  # 3 MB: three chunks
SHARDS = {"model-00001-of-00002.safetensors": WEIGHTS[:700_000], "model-00002-of-00002.safetensors": WEIGHTS[700_000:]}
INDEX = json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode()
CONFIG = b'{"model_type": "llama"}'
BESIDE = {
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces",
    "tokenizer_config.json": b'{"a": 1}',
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE.txt": b"terms",
}
UNWANTED = {
    "pytorch_model.bin": b"a pickle",
    "modeling_tiny.py": b"import os",
    "README.md": b"# tiny",
    ".gitattributes": b"",
    "model.fp16.safetensors": b"other",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"meta weights",
    "original/tokenizer.model": b"meta pieces",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one model, an empty cache and an empty PUNA_HOME; nothing leads to the real hub or a real token."""
    server = FakeHub()
    server.repositories[NAME] = Repository({**BESIDE, **UNWANTED, "model.safetensors": WEIGHTS})
    monkeypatch.setenv("PUNA_HOME", str(tmp_path / "home"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(fetch_module, "RETRY_SECONDS", 0.0)
    yield server
    server.close()


def blob_part(hub: FakeHub, path: str, content: bytes) -> Path:
    """Where the half of a file lies."""
    return Path(constants.HF_HUB_CACHE) / "models--herd--tiny/blobs" / f"{_blob(path, content)}.incomplete"


def on_disk() -> int:
    """Bytes in the model's blobs, whole or not: which small files an interrupted pull still got is a matter of luck."""
    return sum(path.stat().st_size for path in (Path(constants.HF_HUB_CACHE) / "models--herd--tiny/blobs").iterdir())


def _blob(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith("s") else git_sha1(content)


def test_pull_fetches_what_puna_reads_and_nothing_else(hub: FakeHub) -> None:
    heard: list[Progress] = []
    done = pull(NAME, progress=heard.append)
    wanted = {**BESIDE, "model.safetensors": WEIGHTS}
    assert {path.name: path.read_bytes() for path in done.folder.iterdir()} == wanted
    assert (done.name, done.revision, done.commit) == (NAME, "main", COMMIT)
    total = sum(map(len, wanted.values()))
    assert (done.bytes_total, done.bytes_fetched) == (total, total)
    assert (heard[-1].bytes_done, heard[-1].bytes_total) == (total, total)
    assert (heard[-1].files_done, heard[-1].files_total) == (len(wanted), len(wanted))
    assert [p.bytes_done for p in heard] == sorted(p.bytes_done for p in heard)
    assert not any(request.path.endswith((".bin", ".py")) for request in hub.requests)


def test_pull_is_recorded(hub: FakeHub) -> None:
    done = pull(NAME)
    record = read_record(NAME)
    assert record is not None
    assert (record.complete, record.commit, record.revision, record.commits) == (True, COMMIT, "main", (COMMIT,))
    files = {file.path: file for file in record.files}
    assert files["model.safetensors"].sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert files["config.json"].sha256 == hashlib.sha256(CONFIG).hexdigest()
    assert files["config.json"].checksum == f"git-sha1:{git_sha1(CONFIG)}"
    assert files["model.safetensors"].size == len(WEIGHTS)
    row = [row for row in installed() if row.source == "hub"]
    assert [(r.name, r.commit, r.complete, r.size_bytes, r.folder) for r in row] == [
        (NAME, COMMIT, True, done.bytes_total, done.folder)
    ]
    assert row[0].pulled is not None


def test_files_lie_in_the_hubs_cache_for_other_programs(hub: FakeHub) -> None:
    done = pull(NAME)
    for path in ("config.json", "model.safetensors"):
        assert hf_hub_download(NAME, path, local_files_only=True) == str(done.folder / path)


def test_second_pull_fetches_and_hashes_nothing(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    pull(NAME)
    hub.requests.clear()
    monkeypatch.setattr(hub_job, "hash_file", lambda *a, **k: pytest.fail("hashed again"))
    done = pull(NAME)
    assert done.bytes_fetched == 0
    assert all(request.path.startswith("/api/") for request in hub.requests)


def test_what_another_program_cached_is_checked_and_not_fetched(hub: FakeHub) -> None:
    hf_hub_download(NAME, "model.safetensors", endpoint=hub.url)
    hub.requests.clear()
    heard: list[Progress] = []
    done = pull(NAME, progress=heard.append)
    assert done.bytes_fetched == sum(map(len, BESIDE.values()))
    assert not hub.contents("model.safetensors")
    assert any(step.checking and step.file == "model.safetensors" for step in heard)
    assert heard[-1].bytes_done == done.bytes_total


def test_sharded_model_comes_with_its_index(hub: FakeHub) -> None:
    hub.repositories[NAME] = Repository({**BESIDE, **UNWANTED, "model.safetensors.index.json": INDEX, **SHARDS})
    done = pull(NAME)
    assert {file.path for file in done.files} == {*BESIDE, *SHARDS, "model.safetensors.index.json"}


def test_shards_by_other_names(hub: FakeHub) -> None:
    for names in (("model-00001-of-000002", "model-00002-of-000002"), ("part-a", "part-b")):
        shards = {f"{name}.safetensors": content for name, content in zip(names, SHARDS.values(), strict=True)}
        hub.repositories[NAME] = Repository({**BESIDE, "model.safetensors.index.json": INDEX, **shards})
        assert shards.keys() < {file.path for file in pull(NAME).files}
    hub.repositories[NAME] = Repository({**BESIDE, "model.safetensors.index.json": INDEX})
    with pytest.raises(HubError, match="no safetensors or GGUF weights"):
        pull(NAME)


def test_original_files_on_request(hub: FakeHub) -> None:
    done = pull(NAME, original=True)
    assert done.folder.name == "original"
    assert sorted(path.name for path in done.folder.iterdir()) == [
        "consolidated.00.pth",
        "params.json",
        "tokenizer.model",
    ]
    assert resolve(NAME) == done.folder
    assert not hub.contents("model.safetensors")


@pytest.mark.parametrize(
    ("files", "original", "message"),
    [
        ({"config.json": CONFIG, "pytorch_model.bin": b"p"}, False, "GGUF weights; it has pytorch_model.bin"),
        ({"config.json": CONFIG}, False, "no safetensors or GGUF weights."),
        ({"model.safetensors": b"w"}, True, "none of Meta's original files"),
    ],
)
def test_repository_without_the_weights_asked_for(
    hub: FakeHub, files: dict[str, bytes], original: bool, message: str
) -> None:
    hub.repositories[NAME] = Repository(files)
    with pytest.raises(HubError, match=message):
        pull(NAME, original=original)
    assert not hub.contents("pytorch_model.bin")


def test_connection_cut_once_is_resumed_within_the_pull(hub: FakeHub) -> None:
    hub.cut["model.safetensors"] = [1_500_000]
    done = pull(NAME)
    assert (done.folder / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [r.range for r in hub.contents("model.safetensors") if r.host == "localhost"]
    assert ranges[0] == ""
    assert ranges[1].startswith("bytes=1")
    assert done.bytes_fetched == done.bytes_total


def test_pull_that_failed_continues_where_it_stopped(hub: FakeHub) -> None:
    # After the first 1.5 MB the line is dead: every further connection ends before a byte.
    hub.cut["model.safetensors"] = [1_500_000, *[0] * fetch_module.RETRIES]
    with pytest.raises(HubError, match=r"could not be fetched|ended the file early") as caught:
        pull(NAME)
    assert "continues where it stopped" in caught.value.remedy
    part = blob_part(hub, "model.safetensors", WEIGHTS)
    held = part.stat().st_size
    assert 0 < held <= 1_500_000
    assert [row.complete for row in installed() if row.source == "hub"] == [False]
    with pytest.raises(HubError, match="not finished"):
        resolve(NAME)
    hub.requests.clear()
    here = on_disk()
    done = pull(NAME)
    assert (done.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert [r.range for r in hub.contents("model.safetensors")] == [f"bytes={held}-"] * 2  # the hub, then its CDN
    assert done.bytes_fetched == done.bytes_total - here
    assert not part.exists()


def _python(code: str, hub: FakeHub, tmp_path: Path, **env: str) -> list[str]:
    """A Python command, and sets the environment that a person would set."""
    values = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PUNA_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(sys.path),
        **env,
    }
    return [sys.executable, "-c", f"import os; os.environ.update({values!r})\n{code}"]


def test_environment_leads_to_the_hub_and_its_cache(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories[NAME].gated = True
    code = f"from puna.weights.hub import pull; print(pull({NAME!r}).folder)"
    ran = subprocess.run(
        _python(code, hub, tmp_path, HF_TOKEN="hf_right"), capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    folder = tmp_path / "hf/hub/models--herd--tiny/snapshots" / COMMIT
    assert ran.stdout.strip() == str(folder)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_killed_process_continues_where_it_stopped(hub: FakeHub, tmp_path: Path) -> None:
    hub.slow = threading.Event()
    hub.cut["model.safetensors"] = [2_000_000]
    code = f"from puna.weights.hub import pull; pull({NAME!r})"
    process = subprocess.Popen(_python(code, hub, tmp_path, HF_HUB_CACHE=constants.HF_HUB_CACHE))
    part = blob_part(hub, "model.safetensors", WEIGHTS)
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    hub.slow.set()
    held = part.stat().st_size
    assert 0 < held <= 2_000_000
    hub.requests.clear()
    done = pull(NAME)
    assert (done.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.contents("model.safetensors")[0].range == f"bytes={held}-"


def test_interrupt_stops_the_threads_and_keeps_the_part(hub: FakeHub) -> None:
    def interrupt(step: Progress) -> None:
        if step.file == "model.safetensors" and step.bytes_done > 1_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(NAME, progress=interrupt)
    assert blob_part(hub, "model.safetensors", WEIGHTS).stat().st_size > 0
    assert pull(NAME).bytes_fetched < len(WEIGHTS)


def test_one_file_that_fails_stops_the_others(hub: FakeHub) -> None:
    first, second = SHARDS
    hub.repositories[NAME] = Repository({"config.json": CONFIG, "model.safetensors.index.json": INDEX, **SHARDS})
    hub.statuses[first] = [404]
    hub.pace[second] = 0.05  # half a second for the whole file
    with pytest.raises(HubError, match="answers 404"):
        pull(NAME)
    part = blob_part(hub, second, SHARDS[second])
    assert not part.exists() or part.stat().st_size < len(SHARDS[second])
    assert not part.with_suffix("").exists()


def test_server_that_ignores_ranges(hub: FakeHub) -> None:
    hub.whole.add("model.safetensors")
    hub.cut["model.safetensors"] = [1_500_000]
    heard: list[Progress] = []
    done = pull(NAME, progress=heard.append)
    assert (done.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert heard[-1].bytes_done == done.bytes_total


def test_part_that_the_server_has_no_range_for_is_begun_again(hub: FakeHub) -> None:
    """416: the file on the server is shorter than what the listing says; nothing is made of it."""
    part = blob_part(hub, "model.safetensors", WEIGHTS)
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 2_000_000)
    hub.wrong["model.safetensors"] = WEIGHTS[:1_000_000]
    with pytest.raises(UnreachableError, match="could not be fetched whole"):
        pull(NAME)
    assert [r.range for r in hub.contents("model.safetensors") if r.host == "localhost"][:2] == ["bytes=2000000-", ""]
    hub.wrong.clear()
    assert (pull(NAME).folder / "model.safetensors").read_bytes() == WEIGHTS


def test_part_longer_than_the_file_is_begun_again(hub: FakeHub) -> None:
    part = blob_part(hub, "model.safetensors", WEIGHTS)
    part.parent.mkdir(parents=True)
    part.write_bytes(WEIGHTS + b"more")
    done = pull(NAME)
    assert (done.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert done.bytes_fetched == done.bytes_total


def test_part_of_another_file_is_refused_and_removed(hub: FakeHub) -> None:
    part = blob_part(hub, "model.safetensors", WEIGHTS)
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)
    with pytest.raises(HubError, match=r"model\.safetensors of herd/tiny is damaged"):
        pull(NAME)
    assert not part.exists()
    assert (pull(NAME).folder / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_wrong_bytes_never_reach_the_cache(hub: FakeHub, path: str) -> None:
    content = hub.repositories[NAME].files[path]
    hub.wrong[path] = content[:-1] + b"!"
    with pytest.raises(HubError, match=f"{path} of herd/tiny is damaged") as caught:
        pull(NAME)
    assert "Pull again" in caught.value.remedy
    blobs = Path(constants.HF_HUB_CACHE) / "models--herd--tiny/blobs"
    assert not list(blobs.glob(f"{_blob(path, content)}*"))
    hub.wrong.clear()
    assert (pull(NAME).folder / path).read_bytes() == content


def test_more_bytes_than_listed_are_not_taken(hub: FakeHub) -> None:
    hub.wrong["model.safetensors"] = WEIGHTS + b"x" * 5_000_000
    with pytest.raises(UnreachableError, match="more than the 3072000 bytes"):
        pull(NAME)
    assert blob_part(hub, "model.safetensors", WEIGHTS).stat().st_size <= len(WEIGHTS)


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_file_damaged_on_disk_is_named_and_removed(hub: FakeHub, path: str) -> None:
    folder = pull(NAME).folder
    content = (folder / path).read_bytes()
    (folder / path).resolve().write_bytes(content[:-1] + b"!")
    with pytest.raises(HubError, match=f"{path} of herd/tiny is damaged"):
        pull(NAME)
    assert not (folder / path).exists()
    with pytest.raises(HubError, match="puna pull herd/tiny"):
        resolve(NAME)
    assert pull(NAME).bytes_fetched == len(content)
    assert (folder / path).read_bytes() == content


def test_damaged_blob_in_a_store_that_repositories_share(hub: FakeHub, tmp_path: Path) -> None:
    """huggingface_hub may link a blob to a store outside the repository: the link goes, the store is not ours."""
    blob = (pull(NAME).folder / "model.safetensors").resolve()
    store = tmp_path / "store"
    store.write_bytes(WEIGHTS[:-1] + b"!")
    blob.unlink()
    blob.symlink_to(store)
    with pytest.raises(HubError, match="is damaged"):
        pull(NAME)
    assert store.exists()
    assert (pull(NAME).folder / "model.safetensors").read_bytes() == WEIGHTS


def test_token_goes_to_the_hub_and_not_to_its_cdn(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    hub.repositories[NAME].gated = True
    pull(NAME)
    seen = {(request.host, request.authorization) for request in hub.requests}
    assert seen == {("127.0.0.1", "Bearer hf_right"), ("localhost", "")}


def test_gated_without_token(hub: FakeHub) -> None:
    hub.repositories[GATED] = Repository({**BESIDE, "model.safetensors": WEIGHTS}, gated=True)
    with pytest.raises(HubError, match=r"gated under the Llama 3\.2 Community License Agreement") as caught:
        pull("llama3.2:1b")
    remedy = caught.value.remedy
    assert f"https://huggingface.co/{GATED}" in remedy
    assert "hf auth login" in remedy
    assert "HF_TOKEN" in remedy
    assert caught.value.exit_code == 2
    assert read_record(GATED) is None  # nothing came, so there is nothing to list


def test_gated_with_a_token_that_was_not_granted_access(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    hub.granted = False
    hub.repositories[GATED] = Repository({**BESIDE, "model.safetensors": WEIGHTS}, gated=True)
    with pytest.raises(HubError, match="the account of your token has no access") as caught:
        pull(GATED)
    assert f"Accept the licence at https://huggingface.co/{GATED}" in caught.value.remedy


@pytest.mark.parametrize("token", ["", "hf_right"])
def test_no_such_model(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match="There is no model herd/none on http://127"):
        pull("herd/none")


def test_token_that_is_not_accepted(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(HubError, match="does not accept your token"):
        pull(NAME)


def test_no_such_revision(hub: FakeHub) -> None:
    with pytest.raises(HubError, match="has no revision 'nightly'"):
        pull(NAME, revision="nightly")


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [(500, "trouble of its own", 1), (429, "asks to wait", 1), (403, "forbids access", 2), (418, "answers 418", 2)],
)
def test_listing_refused(hub: FakeHub, status: int, message: str, code: int) -> None:
    hub.statuses["api"] = [status]
    with pytest.raises(HubError, match=message) as caught:
        pull(NAME)
    assert caught.value.exit_code == code


@pytest.mark.parametrize(
    ("status", "times", "message"),
    [(503, 99, r"trouble of its own \(it answers 503\)"), (404, 1, "answers 404"), (403, 1, "forbids access")],
)
def test_file_refused(hub: FakeHub, status: int, times: int, message: str) -> None:
    hub.statuses["model.safetensors"] = [status] * times
    with pytest.raises(HubError, match=message):
        pull(NAME)


def test_metadata_refused(hub: FakeHub) -> None:
    """What huggingface_hub reports as "not in the cache" is told by its cause."""
    hub.statuses["HEAD config.json"] = [403]
    with pytest.raises(HubError, match=r"The hub forbids access to herd/tiny"):
        pull(NAME)


def test_passing_trouble_is_waited_out(hub: FakeHub) -> None:
    hub.statuses["model.safetensors"] = [500, 429, 503]
    assert (pull(NAME).folder / "model.safetensors").read_bytes() == WEIGHTS


def test_no_connection(hub: FakeHub) -> None:
    with pytest.raises(UnreachableError, match=r"could not be fetched from http://127\.0\.0\.1:9") as caught:
        pull(NAME, endpoint="http://127.0.0.1:9")
    assert "online" in caught.value.remedy


def test_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pull(NAME).folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnreachableError, match="HF_HUB_OFFLINE is set"):
        pull(NAME)
    assert resolve(NAME) == folder


@pytest.mark.parametrize(
    "info",
    [
        b"<html>log in</html>",
        {"id": NAME, "sha": "../../../etc"},
        {"id": NAME},
        [],
    ],
)
def test_answer_that_is_not_a_hubs(hub: FakeHub, info: object) -> None:
    hub.info = info
    with pytest.raises(UnreachableError, match="does not answer as a hub does"):
        pull(NAME)


@pytest.mark.parametrize(
    "item",
    [
        {"type": "file", "path": "config.json", "size": -1, "oid": "a" * 40},
        {"type": "file", "path": "config.json", "size": "1", "oid": "a" * 40},
        {"type": "file", "path": "config.json", "size": 1, "oid": "../../x"},
        {
            "type": "file",
            "path": "config.json",
            "size": 1,
            "oid": "a" * 40,
            "lfs": {"oid": "../x", "size": 1, "pointerSize": 1},
        },
        {"type": "file", "path": "config.json"},
    ],
)
def test_hostile_listing(hub: FakeHub, item: dict[str, object]) -> None:
    hub.tree = [item]
    with pytest.raises(HubError, match="does not answer as a hub does"):
        pull(NAME)


def test_listing_without_end(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_listing, "_MAX_FILES", 5)
    with pytest.raises(HubError, match="lists more than 5 files"):
        pull(NAME)


def test_listed_path_outside_the_folder_is_not_fetched(hub: FakeHub) -> None:
    hub.tree = [
        {"type": "file", "path": path, "size": 1, "oid": "a" * 40}
        for path in ("../config.json", "/etc/config.json", "x/../../model.safetensors", "..safetensors")
    ]
    with pytest.raises(HubError, match="has no safetensors or GGUF weights"):
        pull(NAME)


def test_disk_too_small(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 1_000_000))
    with pytest.raises(StorageError, match=r"needs 0\.0 GB more .* where 0\.0 GB are free"):
        pull(NAME)
    assert not hub.contents("config.json")


def test_disk_full_on_the_way(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub_job, "fetch", full)
    with pytest.raises(StorageError, match="The disk is full") as caught:
        pull(NAME)
    assert "HF_HUB_CACHE" in caught.value.remedy


@pytest.mark.parametrize("name", ["herd/..", "herd/a--b", "../x", "a/b/c", "/x", "herd/tiny\n", "herd/"])
def test_name_that_is_no_hub_id(hub: FakeHub, name: str) -> None:
    with pytest.raises(HubError, match="is not a hub id"):
        pull(name)


def test_misspelt_short_name(hub: FakeHub) -> None:
    with pytest.raises(HubError, match=r"no model called 'lama3\.2:1b'") as caught:
        pull("lama3.2:1b")
    assert "Did you mean llama3.2:1b" in caught.value.remedy


@pytest.mark.parametrize("revision", ["../x", "a..b", "", "-x", "/x"])
def test_revision_that_is_none(hub: FakeHub, revision: str) -> None:
    if revision == "":
        assert pull(NAME, revision=revision).revision == "main"
    else:
        with pytest.raises(HubError, match="is not a revision"):
            pull(NAME, revision=revision)


def test_pulled_commit_stays_pinned_when_the_branch_moves(hub: FakeHub) -> None:
    folder = pull(NAME).folder
    hub.repositories[NAME].move(LATER_COMMIT, {**BESIDE, "model.safetensors": b"later weights"})
    hf_hub_download(NAME, "config.json", endpoint=hub.url)  # another program moves the cache's `main`
    assert resolve(NAME) == folder
    later = pull(NAME)
    assert later.commit == LATER_COMMIT
    assert later.bytes_fetched == len(b"later weights")  # the other files are the same blobs
    assert resolve(NAME) == later.folder
    record = read_record(NAME)
    assert record is not None
    assert record.commits == (COMMIT, LATER_COMMIT)


def test_earlier_pull_stays_usable_while_a_later_one_is_interrupted(hub: FakeHub) -> None:
    folder = pull(NAME).folder
    hub.repositories[NAME].move(LATER_COMMIT, {**BESIDE, "model.safetensors": WEIGHTS[::-1]})
    hub.statuses["model.safetensors"] = [404]
    with pytest.raises(HubError):
        pull(NAME)
    assert resolve(NAME) == folder


def test_pull_of_a_commit(hub: FakeHub) -> None:
    hub.repositories[NAME].move(LATER_COMMIT, {**BESIDE, "model.safetensors": b"later weights"})
    done = pull(NAME, revision=COMMIT)
    assert (done.revision, done.commit) == (COMMIT, COMMIT)
    assert (done.folder / "model.safetensors").read_bytes() == WEIGHTS


def test_model_of_another_program_resolves_without_network(hub: FakeHub) -> None:
    hub.repositories[NAME] = Repository({**BESIDE, "model.safetensors.index.json": INDEX, **SHARDS})
    folder = Path(hf_hub_download(NAME, "config.json", endpoint=hub.url)).parent
    hf_hub_download(NAME, "model.safetensors.index.json", endpoint=hub.url)
    hf_hub_download(NAME, "model-00001-of-00002.safetensors", endpoint=hub.url)
    with pytest.raises(HubError, match="herd/tiny is not on this machine") as caught:
        resolve(NAME)  # a shard is missing
    assert caught.value.remedy == "`puna pull herd/tiny` fetches it."
    hf_hub_download(NAME, "model-00002-of-00002.safetensors", endpoint=hub.url)
    hub.requests.clear()
    assert resolve(NAME) == folder
    assert hub.requests == []


@pytest.mark.parametrize("index", [b"{", b"[]", b'{"weight_map": 1}', b'{"weight_map": {"a": 1}}'])
def test_damaged_index_in_the_cache(hub: FakeHub, index: bytes) -> None:
    hub.repositories[NAME] = Repository({"config.json": CONFIG, "model.safetensors.index.json": index})
    hf_hub_download(NAME, "config.json", endpoint=hub.url)
    hf_hub_download(NAME, "model.safetensors.index.json", endpoint=hub.url)
    with pytest.raises(HubError, match="cannot be read"):
        resolve(NAME)


def test_remove_frees_the_space(hub: FakeHub) -> None:
    done = pull(NAME)
    assert remove(NAME) == done.bytes_total
    assert not (Path(constants.HF_HUB_CACHE) / "models--herd--tiny").exists()
    assert read_record(NAME) is None
    with pytest.raises(HubError, match="not on this machine"):
        resolve(NAME)
    with pytest.raises(HubError, match="was not pulled by Puna"):
        remove(NAME)


def test_remove_leaves_what_another_commit_needs(hub: FakeHub) -> None:
    pull(NAME)
    hub.repositories[NAME].move(LATER_COMMIT, {**BESIDE, "model.safetensors": b"later weights"})
    other = [Path(hf_hub_download(NAME, path, endpoint=hub.url)) for path in ("config.json", "model.safetensors")]
    shared = len(CONFIG)
    assert remove(NAME) == len(WEIGHTS) + sum(map(len, BESIDE.values())) - shared
    assert [path.read_bytes() for path in other] == [CONFIG, b"later weights"]


def test_remove_takes_superseded_commits_too(hub: FakeHub) -> None:
    pull(NAME)
    hub.repositories[NAME].move(LATER_COMMIT, {**BESIDE, "model.safetensors": b"later weights"})
    pull(NAME)
    assert remove(NAME) == len(WEIGHTS) + len(b"later weights") + sum(map(len, BESIDE.values()))


def test_remove_takes_what_an_interrupted_pull_left(hub: FakeHub) -> None:
    hub.cut["model.safetensors"] = [1_500_000, *[0] * fetch_module.RETRIES]
    with pytest.raises(HubError):
        pull(NAME)
    held = on_disk()
    assert held >= blob_part(hub, "model.safetensors", WEIGHTS).stat().st_size > 0
    assert remove(NAME) == held
    assert not (Path(constants.HF_HUB_CACHE) / "models--herd--tiny").exists()


def test_remove_takes_the_part_where_there_is_no_snapshot_yet(hub: FakeHub) -> None:
    hub.repositories[NAME] = Repository({"model.safetensors": WEIGHTS})
    hub.cut["model.safetensors"] = [1_500_000, *[0] * fetch_module.RETRIES]
    with pytest.raises(HubError):
        pull(NAME)
    held = blob_part(hub, "model.safetensors", WEIGHTS).stat().st_size
    assert remove(NAME) == held
    assert not (Path(constants.HF_HUB_CACHE) / "models--herd--tiny").exists()


def test_embedded_model_is_not_removed(hub: FakeHub) -> None:
    with pytest.raises(HubError, match="part of the package"):
        remove("cria")


def test_what_never_was_a_model_is_not_removed(hub: FakeHub) -> None:
    with pytest.raises(HubError, match="'foo' was not pulled") as caught:
        remove("foo")
    assert "puna list" in caught.value.remedy


def test_embedded_model(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cria").mkdir()
    (tmp_path / "cria/config.json").write_bytes(b"{}")
    monkeypatch.setattr("puna.weights.installed.embedded_folder", lambda: tmp_path / "cria")
    row = installed()[0]
    assert (row.name, row.source, row.size_bytes, row.complete, row.commit) == ("cria", "embedded", 2, True, "")


def test_model_emptied_from_the_cache_by_others(hub: FakeHub) -> None:
    done = pull(NAME)
    shutil.rmtree(done.folder)
    assert [(row.complete, row.size_bytes) for row in installed() if row.source == "hub"] == [(False, 0)]
    with pytest.raises(HubError, match="some of its files are no longer"):
        resolve(NAME)
    remove(NAME)
    assert read_record(NAME) is None


def test_importing_it_does_not_import_the_hub_client() -> None:
    code = """
import sys, puna.weights.hub, puna.weights.meta_link
print([name for name in sys.modules if name.startswith(("huggingface", "httpx"))])
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.stdout.strip() == "[]"
