"""Answers what the gateway left in the mailbox: the only place where the authority signs.

It runs in the supervisor, which listens on no socket.
"""

from __future__ import annotations

import logging
import time
from typing import NoReturn

from cryptography.hazmat.primitives.serialization import Encoding

from uharmony_model.errors import ExchangeError, StoreError
from uharmony_model.exchange.joining import EnrolmentAnswer, EnrolmentRequest, RenewalRequest
from uharmony_server.certificates import read_request, site_certificate
from uharmony_server.mailbox import Errand, Mailbox, Outcome
from uharmony_server.registry import Enrolment, Registry
from uharmony_server.server_folder import ServerFolder
from uharmony_service.keys import key_digest, lifetime, node_key_from_text

SWEEP_SECONDS = 30.0
_logger = logging.getLogger(__name__)


class Registrar:
    """Enrols, renews and lets go."""

    def __init__(self, folder: ServerFolder) -> None:
        self._folder = folder
        self._mailbox = Mailbox(folder.requests, folder.answers)
        self._registry = Registry(folder.invites, folder.sites)
        self._swept = 0.0

    def handle_pending(self) -> int:
        """Answer every request that waits; how many there were. Called a few times a second.

        Raises:
            StoreError: an answer cannot be written.
        """
        handled = 0
        for name, errand in self._mailbox.pending():
            self._mailbox.answer(name, self._outcome(errand))
            handled += 1
        if time.monotonic() - self._swept > SWEEP_SECONDS:
            self._swept = time.monotonic()
            self._mailbox.sweep()
        return handled

    def _outcome(self, errand: Errand) -> Outcome:
        try:
            if errand.kind == "enrol" and errand.enrol is not None:
                return Outcome(status=200, answer=self._enrol(errand.enrol))
            if errand.kind == "renew" and errand.renew is not None:
                return Outcome(status=200, answer=self._renew(errand, errand.renew))
            if errand.kind == "leave":
                return self._leave(errand)
            _refuse("the request is not complete; install the coordinator's version")
        except ExchangeError as error:
            _logger.warning("%s refused: %s", errand.kind, error)
            return Outcome(status=403, detail=str(error)[:1000])
        except StoreError:
            # Its text names places on this machine, which are no business of the caller.
            _logger.exception("%s failed", errand.kind)
            return Outcome(status=503, detail="the coordinator could not write it down; try again")

    def _enrol(self, request: EnrolmentRequest) -> EnrolmentAnswer:
        named, key = read_request(request.csr)
        site = self._registry.invited(request.token, key_digest(key))
        if named != site:
            _refuse(
                f"the join code is for site {site}, the request names {named!a:.80}; "
                "use the code of your own site"
            )
        if request.study != self._folder.study.digest:
            _refuse(
                f"site {site} approved study {request.study[:12]}, "
                f"this is {self._folder.study.digest[:12]}; look at the study again and approve it"
            )
        if node_key_from_text(request.node_key) is None:
            _refuse("the node key is not a P-256 public key; make a new one")
        answer = self._sign(site, request.csr)
        self._registry.redeem(
            request.token,
            Enrolment(
                site=site,
                tls_key=key_digest(key),
                node_key=request.node_key,
                ledger_key=request.ledger_key,
                study=request.study,
                enrolled_at=int(time.time()),
                expires=answer.expires,
            ),
        )
        _logger.info("site %s enrolled", site)
        return answer

    def _renew(self, errand: Errand, request: RenewalRequest) -> EnrolmentAnswer:
        named, key = read_request(request.csr)
        if errand.site is None or named != errand.site or key_digest(key) != errand.tls_key:
            _refuse("a renewal is for the site and the key of the certificate in use")
        answer = self._sign(named, request.csr)
        self._registry.renewed(named, key_digest(key), answer.expires)
        _logger.info("site %s has a new certificate", named)
        return answer

    def _leave(self, errand: Errand) -> Outcome:
        record = self._registry.enrolments().get(errand.site or "")
        if record is None or record.tls_key != errand.tls_key:
            _refuse("this site is not enrolled with this key")
        self._registry.revoke(record.site)
        _logger.info("site %s left", record.site)
        return Outcome(status=200)

    def _sign(self, site: str, csr: str) -> EnrolmentAnswer:
        _, key = read_request(csr)
        certificate = site_certificate(
            self._folder.ca_key,
            self._folder.ca_certificate,
            key,
            site,
            self._folder.config.certificate_hours,
        )
        return EnrolmentAnswer(
            site=site,
            certificate=certificate.public_bytes(Encoding.PEM).decode(),
            ca=self._folder.ca_certificate.read_text(),
            expires=int(lifetime(certificate)[1]),
        )


def _refuse(reason: str) -> NoReturn:
    raise ExchangeError(reason)
