"""Which engines run, on which files: Puna on the model itself, each peer on the same file or on one of the same shape.

What it is: from `--against` to `EngineSpec`s, and the peers' own converters, run where a peer has a format of its own.
What it is not: a claim that a peer's format is the same: it is the nearest in size that the peer has, and the engine's
name says which (`openvino int4`).
What is surprising: a peer that cannot read the model's file gets random weights of its shape, for speed does not depend
on them. And llama.cpp is two engines, with and without its repacking of weights on load, for neither is always faster.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from puna.bench import shapes
from puna.bench.work import Model
from puna.bench.worker import EngineSpec, check_installed
from puna.errors import PunaError, UsageError
from puna.models.config import DecoderConfig
from puna.models.registry import definition
from puna.weights.checkpoint import Checkpoint, open_checkpoint
from puna.weights.whole import appearing

OURS = "puna"

PEERS = {
    "llama.cpp": "llama-cpp-python", "transformers": "transformers", "openvino": "openvino-genai",
    "ctranslate2": "ctranslate2",
}  # fmt: skip
"""What `--against` takes, and the package that each needs."""

SMALL = 64 << 20
"""Bytes of a model for which one thread may be faster than several: llama.cpp is measured with both."""

FEW_BITS = 6.5
"""Bits a weight below which a peer's 4-bit format is the one of like size."""

_KINDS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}

Say = Callable[[str], None]
"""Told what goes on, a line at a time."""


@dataclass(frozen=True)
class Target:
    """What is measured: its path, numbers, the type of most weights (a block type, or F32, F16, BF16), its bytes, and
    a name for files that are made and kept."""

    path: Path
    config: DecoderConfig
    kind: str
    nbytes: int
    name: str

    @property
    def packed(self) -> bool:
        """Whether its weights are blocks."""
        return self.kind not in ("F32", "F16", "BF16")

    @property
    def few_bits(self) -> bool:
        """Whether a peer's 4-bit format is the nearest in size."""
        return self.packed and 8 * self.nbytes / definition(self.config).parameter_count(self.config) < FEW_BITS


def target_of_model(path: Path, name: str) -> tuple[Target, Model]:
    """A model that is there, from its header alone. Raises what `open_checkpoint` does."""
    opened = open_checkpoint(path)
    return _target(opened, name), _model(opened)


def target_of_shape(shape: str, mix: str, say: Say) -> tuple[Target, Model]:
    """A model of random weights, made where it is not there yet. Raises UsageError for a shape or mix not known."""
    config = shapes.config_of(shape)
    opened = open_checkpoint(shapes.random_gguf(shape, config, mix, say))
    return _target(opened, shape), _model(opened)


def _target(opened: Checkpoint, name: str) -> Target:
    sizes: Counter[str] = Counter()
    for tensor in opened.tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    kind = sizes.most_common(1)[0][0]
    return Target(opened.path, opened.config, _KINDS.get(kind, kind), sizes.total(), name)


def _model(opened: Checkpoint) -> Model:
    target = _target(opened, "")
    sizes = {name: tensor.nbytes for name, tensor in opened.tensors.items()}
    products = "int8" if target.packed else "bf16" if target.kind == "BF16" else "fp32"
    return Model(opened.config, sizes, products, "fp32" if target.kind == "F32" else "fp16")


def chosen(against: str | None) -> list[str]:
    """The peers that `--against` names. Raises UsageError for one that is not known, or twice the same."""
    peers = [word.strip() for word in (against or "").split(",") if word.strip()]
    for peer in peers:
        if peer not in PEERS:
            raise UsageError(f"--against {peer}: no such engine.", remedy=f"Some of: {','.join(PEERS)}.")
        if peers.count(peer) > 1:
            raise UsageError(f"--against names {peer} twice.", remedy="Name each once.")
    return peers


def ours(target: Target, threads: int) -> EngineSpec:
    """Puna."""
    return EngineSpec(OURS, "puna.bench.ours", {"model": str(target.path), "threads": threads})


def check_all(peers: Sequence[str], python: str) -> None:
    """Raise DeviceError where one is not installed, before anything is made or measured."""
    for peer in peers:
        check_installed(peer, PEERS[peer], python)


