"""A whole deployment speaks to nobody but itself, and listens where it says.

A small library, loaded into every process before anything else, writes down each name that is
looked up and each address outside this machine; the control shows that it does.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.tiny import tiny_study, write_folder
from uharmony_simulation.deployed import SERVER, Deployment

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.compiler,
    pytest.mark.skipif(sys.platform != "linux", reason="preloading and /proc are Linux's"),
]

SOURCE = Path(__file__).resolve().parent.parent / "support" / "lookups.c"
PROGRAMS = ("superlink", "gateway", "coordinator", "supernode", "site_process")
_LISTEN = "0A"


@dataclass
class Seen:
    """What a run of the deployment did on the network."""

    port: int
    log: str = ""
    processes: set[str] = field(default_factory=set)
    listening: set[tuple[str, str, int]] = field(default_factory=set)


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The log; within this fixture every child of this process is watched."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("lookups")
    library = folder / "lookups.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        patch.setenv("UHARMONY_TEST_LOOKUPS", str(folder / "log"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder / "log"


def test_the_control_is_written_down(preloaded: Path):
    program = (
        "import socket\n"
        "for act in (lambda: socket.getaddrinfo('control.invalid', 443),\n"
        "            lambda: socket.gethostbyname('by-name.invalid'),\n"
        "            lambda: socket.getaddrinfo('localhost', 443)):\n"
        "    try: act()\n"
        "    except OSError: pass\n"
        "one = socket.socket(); one.settimeout(0.1)\n"
        "try: one.connect(('192.0.2.1', 9))\n"
        "except OSError: pass\n"
        "two = socket.socket(type=socket.SOCK_DGRAM)\n"
        "try: two.sendto(b'x', ('192.0.2.2', 9))\n"
        "except OSError: pass\n"
        "try: two.sendmsg([b'x'], [], 0, ('192.0.2.3', 9))\n"
        "except OSError: pass\n"
        "two.sendto(b'x', ('127.0.0.1', 9))\n"
    )
    before = preloaded.read_text() if preloaded.exists() else ""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    text = preloaded.read_text().removeprefix(before)
    preloaded.unlink()
    for expected in (
        "getaddrinfo control.invalid",
        "by-name.invalid",
        "connect 192.0.2.1",
        "sendto 192.0.2.2",
        "sendmsg 192.0.2.3",
    ):
        assert expected in text
    assert "localhost" not in text
    assert "127." not in text


@pytest.fixture(scope="module")
def seen(preloaded: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """One site, one round, the public port on all addresses of this machine."""
    preloaded.unlink(missing_ok=True)
    work = tmp_path_factory.mktemp("quiet")
    data = write_folder(work / "data", {"alpha": 4})
    site = work / "alpha" / "site.yaml"
    site.parent.mkdir()
    cases = data / "cases.csv"
    cases.write_text(
        "case,patient,site,modality,image,label\n"
        + "".join(
            f"{n},{n},alpha,MR,images/{n}.nii.gz,labels/{n}.nii.gz\n"
            for n in (f"alpha_{i}" for i in range(4))
        )
    )
    site.write_text(f"name: alpha\ncases: {cases}\nstore: store\npolicy: {{min_cases: 1}}\n")
    study = tiny_study(training={"rounds": 1, "local_steps": 1})
    deployment = Deployment(work / "deployed", study, {"alpha": site})
    found = Seen(deployment.port)
    try:
        deployment.init(listen="0.0.0.0")  # noqa: S104 - as a coordinator has it
        deployment.start()
        end = time.monotonic() + 120
        while deployment.processes["server"].poll() is None and time.monotonic() < end:
            look(found, str(preloaded))
            time.sleep(0.3)
        assert deployment.processes["server"].poll() == 0
        assert deployment.processes["alpha"].wait(60) == 0
        deployment.call(SERVER, "status", "--dir", str(deployment.server))
        found.log = preloaded.read_text() if preloaded.exists() else ""
        yield found
    finally:
        deployment.stop()


def look(found: Seen, mark: str) -> None:
    """Add the sockets on which processes with this mark in their environment listen now."""
    listening = dict(sockets_listening())
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) == os.getpid():
                continue
            if mark.encode() not in (folder / "environ").read_bytes():
                continue
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            name = next((p for p in PROGRAMS if any(w.endswith(f".{p}") for w in words)), "other")
            found.processes.add(name)
            for link in (folder / "fd").iterdir():
                address = listening.get(str(link.readlink()))
                if address is not None:
                    found.listening.add((name, *address))
        except OSError:
            continue  # it has ended


def sockets_listening() -> Iterator[tuple[str, tuple[str, int]]]:
    """Every listening TCP socket of this machine, as its descriptor is named in /proc."""
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] != _LISTEN:
                continue
            address, port = fields[1].split(":")
            raw = bytes.fromhex(address)
            words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
            yield f"socket:[{fields[9]}]", (socket.inet_ntop(family, words), int(port, 16))


def test_nothing_is_looked_up_and_nobody_else_is_spoken_to(seen: Seen):
    assert set(PROGRAMS) <= seen.processes
    assert seen.log == ""


def test_listening_sockets_are_those_of_the_documentation(seen: Seen):
    by_program = {name: {(a, p) for n, a, p in seen.listening if n == name} for name in PROGRAMS}
    assert by_program["gateway"] == {("0.0.0.0", seen.port)}  # noqa: S104
    for name in ("superlink", "supernode"):
        assert by_program[name], f"{name} was not seen"
        assert {address for address, _ in by_program[name]} == {"127.0.0.1"}
    assert by_program["coordinator"] == by_program["site_process"] == set()
    others = {address for name, address, _ in seen.listening if name not in ("gateway",)}
    assert others == {"127.0.0.1"}


def test_a_listening_socket_would_have_been_seen():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert (f"socket:[{os.fstat(server.fileno()).st_ino}]", server.getsockname()) in list(
            sockets_listening()
        )
