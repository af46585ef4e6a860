"""A copy of a Llama carries the Notice that its agreement asks for; a copy of anything else carries none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import hub_model

from puna.catalog.licence import licences
from puna.errors import PunaError
from puna.weights import convert as module
from puna.weights.checkpoint import open_checkpoint
from puna.weights.convert import convert
from puna.weights.notices import agreement_of

LICENCE = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n\nLlama 3.1 Version Release Date: July 23, 2024\n"


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A tuned model with Meta's licence beside it."""
    folder = tmp_path / "Tuned"
    hub_model().save_pretrained(folder)
    (folder / "LICENSE").write_text(LICENCE)
    (folder / "USE_POLICY.md").write_text("policy")
    return folder


@pytest.mark.parametrize("to", ["safetensors", "meta"])
def test_a_folder_gets_the_notice_and_keeps_the_licence(tuned: Path, tmp_path: Path, to: str) -> None:
    made = convert(tuned, tmp_path / "out", to=to)
    notice = (made.path / "NOTICE").read_text("utf-8")
    assert notice.splitlines()[0] == licences()["llama3.1"].notice
    assert "“Built with Llama”" in notice
    assert (made.path / "LICENSE").read_text() == LICENCE
    assert (made.path / "USE_POLICY.md").read_text() == "policy"
    assert set(made.files) == {path.name for path in made.path.iterdir()}
    assert not any("passes" in note for note in made.notes)
    # The copy's copy keeps it, and does not write another.
    again = convert(made.path, tmp_path / "again", to="safetensors")
    assert (again.path / "NOTICE").read_text("utf-8") == notice
    assert again.files.count("NOTICE") == 1


def test_a_notice_that_is_there_is_kept(tuned: Path, tmp_path: Path) -> None:
    (tuned / "Notice.txt").write_text("theirs")
    made = convert(tuned, tmp_path / "out")
    assert [name for name in made.files if name.lower().startswith("notice")] == ["Notice.txt"]
    assert (made.path / "Notice.txt").read_text() == "theirs"


def test_one_file_says_what_must_lie_beside_it(tmp_path: Path, reference: Path) -> None:
    folder = tmp_path / "Tuned"
    hub_model(vocab_size=512).save_pretrained(folder)
    (folder / "LICENSE").write_text(LICENCE)
    words = reference / "checkpoints" / "stories260K" / "tok512.bin"
    made = convert(folder, tmp_path / "out.gguf", to="gguf", dtype="F32", tokenizer=words)
    assert any(licences()["llama3.1"].notice in note and licences()["llama3.1"].text in note for note in made.notes)
    assert made.files == ("out.gguf",)


def test_a_model_of_the_catalog_is_known_by_its_name_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Llama-3.2-1B-Instruct"
    hub_model().save_pretrained(folder)
    # Of that name, and of another size: nothing is claimed.
    assert agreement_of(open_checkpoint(folder)) is None
    assert "NOTICE" not in convert(folder, tmp_path / "a").files
    config = open_checkpoint(folder).config
    entry = _entry_of_size(config.layers, config.dim, config.hidden_dim)
    monkeypatch.setattr("puna.weights.gguf_metadata.find", lambda name: entry)
    made = convert(folder, tmp_path / "b")
    assert "NOTICE" in made.files
    assert any(licences()["llama3.2"].text in note for note in made.notes)


def _entry_of_size(layers: int, dim: int, ffn_dim: int) -> object:
    from dataclasses import replace

    from puna.catalog.models import lookup

    return replace(lookup("llama3.2:1b"), layers=layers, dim=dim, ffn_dim=ffn_dim)


def test_other_licences_get_none(tmp_path: Path) -> None:
    folder = tmp_path / "Other"
    hub_model().save_pretrained(folder)
    assert "NOTICE" not in convert(folder, tmp_path / "a").files
    (folder / "LICENSE").write_text("Apache License 2.0")
    made = convert(folder, tmp_path / "b")
    assert "NOTICE" not in made.files
    assert "LICENSE" in made.files
    (folder / "LICENSE").write_bytes(bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)))
    assert "NOTICE" not in convert(folder, tmp_path / "c").files


def test_a_failure_leaves_no_notice_behind(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_json", fail)
    with pytest.raises(PunaError):
        convert(tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["Tuned"]
