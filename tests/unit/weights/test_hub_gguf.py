"""GGUF repositories: which file a name means, and pulling, finding and removing one of several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf_builder as gb
import pytest
from hub_server import COMMIT, LATER_COMMIT, FakeHub, Repository
from huggingface_hub import constants, hf_hub_download

from puna.errors import CheckpointError, HubError
from puna.weights import fetch as fetch_module
from puna.weights.checkpoint import open_checkpoint
from puna.weights.find import find_model
from puna.weights.hub import pull, removable, remove, resolve
from puna.weights.hub_gguf import choose, models_of
from puna.weights.installed import installed

NAME = "herd/Tiny-1B-GGUF"
PARTS = {f"Q8_0/Tiny-1B-Q8_0-{i:05d}-of-00002.gguf": b"part %d" % i * 1000 for i in (1, 2)}
FILES = {
    "Tiny-1B-Q4_K_M.gguf": b"four" * 5000,
    "Tiny-1B-UD-Q2_K_XL.gguf": b"two" * 5000,
    "tiny-1b.iq3_m.gguf": b"three" * 5000,
    **PARTS,
    "mmproj-Tiny-f16.gguf": b"a projector",
    "imatrix.gguf": b"importance",
    "README.md": b"# tiny",
    "config.json": b"{}",
    "LICENSE": b"terms",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one repository of GGUFs, an empty cache and an empty PUNA_HOME."""
    server = FakeHub()
    server.repositories[NAME] = Repository(dict(FILES))
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


