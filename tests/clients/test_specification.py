"""Our own OpenAPI description, taken at its word by schemathesis: 10,000 requests, most of them broken in some way.

What it is: no answer is an error of the server's, none has a status, type or form that the description does not name,
and none lets one wait. The model behind is a script, and goes by every name that a model could have, since made-up
requests would be answered 404 otherwise: this is about HTTP.
What is surprising: schemathesis has an environment of its own, as the clients have. `/api/pull` is left out: it asks a
hub on the network for whatever name is made up (its own tests have a hub of their own).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_clients import Client, _free_port, interpreter

pytestmark = pytest.mark.clients

SCHEMATHESIS = Client("schemathesis", "Schemathesis", ("schemathesis",), "schemathesis")
SERVING = """
import sys
import uvicorn
from puna.gateway.one import OneModel
from puna.gateway.scripted import ScriptedBackend
from puna.server.app import create_app

class AnyName(OneModel):
    def _check(self, name):
        pass

uvicorn.run(create_app(AnyName(ScriptedBackend())), port=int(sys.argv[1]), log_level="warning")
"""
CASES = int(os.environ.get("PUNA_SPEC_CASES", "10000"))


@pytest.fixture
def scripted() -> Iterator[str]:
    """The address of a server whose model is a script."""
    port = _free_port()
    process = subprocess.Popen([sys.executable, "-c", SERVING, str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def test_the_description_is_kept(scripted: str, tmp_path: Path) -> None:
    with urllib.request.urlopen(f"{scripted}/openapi.json", timeout=30) as answer:
        operations = len(re.findall(rb'"operationId"', answer.read()))
    assert operations > 30
    # The phase of coverage makes more than half of the cases, whatever is asked.
    done = subprocess.run(
        [
            str(Path(interpreter(SCHEMATHESIS)[0]).with_name("schemathesis")), "run", f"{scripted}/openapi.json",
            "--phases", "coverage,fuzzing",
            "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,"
                        "response_schema_conformance",
            "--exclude-path", "/api/pull",
            "--max-examples", str(CASES // operations // 2), "--request-timeout", "20", "--workers", "2",
            "--continue-on-failure", "--no-color", "--suppress-health-check", "all",
        ],
        capture_output=True, text=True, timeout=3000, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20000:]
    cases = int(re.search(r"([\d,]+) generated", done.stdout)[1].replace(",", ""))  # type: ignore[index]
    assert cases >= CASES * 0.9, done.stdout[-2000:]
