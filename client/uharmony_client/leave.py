"""Leaving a study: the coordinator shuts the site out; what was the study's own can be erased."""

from __future__ import annotations

from collections.abc import Iterator

from uharmony_client.home import Home
from uharmony_client.joining import leave as tell_coordinator
from uharmony_model.atomic import remove_directory
from uharmony_model.errors import ExchangeError


def leave(home: Home, *, purge: bool) -> Iterator[str]:
    """End the membership, and say line by line what was done. The ledger always stays.

    A site that has left already may still purge what it kept.

    Raises:
        ConfigError: the site has not joined, and nothing is to be purged.
        StoreError: something cannot be removed.
    """
    if home.joined or not purge:
        yield from _end_membership(home)
    if purge:
        for name in ("generations", "models", "alone", "evaluations"):
            remove_directory(home.config.store / name)
        yield "generations, models and evaluations are removed"


def _end_membership(home: Home) -> Iterator[str]:
    member = home.membership()
    try:
        tell_coordinator(home.identity, member.address)
        yield f"the coordinator at {member.address} has shut this site out"
    except ExchangeError as error:
        # Leaving is the site's right: it does not wait for the other side.
        yield f"the coordinator was not told ({error}); ask it to revoke {home.config.name}"
    home.identity.membership.unlink(missing_ok=True)
    # The keys of this membership are of no use any more; the ledger's key verifies what was sent.
    for path in (home.identity.tls_key, home.identity.certificate, home.identity.node_key):
        path.unlink(missing_ok=True)
    yield "certificate and keys of the membership are removed; the ledger and its key stay"
