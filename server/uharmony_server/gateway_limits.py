"""How much one caller may ask of the gateway, before it is known and after.

A bucket holds at most a few seconds' worth of tokens and fills at a constant rate; a request takes
one. Buckets are kept for a bounded number of callers, the longest unused go first.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

BURST_SECONDS = 4.0
MAX_CALLERS = 10_000


def caller(address: str) -> str:
    """What is counted as one caller: an IPv4 address, or the /64 an IPv6 address lies in."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))


class Rates:
    """One bucket a caller, all of one size."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = per_second
        self._most = max(1.0, per_second * BURST_SECONDS)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, name: str, patience: float = 0.0) -> float | None:
        """Take a token: how many seconds to wait for it, or None if that is beyond `patience`."""
        now = self._clock()
        level, seen = self._buckets.pop(name, (self._most, now))
        level = min(self._most, level + (now - seen) * self._rate)
        wait = max(0.0, (1.0 - level) / self._rate)
        granted = wait <= patience
        self._buckets[name] = (level - 1.0 if granted else level, now)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        return wait if granted else None


class Places:
    """How many connections are open, in all and from one address."""

    def __init__(self, most: int, most_per_address: int) -> None:
        self._most = most
        self._most_per_address = most_per_address
        self._open: Counter[str] = Counter()

    @property
    def taken(self) -> int:
        """Open connections."""
        return self._open.total()

    def take(self, address: str) -> bool:
        """Take a place, if there is one."""
        if self.taken >= self._most or self._open[address] >= self._most_per_address:
            return False
        self._open[address] += 1
        return True

    def give_back(self, address: str) -> None:
        """Give a place back."""
        self._open[address] -= 1
        if self._open[address] <= 0:
            del self._open[address]
