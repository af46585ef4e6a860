"""What does a step cost beside its native call, and what does one call save over an op at a time?

Decode tokens/s through the whole engine, greedy (submit, step, sampler): the shape of stories15M in float32 and Q8_0
and that of Llama 3.2 1B in bfloat16, with random weights, and the embedded cria. `native` is the runner in use, `plain`
the same C++ ops called one by one by `models/decoder.py`; the two take turns in one process. `python_us` is what a
native step spends outside its native call, in microseconds.

    python bench/step.py --pairs 11 --record
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common

PROMPT = list(range(3, 11))


def stories15m(kind: str) -> tuple[Any, Any]:
    """The shape of stories15M (llama2.c): random weights of small spread, `F32`, or `Q8_0` but for the norms."""
    import numpy as np

    from puna.kernels import ops
    from puna.kernels.layouts import Packed
    from puna.models import decoder
    from puna.models.config import DecoderConfig
    from puna.models.rope import Rope

    config = DecoderConfig(
        generation="llama2", vocab_size=32000, dim=288, layers=6, heads=6, kv_heads=6, head_dim=48, hidden_dim=768,
        norm_eps=1e-5, rope=Rope(48, 10_000.0), context_length=1024, tied_head=True, interleaved_rope=True,
    )  # fmt: skip
    random = np.random.default_rng(0)
    table = decoder.shapes(config)

    def parameter(name: str) -> Any:
        shape = table[name]
        if kind == "F32" or len(shape) == 1:
            return random.standard_normal(shape, np.float32) * np.float32(0.05)
        blocks = random.integers(0, 256, (shape[0], shape[1] // 32, 34), np.uint8)
        blocks[..., :2] = np.full((1,), 0.0007, np.float16).view(np.uint8)
        return ops.prepare(Packed(kind, shape, blocks.reshape(shape[0], -1)))

    return config, decoder.build(config, parameter)


def llama1b() -> tuple[Any, Any]:
    """The shape of Llama 3.2 1B: bfloat16 weights, one random stretch over and over."""
    import numpy as np

    from puna.kernels.layouts import BF16, to_bf16
    from puna.models import decoder
    from puna.models.config import DecoderConfig
    from puna.models.rope import Llama3Scaling, Rope

    config = DecoderConfig(
        generation="llama3.2", vocab_size=128256, dim=2048, layers=16, heads=32, kv_heads=8, head_dim=64,
        hidden_dim=8192, norm_eps=1e-5, rope=Rope(64, 500_000.0, llama3=Llama3Scaling(32.0, 1.0, 4.0, 8192)),
        context_length=131072, tied_head=True,
    )  # fmt: skip
    stretch = to_bf16(np.random.default_rng(0).standard_normal(1 << 20, np.float32) * np.float32(0.02)).bits
    table = decoder.shapes(config)
    return config, decoder.build(config, lambda name: BF16(np.resize(stretch, table[name])))


def embedded() -> tuple[Any, Any]:
    """cria."""
    from puna.models import decoder
    from puna.weights.checkpoint import open_checkpoint
    from puna.weights.find import find_model

    opened = open_checkpoint(find_model("cria"))
    config = opened.read_config.config
    return config, decoder.build(config, lambda name: opened.tensors[name].read())


class Timed:
    """A native decoder that adds up the seconds spent in it."""

    def __init__(self, decoder: Any) -> None:
        self._decoder, self.seconds = decoder, 0.0

    def run(self, *arguments: Any) -> None:
        began = time.perf_counter()
        self._decoder.run(*arguments)
        self.seconds += time.perf_counter() - began


def seconds_a_token(runner: Any, steps: int, timed: Timed | None = None) -> float:
    """Decode `steps` tokens greedily through an engine of its own; with `timed`, the seconds outside it."""
    from puna.engine.engine import Engine
    from puna.types import Sampling

    engine = Engine(runner, pages=-(-(len(PROMPT) + steps + 1) // runner.page))
    engine.submit(PROMPT, Sampling(temperature=0, max_tokens=steps + 1))
    engine.step()  # the prompt, and the first token
    if timed is not None:
        timed.seconds = 0.0
    began = time.perf_counter()
    for _ in range(steps):
        engine.step()
    return (time.perf_counter() - began - (0.0 if timed is None else timed.seconds)) / steps


def measure(model: tuple[Any, Any], steps: int, pairs: int) -> dict[str, Any]:
    """Tokens/s of both runners, their ratio, and what a native step spends in Python."""
    from puna.engine.native_runner import NativeRunner
    from puna.engine.runner import HostRunner

    native, plain = NativeRunner(*model), HostRunner(*model)
    a, b = common.interleaved(pairs, lambda: seconds_a_token(native, steps), lambda: seconds_a_token(plain, steps))
    whole = native._decoder._decoder
    native._decoder._decoder = timed = Timed(whole)  # type: ignore[assignment]
    outside = [seconds_a_token(native, steps, timed) * 1e6 for _ in range(pairs)]
    native._decoder._decoder = whole
    return {
        "native_tokens_s": common.summary([1 / x for x in a]),
        "plain_tokens_s": common.summary([1 / x for x in b]),
        "ratio": common.ratio(b, a),
        "python_us": common.summary(outside),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="leave the 1B shape out")
    parser.add_argument("--pairs", type=int, default=11, help="interleaved pairs of each measurement")
    parser.add_argument("--threads", type=int, help="how many threads (default: what the machine allows)")
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/step.jsonl")
    options = parser.parse_args()
    from puna.kernels import cpu, ops

    ops.select("auto")
    if options.threads:
        cpu.set_threads(options.threads)
    row: dict[str, Any] = {"question": "step", "kernels": ops.summary(), "threads": cpu.threads()}
    row["stories15M_F32"] = measure(stories15m("F32"), 200, options.pairs)
    row["stories15M_Q8_0"] = measure(stories15m("Q8_0"), 200, options.pairs)
    row["cria"] = measure(embedded(), 200, options.pairs)
    if not options.small:
        row["llama3.2-1B_bf16"] = measure(llama1b(), 16, options.pairs)
    common.record("step", row | common.pedigree(), options.record)


if __name__ == "__main__":
    main()
