"""The supervisor, with real child processes that live for fractions of a second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from uharmony_service.supervision import Program, Supervisor

pytestmark = pytest.mark.alone

SLEEP = "import time; time.sleep(60)"


def python(name, code, **settings):
    return Program(name, (sys.executable, "-S", "-c", code), first_pause=0.05, **settings)


def supervise(tmp_path, *programs, **settings):
    said: list[str] = []
    found = Supervisor(programs, tmp_path / "log", say=said.append, **settings)
    return found, said


def test_it_ends_with_the_main_program_and_leaves_nobody(tmp_path):
    code = f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); {SLEEP}"
    wait = f"""
import os, time
while not os.path.exists({str(tmp_path / "pid")!r}) or not open({str(tmp_path / "pid")!r}).read():
    time.sleep(0.01)
"""
    supervisor, _ = supervise(tmp_path, python("other", code), python("main", wait, main=True))
    assert supervisor.run() == 0
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_program_that_dies_is_started_again(tmp_path):
    mark = tmp_path / "mark"
    code = f"""
import os, sys
found = os.path.exists({str(mark)!r})
open({str(mark)!r}, "w").close()
sys.exit(0 if found else 9)
"""
    supervisor, said = supervise(tmp_path, python("main", code, main=True))
    assert supervisor.run() == 0
    assert ["main ended with 9" in line for line in said] == [True]


def test_those_that_belong_together_are_started_again_together(tmp_path):
    starts = tmp_path / "starts"
    other = f"open({str(starts)!r}, 'a').write('x'); {SLEEP}"
    mark = tmp_path / "mark"
    main = f"""
import os, sys, time
while not os.path.exists({str(starts)!r}): time.sleep(0.01)
again = os.path.exists({str(mark)!r})
open({str(mark)!r}, "w").close()
if not again: sys.exit(1)
while len(open({str(starts)!r}).read()) < 2: time.sleep(0.01)
"""
    supervisor, _ = supervise(
        tmp_path, python("node", other), python("main", main, main=True, together=("node",))
    )
    assert supervisor.run() == 0
    assert starts.read_text() == "xx"


def test_a_configuration_that_cannot_be_followed_is_not_tried_again(tmp_path):
    supervisor, said = supervise(
        tmp_path, python("other", SLEEP), python("main", "raise SystemExit(2)", main=True)
    )
    assert supervisor.run() == 2
    assert len(said) == 1


def test_a_signal_ends_it_in_order(tmp_path):
    ready = tmp_path / "ready"
    code = f"""
import signal, sys, time
def end(*_):
    open({str(tmp_path / "asked")!r}, "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
open({str(ready)!r}, "w").close()
{SLEEP}
"""
    supervisor, _ = supervise(tmp_path, python("main", code))

    def ask():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=ask, daemon=True).start()
    assert supervisor.run() == 0
    assert (tmp_path / "asked").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_logs_are_for_this_user_alone(tmp_path):
    supervisor, _ = supervise(tmp_path, python("main", "print('hello')", main=True))
    supervisor.run()
    log = tmp_path / "log" / "main.log"
    assert log.read_text() == "hello\n"
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.parent.stat().st_mode & 0o777 == 0o700


def test_a_child_does_not_outlive_a_parent_that_is_killed(tmp_path):
    child = f"""
import os, time
from uharmony_service.supervision import end_with_parent
end_with_parent()
open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
{SLEEP}
"""
    parent = f"""
import sys
from pathlib import Path
from uharmony_service.supervision import Program, Supervisor
program = Program("child", (sys.executable, "-c", {child!r}))
Supervisor([program], Path({str(tmp_path / "log")!r})).run()
"""
    process = subprocess.Popen([sys.executable, "-c", parent])
    pid_file = tmp_path / "pid"
    end = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    pid = int(pid_file.read_text())
    process.kill()
    process.wait()
    while _alive(pid):
        assert time.monotonic() < end
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