def specs(peers: Sequence[str], target: Target, threads: int, python: str, say: Say) -> list[EngineSpec]:
    """Every peer's engines, their files made where they are not there yet. Raises PunaError where a converter fails."""
    found: list[EngineSpec] = []
    for peer in peers:
        found += _MAKERS[peer](target, threads, python, say)
    return found


def _llama_cpp(target: Target, threads: int, python: str, say: Say) -> list[EngineSpec]:
    path = target.path
    if path.suffix != ".gguf":
        path = shapes.random_gguf(target.name, target.config, target.kind, say)
    counts = sorted({1, threads}) if target.nbytes < SMALL else [threads]
    return [
        EngineSpec(
            f"llama.cpp repack={'on' if repack else 'off'}" + (f" threads={count}" if len(counts) > 1 else ""),
            "puna.bench.peers.llama_cpp",
            {"model": str(path), "threads": count, "repack": repack},
            python=python,
        )
        for count in counts
        # Only blocks are repacked.
        for repack in ((True, False) if target.packed else (True,))
    ]


def _transformers(target: Target, threads: int, python: str, say: Say) -> list[EngineSpec]:
    dtype = "float32" if target.kind == "F32" else "bfloat16"
    model = shapes.random_hub_folder(target.name, target.config, say)
    arguments = {"model": str(model), "threads": threads, "dtype": dtype}
    return [EngineSpec(f"transformers {dtype}", "puna.bench.peers.transformers", arguments, python=python)]


def _openvino(target: Target, threads: int, python: str, say: Say) -> list[EngineSpec]:
    """int4 as optimum-intel's own recipe for speed (symmetric, groups of 64), or int8; fp16 or fp32 for unpacked."""
    form = "int4" if target.few_bits else "int8" if target.packed else "fp32" if target.kind == "F32" else "fp16"
    int4 = ["--sym", "--group-size", "64", "--ratio", "1.0"] if form == "int4" else []

    def command(source: Path, dest: Path) -> list[str]:
        task = ["--task", "text-generation-with-past", "--weight-format", form, *int4]
        return ["optimum.commands.optimum_cli", "export", "openvino", "--model", str(source), *task, str(dest)]

    model = _converted(target, f"openvino-{form}", python, command, say)
    arguments = {"model": str(model), "threads": threads}
    return [EngineSpec(f"openvino {form}", "puna.bench.peers.openvino", arguments, python=python)]


def _ctranslate2(target: Target, threads: int, python: str, say: Say) -> list[EngineSpec]:
    form = "int8" if target.packed else "float32" if target.kind == "F32" else "bfloat16"

    def command(source: Path, dest: Path) -> list[str]:
        words = ["--model", str(source), "--output_dir", str(dest), "--quantization", form]
        return ["ctranslate2.converters.transformers", *words]

    model = _converted(target, f"ctranslate2-{form}", python, command, say)
    arguments = {"model": str(model), "threads": threads, "compute": form}
    return [EngineSpec(f"ctranslate2 {form}", "puna.bench.peers.ctranslate2", arguments, python=python)]


_MAKERS = {
    "llama.cpp": _llama_cpp, "transformers": _transformers, "openvino": _openvino, "ctranslate2": _ctranslate2,
}  # fmt: skip


def _converted(target: Target, ending: str, python: str, command: Callable[[Path, Path], list[str]], say: Say) -> Path:
    """A folder made by a peer's own converter from random weights of the shape; kept for the next time."""
    path = shapes.kept(target.name, target.config, ending)
    if path.is_dir():
        return path
    source = shapes.random_hub_folder(target.name, target.config, say)
    say(f"converting them to {path}, which may take some minutes (kept for the next time)")
    with appearing(path, target.nbytes) as unfinished:
        run = subprocess.run([python, "-m", *command(source, unfinished)], capture_output=True, text=True)
        if run.returncode or not unfinished.is_dir():
            raise PunaError(
                f"The converter to {ending} failed with exit code {run.returncode}.",
                remedy=f"It said:\n{run.stderr.strip()[-1500:]}",
            )
    return path
