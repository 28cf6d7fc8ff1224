"""Flower's Runtime API from the side of a long-lived executor: tasks in, answers out.

None of this is public API of Flower, so its version is checked, and an end-to-end test runs it.
Flower's own retry and task heartbeat send SIGINT to their own process when a claim is lost;
neither is used here. A claim that is lost raises `ClaimLostError`, and the executor goes on with
the next task.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from flwr.app import Context, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, message_to_proto, run_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from uharmony_model.errors import ConfigError
from uharmony_service.loopback import SecretInterceptor

FLOWER = "1.41.0"
OBJECT_POLL_SECONDS = 0.05
_BEAT_SECONDS = 10.0
_RETRIED = frozenset({502, 503, 504})

Answer = TypeVar("Answer")


class ClaimLostError(Exception):
    """The task is no longer ours: its run ended, or the other side was restarted."""


def require_flower() -> None:
    """Refuse to run on another Flower than the one whose inner parts are used here.

    Raises:
        ConfigError: another version is installed.
    """
    found = version("flwr")
    if found != FLOWER:
        raise ConfigError(f"flwr {found} is installed, this version needs {FLOWER}; install it")


class Patience:
    """Repeats a request while the other side is away, for a limited time, without signals."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def invoke(self, call: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer:
        """Call until it is answered.

        Raises:
            ClaimLostError: the other side does not know this claim any more.
            httpx.HTTPError: still no answer after the time is up, or an error that stays.
        """
        end, pause = time.monotonic() + self.seconds, 0.1
        while True:
            try:
                return call(*args, **kwargs)
            except httpx.HTTPStatusError as error:
                code = error.response.status_code
                if code in (401, 403):
                    raise ClaimLostError(f"{code} from {error.request.url.path}") from error
                if code not in _RETRIED or time.monotonic() > end:
                    raise
            except httpx.TransportError:
                if time.monotonic() > end:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 1.0)


def connect(
    address: str,
    secret: str,
    *,
    component: str,
    token: str = "",
    patience: float = 30.0,
) -> RuntimeHttpClient:
    """A client of the Runtime API at `address` (host:port); with `token`, for one claimed task."""
    interceptors: list[Any] = [
        RuntimeVersionHttpInterceptor(component_name=component),
        SecretInterceptor(secret),
    ]
    if token:
        interceptors.append(RuntimeTokenHttpInterceptor(token))
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,  # loopback, on a socket that only the service can have opened
        root_certificates=None,
        interceptors=interceptors,
        retry_invoker=Patience(patience),  # type: ignore[arg-type]  # the one method it calls
    )


def acquire(client: RuntimeHttpClient, kind: str) -> str:
    """Claim the oldest waiting task of a kind: its token, or "" when there is none."""
    found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
    return str(found.token) if found.HasField("task") else ""


class Claim:
    """A claimed task: its client, its heartbeat, its run and context. Leave it to end the beat."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self.client = client
        self.lost = threading.Event()
        self._over = threading.Event()
        answer = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id = answer.task_id
        TaskIdentity.run_id = answer.run.run_id
        TaskIdentity.node_id = answer.context.node_id
        self.context: Context = context_from_proto(answer.context)
        self.run: Run = run_from_proto(answer.run)

    def begin(self) -> None:
        """Start the heartbeat."""
        threading.Thread(target=self._beat, daemon=True).start()

    def end(self) -> None:
        """Stop the heartbeat and close the client."""
        self._over.set()
        self.client.close()

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def receive(self) -> Message:
        """The one message of a ClientApp task, with its content.

        Raises:
            ClaimLostError: it was taken back, or nothing came with the task.
        """
        found = self.client.PullMessages(PullAppMessagesRequest())
        if not found.messages_list:
            raise ClaimLostError("a task without a message")
        tree, node = found.message_object_trees[0], Node(node_id=self.context.node_id)
        run = self.context.run_id
        message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(self.client.PullObject, node, run),
            make_confirm_message_received_fn_protobuf(
                self.client.ConfirmMessageReceived, node, run
            ),
            return_type=Message,
            initial_backoff=OBJECT_POLL_SECONDS,
            backoff_cap=1.0,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def answer(self, message: Message) -> None:
        """Hand the answer of a ClientApp task over and end the task.

        Raises:
            ClaimLostError: the task is no longer ours; the answer was not taken.
        """
        message.metadata.__dict__["_message_id"] = message.object_id
        proto = message_to_proto(remove_content_from_message(message))
        with no_object_id_recompute():
            pushed = self.client.PushMessages(
                PushAppMessagesRequest(
                    messages_list=[proto], message_object_trees=[get_object_tree(message)]
                )
            )
            push_objects(
                get_all_nested_objects(message),
                make_push_object_fn_protobuf(
                    self.client.PushObject,
                    Node(node_id=self.context.node_id),
                    run_id=self.context.run_id,
                    session_id=pushed.session_id,
                ),
                object_ids_to_push=set(pushed.objects_to_push),
            )
        self.finish()

    def finish(self) -> None:
        """End the task as completed."""
        self.client.PushTaskOutput(
            PushTaskOutputRequest(
                context=context_to_proto(self.context), sub_status=SubStatus.COMPLETED, details=""
            )
        )

    def _beat(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            try:
                if not self.client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
                    self.lost.set()
                    return
            except ClaimLostError:
                self.lost.set()
                return
            except (httpx.HTTPError, RuntimeError):
                continue  # the other side is away; the task's own requests find out how long
