"""The core needs no torch: few places may import it, and none of them is reached by importing or asking for help."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath

import pytest
from import_walk import imported

ALLOWED = (
    "puna/kernels/torch_ops.py", "puna/kernels/triton/", "puna/engine/torch_runner.py", "puna/train/",
    "puna/bench/peers/transformers.py",
)  # fmt: skip
FAMILY = {"torch", "triton", "torchvision", "torchaudio", "torchao"}

HELP = """
import sys
sys.argv = ["puna", "--help"]
from puna.cli.main import main
try:
    code = main()
except SystemExit as exit:
    code = exit.code
assert not code, code
sys.exit("torch was imported" if "torch" in sys.modules else 0)
"""


def faults(path: PurePosixPath, tree: ast.Module) -> list[str]:
    """Where a file that may not imports torch or its kin, by any kind of import."""
    if any(str(path) == place or (place.endswith("/") and str(path).startswith(place)) for place in ALLOWED):
        return []
    return [
        f"{path}:{line} imports {name}"
        for line, name in imported(path, tree)
        if name.split(".")[0] in FAMILY or name.startswith("safetensors.torch")
    ]


def test_torch_stays_where_it_belongs(sources: Mapping[PurePosixPath, ast.Module]) -> None:
    assert [fault for path, tree in sources.items() for fault in faults(path, tree)] == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch",
        "import torch.nn.functional as F",
        "def f():\n    from torch import nn",
        "if TYPE_CHECKING:\n    import torch",
        "importlib.import_module('torch')",
        "from safetensors.torch import save_file",
    ],
)
def test_a_stray_torch_is_found(code: str) -> None:
    tree = ast.parse(code)
    assert len(faults(PurePosixPath("puna/models/decoder.py"), tree)) == 1
    assert len(faults(PurePosixPath("puna/engine/runner.py"), tree)) == 1
    assert len(faults(PurePosixPath("puna/trainer.py"), tree)) == 1
    assert faults(PurePosixPath("puna/train/loop.py"), tree) == []
    assert faults(PurePosixPath("puna/kernels/torch_ops.py"), tree) == []


@pytest.mark.parametrize("module", ["puna", "puna.llm", "puna.kernels.ops", "puna.models.decoder"])
def test_importing_loads_no_torch(child: Callable[..., str], module: str) -> None:
    assert child(f"import sys, {module}; print('torch' in sys.modules)") == "False\n"


def test_help_loads_no_torch(child: Callable[..., str]) -> None:
    assert "puna" in child(HELP)


def test_the_check_in_the_child_sees_torch(child: Callable[..., str]) -> None:
    program = "import sys, types; sys.modules['torch'] = types.ModuleType('torch')\n" + HELP
    with pytest.raises(AssertionError, match="torch was imported"):
        child(program)
