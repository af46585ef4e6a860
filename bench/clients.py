"""How much do many clients get at once, and how long do they wait? Engines under the same load, in turns.

Each engine is loaded once in a process of its own; a turn puts the load on each. `--rate` is in requests a second, or
as a share of the best peer's own rate in a closed loop before (`0.7x`). A ratio is above 1 where Puna is better.

    python bench/clients.py --model 1b.gguf --against llama-server,openvino --server llama-server --requests 32 --record
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common

from puna.bench import engines
from puna.bench.compare import paired_ratio
from puna.bench.worker import EngineSpec, Worker
from puna.cli import terminal

LARGER_IS_BETTER = ("tokens_per_second",)
SMALLER_IS_BETTER = ("first_p50", "first_p90", "between_p50", "between_p90")


def specs(options: argparse.Namespace, target: engines.Target) -> list[EngineSpec]:
    """Puna, and the peers that were named."""
    ours = engines.ours(target, options.threads)
    room = options.clients * (options.prompt + options.new + 64)
    found = []
    for step_tokens in options.step_tokens.split(",") if options.step_tokens else (None,):
        name = ours.name + (f" step_tokens={step_tokens}" if step_tokens else "")
        extra = {"room": room, "step_tokens": step_tokens and int(step_tokens)}
        found.append(EngineSpec(name, ours.module, ours.arguments | extra))
    for peer in options.against.split(",") if options.against else ():
        if peer == "puna-serve":
            arguments = {"model": str(target.path), "vocabulary": target.config.vocab_size}
            found.append(EngineSpec(peer, "puna.bench.puna_server", arguments))
        elif peer == "llama-server":
            arguments = {
                "server": str(options.server), "model": str(target.path), "threads": options.threads,
                "slots": options.clients, "context": options.prompt + options.new + 64,
                "vocabulary": target.config.vocab_size,
            }  # fmt: skip
            found += [
                EngineSpec(
                    f"llama-server repack={'on' if repack else 'off'}",
                    "puna.bench.peers.llama_server",
                    arguments | {"repack": repack},
                )
                for repack in (True, False)
                if options.repack in ("both", "on" if repack else "off")
            ]
        else:
            found += engines.specs([peer], target, options.threads, options.peer_python, terminal.note)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF; `puna bench --shape` makes one")
    parser.add_argument("--against", help="llama-server, openvino, puna-serve")
    parser.add_argument("--server", type=Path, help="llama.cpp's llama-server, for --against llama-server")
    parser.add_argument(
        "--repack", choices=("both", "on", "off"), default="both", help="llama-server's regrouping of weights on load"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has the peers")
    parser.add_argument(
        "--name", default="llama3.2:1b", help="the model's short name: a peer's file is made of its shape"
    )
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--shared", type=int, default=0, help="tokens at a prompt's start that are the same in all")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--rate", default="0", help="requests a second, or `0.7x` of the best peer; 0: a closed loop")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--step-tokens", help="what Puna computes in a step at most; several are several engines")
    parser.add_argument("--record", action="store_true", help="append the row to bench/results")
    options = parser.parse_args()
    target, _ = engines.target_of_model(options.model, options.name)
    load = {key: getattr(options, key) for key in ("requests", "clients", "prompt", "new", "shared")}
    taken: dict[str, list[dict[str, float]]] = {}
    counts: dict[str, dict[str, float]] = {}
    workers = {spec.name: Worker(spec) for spec in specs(options, target)}
    ours = [name for name in workers if name.startswith(engines.OURS)]
    counting = [name for name in ours if name != "puna-serve"]  # over HTTP nobody tells the engine's counts
    try:
        for name, worker in workers.items():
            worker.ask("load")
            worker.ask("clients", load=load | {"requests": 2, "clients": 2, "prompt": 64, "new": 8, "shared": 0})
            taken[name] = []
        rate = float(options.rate.removesuffix("x"))
        if options.rate.endswith("x"):
            rate *= best_peer({name: worker for name, worker in workers.items() if name not in ours}, load)
        before = {name: workers[name].ask("counts") for name in counting}
        for turn in range(options.turns):
            for name, worker in list(workers.items())[:: 1 if turn % 2 == 0 else -1]:
                taken[name].append(worker.ask("clients", load=load | {"rate": rate, "seed": turn})["figures"])
                terminal.note(f"{name}: {taken[name][-1]}")
        for name in counting:
            counts[name] = {key: value - before[name][key] for key, value in workers[name].ask("counts").items()}
    finally:
        for worker in workers.values():
            worker.close()
    row: dict[str, Any] = {
        "question": f"clients {options.model.stem}, {f'Poisson {options.rate}' if rate else 'closed loop'}",
        **load,
        "rate": f"{options.rate} = {rate:.3f}" if rate else "closed",
        "turns": options.turns,
    }
    for name, figures in taken.items():
        row[name] = {key: round(statistics.median(each[key] for each in figures), 4) for key in figures[0]}
        if name in counting:
            row[name]["steps"] = steps(counts[name])
        if name != ours[0]:
            row[name]["ratio"] = {
                key: round(paired_ratio(*pair).median, 3)
                for key in (*LARGER_IS_BETTER, *SMALLER_IS_BETTER)
                if (pair := pair_of(taken[ours[0]], taken[name], key)) is not None
            }
    common.record("clients", row | common.pedigree(), options.record)


def steps(counts: dict[str, float]) -> dict[str, float]:
    """Of the engine's steps: how many, milliseconds of each part in the mean, and the share that is not the model."""
    parts = {part: counts[f"{part}_seconds"] for part in ("schedule", "run", "sample")}
    own = (parts["schedule"] + parts["sample"]) / sum(parts.values())
    each = {f"{part}_ms": round(1e3 * seconds / counts["steps"], 3) for part, seconds in parts.items()}
    return {"steps": counts["steps"], **each, "own": round(own, 4)}


def best_peer(peers: dict[str, Worker], load: dict[str, Any]) -> float:
    """Requests a second that the best peer answers when it always has enough of them.

    Raises SystemExit where there is no peer.
    """
    if not peers:
        raise SystemExit("--rate as a share of the best peer's needs --against.")
    asked = load | {"seed": 1000}
    rates: list[float] = [
        worker.ask("clients", load=asked)["figures"]["requests_per_second"] for worker in peers.values()
    ]
    return max(rates)


def pair_of(
    ours: list[dict[str, float]], theirs: list[dict[str, float]], key: str
) -> tuple[list[float], list[float]] | None:
    """Ours and theirs so that the ratio is above 1 where ours is better; None where one is 0."""
    pair = [each[key] for each in ours], [each[key] for each in theirs]
    if not all(pair[0]) or not all(pair[1]):
        return None
    return pair if key in LARGER_IS_BETTER else (pair[1], pair[0])


if __name__ == "__main__":
    main()
