"""EleutherAI's lm-evaluation-harness, with tasks of its own kinds over a file of questions."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
from checks import BASE, KEY, URL, check, run

TASKS = Path(tempfile.mkdtemp())
QUESTIONS = [
    {"question": "Once upon a", "choices": [" time", " fish"], "answer": 0},
    {"question": "The little girl was very", "choices": [" happy", " the"], "answer": 0},
]
(TASKS / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
SHARED = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {TASKS}/questions.jsonl
test_split: test
doc_to_text: "{{{{question}}}}"
"""
(TASKS / "choice.yaml").write_text(
    "task: puna_choice\noutput_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\n" + SHARED
)
(TASKS / "say.yaml").write_text(
    "task: puna_say\noutput_type: generate_until\ndoc_to_target: ' time'\n"
    "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 12\n  temperature: 0\n" + SHARED
)


@check("local-completions: multiple choice by log-likelihood (echo with logprobs), and generation")
def evaluate() -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    os.environ["OPENAI_API_KEY"] = KEY
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": BASE, "base_url": f"{URL}/v1/completions",
            "tokenizer_backend": "remote", "tokenized_requests": True,
            "auth_token": KEY, "num_concurrent": 2, "max_retries": 1, "max_length": 512,
        },
        tasks=["puna_choice", "puna_say"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
    )  # fmt: skip
    assert found["results"]["puna_choice"]["acc,none"] == 1.0


run()
