"""`check --connect`: is the coordinator there, is it the right one, does its clock agree?"""

from __future__ import annotations

import time

from uharmony_client.check import Reached
from uharmony_client.home import Home
from uharmony_client.joining import clock_offset


def reach(home: Home) -> Reached:
    """Ask the coordinator for its time, trusting only the authority pinned when joining.

    Raises:
        ConfigError: the site has not joined.
        ExchangeError: out of reach, or another server.
    """
    address = home.membership().address
    begin = time.monotonic()
    ahead = clock_offset(address, home.identity.ca.read_text())
    return Reached(clock_ahead_s=ahead, seconds=time.monotonic() - begin)
