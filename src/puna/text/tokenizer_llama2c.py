"""llama2.c `tok*.bin`: the tokenizer of llama2.c's checkpoints, and the only merge that is our own.

What it is: the file (int32 longest length; then for each token float32 score, int32 length, its bytes) and run.c's
encoder, in O(n log n) where run.c is quadratic.
What it is not: sentencepiece, though it gives the same ids for the same vocabulary: `▁` is no space here.
What is surprising: the file does not say how many tokens it has; they go on to its end.
"""

from __future__ import annotations

import heapq
import math
import struct
from pathlib import Path

from puna.errors import TokenizerError
from puna.text.tokenizer import Tokenizer
from puna.text.tokenizer_files import REMEDY_FETCH, Beside

_FIRST_BYTE = 3  # <unk>, <s>, </s>, then one token for each of the 256 bytes


class Llama2cTokenizer(Tokenizer):
    """llama2.c `tok*.bin`: int32 longest length, then for each token float32 score, int32 length, its bytes.

    Encoding is run.c's: a space before the text, a token for each character (or, failing that, for each of its bytes),
    then the adjacent pair whose union has the best score is merged, leftmost first, until none is left.
    """

    def __init__(self, path: Path, data: bytes) -> None:
        self._scores: list[float] = []
        self._pieces: list[bytes] = []
        longest = struct.unpack_from("<i", data)[0]
        at = 4
        while at < len(data):
            if at + 8 > len(data):
                raise self._damaged(path, f"token {len(self._pieces)} is cut short")
            score, length = struct.unpack_from("<fi", data, at)
            at += 8
            if not 0 < length <= longest or at + length > len(data) or not math.isfinite(score):
                raise self._damaged(path, f"token {len(self._pieces)} has length {length} and score {score}")
            self._scores.append(score)
            self._pieces.append(data[at : at + length])
            at += length
        first = _FIRST_BYTE
        if self._pieces[first : first + 256] != [b"<0x%02X>" % b for b in range(256)]:
            raise self._damaged(path, "tokens 3 to 258 are not <0x00> to <0xFF>")
        special = {self._pieces[i].decode("utf-8", "replace").strip("\n"): i for i in range(first)}
        if len(special) != first:
            raise self._damaged(path, "tokens 0 to 2 are not three different special tokens")
        self._ids: dict[bytes, int] = {}
        for i in range(first + 256, len(self._pieces)):
            self._ids.setdefault(self._pieces[i], i)
        super().__init__(
            kind="llama2c",
            source=path,
            vocab_size=len(self._pieces),
            special=special,
            beside=Beside(),
            strips_space=True,
            byte_ids=range(first, first + 256),
        )
        if (self.bos_id, self.eos_id) != (1, 2):
            raise self._damaged(path, "tokens 1 and 2 are not <s> and </s>")

    @staticmethod
    def _damaged(path: Path, what: str) -> TokenizerError:
        return TokenizerError(f"{path} is a damaged llama2.c tokenizer: {what}.", remedy=REMEDY_FETCH)

    def _encode_ordinary(self, text: str) -> list[int]:
        if not text:
            return []
        symbols: list[int] = []
        for character in " " + text:
            raw = character.encode()
            known = self._ids.get(raw)
            symbols.extend([known] if known is not None else [_FIRST_BYTE + b for b in raw])
        return self._merge(symbols)

    def _merge(self, symbols: list[int]) -> list[int]:
        """Merge best pairs first, leftmost on a tie. A heap of candidate pairs over a linked list: O(n log n).

        An entry is stale, and skipped, when either of its two symbols has changed since it was pushed.
        """
        count = len(symbols)
        after, before = list(range(1, count + 1)), list(range(-1, count - 1))
        heap: list[tuple[float, int, int, int, int]] = []

        def push(left: int, right: int) -> None:
            if left < 0 or right >= count:
                return
            a, b = symbols[left], symbols[right]
            merged = self._ids.get(self._pieces[a] + self._pieces[b])
            if merged is not None:
                heapq.heappush(heap, (-self._scores[merged], left, a, b, merged))

        for left in range(count - 1):
            push(left, left + 1)
        while heap:
            _, left, a, b, merged = heapq.heappop(heap)
            right = after[left]
            if right >= count or symbols[left] != a or symbols[right] != b:
                continue
            symbols[left], symbols[right] = merged, -1
            after[left] = after[right]
            if after[left] < count:
                before[after[left]] = left
            push(before[left], left)
            push(left, after[left])
        return [s for s in symbols if s >= 0]

    def _ordinary_bytes(self, token_id: int) -> bytes:
        if token_id in self._byte_ids:
            return bytes([token_id - _FIRST_BYTE])
        return self._pieces[token_id]

    def _lookup(self, name: str) -> int | None:
        return self._ids.get(name.encode())
