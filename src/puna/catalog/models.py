"""The released models of the family, and the names people call them by.

What it is: `models.json` read into `CatalogEntry` records, one for each published checkpoint (`llama3.2:1b` and
`llama3.2:1b-base` are two), and `lookup`, which finds one by short name, hub id or the model's own name.
What it is not: a gate. A hub id that is not in the catalog can be pulled and run all the same. Prompt Guard is left
out: it is a DeBERTa classifier, not a Llama, and `lookup` says so.
What is surprising: the short name of a size means its chat or instruct checkpoint where there is one; the pretrained
one is asked for with `-base` (`llama3.2:1b-base`), Code Llama's third form with `-python`. A generation alone
(`llama3.2`) names no model, because a guess at the size may cost a hundred gigabytes.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from puna.errors import HubError

if TYPE_CHECKING:
    from collections.abc import Mapping

# Where a hub model's licence is read and accepted. A fact about the public hub, so a mirror (HF_ENDPOINT) does not
# change it: mirrors pass on what was accepted there.
HUB_PAGE = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One published checkpoint.

    `params` is every weight once (a tied head is not counted twice), `vision_params` those of them that only a picture
    uses: the vision encoder's and the projector's. `params_stated` is Meta's own word; `ffn_dim` is the width of the
    SwiGLU's hidden layer; `context_length` is in tokens. `rope_scaling` is spelled as the hub's config.json spells it,
    or None; so are `text_config`, which has the keys of a Llama 4 or a Llama that sees beside those above, and
    `vision_config`, empty where it does not see.
    """

    short_name: str
    aliases: tuple[str, ...]
    name: str
    generation: str
    variant: str
    hub_id: str
    architecture: str
    released: str
    params: int
    params_stated: str
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    context_length: int
    tied: bool
    licence: str
    licence_name: str
    gated: bool
    note: str
    meta_folders: tuple[str, ...]
    meta_shards: int
    text_config: Mapping[str, Any]
    vision_config: Mapping[str, Any]
    vision_params: int

    @property
    def licence_page(self) -> str:
        """The page where the licence is read, and accepted where the model is gated."""
        return f"{HUB_PAGE}/{self.hub_id}"

    @property
    def download_bytes(self) -> int:
        """About what `puna pull` fetches: the released weights take two bytes a parameter."""
        return 2 * self.params


@cache
def entries() -> tuple[CatalogEntry, ...]:
    """Every checkpoint of the catalog, oldest generation first, each size's default variant before its others."""
    data = json.loads(resources.files(__package__).joinpath("models.json").read_text(encoding="utf-8"))
    found = []
    for size in data["models"]:
        facts = {key: value for key, value in size.items() if key not in ("short", "aliases", "variants")}
        for index, (variant, own) in enumerate(size["variants"].items()):
            suffixed = [f"{short}-{variant}" for short in (size["short"], *size.get("aliases", ()))]
            # The default variant goes by the bare name and answers to the suffixed one too.
            names = [size["short"], *size.get("aliases", ()), *suffixed] if index == 0 else suffixed
            merged = {
                "note": "", "meta_shards": 0, "meta_folders": (), "text_config": {}, "vision_config": {},
                "vision_params": 0,
                **facts, **own,
            }  # fmt: skip
            merged["meta_folders"] = tuple(merged["meta_folders"])
            found.append(
                CatalogEntry(
                    short_name=names[0],
                    aliases=tuple(names[1:]),
                    variant=variant,
                    licence_name=data["licences"][size["licence"]],
                    **merged,
                )
            )
    return tuple(found)


@cache
def _by_name() -> dict[str, CatalogEntry]:
    """Lower-case name (short names, aliases, hub ids, the last part of hub ids) to entry."""
    index: dict[str, CatalogEntry] = {}
    for entry in entries():
        hub_name = entry.hub_id.split("/")[1].lower()
        for name in (entry.short_name, *entry.aliases, entry.hub_id.lower(), hub_name, hub_name.removesuffix("-hf")):
            index.setdefault(name, entry)
    return index


def find(name: str) -> CatalogEntry | None:
    """The entry called `name` (short name, hub id, or the model's own name; case does not matter), or None."""
    return _by_name().get(name.strip().lower())


def lookup(name: str) -> CatalogEntry:
    """The entry called `name`, as `find` does.

    Raises:
        HubError: no model of the catalog has that name; the remedy offers the nearest ones. For a model that articles
            made up (a Llama 4.1, a 405B Llama 4) the message says what is true.
    """
    entry = find(name)
    if entry is None:
        from puna.catalog.facts import correction

        if (wrong := correction(name)) is not None:
            raise HubError(wrong.says, remedy=f"Did you mean {' or '.join(wrong.see)}?")
        raise HubError(f"There is no model called {name!r} in the catalog.", remedy=_suggestion(name))
    return entry


def _suggestion(name: str) -> str:
    """What the person may have meant: the sizes of a generation, or the nearest spellings."""
    asked = name.strip().lower()
    sizes = [entry.short_name for entry in entries() if entry.generation == asked]
    if sizes:
        return f"Name the size too: {', '.join(sizes)}."
    forms = [entry.short_name for entry in entries() if asked.startswith(entry.short_name)]
    if forms:
        # The size is right and the form is not: llama3.2:1b-chat.
        size = forms[0]
        forms = [entry.short_name for entry in entries() if entry.short_name.startswith(size)]
        return f"Did you mean {' or '.join(forms)}?"
    nearest = difflib.get_close_matches(asked, _by_name(), n=8, cutoff=0.6)
    # Several spellings of one model are one suggestion.
    close = list(dict.fromkeys(_by_name()[match].short_name for match in nearest))[:3]
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return "`puna models` lists the short names; any other model goes by its hub id, org/name."
