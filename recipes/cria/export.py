"""Writes a checkpoint of train.py as the folder that ships in the package, which transformers loads as well.

What it is: safetensors in bf16 under the hub's names, with the configs beside it.
What it is not: the model card; README.md in that folder is written by people.
What is surprising: each file is replaced at once by a finished one, the weights last, so that a program that starts
meanwhile finds a whole model.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from prepare import BOS, BOS_ID, EOS, EOS_ID, WORK
from safetensors.torch import save
from train import CONFIG

from puna.models.config import write_hub
from puna.weights.names import foreign

PACKAGE = Path(__file__).parents[2] / "src" / "puna" / "data" / "cria"
"""Where the embedded model lies."""


def main() -> None:
    """Read checkpoint.pt and tokenizer.json of the work folder; write the five files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=WORK, help="folder of train.py's checkpoint (default: %(default)s)"
    )
    parser.add_argument("--to", type=Path, default=PACKAGE, help="folder to write to (default: %(default)s)")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)

    state = torch.load(args.work / "checkpoint.pt", weights_only=True)
    tensors = {foreign(name, "hub"): p.to(torch.bfloat16).contiguous() for name, p in state["parameters"].items()}
    jsons = {
        "config.json": write_hub(CONFIG, dtype="bfloat16", bos_id=BOS_ID, eos_ids=[EOS_ID]),
        "generation_config.json": {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "model_max_length": CONFIG.context_length,
            "clean_up_tokenization_spaces": False,
        },
    }
    partial = args.to / ".partial"
    for name, value in jsons.items():
        partial.write_text(json.dumps(value, indent=2) + "\n")
        os.replace(partial, args.to / name)
    partial.write_bytes((args.work / "tokenizer.json").read_bytes())
    os.replace(partial, args.to / "tokenizer.json")
    partial.write_bytes(save(tensors, metadata={"format": "pt"}))
    os.replace(partial, args.to / "model.safetensors")
    print(f"step {state['step']}, {state['tokens']} tokens: {args.to}")


if __name__ == "__main__":
    main()
