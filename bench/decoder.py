"""How fast is the decoder beside transformers, on the shape of Llama 3.2 1B with bf16 weights on a CPU?

Decode: seconds a token at about 128 tokens of context. Prefill: 512 tokens from an empty cache, the last position's
logits. Both engines read the same random-weight safetensors folder, with the same number of threads; transformers runs
eager with its default attention (sdpa). Ratios are ours over theirs, above 1 is better. Decode is set
beside what NumPy's sums read from memory in the same run, prefill beside the bf16 peak given by a flag.

    python bench/decoder.py --folder /tmp/llama-1b-random --pairs 11 --record
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common

SHAPE = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CONTEXT, STEPS, PREFILL = 128, 16, 512


def make(folder: Path) -> None:
    """Write the random-weight model once, by transformers."""
    if (folder / "model.safetensors").exists():
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=ROPE, initializer_range=0.02))
    model.save_pretrained(folder)


def puna_works(folder: Path, threads: int) -> dict[str, Callable[[], float]]:
    """Ours: the host runner, over weights mapped from the file."""
    import numpy as np

    from puna.engine.runner import HostRunner
    from puna.kernels import cpu, ops
    from puna.models import decoder
    from puna.weights.checkpoint import open_checkpoint

    ops.select("auto")
    cpu.set_threads(threads)
    checkpoint = open_checkpoint(folder)
    config = checkpoint.read_config.config
    runner = HostRunner(config, decoder.build(config, lambda name: checkpoint.tensors[name].read()))

    def decode() -> float:
        logits = common.feed(runner, range(1, CONTEXT + 1), 0)
        began = time.perf_counter()
        for i in range(STEPS):
            logits = common.feed(runner, [int(logits.argmax())], CONTEXT + i)
        return (time.perf_counter() - began) / STEPS

    def prefill() -> float:
        began = time.perf_counter()
        common.feed(runner, range(1, PREFILL + 1), 0)
        return time.perf_counter() - began

    file = np.memmap(folder / "model.safetensors", np.uint8, "r")
    part = file.size // threads // 8 * 8
    parts = [file[i * part : (i + 1) * part].view(np.uint64) for i in range(threads)]

    def memory() -> float:
        """Seconds to read the whole file from memory, by NumPy sums on as many threads: the limit of a decode step."""
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(np.sum, parts))  # the threads and the pages are there
            began = time.perf_counter()
            list(pool.map(np.sum, parts))
            return time.perf_counter() - began

    return {"decode": decode, "prefill_512": prefill, "memory": memory}


def transformers_works(folder: Path, threads: int) -> dict[str, Callable[[], float]]:
    """Theirs: LlamaForCausalLM in bf16, eager, its own cache."""
    import torch
    from transformers import DynamicCache, LlamaForCausalLM

    torch.set_num_threads(threads)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def decode() -> float:
        cache = DynamicCache()
        logits = model(torch.arange(1, CONTEXT + 1)[None], past_key_values=cache, logits_to_keep=1).logits
        began = time.perf_counter()
        for _ in range(STEPS):
            logits = model(logits[:, -1:].argmax(-1), past_key_values=cache, logits_to_keep=1).logits
        return (time.perf_counter() - began) / STEPS

    @torch.inference_mode()
    def prefill() -> float:
        began = time.perf_counter()
        model(torch.arange(1, PREFILL + 1)[None], past_key_values=DynamicCache(), logits_to_keep=1)
        return time.perf_counter() - began

    return {"decode": decode, "prefill_512": prefill}


def serve(engine: str, folder: Path, threads: int) -> None:
    """Be one engine: read names of work, answer seconds and peak memory."""
    works = (puna_works if engine == "puna" else transformers_works)(folder, threads)
    for line in sys.stdin:
        seconds = works[line.strip()]()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak_mb": peak}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/puna-bench-1b"), help="where the random model lies")
    parser.add_argument("--pairs", type=int, default=11, help="interleaved pairs of each measurement")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of both engines")
    parser.add_argument("--bf16-gflop-s", type=float, default=449.0, help="the threads' peak of bf16 products")
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/decoder.jsonl")
    parser.add_argument("--worker", choices=("puna", "transformers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(options.worker, options.folder, options.threads)
        return
    make(options.folder)
    arguments = ("--folder", str(options.folder), "--threads", str(options.threads))
    ours, theirs = (common.Worker(__file__, name, *arguments) for name in ("puna", "transformers"))
    row: dict[str, Any] = {"question": "decoder", "shape": "Llama-3.2-1B", "dtype": "bf16", "threads": options.threads}
    parameters = 1_235_814_400
    for work in ("decode", "prefill_512"):
        a, b = common.interleaved(
            options.pairs, lambda w=work: ours.ask(w)["seconds"], lambda w=work: theirs.ask(w)["seconds"]
        )
        tokens = PREFILL if work == "prefill_512" else 1
        row[work] = {
            "puna_tokens_s": common.summary([tokens / seconds for seconds in a]),
            "transformers_tokens_s": common.summary([tokens / seconds for seconds in b]),
            "ratio": common.ratio(b, a),
        }
    decode, prefill = (row[w]["puna_tokens_s"]["median"] for w in ("decode", "prefill_512"))
    row["decode"]["gb_s"] = decode * parameters * 2 / 1e9
    # Before memory is measured: that maps the file a second time, which counts twice.
    row["peak_mb"] = {"puna": ours.ask("decode")["peak_mb"], "transformers": theirs.ask("decode")["peak_mb"]}
    size = (options.folder / "model.safetensors").stat().st_size
    row["memory_read_gb_s"] = common.summary([size / ours.ask("memory")["seconds"] / 1e9 for _ in range(options.pairs)])
    row["decode"]["share_of_memory_read"] = row["decode"]["gb_s"] / row["memory_read_gb_s"]["median"]
    body = parameters - SHAPE["vocab_size"] * SHAPE["hidden_size"]  # the head runs for one position of 512
    row["prefill_512"]["gflop_s"] = prefill * 2 * body / 1e9
    row["prefill_512"]["share_of_bf16_peak"] = row["prefill_512"]["gflop_s"] / options.bf16_gflop_s
    ours.close(), theirs.close()
    common.record("decoder", row | common.pedigree(), options.record)


if __name__ == "__main__":
    main()
