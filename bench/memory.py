"""How much memory does a model take beyond its file? Peak resident memory over file size, at the shape of Llama 3.1 8B.

The file is written once (16 GB of bf16, one random block repeated: only sizes matter here), then a fresh process maps
it, reads a prompt of 128 tokens and makes 8 more. Mapped pages count as resident while the system has room for them.

    python bench/memory.py --folder /tmp/puna-bench-8b --record
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import common

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_theta": 500000.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


def make(folder: Path) -> None:
    """Write the model: shapes from the config, numbers from one block of small random bf16."""
    import numpy as np

    from puna.kernels.layouts import to_bf16
    from puna.models import decoder
    from puna.models.config import read_hub
    from puna.weights.names import foreign

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = {foreign(name, "hub"): shape for name, shape in decoder.shapes(read_hub(CONFIG).config).items()}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    block = to_bf16(np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(np.float32)).bits.tobytes()
    partial = folder / "model.safetensors.partial"
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while offset:
            offset -= file.write(block[:offset])
    partial.rename(folder / "model.safetensors")


def worker(folder: Path) -> None:
    """Load, run, and print the peak."""
    from puna.engine.runner import HostRunner
    from puna.models import decoder
    from puna.weights.checkpoint import open_checkpoint

    began = time.perf_counter()
    checkpoint = open_checkpoint(folder)
    config = checkpoint.read_config.config
    runner = HostRunner(config, decoder.build(config, lambda name: checkpoint.tensors[name].read()))
    opened = time.perf_counter() - began
    logits = common.feed(runner, range(1, 129), 0)
    began = time.perf_counter()
    for i in range(8):
        logits = common.feed(runner, [int(logits.argmax())], 128 + i)
    seconds = (time.perf_counter() - began) / 8
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_bytes": peak, "open_s": opened, "decode_tokens_s": 1 / seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/puna-bench-8b"), help="where the model lies")
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/memory.jsonl")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.folder)
        return
    if not (options.folder / "model.safetensors").exists():
        make(options.folder)
    command = [sys.executable, __file__, "--worker", "--folder", str(options.folder)]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size = (options.folder / "model.safetensors").stat().st_size
    row = {
        "question": "memory", "shape": "Llama-3.1-8B", "dtype": "bf16", "file_mb": size / 1e6,
        "peak_mb": answer["peak_bytes"] / 1e6, "peak_over_file": answer["peak_bytes"] / size,
        "open_s": answer["open_s"], "decode_tokens_s": answer["decode_tokens_s"],
    }  # fmt: skip
    common.record("memory", row | common.pedigree(), options.record)


if __name__ == "__main__":
    main()
