"""What every Grid of ours has in common: Flower's interface around sending and receiving."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run


class OneRunGrid(Grid):
    """A grid with one run. Messages are sent and answered in one call, `send_and_receive`."""

    def __init__(self) -> None:
        self._run = Run.create_empty(run_id=1)

    def set_run(self, run: Run) -> None:
        """Set the run whose messages this grid carries."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run whose messages this grid carries."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Not offered: sending without waiting would lose what the grid is for."""
        raise NotImplementedError("use send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Not offered, as `push_messages`."""
        raise NotImplementedError("use send_and_receive")