@pytest.mark.parametrize(
    ("file", "label"),
    [
        ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("llama-2-7b.Q4_0.gguf", "Q4_0"),
        ("x-q5_k_s.gguf", "Q5_K_S"),
        ("x-IQ2_XXS.gguf", "IQ2_XXS"),
        ("x-UD-IQ1_S.gguf", "UD-IQ1_S"),
        ("x-Q6_K_L.gguf", "Q6_K_L"),
        ("x-BF16-00001-of-00001.gguf", "BF16"),
        ("x.fp16.gguf", "FP16"),
        ("x-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("F16.gguf", "F16"),
        ("model.gguf", "model.gguf"),
        ("Q4_K_M-old.gguf", "Q4_K_M-old.gguf"),
        ("deep/er/x-Q8_0.gguf", "Q8_0"),
    ],
)
def test_what_a_file_is_called(file: str, label: str) -> None:
    (model,) = models_of(NAME, [file])
    assert (model.label, model.files) == (label, (file,))
    for name in (label, label.lower(), file.rpartition("/")[2]):
        assert choose(NAME, [model], name) is model


def test_two_models_of_one_type_are_called_by_their_files() -> None:
    models = models_of(NAME, ["small.Q4_K_M.gguf", "large.Q4_K_M.gguf", "large.Q8_0.gguf"])
    assert [model.label for model in models] == ["Q8_0", "large.Q4_K_M.gguf", "small.Q4_K_M.gguf"]
    assert choose(NAME, models, "small.Q4_K_M.gguf").files == ("small.Q4_K_M.gguf",)
    for tag in ("Q4_K_M", None):
        with pytest.raises(HubError, match=r"Q8_0, large\.Q4_K_M\.gguf, small\.Q4_K_M\.gguf"):
            choose(NAME, models, tag)


def test_what_is_no_model_and_what_lies_oddly_is_passed_over() -> None:
    paths = ["mmproj-x-Q8_0.gguf", "x.imatrix.gguf", "../x-Q8_0.gguf", ".x-Q8_0.gguf", "a/b/c/x-Q8_0.gguf", "x y.gguf"]
    assert models_of(NAME, paths) == []


def test_a_part_that_is_missing() -> None:
    with pytest.raises(HubError, match="has 2 of the 3 parts of x-Q8_0"):
        models_of(NAME, ["x-Q8_0-00001-of-00003.gguf", "x-Q8_0-00003-of-00003.gguf"])


@pytest.mark.parametrize("asked", ["Q4_K_M", "q4_k_m", "Tiny-1B-Q4_K_M.gguf", None])
def test_one_of_several_is_fetched(hub: FakeHub, asked: str | None) -> None:
    said: list[str] = []
    done = pull(NAME if asked is None else f"{NAME}:{asked}", say=said.append)
    assert done.name == f"{NAME}:Q4_K_M"
    assert [file.path for file in done.files] == ["LICENSE", "Tiny-1B-Q4_K_M.gguf"]
    assert done.path.read_bytes() == FILES["Tiny-1B-Q4_K_M.gguf"]
    # What was not asked for by name is said, before it is fetched, with what there is besides.
    others = "IQ3_M, Q8_0, UD-Q2_K_XL"
    assert said == ([] if asked else [f"{NAME} has several GGUF models: {NAME}:Q4_K_M is fetched, not {others}."])
    for name in (NAME, f"{NAME}:Q4_K_M", f"{NAME}:q4_k_m", f"{NAME}:Tiny-1B-Q4_K_M.gguf"):
        assert find_model(name) == done.path
    row = installed()[-1]
    assert (row.name, row.complete, row.size_bytes) == (f"{NAME}:Q4_K_M", True, done.bytes_total)
    with pytest.raises(HubError, match="Q8_0 is not on this machine") as refused:
        resolve(f"{NAME}:Q8_0")
    assert refused.value.remedy == f"`puna pull {NAME}:Q8_0` fetches it."


def test_a_split_one_lies_in_a_folder(hub: FakeHub) -> None:
    done = pull(f"{NAME}:Q8_0")
    assert [file.path for file in done.files] == ["LICENSE", *PARTS]
    assert done.path == resolve(f"{NAME}:Q8_0") == done.folder / next(iter(PARTS)).partition("/")[2]
    assert [path.read_bytes() for path in sorted(done.folder.iterdir())] == list(PARTS.values())


def test_several_and_none_is_named(hub: FakeHub) -> None:
    del hub.repositories[NAME].files["Tiny-1B-Q4_K_M.gguf"]
    with pytest.raises(HubError, match="has 3 GGUF models: IQ3_M, Q8_0, UD-Q2_K_XL") as refused:
        pull(NAME)
    assert refused.value.remedy == f"Name one: {NAME}:IQ3_M"
    with pytest.raises(HubError, match="no GGUF of Q4_K_M; it has IQ3_M, Q8_0, UD-Q2_K_XL"):
        pull(f"{NAME}:Q4_K_M")
    assert not any(hub.contents(path) for path in FILES)
    assert len(installed()) <= 1  # the embedded model


def test_the_only_one_needs_no_name(hub: FakeHub) -> None:
    hub.repositories[NAME] = Repository({"model.gguf": b"numbers", "LICENSE": b"terms"})
    done = pull(NAME)
    assert done.name == f"{NAME}:model.gguf"
    assert resolve(NAME) == resolve(f"{NAME}:model.gguf") == find_model(f"{NAME}:model.gguf") == done.path


def test_safetensors_come_first(hub: FakeHub) -> None:
    hub.repositories[NAME].files["model.safetensors"] = b"numbers"
    assert pull(NAME).name == NAME
    assert not hub.contents("Q4_K_M.gguf")
    done = pull(f"{NAME}:Q4_K_M")
    assert find_model(f"{NAME}:Q4_K_M") == done.path
    assert find_model(NAME) == done.folder
    remove(NAME)
    assert find_model(NAME) == done.path  # the only one left of that name


def test_tag_with_nothing_to_name(hub: FakeHub) -> None:
    hub.repositories[NAME] = Repository({"model.safetensors": b"numbers", "config.json": b"{}"})
    with pytest.raises(HubError, match="no GGUF of Q8_0, nor any other"):
        pull(f"{NAME}:Q8_0")
    with pytest.raises(HubError, match="names a GGUF"):
        pull(f"{NAME}:Q8_0", original=True)


@pytest.mark.parametrize("tag", ["", "a/b", "../x", ":", "x:y", "x y", "y" * 200])
def test_tag_that_is_none(hub: FakeHub, tag: str) -> None:
    for take in (pull, resolve):
        with pytest.raises(HubError, match="is not a hub id"):
            take(f"{NAME}:{tag}")
    assert not hub.requests


def test_removing_one_leaves_the_others(hub: FakeHub) -> None:
    four, eight = pull(f"{NAME}:Q4_K_M"), pull(f"{NAME}:Q8_0")
    with pytest.raises(HubError, match=f"is here 2 times: {NAME}:Q4_K_M, {NAME}:Q8_0"):
        resolve(NAME)
    with pytest.raises(HubError, match="is here 2 times"):
        removable(NAME)
    blob = four.path.resolve()
    assert remove(f"{NAME}:q4_k_m") == len(FILES["Tiny-1B-Q4_K_M.gguf"])
    assert not four.path.exists()
    assert not blob.exists()
    assert [row.name for row in installed() if row.source == "hub"] == [f"{NAME}:Q8_0"]
    assert resolve(NAME) == eight.path
    assert (four.folder / "LICENSE").read_bytes() == b"terms"
    remove(NAME)
    assert not list(Path(constants.HF_HUB_CACHE).glob("models--*/blobs/*"))
    with pytest.raises(HubError, match="not on this machine"):
        resolve(NAME)


def test_what_another_commit_shows_too_stays(hub: FakeHub) -> None:
    first = pull(f"{NAME}:Q4_K_M")
    later = {**FILES, "LICENSE": b"other terms"}
    hub.repositories[NAME].move(LATER_COMMIT, later)
    second = pull(f"{NAME}:Q8_0")
    assert (first.commit, second.commit) == (COMMIT, LATER_COMMIT)
    remove(f"{NAME}:Q4_K_M")
    assert not first.path.exists()
    assert resolve(NAME) == second.path
    assert (second.folder.parent / "LICENSE").read_bytes() == b"other terms"


def test_a_pull_that_was_cut_is_named_and_continued(hub: FakeHub) -> None:
    numbers = hub.repositories[NAME].files["Tiny-1B-Q4_K_M.gguf"] = bytes(range(256)) * 12_000  # three chunks
    hub.cut["Tiny-1B-Q4_K_M.gguf"] = [1_500_000, *[0] * fetch_module.RETRIES]
    with pytest.raises(HubError, match=r"could not be fetched|ended the file early"):
        pull(NAME)
    with pytest.raises(HubError, match=f"The pull of {NAME}:Q4_K_M was not finished"):
        resolve(NAME)
    hub.cut.clear()
    assert pull(NAME).bytes_fetched < len(numbers)
    assert resolve(NAME).read_bytes() == numbers


def test_what_another_program_fetched_is_found(hub: FakeHub) -> None:
    for path in (*PARTS, "Tiny-1B-Q4_K_M.gguf"):
        hf_hub_download(NAME, path)
    assert resolve(NAME).read_bytes() == FILES["Tiny-1B-Q4_K_M.gguf"]
    assert resolve(f"{NAME}:q8_0").name == next(iter(PARTS)).partition("/")[2]
    with pytest.raises(HubError, match="IQ3_M is not on this machine"):
        resolve(f"{NAME}:IQ3_M")
    with pytest.raises(HubError, match="was not pulled by Puna"):
        removable(f"{NAME}:Q8_0")


def test_it_opens_as_the_file_does(hub: FakeHub, tmp_path: Path) -> None:
    whole = gb.tiny().write(tmp_path / "x-F32.gguf")
    hub.repositories[NAME] = Repository({"x-F32.gguf": whole.read_bytes()})
    pull(f"{NAME}:F32")
    opened = open_checkpoint(find_model(f"{NAME}:F32"))
    assert opened.format == "gguf"
    assert opened.config == open_checkpoint(whole).config


def test_path_that_is_not_there_is_none_of_the_hubs(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        find_model("here/x-Q4_K_M.gguf")
