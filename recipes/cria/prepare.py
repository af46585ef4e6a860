"""Cria's data: cleans the stories, trains the tokenizer on them, and writes both as token ids.

What it is: the first of four scripts (prepare, train, export, evaluate); everything it writes goes to the work folder.
What it is not: a download. README.md beside it says where the data set is found.
What is surprising: the held-out stories are filtered against the training stories by their eight-word stretches, since
story collections overlap, and a story with a new name in it is not a new story.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

WORK = Path(__file__).parents[2] / ".cria"
"""The work folder of all four scripts unless told otherwise; git ignores it."""

SEPARATOR = "<|endoftext|>"
BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1
VOCAB_SIZE = 2048

SHINGLE = 8
"""Words in a stretch. Two stories that share an opening formula share one or two stretches of this length."""
MOST_SHARED = 0.2
"""A held-out story with more than this share of its stretches found in the training stories is dropped."""

ASCII = str.maketrans(
    {"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "`": "'", "–": "-", "—": "-", "…": "...", "\u00a0": " "}
)
STRANGE = re.compile(r"[^\n -~éèêëáàâäíìîïóòôöúùûüñç]", re.IGNORECASE)
"""Anything but printable ASCII and the accented letters of borrowed words: in these files, broken encodings."""


def clean(story: str) -> str | None:
    """One story in plain quotes and single line breaks; None for one that is broken or cut off."""
    text = story.translate(ASCII).replace("''", '"').replace("\r", "")
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.split("\n"))
    text = "\n".join(line for line in lines if line)
    if STRANGE.search(text) or text.count('"') % 2 or not re.search(r"[.!?][\"']?$", text):
        return None
    return text


def read(paths: Iterable[Path]) -> tuple[list[str], int]:
    """The cleaned, distinct stories of files in which a line `<|endoftext|>` ends each, and how many were dropped."""
    stories: dict[str, None] = {}
    seen = 0
    for path in paths:
        for raw in path.read_text(encoding="utf-8").split(SEPARATOR):
            if raw.strip():
                seen += 1
                if (text := clean(raw)) is not None:
                    stories[text] = None
    return list(stories), seen - len(stories)


def shingles(story: str) -> set[int]:
    """Hashes of a story's stretches of SHINGLE words, letters only."""
    words = re.findall(r"[a-z]+", story.lower())
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1)}


def without_overlap(held_out: Sequence[str], training: Sequence[str]) -> list[str]:
    """The held-out stories that are not, by MOST_SHARED, retold in the training stories."""
    known = set().union(*(shingles(s) for s in training))
    return [s for s in held_out if (own := shingles(s)) and len(own & known) <= MOST_SHARED * len(own)]


def train_tokenizer(stories: Iterable[str]) -> Tokenizer:
    """Byte-level BPE of VOCAB_SIZE entries, whose texts begin with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(stories, trainer)
    begin = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    tokenizer.post_processor = begin  # type: ignore[assignment]
    assert (tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)) == (BOS_ID, EOS_ID)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def encode(tokenizer: Tokenizer, stories: Sequence[str]) -> np.ndarray:
    """BOS story EOS, one after the other: uint16 [tokens]."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(stories), add_special_tokens=False):
        ids += [BOS_ID, *encoding.ids, EOS_ID]
    return np.array(ids, np.uint16)


def main() -> None:
    """Read, clean, split, train the tokenizer, encode, and write train.npy, held_out.npy, tokenizer.json, data.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="files of training stories")
    parser.add_argument("--held-out", type=Path, required=True, help="file of held-out stories")
    parser.add_argument("--work", type=Path, default=WORK, help="folder to write to (default: %(default)s)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    training, dropped = read(args.train)
    held_out, held_dropped = read([args.held_out])
    kept = without_overlap(held_out, training)
    tokenizer = train_tokenizer(training)
    tokenizer.save(str(args.work / "tokenizer.json"))
    facts: dict[str, dict[str, int]] = {}
    for name, stories, lost in (("train", training, dropped), ("held_out", kept, held_dropped)):
        ids = encode(tokenizer, stories)
        np.save(args.work / f"{name}.npy", ids)
        facts[name] = {
            "stories": len(stories),
            "dropped_as_broken_or_double": lost,
            "utf8_bytes": sum(len(s.encode()) for s in stories),
            "tokens": len(ids),
        }
    facts["held_out"]["dropped_as_overlap"] = len(held_out) - len(kept)
    (args.work / "data.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
