"""The grid over real sites, with a SuperLink that the test plays."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.task_identity import TaskIdentity

from uharmony_server import link_grid
from uharmony_server.link import AnswerLostError, Arrived, LinkLostError, LinkSession
from uharmony_server.link_grid import LinkGrid, Waiting, node_of

KEY = b"key"
ALWAYS = Waiting()


@dataclass
class FakeLink:
    """SuperLink as the grid sees it: who is online, what was pushed, what lies there."""

    connected: set[str] = field(default_factory=set)
    numbers: dict[str, int] = field(default_factory=dict)
    pushed: list[Message] = field(default_factory=list)
    ready: list[Arrived] = field(default_factory=list)
    opened: int = 0
    away: int = 0
    lost_fetches: int = 0
    forgotten: int = 0
    half: set[str] = field(default_factory=set)
    counter: Any = field(default_factory=lambda: itertools.count(1))

    def open(self, members):
        self.opened += 1
        self.numbers = {}
        self.ready.clear()
        self.admit(members)

    def admit(self, members):
        for site in set(self.numbers) - set(members):
            del self.numbers[site]
        for site in sorted(members):
            # A restarted SuperLink gives other numbers: the grid must not care.
            self.numbers.setdefault(site, 1000 * self.opened + next(self.counter))

    def online(self):
        if self.away:
            self.away -= 1
            raise LinkLostError("away")
        return {s: n for s, n in self.numbers.items() if s in self.connected}

    def push(self, messages):
        self.pushed += messages
        identifiers = [f"m{next(self.counter)}" for _ in messages]
        for message, identifier in zip(messages, identifiers, strict=True):
            message.metadata.__dict__["_message_id"] = identifier
        return identifiers

    def answers(self, identifiers):
        wanted = set(identifiers)
        found = [a for a in self.ready if a.head.metadata.reply_to_message_id in wanted]
        self.ready = [a for a in self.ready if a not in found]
        return found

    def collect(self, arrived, contents):
        if self.lost_fetches:
            self.lost_fetches -= 1
            raise AnswerLostError("dropped")
        return arrived.head.metadata.message_id not in self.half

    def assemble(self, arrived, contents):
        return arrived.head

    def forget(self, arrived):
        self.forgotten += 1

    def reply(self, message, error=None, text="done", half=False):
        """The site answers this message (or SuperLink does, with an error)."""
        content = error or RecordDict({"text": ConfigRecord({"text": text})})
        answer = Message(content, reply_to=message)
        answer.metadata.__dict__["_message_id"] = f"r{next(self.counter)}"
        if half:  # its head is there, its parts are still being sent
            self.half.add(answer.metadata.message_id)
        self.ready.append(Arrived(answer, None))  # type: ignore[arg-type]


class Watched:
    """Remembers what the grid saw."""

    def __init__(self):
        self.seen: list[tuple[set[str], set[str]]] = []

    def waiting(self, awaited, online):
        self.seen.append((set(awaited), set(online)))


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where the grid sleeps; `at` runs something at a moment."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    class Clock:
        def __init__(self):
            self.now = 0.0
            self.events: list[tuple[float, Any]] = []

        def monotonic(self):
            return self.now

        def time(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds
            due = [e for e in self.events if e[0] <= self.now]
            self.events = [e for e in self.events if e[0] > self.now]
            for _, event in due:
                event()

        def at(self, moment, event):
            self.events.append((moment, event))

    found = Clock()
    monkeypatch.setattr(link_grid, "time", found)
    return found


def make(sites=("alpha", "beta"), waiting=ALWAYS, online=None):
    members = dict.fromkeys(sites, KEY)
    link = FakeLink(connected=set(sites if online is None else online))
    link.admit(members)
    watcher = Watched()
    return LinkGrid(link, lambda: members, waiting, watcher), link, members, watcher  # type: ignore[arg-type]


def ask(sites=("alpha", "beta"), round_=1, kind="train"):
    return [Message(RecordDict(), node_of(s), kind, group_id=str(round_)) for s in sites]


def site_of(grid, message):
    return grid.site_of(message.metadata.src_node_id)


def asked(link, site):
    return [m for m in link.pushed if m.metadata.dst_node_id == link.numbers.get(site)]


def test_answers_come_in_the_order_of_the_questions_whatever_their_own(clock):
    grid, link, _, _ = make()
    clock.at(1, lambda: link.reply(asked(link, "beta")[-1]))
    clock.at(3, lambda: link.reply(asked(link, "alpha")[-1]))
    found = list(grid.send_and_receive(ask()))
    assert [site_of(grid, m) for m in found] == ["alpha", "beta"]
    assert len(link.pushed) == 2


def test_an_absent_site_is_asked_when_it_comes_and_not_before(clock):
    grid, link, _, watcher = make(online={"alpha"})
    clock.at(1, lambda: link.reply(asked(link, "alpha")[-1]))
    clock.at(100, lambda: link.connected.add("beta"))
    clock.at(101, lambda: link.reply(asked(link, "beta")[-1]))
    assert len(list(grid.send_and_receive(ask()))) == 2
    assert len(asked(link, "beta")) == 1
    assert ({"beta"}, {"alpha"}) in watcher.seen


@pytest.mark.parametrize("code", sorted(link_grid.GONE))
def test_no_answer_is_not_a_refusal(clock, code):
    grid, link, _, _ = make(("alpha",))
    clock.at(1, lambda: link.reply(asked(link, "alpha")[-1], Error(code=code, reason="gone")))
    clock.at(5, lambda: link.reply(asked(link, "alpha")[-1]))
    (found,) = grid.send_and_receive(ask(("alpha",)))
    assert not found.has_error()
    assert len(asked(link, "alpha")) == 2


def test_what_a_site_itself_got_wrong_is_handed_on(clock):
    grid, link, _, _ = make(("alpha",))
    error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason="a defect")
    clock.at(1, lambda: link.reply(asked(link, "alpha")[-1], error))
    (found,) = grid.send_and_receive(ask(("alpha",)))
    assert found.has_error()
    assert len(link.pushed) == 1


def test_a_restarted_superlink_means_asking_everybody_again(clock):
    grid, link, _, _ = make()
    clock.at(1, lambda: setattr(link, "away", 1))

    def answer_all():
        for site in ("alpha", "beta"):
            link.reply(asked(link, site)[-1])

    clock.at(5, answer_all)
    found = list(grid.send_and_receive(ask()))
    assert [site_of(grid, m) for m in found] == ["alpha", "beta"]
    assert link.opened == 1
    assert len(link.pushed) == 4


def test_an_answer_that_is_lost_while_it_is_fetched_is_asked_for_again(clock):
    grid, link, _, _ = make(("alpha",))
    link.lost_fetches = 1
    clock.at(1, lambda: link.reply(asked(link, "alpha")[-1]))
    clock.at(5, lambda: link.reply(asked(link, "alpha")[-1]))
    assert len(list(grid.send_and_receive(ask(("alpha",))))) == 1
    assert len(link.pushed) == 2


def test_a_round_closes_at_its_deadline_and_the_late_answer_is_told_once(clock):
    grid, link, _, _ = make(waiting=Waiting(deadline=60))
    clock.at(1, lambda: link.reply(asked(link, "alpha")[-1]))
    found = list(grid.send_and_receive(ask(round_=7)))
    assert [site_of(grid, m) for m in found] == ["alpha"]
    assert 60 <= clock.now < 62
    late = asked(link, "beta")[-1]
    clock.at(70, lambda: link.reply(late))
    clock.at(71, lambda: [link.reply(asked(link, s)[-1]) for s in ("alpha", "beta")])
    assert len(list(grid.send_and_receive(ask(round_=8)))) == 2
    assert grid.take_late() == [("beta", 7)]
    assert grid.take_late() == []
    assert link.forgotten == 1


def test_what_came_in_time_counts_though_an_earlier_name_was_waited_for(clock):
    grid, link, _, _ = make(waiting=Waiting(deadline=60), online={"beta"})
    clock.at(1, lambda: link.reply(asked(link, "beta")[-1]))
    found = list(grid.send_and_receive(ask()))
    assert [site_of(grid, m) for m in found] == ["beta"]
    assert clock.now >= 60


def test_an_upload_that_stands_still_does_not_hold_the_round_past_its_deadline(clock):
    grid, link, _, _ = make(waiting=Waiting(deadline=60))
    clock.at(1, lambda: link.reply(asked(link, "alpha")[-1], half=True))
    clock.at(2, lambda: link.reply(asked(link, "beta")[-1]))
    found = list(grid.send_and_receive(ask(round_=3)))
    assert [site_of(grid, m) for m in found] == ["beta"]
    assert 60 <= clock.now < 62
    assert grid.take_late() == [("alpha", 3)]  # it has trained


def test_an_upload_that_goes_on_is_read_when_it_is_whole(clock):
    grid, link, _, _ = make(("alpha",))
    clock.at(1, lambda: link.reply(asked(link, "alpha")[-1], half=True))
    clock.at(40, lambda: link.half.clear())
    assert len(list(grid.send_and_receive(ask(("alpha",))))) == 1
    assert len(link.pushed) == 1


def test_a_site_that_still_works_on_a_closed_round_gets_no_other_on_top(clock):
    grid, link, _, _ = make(("alpha",), waiting=Waiting(deadline=10))
    for round_ in (1, 2, 3):
        assert list(grid.send_and_receive(ask(("alpha",), round_))) == []
    assert len(link.pushed) == 1
    late = link.pushed[0]
    clock.at(clock.now + 1, lambda: link.reply(late))
    clock.at(clock.now + 3, lambda: link.reply(asked(link, "alpha")[-1]))
    assert len(list(grid.send_and_receive(ask(("alpha",), 4)))) == 1
    assert grid.take_late() == [("alpha", 1)]
    assert len(link.pushed) == 2


def test_between_rounds_it_registers_who_has_joined_and_says_who_is_there(clock):
    grid, link, members, watcher = make(("alpha",))
    members["beta"] = KEY
    link.connected.add("beta")
    assert grid.tend() == ["alpha", "beta"]
    assert watcher.seen[-1] == (set(), {"alpha", "beta"})
    assert sorted(grid.online()) == sorted([node_of("alpha"), node_of("beta")])


def test_a_late_evaluation_is_no_late_update(clock):
    grid, link, _, _ = make(("alpha",), waiting=Waiting(deadline=10))
    assert list(grid.send_and_receive(ask(("alpha",), kind="evaluate"))) == []
    late = asked(link, "alpha")[-1]
    clock.at(13, lambda: link.reply(late))
    clock.at(15, lambda: link.reply(asked(link, "alpha")[-1]))
    assert len(list(grid.send_and_receive(ask(("alpha",), 2)))) == 1
    assert grid.take_late() == []


def test_a_site_that_stays_away_is_not_waited_for_to_the_deadline(clock):
    grid, link, _, _ = make(waiting=Waiting(deadline=3600, absent=30), online={"alpha"})
    clock.at(1, lambda: link.reply(asked(link, "alpha")[-1]))
    assert len(list(grid.send_and_receive(ask()))) == 1
    assert clock.now < 60


def test_a_site_that_works_is_waited_for_however_long(clock):
    grid, link, _, _ = make(("alpha",), waiting=Waiting(absent=30))
    clock.at(5000, lambda: link.reply(asked(link, "alpha")[-1]))
    assert len(list(grid.send_and_receive(ask(("alpha",))))) == 1


def test_a_site_that_is_revoked_in_a_round_is_not_waited_for(clock):
    grid, link, members, _ = make()
    clock.at(1, lambda: link.reply(asked(link, "alpha")[-1]))
    clock.at(4, lambda: members.pop("beta"))
    assert len(list(grid.send_and_receive(ask()))) == 1
    assert list(grid.get_node_ids()) == [node_of("alpha")]


def test_numbers_depend_on_names_alone():
    assert node_of("alpha") == node_of("alpha") != node_of("beta")
    assert 0 < node_of("alpha") < 2**63


def test_an_answer_that_cannot_be_read_is_the_error_of_that_site_alone(clock):
    answer = Message(RecordDict(), reply_to=ask(("alpha",))[0])
    answer.metadata.__dict__["_message_id"] = "r1"
    for contents in ({}, {"x": b""}, {"x": b"Message  3\0abc"}, {"x": b"Message  0\0"}):
        arrived = Arrived(answer, ObjectTree(object_id="x"))
        found = LinkSession.assemble(arrived, dict(contents))
        assert found.has_error()
        assert "cannot be read" in str(found.error.reason)
        assert found.error.code not in link_grid.GONE
        assert found.metadata.reply_to_message_id == answer.metadata.reply_to_message_id
