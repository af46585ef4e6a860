"""Engines that share no code with transformers or with us, on files that we converted. Run by `make test-peers`.

What they gave is asserted in `make test` too: it is stories260K's published text, which the golden tests hold.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from puna.text.tokenizer import load_tokenizer
from puna.weights.convert import convert


@pytest.mark.peers
def test_ctranslate2_writes_the_golden_text_from_our_safetensors(reference: Path, tmp_path: Path) -> None:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    folder = reference / "checkpoints" / "stories260K"
    convert(folder / "stories260K.bin", tmp_path / "hub", to="safetensors", tokenizer=folder / "tok512.bin")
    tokens = [f"t{i}" for i in range(512)]

    class Loader(TransformersConverter):
        """llama2.c's tokenizer means nothing to transformers: name the ids instead."""

        def load_tokenizer(self, *_: object, **__: object) -> object:
            class Names:
                bos_token, eos_token, unk_token = "t1", "t2", "t0"

                def get_vocab(self) -> dict[str, int]:
                    return {token: i for i, token in enumerate(tokens)}

            return Names()

    Loader(str(tmp_path / "hub")).convert(str(tmp_path / "ct2"))
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu", compute_type="float32")
    result = generator.generate_batch(
        [["t1"]], max_length=256, sampling_topk=1, include_prompt_in_result=False, end_token="t2"
    )[0]
    words = load_tokenizer(folder / "tok512.bin")
    text = words.decode([1, *result.sequences_ids[0]], skip_special=True)
    expected = json.loads((folder / "expected_greedy.json").read_text())["text"]
    assert text.strip() == expected.strip()
