"""Limits by the minute: token buckets, in memory.

What it is: the arithmetic of "so many a minute", for keys and for addresses that send wrong ones.
What it is not: quotas of a day (`keys.py`): those are written down.
What is surprising: what an answer costs is known only when it has ended. A bucket may therefore be overdrawn, and then
lets nobody in until it has filled up again: over time the limit holds exactly, and nothing is guessed.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from ipaddress import IPv6Address, ip_address

MINUTE = 60.0


class Bucket:
    """Holds `most`, and fills up with so many a minute."""

    __slots__ = ("_at", "_level", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        self._level, self._at = float(most), time.monotonic()

    def level(self) -> float:
        """What is in it now; below 0 where it is overdrawn."""
        now = time.monotonic()
        self._level = min(float(self.most), self._level + (now - self._at) * self.most / MINUTE)
        self._at = now
        return self._level

    def take(self, count: float) -> None:
        """Take so much out, also more than there is."""
        self._level = self.level() - count

    def seconds_until(self, count: float) -> float:
        """How long until so much is in it."""
        return max(0.0, (count - self.level()) * MINUTE / self.most)


class Rates:
    """The buckets of every key that has limits of a minute."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def bucket(self, key: str, what: str, most: int | None) -> Bucket | None:
        """The bucket of a key for "requests" or "tokens", None where there is no limit. A limit that was changed
        begins full."""
        if most is None:
            return None
        found = self._buckets.get((key, what))
        if found is None or found.most != most:
            found = self._buckets[key, what] = Bucket(most)
        return found


def reset_in(seconds: float) -> str:
    """A time as OpenAI's `x-ratelimit-reset-…` headers have it: `1s`, `6m0s`."""
    whole = int(-(-seconds // 1))
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"


class Suspects:
    """How many wrong keys each address has sent, of the addresses that did so last."""

    def __init__(self, most: int, addresses: int) -> None:
        self._most, self._addresses = most, addresses
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def note(self, address: str) -> None:
        """A wrong key came from there."""
        where = network(address)
        bucket = self._buckets.pop(where, None) or Bucket(self._most)
        bucket.take(1)
        self._buckets[where] = bucket
        if len(self._buckets) > self._addresses:
            self._buckets.popitem(last=False)

    def wait(self, address: str) -> float:
        """Seconds before it may try again; 0: now."""
        bucket = self._buckets.get(network(address))
        return 0.0 if bucket is None else bucket.seconds_until(1)


def network(address: str) -> str:
    """Whom an address belongs to: itself, or the /64 that one customer has of IPv6."""
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(found, IPv6Address):
        mapped = found.ipv4_mapped
        return str(mapped) if mapped else str(IPv6Address(int(found) >> 64 << 64))
    return str(found)
