"""How fast each C++ op is: one JSON line an op, shape, weight type and instruction set.

What it is: medians of repeated calls on this machine, with GB/s of the bytes that must be read and GFLOP/s of the
arithmetic that must be done, for the shapes of Llama 3.2 1B (and tiny ones, where only the overhead counts).
What it is not: a comparison with anyone; `bench/decoder.py` runs a whole model beside transformers.
What is surprising: a busy machine halves everything; each line carries the load average, and `best` beside `median`.

    python bench/kernels.py [--isa avx512,avx2] [--threads 2] [--only linear] [--seconds 0.5]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from puna.engine.runner import PAGE
from puna.kernels import cpu
from puna.kernels import reference as ref
from puna.kernels.blocks import TYPES
from puna.kernels.layouts import BF16, Packed, page_table

Case = tuple[str, str, Callable[[], object], float, float]
"""Op, shape in words, the call, bytes read, floating-point operations."""

rng = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return rng.standard_normal(shape, dtype=np.float32)


def weight(dtype: str, out: int, inner: int) -> Any:
    """Random weights of a type: small numbers, made without a float32 copy of a large matrix."""
    if dtype == "fp32":
        return normal(out, inner)
    words = rng.integers(0, 1 << 16, (out, inner), dtype=np.uint16)
    if dtype == "fp16":
        return ((words & 0x83FF) | 0x2800).view(np.float16)
    return BF16((words & 0x807F) | 0x3D00)


def linears() -> Iterator[Case]:
    for out, inner in ((8192, 2048), (2048, 8192), (2048, 2048), (512, 2048), (128256, 2048)):
        for dtype in ("bf16", "fp16", "fp32"):
            w = weight(dtype, out, inner)
            for rows in (1, 2, 4, 8, 12, 16, 32, 128, 512):
                if out > 100_000 and rows > 1:
                    continue
                x = normal(rows, inner)
                shape = f"{rows} x {inner} -> {out} {dtype}"
                yield "linear", shape, lambda x=x, w=w: cpu.linear(x, w), w.nbytes, 2.0 * rows * inner * out


PACKED = ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
BEYOND_CACHE = 200 << 20
"""Bytes of copies of one matrix that few rows go through in turn, so that weights come from memory as in a model."""


def packed_linears() -> Iterator[Case]:
    """Products with packed weights, and `prepare`. With more than 12 rows the copies make no difference: one serves."""
    for out, inner in ((8192, 2048), (2048, 8192), (128256, 2048)):
        for kind in PACKED:
            row = TYPES[kind].row_bytes(inner)
            # Any bits are numbers; those of the scales are kept small, or results would be infinite.
            data = rng.integers(0, 128, (out, row), dtype=np.uint8) & 0x3B
            file = Packed(kind, (out, inner), data)
            call = lambda file=file: cpu.prepare(file)  # noqa: E731
            yield "prepare", f"{inner} -> {out} {kind}", call, float(file.nbytes), 0
            copies = [cpu.prepare(file) for _ in range(max(1, BEYOND_CACHE // file.nbytes))]
            for rows in (1, 2, 4, 8, 12, 16, 24, 32, 128, 512, 2048):
                if out > 100_000 and rows > 12:
                    continue
                used = copies if rows <= 12 else copies[:1]
                x = normal(rows, inner)
                call = lambda x=x, used=used: [cpu.linear(x, w) for w in used]  # noqa: E731
                flops = 2.0 * rows * inner * out * len(used)
                yield "linear", f"{rows} x {inner} -> {out} {kind}", call, float(file.nbytes * len(used)), flops
            x = normal(1, inner)
            call = lambda x=x, file=file: cpu.linear(x, file)  # noqa: E731
            shape = f"1 x {inner} -> {out} {kind} as in the file"
            yield "linear", shape, call, float(file.nbytes), 2.0 * inner * out


def attentions() -> Iterator[Case]:
    H, G, D = 32, 8, 64
    for T in (128, 512, 2048):
        q, k, v = normal(1, T, H, D), normal(1, T, G, D), normal(1, T, G, D)
        flops = 4.0 * H * D * T * (T + 1) / 2
        yield "attention", f"prefill {T}", lambda q=q, k=k, v=v: cpu.attention(q, k, v, None), 2.0 * k.nbytes, flops
    for B, S in ((1, 128), (1, 1024), (1, 8192), (8, 1024)):
        q, k, v = normal(B, H, D), *(normal(B * S // PAGE, PAGE, G, D) for _ in range(2))
        at = page_table([S - 1] * B, [1] * B, np.random.default_rng(0).permutation(B * S // PAGE).reshape(B, -1))
        call = lambda q=q, k=k, v=v, at=at: cpu.attention(q, k, v, at)  # noqa: E731
        yield "attention", f"decode {B} x {S}", call, 2.0 * k.nbytes, 4.0 * B * H * D * S


def others() -> Iterator[Case]:
    for rows, dim, hidden, heads, D in ((1, 64, 172, 8, 8), (1, 2048, 8192, 32, 64), (512, 2048, 8192, 32, 64)):
        x, norm = normal(1, rows, dim), np.ones(dim, np.float32)
        gate, up = normal(1, rows, hidden), normal(1, rows, hidden)
        q = normal(1, rows, heads, D)
        at = np.arange(rows, dtype=np.int32)[None]
        cos, sin = ref.rope_table(at, 10000.0 ** -np.linspace(0, 1, D // 2, dtype=np.float32))
        table, logits = weight("bf16", 1000, dim), normal(1, rows, dim)
        cache, pages = np.zeros((-(-rows // PAGE), PAGE, heads, D), np.float32), np.arange(-(-rows // PAGE))[None]
        table_of_pages = page_table([0], [rows], pages)
        shape = f"{rows} x {dim}"
        yield "rms_norm", shape, lambda x=x, w=norm: cpu.rms_norm(x, w, 1e-5), x.nbytes, 0
        yield "swiglu", f"{rows} x {hidden}", lambda g=gate, u=up: cpu.swiglu(g, u), 2 * gate.nbytes, 0
        yield "rope", shape, lambda q=q, c=cos, s=sin: cpu.rope(q, c, s, False), q.nbytes, 0
        yield "rope", shape + " interleaved", lambda q=q, c=cos, s=sin: cpu.rope(q, c, s, True), q.nbytes, 0
        yield "embedding", shape, lambda t=table, at=at: cpu.embedding(t, at), rows * dim * 2, 0
        yield "argmax", shape, lambda x=logits: cpu.argmax(x), x.nbytes, 0
        call = lambda c=cache, q=q[0], at=table_of_pages: cpu.write_kv(c, c, q, q, at)  # noqa: E731
        yield "write_kv", shape, call, 2 * q.nbytes, 0
    logits = normal(1, 128256)
    yield "argmax", "1 x 128256", lambda: cpu.argmax(logits), logits.nbytes, 0
    for inner, out in ((64, 64), (64, 172), (288, 288), (288, 768), (768, 288), (288, 32000)):
        x, w = normal(1, 1, inner), normal(out, inner)
        shape = f"1 x {inner} -> {out} fp32"
        yield "linear", shape, lambda x=x, w=w: cpu.linear(x, w), w.nbytes, 2.0 * inner * out
    q, k = normal(1, 8, 8), normal(8, PAGE, 4, 8)
    for s in (10, 200):
        at = page_table([s], [1], np.arange(8)[None])
        yield "attention", f"decode 8 heads of 8, {s} keys", lambda at=at: cpu.attention(q, k, k, at), 2.0 * s * 128, 0


def measure(call: Callable[[], object], seconds: float) -> tuple[float, float, int]:
    """Median and best seconds a call, and how many samples; short calls are timed in bunches."""
    call()
    start = time.perf_counter()
    call()
    bunch = max(1, int(2e-4 / (time.perf_counter() - start + 1e-9)))
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples) < 5:
        start = time.perf_counter()
        for _ in range(bunch):
            call()
        samples.append((time.perf_counter() - start) / bunch)
    samples.sort()
    return samples[len(samples) // 2], samples[0], len(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default=cpu.isas()[0], help="instruction sets, by commas (default: the fastest)")
    parser.add_argument("--threads", type=int, default=cpu.threads())
    parser.add_argument("--only", default="", help="only lines whose `op shape` holds this text")
    parser.add_argument("--seconds", type=float, default=0.5, help="time a line")
    args = parser.parse_args()
    cpu.set_threads(args.threads)
    for cases in (linears, packed_linears, attentions, others):
        for op, shape, call, read, flops in cases():
            if args.only not in f"{op} {shape}":
                continue
            for isa in args.isa.split(","):
                cpu.use(isa)
                median, best, samples = measure(call, args.seconds)
                row: dict[str, Any] = {"op": op, "shape": shape, "isa": isa, "threads": args.threads}
                row |= {"us": round(median * 1e6, 2), "best_us": round(best * 1e6, 2), "samples": samples}
                row |= {"GB/s": round(read / median / 1e9, 1)}
                if flops:
                    row["GFLOP/s"] = round(flops / median / 1e9, 1)
                row["load"] = round(os.getloadavg()[0], 1)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
