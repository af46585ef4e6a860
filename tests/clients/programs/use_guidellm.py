"""GuideLLM's load generator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import BASE, KEY, URL, check, run

PLACE = Path(tempfile.mkdtemp())
(PLACE / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Once upon a time, {i}"}) + "\n" for i in range(8)))


@check("a synchronous run of eight requests, none failed")
def load() -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "guidellm", "run", "--disable-console",
            "--backend", f"kind=openai_http,target={URL},model={BASE},api_key={KEY},request_format=/v1/completions",
            "--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=8",
            "--data", f"kind=json_file,path={PLACE}/prompts.jsonl",
            "--output", f"kind=json,path={PLACE}/report.json",
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    totals = json.loads((PLACE / "report.json").read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (8, 0), totals


run()
