"""Child processes that are kept alive, end together, and never outlive their parent.

A service is a small parent and a few programs. A program that dies is started again after a pause
that doubles; those that cannot go on without it are started again with it. The parent never
imports torch or Flower, so little can go wrong in it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from uharmony_model.errors import ConfigError, NetworkError, UHarmonyError

PERMANENT = frozenset({ConfigError.exit_code, NetworkError.exit_code})
# Flower looks nothing up anywhere, and proxies of the surroundings are not for these processes.
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "NO_PROXY": "*"}
_STOP_SECONDS = 15.0
_TICK_SECONDS = 0.1
_LONGEST_PAUSE = 30.0
_HEALTHY_SECONDS = 60.0
_MAX_LOG_BYTES = 8 << 20
_ORPHAN_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Program:
    """One child. Exit code 0 of a `main` program ends the service; `together` restarts with it.

    `keeps` are file descriptors that the child inherits.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    main: bool = False
    together: tuple[str, ...] = ()
    keeps: tuple[int, ...] = ()
    first_pause: float = 0.5


class _Child:
    def __init__(self, program: Program, log: Path) -> None:
        self.program, self.log = program, log
        self.process: subprocess.Popen[bytes] | None = None
        self.pause = program.first_pause
        self.due = 0.0
        self.started = 0.0

    def start(self) -> None:
        if self.log.is_file() and self.log.stat().st_size > _MAX_LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self.process = subprocess.Popen(  # noqa: S603 - our own programs
                self.program.command,
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                env={**os.environ, **self.program.environment, "UHARMONY_PARENT": str(os.getpid())},
                pass_fds=self.program.keeps,
                start_new_session=True,  # a Ctrl-C is for the parent, who ends them in order
            )
        finally:
            os.close(descriptor)
        self.started = time.monotonic()

    def ended(self) -> int | None:
        """The exit code of a child that has just been found dead; None while it lives."""
        if self.process is None:
            return None
        code = self.process.poll()
        if code is None:
            return None
        self.process = None
        return code

    def plan_restart(self) -> None:
        if time.monotonic() - self.started > _HEALTHY_SECONDS:
            self.pause = self.program.first_pause
        self.due = time.monotonic() + self.pause
        self.pause = min(2 * self.pause, _LONGEST_PAUSE)

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


class Supervisor:
    """Runs programs until a main one is done, one fails for good, or a signal asks to stop.

    `on_tick` is called ten times a second with the names of the programs and whether they run.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        logs: Path,
        *,
        on_tick: Callable[[Mapping[str, bool]], None] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._children = {p.name: _Child(p, logs / f"{p.name}.log") for p in programs}
        self._on_tick, self._say = on_tick, say
        self._asked = False

    def run(self) -> int:
        """Start everything and stay until the end; the service's exit code.

        Raises:
            UHarmonyError: what the periodic work of the parent raises; all children are stopped.
        """
        before = {s: signal.signal(s, self._remember) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            for child in self._children.values():
                self._start(child)
            while not self._asked:
                code = self._turn()
                if code is not None:
                    return code
                time.sleep(_TICK_SECONDS)
            return 0
        finally:
            for child in reversed(self._children.values()):
                child.stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _turn(self) -> int | None:
        for child in self._children.values():
            code = child.ended()
            if code is not None:
                if child.program.main and code == 0:
                    return 0
                if code in PERMANENT:
                    self._say(f"{child.program.name} ended for good; see {child.log}")
                    return code
                child.plan_restart()
                self._say(
                    f"{child.program.name} ended with {code}; starting it again in "
                    f"{child.due - time.monotonic():.1f} s (its log: {child.log})"
                )
                for name in child.program.together:
                    self._children[name].stop()
                    self._children[name].due = child.due
            if child.process is None and time.monotonic() >= child.due:
                self._start(child)
        if self._on_tick is not None:
            self._on_tick({n: c.process is not None for n, c in self._children.items()})
        return None

    def _start(self, child: _Child) -> None:
        try:
            child.start()
        except OSError as error:  # no memory, no room for a log: that passes
            child.plan_restart()
            self._say(f"{child.program.name} could not be started ({error}); trying again")

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def end_with_parent(parent: int | None = None) -> None:
    """End this process when its parent is gone, however that one ended. Call it first.

    `parent` is its process number: it may be gone before this process can ask for it.
    """
    parent = parent or int(os.environ.get("UHARMONY_PARENT", os.getppid()))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(_ORPHAN_SECONDS)  # the signal has come too, and a clean end is better
    os._exit(UHarmonyError.exit_code)
