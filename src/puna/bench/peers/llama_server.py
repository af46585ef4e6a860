"""llama.cpp's own server, spoken to over HTTP on this machine: its continuous batching is there, not in the library.

What is surprising: it is a program that has to be built (`tools/server` of llama.cpp), so its path is an argument.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from puna.bench.over_http import ServerUnderLoad
from puna.bench.protocol import serve


class LlamaServer(ServerUnderLoad):
    """See load.Serving."""

    def __init__(
        self, server: str, model: str, threads: int, repack: bool, slots: int, context: int, vocabulary: int
    ) -> None:
        self.vocabulary = vocabulary
        asked = subprocess.run([server, "--version"], capture_output=True, text=True)
        self.version = (asked.stderr + asked.stdout).partition("version:")[2].strip().splitlines()[0]

        def command(port: int) -> list[str]:
            return [
                server, "-m", model, "-t", str(threads), "-np", str(slots), "-c", str(slots * context),
                "--host", "127.0.0.1", "--port", str(port), "--no-warmup",
                *([] if repack else ["--no-repack"]),
            ]  # fmt: skip

        def body(prompt: list[int], new: int) -> dict[str, Any]:
            return {
                "prompt": prompt, "n_predict": new, "stream": True, "ignore_eos": True, "temperature": 0,
                "cache_prompt": True, "return_tokens": True,
            }  # fmt: skip

        super().__init__(command, "/completion", body, lambda piece, before: len(piece.get("tokens") or ()))


if __name__ == "__main__":
    engine = LlamaServer(**json.loads(sys.argv[1]))
    serve(engine)
    engine.close()
