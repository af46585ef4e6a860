"""What a copy of a Llama must carry with it: the Notice file with Meta's line, and a word on the agreement.

What it is: finding out under which agreement a checkpoint came, and what of its demands a conversion can meet.
What it is not: the agreements. Their texts are Meta's and are not in this package; a LICENSE that lies beside the
source is copied along by `convert`, and where there is none, the note says where to get it.
What is surprising: a fine-tuned model has a name of its own, and is known by the LICENSE file beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

from puna.catalog.licence import Licence, licence_of, licences, named_by, notice_file
from puna.weights.checkpoint import Checkpoint
from puna.weights.gguf_metadata import catalog_entry

NOTICE_NAME = "NOTICE"


def agreement_of(checkpoint: Checkpoint) -> Licence | None:
    """The agreement a checkpoint came under, or None where nothing says so: then nothing is claimed.

    What says so: its name and size in the catalog, a GGUF's metadata, a LICENSE file beside it.
    """
    entry = catalog_entry(checkpoint)
    if entry is not None:
        return licence_of(entry)
    if checkpoint.gguf is not None:
        said = checkpoint.gguf.metadata.get("general.license")
        return licences().get(said) if isinstance(said, str) else None
    beside = checkpoint.path.is_dir() or checkpoint.format in ("safetensors", "meta")
    for path in sorted(checkpoint.folder.iterdir()) if beside else ():
        if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE")):
            with path.open("rb") as file:
                found = named_by(file.read(2000).decode("utf-8", errors="replace"))
            if found is not None:
                return found
    return None


def notice(checkpoint: Checkpoint, beside: Sequence[str], notes: list[str]) -> str | None:
    """The text of the Notice file to write beside a copy, None where there is one or none is asked for.

    `beside` are the names of the files that are copied along; what is still missing goes into `notes`.
    """
    agreement = agreement_of(checkpoint)
    if agreement is None:
        return None
    if not agreement.notice:
        notes.append(f"{agreement.name}: it gives no right to pass the copy on")
        return None
    if not any(name.upper().startswith(("LICENSE", "LICENCE")) for name in beside):
        notes.append(
            f"who passes the copy on gives the {agreement.name} with it, which was not beside the source: "
            f"{agreement.text}"
        )
    if any(name.upper().startswith(NOTICE_NAME) for name in beside):
        return None
    return notice_file(agreement)


def note_on_file(checkpoint: Checkpoint, notes: list[str]) -> None:
    """What must lie beside a single file that is passed on, for which there is no folder to put it into."""
    agreement = agreement_of(checkpoint)
    if agreement is not None and agreement.notice:
        notes.append(
            f"who passes the file on puts a Notice beside it that says “{agreement.notice}”, and the {agreement.name}: "
            f"{agreement.text}"
        )
