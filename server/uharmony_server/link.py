"""The coordinator's session with SuperLink: a run, the sites' nodes, messages and answers.

The coordinator is the executor of its own ServerApp task, a process of its own: a SuperLink that
dies takes nothing with it. After its restart a new run begins within a second and the sites' keys
are registered again; what was under way is asked again and answered from the sites' stores.
"""

from __future__ import annotations

import hashlib
import io
import logging
import threading
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
from flwr.app import Error, Message
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, Status
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    GetNodesRequest,
    PullAppMessagesRequest,
    PushAppMessagesRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from uharmony_service.loopback import SecretInterceptor
from uharmony_service.runtime import Claim, ClaimLostError, acquire, connect

log = logging.getLogger(__name__)

COMPONENT = "flwr-serverapp"
_PATIENCE_SECONDS = 3.0
_RESTART_SECONDS = 120.0
_PULLS = 2  # parts of an answer that are fetched at a time
_NODE = Node(node_id=SUPERLINK_NODE_ID)


class LinkLostError(Exception):
    """SuperLink is away or was restarted; `LinkSession.open` begins anew."""


class AnswerLostError(Exception):
    """An answer was announced and will never be whole; the site is asked again."""


@dataclass(frozen=True)
class Arrived:
    """An answer that lies at SuperLink: its head, and the objects it consists of."""

    head: Message
    tree: ObjectTree


