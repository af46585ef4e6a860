"""Which engines run for which model; a peer that is not there is an error that names what to install."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from puna.bench import engines, shapes
from puna.bench.engines import Target
from puna.errors import DeviceError, PunaError, UsageError

TARGET = Target(Path("m.gguf"), shapes.config_of("llama3.2:1b"), "Q4_K", 800_000_000, "m")


def test_peers_by_name() -> None:
    assert engines.chosen(None) == []
    assert engines.chosen("llama.cpp, openvino") == ["llama.cpp", "openvino"]
    with pytest.raises(UsageError, match=r"--against vllm: no such engine"):
        engines.chosen("llama.cpp,vllm")
    with pytest.raises(UsageError, match="openvino twice"):
        engines.chosen("openvino,openvino")


def test_a_peer_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines.PEERS, "llama.cpp", "no-such-package-anywhere")
    with pytest.raises(DeviceError, match=r"--against llama.cpp needs the package no-such-package-anywhere") as error:
        engines.check_all(["llama.cpp"], sys.executable)
    assert "pip install no-such-package-anywhere" in error.value.remedy
    assert "group `bench`" in error.value.remedy
    with pytest.raises(DeviceError, match="--peer-python"):
        engines.check_all(["llama.cpp"], str(tmp_path / "no-python"))


def test_llama_cpp_runs_with_and_without_repacking_on_the_same_file() -> None:
    found = engines.specs(["llama.cpp"], TARGET, 2, "python", print)
    assert [spec.arguments for spec in found] == [
        {"model": "m.gguf", "threads": 2, "repack": True},
        {"model": "m.gguf", "threads": 2, "repack": False},
    ]
    assert len({spec.name for spec in found}) == 2


def test_a_small_model_is_tried_with_one_thread_too() -> None:
    small = replace(TARGET, nbytes=10_000_000)
    found = engines.specs(["llama.cpp"], small, 2, "python", print)
    assert sorted(spec.arguments["threads"] for spec in found) == [1, 1, 2, 2]
    plain = engines.specs(["llama.cpp"], replace(small, kind="F32"), 2, "python", print)
    assert [(spec.arguments["threads"], spec.arguments["repack"]) for spec in plain] == [(1, True), (2, True)]


@pytest.mark.parametrize(
    ("kind", "nbytes", "names"),
    [
        ("Q4_K", 800_000_000, ["openvino int4", "ctranslate2 int8", "transformers bfloat16"]),
        ("Q8_0", 1_310_000_000, ["openvino int8", "ctranslate2 int8", "transformers bfloat16"]),
        ("BF16", 2_470_000_000, ["openvino fp16", "ctranslate2 bfloat16", "transformers bfloat16"]),
        ("F32", 4_940_000_000, ["openvino fp32", "ctranslate2 float32", "transformers float32"]),
    ],
)
def test_the_format_of_like_size(
    kind: str, nbytes: int, names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shapes, "random_hub_folder", lambda *_: tmp_path)
    monkeypatch.setattr(engines, "_converted", lambda target, ending, *_: tmp_path / ending)
    target = replace(TARGET, kind=kind, nbytes=nbytes)
    found = engines.specs(["openvino", "ctranslate2", "transformers"], target, 2, "python", print)
    assert [spec.name for spec in found] == names


def test_a_converter_that_fails_says_what_it_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PUNA_HOME", str(tmp_path))
    monkeypatch.setattr(shapes, "random_hub_folder", lambda *_: tmp_path)
    with pytest.raises(PunaError, match="exit code 1") as error:
        engines._converted(TARGET, "x", sys.executable, lambda *_: ["no_such_module_anywhere"], lambda _: None)
    assert "No module named no_such_module_anywhere" in error.value.remedy
    assert list((tmp_path / "bench").glob("*") if (tmp_path / "bench").exists() else []) == []


def test_a_model_s_own_figures() -> None:
    from puna.weights.embedded import embedded_folder

    target, model = engines.target_of_model(embedded_folder(), "cria")
    assert target.kind in ("F32", "BF16", "F16")
    assert not target.packed
    assert sum(model.sizes.values()) == target.nbytes
    assert model.products == {"F32": "fp32", "F16": "fp32", "BF16": "bf16"}[target.kind]
