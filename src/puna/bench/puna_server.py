"""`puna serve` as an engine under load, over HTTP as its clients reach it.

What it is: the server's own answers, streamed, with everything that stands between a client and the engine.
What it is not: the engine alone (`ours.py`); what lies between the two figures is what HTTP costs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from puna import __version__
from puna.bench.over_http import ServerUnderLoad
from puna.bench.protocol import serve


class PunaServer(ServerUnderLoad):
    """See load.Serving."""

    def __init__(self, model: str, vocabulary: int) -> None:
        self.vocabulary, self.version = vocabulary, __version__

        def command(port: int) -> list[str]:
            return [sys.executable, "-m", "puna", "serve", model, "--port", str(port)]

        def body(prompt: list[int], new: int) -> dict[str, Any]:
            return {
                "model": "", "prompt": prompt, "max_tokens": new, "stream": True, "ignore_eos": True, "temperature": 0,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            }  # fmt: skip

        def made(piece: dict[str, Any], before: int) -> int:
            tokens: int = piece["usage"]["completion_tokens"]  # a piece holds several where its reader was behind
            return tokens - before

        super().__init__(command, "/v1/completions", body, made)


if __name__ == "__main__":
    engine = PunaServer(**json.loads(sys.argv[1]))
    serve(engine)
    engine.close()
