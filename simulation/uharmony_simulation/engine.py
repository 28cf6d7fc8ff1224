"""A Flower Grid in this process: the sites' real ClientApp, one site after the other.

Answers are produced while they are consumed, so that the strategy decides how many updates are in
memory; there is one model. What a site keeps lies in its own store on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

from uharmony_service.grid import OneRunGrid

ClientAppLike = Callable[[Message, Context], Message]
log = logging.getLogger(__name__)

# Flower's code for an exception inside a ClientApp.
CLIENT_APP_RAISED = 2


def name_the_task() -> None:
    """Say which task of which run this process is.

    Flower stamps every message with it; a process without a task manager names it itself, as
    Flower's own simulation does.
    """
    TaskIdentity.task_id, TaskIdentity.run_id = 1, 1
    TaskIdentity.node_id = SUPERLINK_NODE_ID


class InProcessGrid(OneRunGrid):
    """Nodes 1..n are the given sites, sorted by name."""

    def __init__(self, app: ClientAppLike, sites: Iterable[str]) -> None:
        name_the_task()
        self._app = app
        super().__init__()
        self._contexts: dict[int, Context] = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"site": site},
                state=RecordDict(),
                run_config={},
            )
            for node, site in enumerate(sorted(sites), start=1)
        }
        self._pushed: dict[str, Message] = {}

    @property
    def sites(self) -> Mapping[int, str]:
        """Which site each node is."""
        return {node: str(c.node_config["site"]) for node, c in self._contexts.items()}

    def get_node_ids(self) -> Iterable[int]:
        """The nodes, one a site."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until their answers are pulled; only then does a site work."""
        identifiers = []
        for message in messages:
            identifier = str(uuid4())
            self._pushed[identifier] = message
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer the messages with these identifiers."""
        return [self._answer(self._pushed.pop(i)) for i in message_ids if i in self._pushed]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Answers in the order of the messages, each computed when it is asked for."""
        for message in messages:
            yield self._answer(message)

    def _answer(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            return self._app(message, context)
        except Exception as error:  # a site's defect must not end the federation
            reason = f"{type(error).__name__}: {error}"[:500]
            log.warning("site %s failed: %s", context.node_config["site"], reason)
            log.debug("where it failed", exc_info=True)
            return Message(Error(code=CLIENT_APP_RAISED, reason=reason), reply_to=message)


def site_of(context: Context, sites: Mapping[int, str] | None = None) -> str:
    """Which site a node stands for: named by this grid, numbered by Flower's Ray engine."""
    if "site" in context.node_config:
        return str(context.node_config["site"])
    return (sites or {})[int(context.node_config["partition-id"])]
