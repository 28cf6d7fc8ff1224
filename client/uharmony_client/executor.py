"""The warm process of a site: takes tasks from the SuperNode and does them with installed code.

The application bundle that Flower carries is never unpacked; what runs is the ClientApp given
here. One process serves all rounds, so torch, the network and the memory maps stay loaded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import httpx
from flwr.app import Context, Message
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

from uharmony_service.runtime import Claim, ClaimLostError, acquire, connect

log = logging.getLogger(__name__)
ClientAppLike = Callable[[Message, Context], Message]

IDLE_SECONDS = 0.05
AWAY_SECONDS = 0.2
COMPONENT = "flwr-clientapp"


def execute_tasks(
    app: ClientAppLike,
    address: str,
    secret: str,
    *,
    done: Callable[[], bool] = lambda: False,
    idle: Callable[[], None] = lambda: None,
) -> None:
    """Do one task after the other from the SuperNode at `address` until `done()` says so."""
    with connect(address, secret, component=COMPONENT, patience=0.0) as client:
        while not done():
            try:
                token = acquire(client, TaskType.CLIENT_APP)
            except (httpx.HTTPError, ClaimLostError):
                time.sleep(AWAY_SECONDS)  # the SuperNode is being started
                continue
            if token:
                _do(app, address, secret, token)
            else:
                idle()
                time.sleep(IDLE_SECONDS)


def _do(app: ClientAppLike, address: str, secret: str, token: str) -> None:
    """One task. What goes wrong between the two processes costs this answer, never the work."""
    try:
        with (
            connect(address, secret, component=COMPONENT, token=token) as client,
            Claim(client) as claim,
        ):
            message = claim.receive()
            claim.answer(app(message, claim.context))
    except (ClaimLostError, ObjectPullError, httpx.HTTPError) as error:
        # The work is in the site's store: asked again, it is sent again.
        log.warning("an answer could not be handed over (%s); waiting to be asked again", error)
