"""How fast is Puna on a GGUF beside llama.cpp and others? `puna bench` on random weights of a shape, recorded.

One row for a shape and type: each engine's median for each kind of work, the paired ratios with their intervals, what
the machine reached in the same run, and Puna's shares of that.

    python bench/gguf.py --shape llama3.2:1b --type Q4_K_M --against llama.cpp,openvino --full --record
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common


def row_of(found: dict[str, Any]) -> dict[str, Any]:
    """A document of `puna bench --json` as a row of results."""
    works: dict[str, dict[str, Any]] = {}
    for each in found["results"]:
        work = works.setdefault(each["work"], {"unit": each["unit"]})
        work[each["engine"]] = each["median"]
        if each["engine"] == "puna" and each["share_of_limit"] is not None:
            work["puna_share_of_limit"] = each["share_of_limit"]
    for each in found["pairs"]:
        figures = {key: each[key] for key in ("median", "low", "high", "pairs")}
        works[each["work"]].setdefault("ratio_to", {})[each["against"]] = figures
    if "load" in works:  # the machine's load has that name in every row
        works["loading"] = works.pop("load")
    versions = {each["engine"]: each["version"] for each in found["results"]}
    facts = {key: found[key] for key in ("model", "type", "weights_bytes", "threads")}
    facts["limits"] = found["machine"]
    return {"question": f"gguf {found['model']} {found['type']}", **facts, "versions": versions, **works}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append the row to bench/results")
    options, rest = parser.parse_known_args()  # the rest is for puna bench
    run = subprocess.run([sys.executable, "-m", "puna", "bench", *rest, "--json"], stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(run.returncode)
    row = row_of(json.loads(run.stdout))
    common.record(row["question"].replace(":", "-").replace(" ", "-"), row | common.pedigree(), options.record)


if __name__ == "__main__":
    main()
