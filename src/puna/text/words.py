"""Words: the texts of a whole vocabulary in one piece of memory.

What it is: how a file's reader hands 400,000 short texts on without making an object of each.
What it is not: decoded. A word is bytes.
What is surprising: it knows ends only; a word begins where the one before it ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Words:
    """Many words in one piece of memory: word i is `blob[ends[i - 1]:ends[i]]`."""

    blob: bytes
    ends: npt.NDArray[np.int64]

    def __repr__(self) -> str:
        return f"an array of {len(self)} texts"

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        return self.blob[int(self.ends[i - 1]) if i else 0 : int(self.ends[i])]

    def texts(self) -> list[str]:
        """Every word decoded, in order. Raises UnicodeDecodeError for one that is not UTF-8."""
        if b"\0" in self.blob:
            return [word.decode("utf-8") for word in self.to_list()]
        return self.between("\0").split("\0") if len(self) else []

    def between(self, mark: str) -> str:
        """All words decoded with an ASCII character between them. Raises UnicodeDecodeError for one not UTF-8."""
        blob = np.frombuffer(self.blob, np.uint8, int(self.ends[-1]))
        return np.insert(blob, self.ends[:-1], ord(mark)).tobytes().decode("utf-8")

    def to_list(self) -> list[bytes]:
        """Every word, in order."""
        ends = self.ends.tolist()
        blob = self.blob
        return [blob[a:b] for a, b in zip([0, *ends][:-1], ends, strict=True)]