class LinkSession:
    """One run at SuperLink. `members` maps each site to its node key (PEM bytes)."""

    def __init__(self, address: str, secret: str) -> None:
        self._address, self._secret = address, secret
        self._claim: Claim | None = None
        self._keys: dict[str, bytes] = {}
        self.nodes: dict[str, int] = {}

    def open(self, members: Mapping[str, bytes]) -> None:
        """Begin a run, and register every member. Waits while SuperLink is being started.

        Raises:
            LinkLostError: SuperLink did not come up.
        """
        self.close()
        end = time.monotonic() + _RESTART_SECONDS
        while not self._opened(members, last=time.monotonic() > end):
            time.sleep(0.2)

    def close(self) -> None:
        """End the heartbeat and the connection."""
        if self._claim is not None:
            self._claim.end()
            self._claim = None

    def admit(self, members: Mapping[str, bytes]) -> None:
        """Register new members' keys and strike those that are no longer members."""
        # A site that joined again has another key, and is another node.
        for site in sorted(s for s in self.nodes if members.get(s) != self._keys.get(s)):
            with self._asking():
                self._control(UnregisterNodeRequest(node_id=self.nodes[site]))
            del self.nodes[site]
        for site, key in sorted(members.items()):
            if site not in self.nodes:
                with self._asking():
                    self.nodes[site] = self._control(RegisterNodeRequest(public_key=key)).node_id
                self._keys[site] = key

    def online(self) -> dict[str, int]:
        """The members that are connected now, with their node numbers."""
        with self._asking() as claim:
            found = {n.node_id for n in claim.client.GetNodes(GetNodesRequest()).nodes}
        return {site: node for site, node in self.nodes.items() if node in found}

    def push(self, messages: Sequence[Message]) -> list[str]:
        """Send messages; objects that several have in common are sent once."""
        with self._asking() as claim, no_object_id_recompute():
            protos, trees, objects = [], [], {}
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
                protos.append(message_to_proto(remove_content_from_message(message)))
                trees.append(get_object_tree(message))
                objects.update(get_all_nested_objects(message))
            pushed = claim.client.PushMessages(
                PushAppMessagesRequest(messages_list=protos, message_object_trees=trees)
            )
            push_objects(
                objects,
                make_push_object_fn_protobuf(
                    claim.client.PushObject, _NODE, claim.run.run_id, pushed.session_id
                ),
                object_ids_to_push=set(pushed.objects_to_push),
            )
        return list(pushed.message_ids)

    def answers(self, identifiers: Iterable[str]) -> list[Arrived]:
        """What has come for these messages since the last question, without its content."""
        wanted = sorted(identifiers)
        if not wanted:
            return []
        with self._asking() as claim:
            found = claim.client.PullMessages(PullAppMessagesRequest(message_ids=wanted))
        pairs = zip(found.messages_list, found.message_object_trees, strict=True)
        return [Arrived(message_from_proto(proto), tree) for proto, tree in pairs]

    def collect(self, arrived: Arrived, contents: dict[str, bytes]) -> bool:
        """Fetch what has come of an answer into `contents`; True when it is whole.

        SuperLink shows an answer before its parts are there: a site may still be sending them.

        Raises:
            AnswerLostError: a part will never come.
            LinkLostError: SuperLink is away.
        """
        with self._asking() as claim:
            wanted = {p.object_id for p in iterate_object_tree(arrived.tree)} - set(contents)
            stopped = threading.Event()

            def pull(identifier: str) -> None:
                if stopped.is_set():
                    return
                found = claim.client.PullObject(
                    PullObjectRequest(node=_NODE, run_id=claim.run.run_id, object_id=identifier)
                )
                if not found.object_found:
                    raise AnswerLostError("a part of the answer was dropped")
                if found.object_available:
                    contents[identifier] = found.object_content
                else:
                    stopped.set()

            with ThreadPoolExecutor(_PULLS) as pool:
                for done in [pool.submit(pull, identifier) for identifier in sorted(wanted)]:
                    done.result()
            if stopped.is_set():
                return False
            self._forget(claim, arrived)
        return True

    @staticmethod
    def assemble(arrived: Arrived, contents: dict[str, bytes]) -> Message:
        """The answer from its parts. What cannot be read becomes an error of that site alone."""
        head = arrived.head
        try:
            message = inflate_object_from_contents(arrived.tree.object_id, contents)
            if not isinstance(message, Message):
                raise TypeError(type(message).__name__)  # noqa: TRY301 - one way out for all
            if message.has_error():
                return make_message(metadata=head.metadata, error=message.error)
            return make_message(metadata=head.metadata, content=message.content)
        except Exception as error:  # bytes from outside, read by foreign code
            reason = f"an answer that cannot be read ({type(error).__name__})"
            wrong = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
            return make_message(metadata=head.metadata, error=wrong)

    def forget(self, arrived: Arrived) -> None:
        """Let SuperLink drop an answer that nobody will read."""
        with self._asking() as claim:
            self._forget(claim, arrived)

    # --- parts -----------------------------------------------------------------------------------

    def _forget(self, claim: Claim, arrived: Arrived) -> None:
        claim.client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=_NODE,
                run_id=claim.run.run_id,
                message_object_id=arrived.head.metadata.message_id,
            )
        )

    def _opened(self, members: Mapping[str, bytes], *, last: bool) -> bool:
        try:
            self._stop_earlier_runs()
            self._begin()
            # Killed and started again, we meet a SuperLink that knows the keys already.
            known = {n.public_key: n.node_id for n in self._control(ListNodesRequest()).nodes_info}
            self.nodes = {site: known[key] for site, key in members.items() if key in known}
            self._keys = {site: members[site] for site in self.nodes}
            self.admit(members)
        except (httpx.HTTPError, ClaimLostError, LinkLostError, RuntimeError) as error:
            self.close()
            if last:
                raise LinkLostError(f"SuperLink does not come up: {error}") from error
            return False
        return True

    def _stop_earlier_runs(self) -> None:
        """A predecessor's runs: their messages and objects are of no use to anybody."""
        for run_id, run in self._control(ListRunsRequest()).run_dict.items():
            if run.status.status != Status.FINISHED:
                self._control(StopRunRequest(run_id=run_id))

    def _begin(self) -> None:
        bundle = _stub_bundle()
        fab = Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle)
        if not self._control(StartRunRequest(fab=fab)).run_id:
            raise LinkLostError("SuperLink began no run")
        end = time.monotonic() + _PATIENCE_SECONDS
        with self._client() as client:
            while not (token := acquire(client, TaskType.SERVER_APP)):
                if time.monotonic() > end:
                    raise LinkLostError("SuperLink gave no task")
                time.sleep(0.02)
        client = self._client(token)
        try:
            self._claim = Claim(client)
        except BaseException:
            client.close()
            raise
        self._claim.begin()

    def _client(self, token: str = "") -> Any:
        return connect(
            self._address,
            self._secret,
            component=COMPONENT,
            token=token,
            patience=_PATIENCE_SECONDS,
        )

    def _control(self, request: Any) -> Any:
        with ControlHttpClient.from_server_address(
            self._address,
            True,  # plain HTTP: this is loopback
            None,
            [
                RuntimeVersionHttpInterceptor(component_name="flwr-cli"),
                SecretInterceptor(self._secret),
            ],
        ) as client:
            return getattr(client, type(request).__name__.removesuffix("Request"))(request)

    def _asking(self) -> _Asking:
        return _Asking(self._claim)


class _Asking:
    """Within this block an absent or restarted SuperLink is one error, `LinkLostError`."""

    def __init__(self, claim: Claim | None) -> None:
        self._claim = claim

    def __enter__(self) -> Claim:
        if self._claim is None or self._claim.lost.is_set():
            raise LinkLostError("no session with SuperLink")
        return self._claim

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (httpx.HTTPError, ClaimLostError, RuntimeError)):
            raise LinkLostError(f"{type(error).__name__}: {error}"[:200]) from error


def _stub_bundle() -> bytes:
    """The smallest application bundle that Flower takes; nothing in it is ever imported."""
    text = """[project]
name = "uharmony"
version = "1.0.0"
[tool.flwr.app]
publisher = "uharmony"
[tool.flwr.app.components]
serverapp = "installed:by_the_hospital"
clientapp = "installed:by_the_hospital"
[tool.flwr.app.config]
"""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo("pyproject.toml"), text)
    return out.getvalue()
