"""The GGUF models of a repository: which files make one, what each is called, and which of them a name means.

What it is: pure functions over the paths of files, for a listing of the hub (`hub_listing.py`) as for its cache.
What it is not: a look into the files. `org/name:Q4_K_M` means the file whose name says Q4_K_M, as people who publish
GGUFs name them and as llama.cpp and Ollama understand it.
What is surprising: two files may say the same type (two models in one repository); then only their whole names tell
them apart, and those are what they are called by: `org/name:small.Q4_K_M.gguf`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from puna.errors import HubError
from puna.weights.gguf import PART_NAME

PREFERRED = "Q4_K_M"
"""What a repository with several models gives where none is named, if it has that one: what llama.cpp takes too."""

TAG = re.compile(r"[\w][\w.+-]{0,127}", re.ASCII)
"""What may stand after the colon of `org/name:TAG`: a type, or the name of a file."""

# At most two folders deep; no part begins with a dot.
_PATH = re.compile(r"([\w][\w.+-]*/){0,2}[\w][\w.+-]*\.gguf", re.ASCII)
_TYPE = re.compile(
    r"(?:.*?[-._])?((UD-)?(I?Q\d+(_[A-Z0-9]+)*|TQ\d_\d|MXFP4(_MOE)?|BF16|FP?16|FP?32))", re.ASCII | re.IGNORECASE
)
# Projectors of vision models and importance matrices: GGUF files that are no models.
_NO_MODEL = re.compile(r"(.*[-._])?(mmproj|imatrix)([-._].*)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HubGGUF:
    """A model of a repository: `label` is what stands after the colon, `files` are its parts in order."""

    label: str
    files: tuple[str, ...]


def models_of(hub_id: str, paths: Iterable[str]) -> list[HubGGUF]:
    """The models among the files of a repository, by label.

    Raises:
        HubError: one that is split lacks parts.
    """
    parts: dict[tuple[str, int], dict[int, str]] = {}
    for path in sorted(paths):
        if not _PATH.fullmatch(path) or _NO_MODEL.fullmatch(path.rpartition("/")[2]):
            continue
        part = PART_NAME.fullmatch(path)
        whole = (part["stem"], int(part["count"])) if part else (path.removesuffix(".gguf"), 0)
        parts.setdefault(whole, {})[int(part["number"]) if part else 1] = path
    types = {}
    for (stem, count), numbered in parts.items():
        if list(numbered) != list(range(1, (count or 1) + 1)):
            raise HubError(
                f"{hub_id} has {len(numbered)} of the {count} parts of {stem}.", remedy="Ask for another of its files."
            )
        said = _TYPE.fullmatch(stem.rpartition("/")[2])
        types[stem, count] = said[1].upper() if said else ""
    often = Counter(types.values())
    found = []
    for (stem, count), kind in types.items():
        label = kind if kind and often[kind] == 1 else f"{stem.rpartition('/')[2]}.gguf"
        found.append(HubGGUF(label, tuple(parts[stem, count].values())))
    return sorted(found, key=lambda model: model.label)


def choose(hub_id: str, models: list[HubGGUF], tag: str | None) -> HubGGUF:
    """The model that `tag` names (a type or a file's name, whatever its case); without one, the only one or PREFERRED.

    Raises:
        HubError: there is none such, or none is named where there are several without PREFERRED; says which there are.
    """
    if tag is None:
        fitting = models if len(models) == 1 else [model for model in models if model.label == PREFERRED]
    else:
        fitting = [model for model in models if is_called(model.label, model.files, tag)]
    if len(fitting) == 1:
        return fitting[0]
    labels = [model.label for model in models]
    if tag is None:
        raise HubError(
            f"{hub_id} has {len(models)} GGUF models: {', '.join(labels)}.", remedy=f"Name one: {hub_id}:{labels[0]}"
        )
    raise HubError(
        f"{hub_id} has no GGUF of {tag}" + (f"; it has {', '.join(labels)}." if labels else ", nor any other."),
        remedy=f"Name one of them: {hub_id}:{labels[0]}" if labels else f"Ask for {hub_id} alone.",
    )


def is_called(label: str, files: Iterable[str], tag: str) -> bool:
    """Whether `tag` means the model of this label and these files, by label or by the name of a file."""
    return tag.lower() in (label.lower(), *(file.rpartition("/")[2].lower() for file in files))
