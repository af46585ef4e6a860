"""The commands about models as things: models, list, show, pull, rm, convert."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest

from puna.catalog import models as catalog
from puna.cli import show
from puna.cli.main import main
from puna.engine.runner import HostRunner
from puna.errors import HubError, StorageError, UnreachableError
from puna.models import decoder
from puna.models.config import DecoderConfig
from puna.models.rope import Rope
from puna.settings import PullSettings
from puna.weights import hub, meta_link
from puna.weights.fetch import Progress
from puna.weights.hub import Pulled
from puna.weights.installed import PulledFile, Record, write_record

Puna = Callable[..., Any]


def test_the_catalog_as_table_and_document(puna: Puna) -> None:
    lines = puna("models").out.splitlines()
    assert lines[0].split()[:4] == ["SHORT", "NAME", "PARAMETERS", "CONTEXT"]
    assert len(lines) == 1 + len({entry.name for entry in catalog.entries()})
    [row] = [line for line in lines if line.startswith("llama3.2:1b ")]
    assert row.split()[1:3] == ["1.23B", "128K"]
    assert row.split()[-5:] == ["instruct", "base", "Llama", "3.2", "Community"]
    rows = {row["short_name"]: row for row in puna("models", "--json").json()["models"]}
    assert len(rows) == len(catalog.entries())
    assert rows["llama3.2:1b"]["parameters"] == 1_235_814_400
    assert rows["llama3.2:1b"]["context_length"] == 131_072
    assert (rows["llama4:scout"]["parameters"], rows["llama4:scout"]["vision_parameters"]) == (108641793536, 871932416)


def test_nothing_is_here(puna: Puna, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.weights.installed.embedded_folder", lambda: Path("not there"))
    said = puna("list")
    assert (said.code, said.out) == (0, "")
    assert "puna models" in said.err
    assert puna("list", "--json").json() == {"models": []}


def test_what_was_pulled_is_listed(puna: Puna, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.weights.installed.embedded_folder", lambda: Path("not there"))
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "model.safetensors").write_bytes(b"x" * 2500)
    when = datetime(2026, 1, 2, tzinfo=UTC).isoformat()
    file = PulledFile("model.safetensors", 2500, "sha256:0", "0", 0)
    write_record(
        Record(
            "meta-llama/Llama-3.2-1B-Instruct", "hub", str(tmp_path / "w"), "main", "c" * 40, when, True, (), (file,)
        )
    )
    [header, row] = puna("list").out.splitlines()
    assert header.split() == ["NAME", "SHORT", "NAME", "SIZE", "PULLED", "STATE", "FROM"]
    assert row.split() == [
        "meta-llama/Llama-3.2-1B-Instruct", "llama3.2:1b", "2.5", "kB", "2026-01-02", "whole", "hub", "main", "c" * 12,
    ]  # fmt: skip
    [document] = puna("list", "--json").json()["models"]
    assert (document["size_bytes"], document["complete"], document["pulled"]) == (2500, True, when)
    (tmp_path / "w" / "model.safetensors").unlink()
    assert "not whole" in puna("list").out


@pytest.fixture
def stories(reference: Path) -> tuple[str, ...]:
    """MODEL and --tokenizer of stories260K."""
    folder = reference / "checkpoints" / "stories260K"
    return str(folder / "stories260K.bin"), "--tokenizer", str(folder / "tok512.bin")


def test_show_says_what_a_model_is(puna: Puna, stories: tuple[str, ...]) -> None:
    shown = puna("show", *stories, "--json").json()
    assert (shown["format"], shown["parameters"], shown["context_length"]) == ("llama2c", 260_032, 512)
    assert shown["dtypes"] == {"fp32": 47}
    assert shown["tokenizer"]["kind"] == "llama2c"
    assert shown["tokenizer"]["vocabulary"] == 512
    assert (shown["chat_format"], shown["licence"]) == (None, None)
    assert shown["file_bytes"] == Path(stories[0]).stat().st_size
    # 5 layers, keys and values, 4 heads of 8 numbers of 4 bytes, 512 positions
    assert shown["memory"]["kv_cache_bytes"] == {"512": 5 * 2 * 4 * 8 * 4 * 512}
    assert shown["memory"]["weights_bytes"] == 4 * 260_032
    assert shown["memory"]["total_bytes"] == {"512": 4 * 260_032 + 655_360}
    text = puna("show", *stories).out
    for part in ("260,032 (260K)", "47 × fp32", "none: it continues text", "1.7 MB with 512 tokens", "not known"):
        assert part in text


def test_show_counts_the_cache_the_engine_makes() -> None:
    config = DecoderConfig("llama3", 32, 128, 3, 4, 2, 32, 32, 1e-5, Rope(32, 1e4), 100)

    def parameter(name: str) -> Any:
        return np.zeros(decoder.shapes(config)[name], np.float32)

    for kv_type in ("fp32", "bf16", "fp16", "q8_0"):
        runner = HostRunner(config, decoder.build(config, parameter), kv_type)
        runner.allocate(2)
        nbytes = sum(array.nbytes for array in (*runner._cache.keys, *runner._cache.values))
        assert show.kv_cache_bytes(config, 100, kv_type) == nbytes


def test_show_finds_the_licence(tmp_path: Path) -> None:
    assert show.licence("llama3.1:8b", tmp_path) == "Llama 3.1 Community License Agreement"
    assert show.licence("mine", tmp_path) is None
    (tmp_path / "LICENSE.txt").write_text("\n  My Licence\nmore")
    assert show.licence("mine", tmp_path) == "My Licence (LICENSE.txt)"


@pytest.mark.parametrize("words", [("./absent.bin",), ("llama9:1b",)])
def test_show_of_what_is_not_there(puna: Puna, words: tuple[str, ...]) -> None:
    said = puna("show", *words)
    assert (said.code, said.out) == (2, "")
    assert "Traceback" not in said.err


def pulled(fetched: int = 3_000) -> Pulled:
    """A finished pull."""
    return Pulled("org/m", Path("f"), "main", "c" * 40, (PulledFile("a", 1, "", "5a", 0),), 3_000_000, fetched)


def test_pull_hands_on_what_was_asked(puna: Puna, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def fake(name: str, **options: Any) -> Pulled:
        calls.append((name, options))
        return pulled()

    monkeypatch.setattr(hub, "pull", fake)
    said = puna("pull", "llama3.2:1b", "--revision", "v1", "--original")
    assert (said.code, said.out) == (0, "")
    assert "org/m is here: 3.0 MB, 3.0 kB fetched" in said.err
    assert calls == [("llama3.2:1b", {"revision": "v1", "original": True, "progress": None, "say": ANY})]
    assert puna("pull", "org/m", "--json").json() == {
        "name": "org/m",
        "path": "f",
        "folder": "f",
        "revision": "main",
        "commit": "c" * 40,
        "bytes_total": 3_000_000,
        "bytes_fetched": 3_000,
        "files": [{"path": "a", "size": 1, "sha256": "5a"}],
    }


def test_pull_from_meta(puna: Puna, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(meta_link, "pull_meta", lambda *words, progress: calls.append(words) or pulled(0))
    assert "nothing to fetch" in puna("pull", "llama3.1:8b", "--meta-url", "https://x/*").err
    assert calls == [("https://x/*", "llama3.1:8b")]
    said = puna("pull", "llama3.1:8b", "--meta-url", "https://x/*", "--original")
    assert said.code == 2
    assert "--original" in said.err


def test_pull_shows_a_bar_at_a_terminal(terminal: Puna) -> None:
    program = (
        "import time; from puna.weights import hub; from puna.weights.fetch import Progress\n"
        "from puna.weights.hub import Pulled\n"
        "from pathlib import Path\nfrom puna.cli.main import main\n"
        "def pull(name, *, progress, **_):\n"
        "    for done in (10, 500_000, 2_000_000):\n"
        "        progress(Progress('model.safetensors', done < 100, done, 1_000_000, 1, 3)); time.sleep(0.2)\n"
        "    return Pulled(name, Path('f'), 'main', '', (), 1, 1)\n"
        "hub.pull = pull\nraise SystemExit(main(['pull', 'org/m']))"
    )
    shown = terminal("-c", program)
    shown.until("checking model.safetensors (1/3)")
    shown.until("fetching model.safetensors (1/3)")
    shown.until("0.5/1.0 MB")
    shown.until("2.0/2.0 MB")
    shown.until("org/m is here")
    assert shown.leave() == 0


def test_a_refused_pull_is_the_hubs_message(puna: Puna, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **_: Any) -> Pulled:
        raise HubError(f"{name} is gated.", remedy="Accept the licence.")

    monkeypatch.setattr(hub, "pull", refuse)
    said = puna("pull", "org/m", "--json")
    assert said.code == 2
    assert said.json() == {"error": {"kind": "HubError", "message": "org/m is gated.", "remedy": "Accept the licence."}}
    assert PullSettings(name="x").meta_url is None
    assert Progress("f", False, 1, 2, 0, 1).bytes_done == 1


def test_a_signed_link_may_come_from_stdin(puna: Puna, monkeypatch: pytest.MonkeyPatch) -> None:
    links: list[str] = []

    def refuse(url: str, *_: Any, **__: Any) -> Pulled:
        links.append(url)
        raise HubError("expired")

    monkeypatch.setattr(meta_link, "pull_meta", refuse)
    monkeypatch.setattr("sys.stdin", io.StringIO("https://example.org/*?Policy=x\n"))
    assert puna("pull", "llama3.1:8b", "--meta-url", "-").code == 2
    assert links == ["https://example.org/*?Policy=x"]


@pytest.mark.parametrize("words", [("cria",), ("cria", "--meta-url", "https://x/*"), ("cria", "--json")])
def test_what_is_inside_the_package_is_not_pulled(puna: Puna, words: tuple[str, ...]) -> None:
    said = puna("pull", *words)
    assert said.code == 2
    assert said.err == "puna: cria is inside the package: there is nothing to pull.\nRun it: puna run cria\n"


@pytest.mark.parametrize("words", [("lama3.2:1b",), ("a/b/c",), ("org/m", "--meta-url", "https://x/*")])
def test_nothing_is_fetched_by_a_name_that_is_none(puna: Puna, words: tuple[str, ...]) -> None:
    said = puna("pull", *words)
    assert (said.code, said.out) == (2, "")
    assert "Fetching" not in said.err
    assert words[0] in said.err


def test_a_hub_that_cannot_be_reached_is_not_the_inputs_fault(puna: Puna, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (UnreachableError, StorageError):

        def fail(name: str, kind: type[HubError] = kind, **_: Any) -> Pulled:
            raise kind("No.", remedy="Later.")

        monkeypatch.setattr(hub, "pull", fail)
        assert puna("pull", "org/m").code == 1


def test_rm_asks_first(puna: Puna, monkeypatch: pytest.MonkeyPatch, terminal: Puna, tmp_path: Path) -> None:
    removed: list[str] = []
    when = datetime(2026, 1, 2, tzinfo=UTC).isoformat()
    folder = tmp_path / "models--org--m" / "snapshots" / ("c" * 40)
    write_record(Record("org/m", "hub", str(folder), "main", "c" * 40, when, True, (), ()))
    monkeypatch.setattr(hub, "remove", lambda name: removed.append(name) or 5_000)
    said = puna("rm", "org/m")
    assert said.code == 2
    assert "--yes" in said.err
    assert removed == []
    assert "5.0 kB are free again" in puna("rm", "org/m", "--yes").err
    assert puna("rm", "org/m", "-y", "--json").json() == {"name": "org/m", "bytes_freed": 5_000}
    assert removed == ["org/m", "org/m"]
    for key, code, text in (("n", 1, "was not removed"), ("y", 0, "org/m is removed")):
        shown = terminal("-m", "puna", "rm", "org/m")
        shown.until("Remove org/m and its files? [y/N] ")
        shown.press(f"{key}\n")
        shown.until(text)
        assert shown.leave() == code


@pytest.mark.parametrize("words", [("cria",), ("cria", "--yes")])
def test_cria_stays(puna: Puna, words: tuple[str, ...]) -> None:
    said = puna("rm", *words)
    assert said.code == 2
    assert said.err.startswith("puna: cria is part of the package")


@pytest.mark.parametrize("yes", [(), ("--yes",)])
def test_rm_looks_before_it_asks(puna: Puna, yes: tuple[str, ...]) -> None:
    said = puna("rm", "foo", *yes)
    assert (said.code, said.err) == (2, "puna: 'foo' was not pulled.\n`puna list` shows what was.\n")
    said = puna("rm", "llama3.2:1b", *yes)
    assert said.code == 2
    assert said.err.startswith("puna: meta-llama/Llama-3.2-1B-Instruct was not pulled by Puna.\n`puna list`")


def test_convert_and_run_again(puna: Puna, stories: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "made"
    said = puna("convert", *stories, "--to", "safetensors", "--type", "BF16", "-o", str(out), "--json")
    assert said.code == 0
    made = said.json()
    assert (made["path"], made["format"], made["weights_bytes"]) == (str(out), "safetensors", 2 * 260_032)
    assert sorted(made["files"]) == sorted(path.name for path in out.iterdir())
    assert puna("show", str(out), "--json").json()["dtypes"] == {"bf16": 47}
    answer = puna("run", str(out), "", "--raw", "--temperature", "0", "--max-tokens", "5").out
    assert answer.startswith("Once upon a")
    again = puna("convert", *stories, "--to", "meta", "-o", str(out))
    assert again.code == 2
    assert "already exists" in again.err
    plain = puna("convert", *stories, "--to", "meta", "-o", str(tmp_path / "meta"))
    assert (plain.code, plain.out) == (0, "")
    assert json.loads((tmp_path / "meta" / "params.json").read_text())["n_layers"] == 5


def test_a_conversion_that_is_terminated_leaves_nothing(
    stories: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(file: Any, *_: Any) -> None:
        file.write(b"half")
        assert list(tmp_path.glob(".x.gguf.unfinished-*"))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("puna.weights.gguf_write.write", write)
    with pytest.raises(SystemExit) as ended:
        main(["convert", *stories, "--to", "gguf", "-o", str(tmp_path / "x.gguf")])
    assert ended.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_convert_to_gguf(puna: Puna, stories: tuple[str, ...], tmp_path: Path) -> None:
    """The file, its size, and what its types had to give up; types a folder cannot hold are refused."""
    out = tmp_path / "stories.gguf"
    said = puna("convert", *stories, "--to", "gguf", "--type", "Q4_K_M", "-o", str(out), "--json")
    document = said.json()
    assert said.code == 0
    assert (document["path"], document["format"], document["files"]) == (str(out), "gguf", ["stories.gguf"])
    assert out.read_bytes()[:4] == b"GGUF"
    assert 0 < out.stat().st_size - document["weights_bytes"] < 20_000
    assert any("Q5_0 in place of Q4_K" in note for note in document["notes"])
    again = puna("convert", *stories, "--to", "gguf", "-o", str(out))
    assert (again.code, again.out) == (2, "")
    assert "already exists" in again.err
    refused = puna("convert", *stories, "--to", "meta", "--type", "Q4_K_M", "-o", str(tmp_path / "meta"))
    assert refused.code == 2
    assert "--to meta holds F32, BF16, F16 only" in refused.err
    assert "--to gguf" in refused.err
