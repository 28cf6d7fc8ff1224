"""The gateway's view of who is enrolled: read again when the records change."""

from __future__ import annotations

import logging

from uharmony_model.errors import StoreError
from uharmony_server.gateway_rules import Peer, recognise
from uharmony_server.registry import Enrolment, Registry

_logger = logging.getLogger(__name__)


class Access:
    """Recognises callers."""

    def __init__(self, registry: Registry, study: str) -> None:
        self.registry = registry
        self._study = study
        self._signature: object = None
        self._enrolments: dict[str, Enrolment] = {}

    def refresh(self) -> bool:
        """Read the records again if they changed; say whether they did.

        Records that cannot be read leave the last good view: a disk error must not shut out
        every site, and a revocation is a whole file or none.
        """
        try:
            # The signature first: a record written in between is seen at the next look.
            signature = self.registry.signature()
            if signature == self._signature:
                return False
            self._enrolments = self.registry.enrolments()
        except StoreError:
            _logger.exception("the enrolment records cannot be read; the last view stays")
            return False
        self._signature = signature
        return True

    def recognise(self, peer: Peer) -> Enrolment:
        """The enrolment of a caller.

        Raises:
            Refused: it has none.
        """
        return recognise(peer, self._enrolments, self._study)
