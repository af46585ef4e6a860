"""Pulling by Meta's signed links, from a server on the loopback interface."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hub_server import FakeHub

from puna.catalog import models as catalog
from puna.errors import HubError, StorageError, UnreachableError
from puna.weights import fetch as fetch_module
from puna.weights.fetch import Progress
from puna.weights.hub import remove, resolve
from puna.weights.installed import installed, read_record
from puna.weights.meta_link import pull_meta

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARDS = {"consolidated.00.pth": bytes(range(256)) * 8000, "consolidated.01.pth": b"second" * 1000}
FILES = {"params.json": b'{"dim": 8}', "tokenizer.model": b"ranks", **SHARDS}


def checklist(files: dict[str, bytes]) -> bytes:
    return "".join(f"{hashlib.md5(content).hexdigest()}  {name}\n" for name, content in files.items()).encode()


def policy(expires: float) -> str:
    statement = {"Resource": "https://x/*", "Condition": {"DateLessThan": {"AWS:EpochTime": int(expires)}}}
    text = base64.b64encode(json.dumps({"Statement": [statement]}).encode()).decode()
    return text.replace("+", "-").replace("=", "_").replace("/", "~")


def link(server: FakeHub, expires_in: float = 3600) -> str:
    return f"{server.url}/meta/*?Policy={policy(time.time() + expires_in)}&Signature=s~S_&Key-Pair-Id=K"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Meta's server with Llama 3.1 8B, which has two weight files and few parameters here."""
    fake = FakeHub()
    put(fake, "Llama-3.1-8B-Instruct", FILES)
    monkeypatch.setenv("PUNA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fetch_module, "RETRY_SECONDS", 0.0)
    real = catalog.lookup
    monkeypatch.setattr(catalog, "lookup", lambda name: replace(real(name), params=1_030_000, meta_shards=2))
    yield fake
    fake.close()


def put(server: FakeHub, folder: str, files: dict[str, bytes]) -> None:
    server.meta |= {f"{folder}/{name}": content for name, content in files.items()}
    server.meta[f"{folder}/checklist.chk"] = checklist(files)


def test_files_come_in_metas_layout(server: FakeHub, tmp_path: Path) -> None:
    heard: list[Progress] = []
    done = pull_meta(link(server), "llama3.1:8b", tmp_path / "dest", progress=heard.append)
    assert done.folder == tmp_path / "dest"
    expected = {**FILES, "checklist.chk": checklist(FILES)}
    assert {path.name: path.read_bytes() for path in done.folder.iterdir()} == expected
    assert heard[-1].bytes_done == done.bytes_total == sum(map(len, expected.values()))
    assert (heard[-1].files_done, heard[-1].files_total) == (5, 5)
    digests = {file.path: file.sha256 for file in done.files}
    assert digests["consolidated.00.pth"] == hashlib.sha256(SHARDS["consolidated.00.pth"]).hexdigest()


def test_default_folder_record_and_removal(server: FakeHub, tmp_path: Path) -> None:
    done = pull_meta(link(server), "llama3.1:8b")
    assert done.folder == tmp_path / "home/meta/Llama-3.1-8B-Instruct"
    assert resolve("llama3.1:8b") == done.folder
    rows = [row for row in installed() if row.source == "meta"]
    assert [(row.name, row.short_name, row.complete) for row in rows] == [("llama3.1:8b", "llama3.1:8b", True)]
    assert remove("llama3.1:8b") == done.bytes_total
    assert not done.folder.exists()
    assert read_record("llama3.1:8b") is None


def test_older_folder_name_is_found(server: FakeHub) -> None:
    server.meta.clear()
    put(server, "Meta-Llama-3.1-8B-Instruct", FILES)
    assert (pull_meta(link(server), "llama3.1:8b").folder / "params.json").read_bytes() == b'{"dim": 8}'


def test_llama2_tokenizer_lies_beside_the_folders(server: FakeHub) -> None:
    put(server, "llama-2-7b-chat", {"params.json": b"{}", **SHARDS})
    server.meta["tokenizer.model"] = b"pieces"
    server.meta["tokenizer_checklist.chk"] = checklist({"tokenizer.model": b"pieces"})
    folder = pull_meta(link(server), "llama2:7b").folder
    assert (folder / "tokenizer.model").read_bytes() == b"pieces"


def test_interrupted_pull_continues_where_it_stopped(server: FakeHub) -> None:
    name = "Llama-3.1-8B-Instruct/consolidated.00.pth"
    server.cut[name] = [1_100_000, *[0] * fetch_module.RETRIES]
    with pytest.raises(HubError, match=r"could not be fetched") as caught:
        pull_meta(link(server), "llama3.1:8b")
    assert "Signature" not in str(caught.value)
    part = installed()[-1].folder / "consolidated.00.pth.part"
    held = part.stat().st_size
    assert 0 < held <= 1_100_000
    assert not installed()[-1].complete
    server.requests.clear()
    done = pull_meta(link(server), "llama3.1:8b")
    assert [r.range for r in server.contents(name)] == [f"bytes={held}-"]
    assert (done.folder / "consolidated.00.pth").read_bytes() == SHARDS["consolidated.00.pth"]


def test_part_that_was_whole_already(server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth.part").write_bytes(SHARDS["consolidated.00.pth"])
    pull_meta(link(server), "llama3.1:8b", tmp_path)
    assert (tmp_path / "consolidated.00.pth").read_bytes() == SHARDS["consolidated.00.pth"]


def test_second_pull_checks_and_fetches_only_the_checklist(server: FakeHub) -> None:
    pull_meta(link(server), "llama3.1:8b")
    server.requests.clear()
    done = pull_meta(link(server), "llama3.1:8b")
    assert [request.path for request in server.requests] == ["/meta/Llama-3.1-8B-Instruct/checklist.chk"]
    assert done.bytes_fetched == len(checklist(FILES))


@pytest.mark.parametrize("where", ["sent", "on disk"])
def test_wrong_checksum_is_named_and_the_file_removed(server: FakeHub, tmp_path: Path, where: str) -> None:
    wrong = SHARDS["consolidated.01.pth"][:-1] + b"!"
    if where == "sent":
        server.wrong["Llama-3.1-8B-Instruct/consolidated.01.pth"] = wrong
    else:
        (tmp_path / "consolidated.01.pth").write_bytes(wrong)
    with pytest.raises(HubError, match=r"consolidated\.01\.pth in .* is damaged"):
        pull_meta(link(server), "llama3.1:8b", tmp_path)
    assert not list(tmp_path.glob("consolidated.01*"))
    server.wrong.clear()
    pull_meta(link(server), "llama3.1:8b", tmp_path)
    assert (tmp_path / "consolidated.01.pth").read_bytes() == SHARDS["consolidated.01.pth"]


def test_expired_link_says_when(server: FakeHub) -> None:
    with pytest.raises(HubError, match=r"The link expired on 20\d\d-\d\d-\d\d at \d\d:\d\d UTC") as caught:
        pull_meta(link(server, expires_in=-60), "llama3.1:8b")
    assert "https://www.llama.com/llama-downloads" in caught.value.remedy
    assert server.requests == []


def test_refused_link(server: FakeHub) -> None:
    server.meta.clear()
    with pytest.raises(HubError, match=r"refuses a file of llama3\.1:8b \(it answers 403\)"):
        pull_meta(link(server), "llama3.1:8b")


def test_policy_that_cannot_be_read_is_left_to_the_server(server: FakeHub) -> None:
    for query in ("Policy=%%%", "Policy=e30_", "", "Policy=" + policy(1e30)):
        pull_meta(f"{server.url}/meta/*?{query}", "llama3.1:8b")


def test_server_in_trouble(server: FakeHub) -> None:
    server.statuses["Llama-3.1-8B-Instruct/params.json"] = [500] * 20
    with pytest.raises(UnreachableError, match="Meta's server answers 500"):
        pull_meta(link(server), "llama3.1:8b")


@pytest.mark.parametrize(
    "url",
    ["", "not a link", "https://download.llamameta.net/?Policy=x", "ftp://x/*", "https://x/*/*", "https://x/?a=*"],
)
def test_what_is_no_link(server: FakeHub, url: str) -> None:
    with pytest.raises(HubError, match="not a link of the kind that Meta mails"):
        pull_meta(url, "llama3.1:8b")


@pytest.mark.parametrize("sent", [b"", b"<html>", b"abc  params.json\n", b"0" * 32 + b"  ../x\n"])
def test_checklist_that_is_none(server: FakeHub, sent: bytes) -> None:
    server.meta["Llama-3.1-8B-Instruct/checklist.chk"] = sent
    with pytest.raises(HubError, match="not a checklist of MD5 sums"):
        pull_meta(link(server), "llama3.1:8b")


def test_checklist_of_another_model(server: FakeHub) -> None:
    put(server, "Llama-3.1-8B-Instruct", {"params.json": b"{}", "consolidated.00.pth": b"w"})
    with pytest.raises(HubError, match=r"lists 1 weight files, and llama3\.1:8b has 2"):
        pull_meta(link(server), "llama3.1:8b")


def test_checklist_without_the_tokenizer(server: FakeHub) -> None:
    put(server, "Llama-3.1-8B-Instruct", {"params.json": b"{}", **SHARDS})
    with pytest.raises(HubError, match=r"no checksum for tokenizer\.model"):
        pull_meta(link(server), "llama3.1:8b")


def test_model_that_metas_links_are_not_known_for(server: FakeHub) -> None:
    with pytest.raises(HubError, match="is not known") as caught:
        pull_meta(link(server), "llama-guard2:8b")
    assert "puna pull llama-guard2:8b" in caught.value.remedy


def test_disk_too_small(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "lookup", lambda name: replace(catalog.find(name), params=10**15))
    with pytest.raises(StorageError, match=r"llama3\.1:8b needs about 2000000\.0 GB more"):
        pull_meta(link(server), "llama3.1:8b")


def test_unreachable_server(server: FakeHub) -> None:
    with pytest.raises(UnreachableError, match=r"could not be fetched from 127\.0\.0\.1"):
        pull_meta("http://127.0.0.1:9/*", "llama3.1:8b")
