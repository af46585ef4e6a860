"""Does the server stay as it is? Mixed load for a long while: answers, streams that are left, bad requests, switches
between models; memory looked at all the time.

Models are served on demand in a process of its own, and only one of them has room at a time, so every switch loads one
and unloads another. Nothing may be lost: every request ends in an answer, or in the refusal that it asked for, but for
those whose client leaves. The first tenth is the warm-up; memory is flat where the last tenth is near the one after the
warm-up: in the mean (which model is loaded makes a difference, and a tenth has many turns) and at its peak.

    python bench/soak.py --models cria stories260K.gguf --memory 0.012 --home HOME --minutes 60 --record
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common
import httpx2

from puna.cli import terminal

KINDS = ("whole", "streamed", "left early", "left at once", "bad", "embedding", "structured", "ollama")
TURN = 7.0
"""Seconds after which all clients turn to another model."""


def looked_at(process: int) -> dict[str, int]:
    """What a process has now: bytes in memory, threads, open files."""
    folder = Path(f"/proc/{process}")
    return {
        "memory": int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "threads": len(list((folder / "task").iterdir())),
        "files": len(list((folder / "fd").iterdir())),
    }


async def once(client: httpx2.AsyncClient, kind: str, model: str, draw: random.Random) -> str:
    """Make a request of a kind; "ok", or what was wrong."""
    prompt = draw.choice(("Once upon a time", "The dog", "Tom and Lily went to the park", "One day")) * draw.randint(
        1, 9
    )
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": draw.randint(1, 120)}
    if kind == "bad":
        wrong = draw.choice(({"wings": 1}, {"temperature": -5}, {"max_tokens": -1}, {"model": "nobody"}, {"n": 10**9}))
        answer = await client.post("/v1/completions", json=body | wrong)
        return "ok" if answer.status_code in (400, 404, 422) else f"bad request got {answer.status_code}"
    if kind == "embedding":
        answer = await client.post("/v1/embeddings", json={"model": model, "input": [prompt, "a cat"]})
        return "ok" if answer.status_code == 200 and len(answer.json()["data"]) == 2 else f"embedding {answer.text}"
    if kind == "ollama":
        asked = {"model": model, "prompt": prompt, "raw": True, "stream": False, "options": {"num_predict": 30}}
        answer = await client.post("/api/generate", json=asked)
        return "ok" if answer.status_code == 200 and answer.json()["done"] else f"ollama {answer.text}"
    if kind == "structured":
        schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"],
                  "additionalProperties": False}  # fmt: skip
        asked = {"model": model, "prompt": prompt, "raw": True, "stream": False, "format": schema}
        answer = await client.post("/api/generate", json=asked | {"options": {"num_predict": 60}})
        if answer.status_code != 200:
            return f"structured {answer.text}"
        text = answer.json()["response"]
        return "ok" if json.loads(text)["x"] in (1, 2) else f"structured answer {text!r}"
    if kind == "whole":
        answer = await client.post("/v1/completions", json=body)
        return "ok" if answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] else answer.text
    if kind == "left at once":  # while it waits, loads a model, or answers
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(draw.expovariate(50)):
                await client.post("/v1/completions", json=body)
        return "ok"
    left = kind == "left early"
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        if answer.status_code != 200:
            return f"stream {answer.status_code}: {(await answer.aread())[:200]!r}"
        finished = ended = False
        async for line in answer.aiter_lines():
            if left:
                return "ok"
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                piece = json.loads(line[6:])
                finished = finished or any(choice["finish_reason"] for choice in piece.get("choices", ()))
    return "ok" if finished and ended else "a stream without an end"


async def client_of(url: str, models: list[str], end: float, seed: int, pause: float, counts: Counter[str]) -> None:
    """One client: a request of any kind after another, until the end."""
    draw = random.Random(seed)
    async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
        while time.monotonic() < end:
            kind = draw.choice(KINDS)
            model = models[int(time.monotonic() / TURN) % len(models)]
            if draw.random() < 0.03:  # one that is not loaded, as likely as not, while others use the one that is
                model = draw.choice(models)
            try:
                said = await once(client, kind, model, draw)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            counts[kind if said == "ok" else f"FAILED {kind}: {said[:120]}"] += 1
            await asyncio.sleep(draw.expovariate(1 / pause))


async def soak(url: str, process: int, models: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Put the load on the server; what came of it, and its memory over time."""
    counts: Counter[str] = Counter()
    began = time.monotonic()
    end = began + 60 * options.minutes
    clients = [client_of(url, models, end, seed, options.pause, counts) for seed in range(options.clients)]
    work = asyncio.gather(*clients)
    samples: list[dict[str, int]] = []
    while not work.done():
        samples.append(looked_at(process))
        if len(samples) % 60 == 1:
            now = samples[-1]
            seconds, megabytes = time.monotonic() - began, now["memory"] / 1e6
            told = f"{now['threads']} threads  {now['files']} files  {sum(counts.values())} requests"
            terminal.note(f"{seconds:5.0f} s  {megabytes:6.1f} MB  {told}")
        await asyncio.wait([work], timeout=1)
    await work
    return {"counts": dict(sorted(counts.items())), "samples": samples}


def flat(samples: list[dict[str, int]], key: str) -> dict[str, float]:
    """What there was of it in the tenth after the warm-up and in the last one, and how much more that is."""
    tenth = max(1, len(samples) // 10)
    row: dict[str, float] = {}
    after, last = ([sample[key] for sample in part] for part in (samples[tenth : 2 * tenth], samples[-tenth:]))
    for name, of in (("mean", statistics.mean), ("peak", max)):
        row |= {
            f"{name}_after_warm_up": round(of(after)),
            f"{name}_at_the_end": round(of(last)),
            f"{name}_growth": round(of(last) / of(after) - 1, 4),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="as for `puna serve`; any two should not fit")
    parser.add_argument("--memory", default="0.012", help="gigabytes that the models may take together")
    parser.add_argument("--home", type=Path, required=True, help="PUNA_HOME of the server: its files lie there")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds in the mean between a client's requests")
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/soak.jsonl")
    options = parser.parse_args()
    options.home.mkdir(exist_ok=True)
    server = subprocess.Popen(
        [sys.executable, "-m", "puna", "serve", *options.models, "--on-demand", "--memory", options.memory,
         "--port", "0", "--json", "--log", "line"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=(options.home / "server.log").open("w"),
        env=os.environ | {"PUNA_HOME": str(options.home)},
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        with httpx2.Client(base_url=url) as client:
            names = [model["id"] for model in client.get("/v1/models").json()["data"]]
            seen = asyncio.run(soak(url, server.pid, names, options))
            time.sleep(1)  # what clients left last is found out by now
            state = client.get("/puna/engine").json()
    finally:
        server.terminate()
        code = server.wait(60)
    failed = {what: n for what, n in seen["counts"].items() if what.startswith("FAILED")}
    for what, n in failed.items():
        terminal.note(f"{n} x {what}")
    common.record(
        "soak",
        {
            "question": "soak",
            "minutes": options.minutes,
            "clients": options.clients,
            "models": names,
            "requests": sum(seen["counts"].values()),
            "failed": sum(failed.values()),
            "by_kind": {kind: seen["counts"].get(kind, 0) for kind in KINDS},
            **{key: flat(seen["samples"], key) for key in ("memory", "threads", "files")},
            "left_running": len(state["streams"])
            + sum(model["running"] + model["waiting"] for model in state["models"]),
            "left_pages": sum(model["pages_used"] for model in state["models"]),
            "exit_code": code,
        }
        | common.pedigree(),
        options.record,
    )


if __name__ == "__main__":
    main()
