"""Does a mixture larger than memory answer? A file 1.5 times the available memory, of which a token needs a part.

The model has Scout's layers in small and random weights: 16 experts a layer, of which a token passes one, and all of
it in Q8_0. A helper process takes memory until the file is 1.5 times what is left. It locks it, and where it may not,
a system without swap keeps it all the same. Then Puna loads the file in a process of its own, whose pages of it the
system has been told to forget, says what it does about it, and answers. Bytes read from the disk are the kernel's count
of that process.

The helper lets go, and ends, when less than `--floor` is left: it must never be what ends another process, and the
kernel is told to end it before any other.

    python bench/larger_than_memory.py --file 7.5 --record
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common
from plan_memory import status

from puna.bench import shapes
from puna.models.llama4_config import Llama4Config, every
from puna.models.rope import Rope
from puna.weights import limits

OVER = 1.5
LAYER = 0.47e9
"""Bytes of a layer of the model below, about."""
ANSWER = 12


def config_of(size: float) -> Llama4Config:
    """A mixture whose file has about `size` bytes."""
    layers = round(size / LAYER / 4) * 4
    return Llama4Config(
        "llama4", vocab_size=32000, dim=2048, layers=layers, heads=16, kv_heads=4, head_dim=128, hidden_dim=8192,
        norm_eps=1e-5, rope=Rope(128, 5e5), context_length=8448, interleaved_rope=True, chunk=8192,
        global_layers=every(4, layers), expert_hidden_dim=4096, experts=16, experts_per_token=1,
        moe_layers=tuple(range(layers)), qk_norm=True,
    )  # fmt: skip


def helper(leave: int, floor: int) -> None:
    """Take memory until `leave` bytes are available, say so, and hold it until stdin ends or less than `floor` is."""
    Path("/proc/self/oom_score_adj").write_text("1000")
    swap = [line for line in limits.read_text(Path("/proc/meminfo")).splitlines() if line.startswith("SwapTotal")]
    held, locked = [], True
    mlock = ctypes.CDLL(None).mlock
    while (more := (limits.available() or 0) - leave) > 16 << 20:
        piece = mmap.mmap(-1, min(more, 256 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(piece))
        if locked and mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(piece))):
            locked = False
            if not swap or int(swap[0].split()[1]):
                raise SystemExit("memory can be locked only up to a limit here (ulimit -l), and there is swap")
        for at in range(0, len(piece), mmap.PAGESIZE):
            piece[at] = 1
        held.append(piece)
    print(json.dumps({"held": sum(map(len, held)), "locked": locked}), flush=True)
    done = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
    while not done.wait(0.1):
        if (limits.available() or 0) < floor:
            raise SystemExit("less than the floor is left: the memory is let go")


def read_bytes() -> int:
    """What this process had read from the disk."""
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])


def worker(path: Path) -> dict[str, Any]:
    """Load it and answer; what was told, and how long and how much each part took."""
    from puna.llm import LLM

    marks = [(time.perf_counter(), read_bytes())]

    def mark() -> dict[str, float]:
        marks.append((time.perf_counter(), read_bytes()))
        (began, before), (ended, after) = marks[-2:]
        return {"seconds": round(ended - began, 2), "read_gb": round((after - before) / 1e9, 3)}

    llm = LLM(path)
    found: dict[str, Any] = {"notes": [note for note in llm.notes if "available" in note], "loading": mark()}
    stream = iter(llm.stream([1], temperature=0.0, max_tokens=ANSWER, ignore_eos=True))
    next(stream)
    found["first_token"] = mark()
    rest = sum(1 for _ in stream)
    found["rest"] = mark() | {"pieces": rest}
    found["memory_gb"] = {key: round(value / 1e9, 3) for key, value in status().items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=float, default=7.5, help="gigabytes of the file, about")
    parser.add_argument("--floor", type=float, default=2.0, help="gigabytes that are to stay available to others")
    parser.add_argument(
        "--record", action="store_true", help="append the row to bench/results/larger-than-memory.jsonl"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--helper", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker)))
        return
    if options.helper:
        helper(options.helper, int(options.floor * 1e9))
        return
    config = config_of(options.file * 1e9)
    path = shapes.random_gguf(
        f"scout-{config.layers}-layers", config, "Q8_0", lambda text: print(text, file=sys.stderr)
    )
    size = path.stat().st_size
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    here = [sys.executable, __file__, "--floor", str(options.floor)]
    taking = subprocess.Popen(
        [*here, "--helper", str(int(size / OVER))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert taking.stdout is not None
        held = json.loads(taking.stdout.readline())
        available = limits.available() or 0
        done = subprocess.run([*here, "--worker", str(path)], capture_output=True, text=True)
        kept = taking.poll() is None
    finally:
        taking.communicate()
    if done.returncode or not kept:
        raise SystemExit(f"it ended with {done.returncode}; the helper held on: {kept}\n{done.stderr[-2000:]}")
    row = {
        "question": "larger-than-memory", "file_gb": round(size / 1e9, 2), "available_gb": round(available / 1e9, 2),
        "file_over_available": round(size / available, 2), "held_gb": round(held["held"] / 1e9, 2),
        "locked": held["locked"], **json.loads(done.stdout),
    }  # fmt: skip
    common.record("larger-than-memory", row | common.pedigree(), options.record)


if __name__ == "__main__":
    main()
