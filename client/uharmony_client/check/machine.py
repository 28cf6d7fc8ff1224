"""The machine: disk, memory, device, rights, certificate and, where it is asked for, the clock.

Facts and findings name no path: folders may be named after people or projects.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from cryptography import x509

from uharmony_client.check.findings import Detail
from uharmony_client.device import choose_device
from uharmony_client.site_config import SiteConfig
from uharmony_model.errors import ConfigError, UHarmonyError

Noted = tuple[str, Detail]

_SPARE_BYTES = 1 << 30  # for everything that is not counted: logs, reports, the ledger
_EARLY_DAYS = 7
_CLOCK_S = 5.0
_MAX_CERTIFICATE_BYTES = 1 << 16


@dataclass(frozen=True)
class Need:
    """What the study needs here: bytes of prepared volumes and generations, of memory at once.

    `memory` is for the largest case, `carried` for what learning without labels carries.
    """

    volumes: int
    generations: int
    memory: int
    carried: int = 0


@dataclass(frozen=True)
class Reached:
    """The coordinator answered: seconds its clock is ahead of ours (None: not said), and taken."""

    clock_ahead_s: float | None
    seconds: float


Connection = Callable[[], Reached]


@dataclass(frozen=True)
class Machine:
    """Facts about the machine, each under a fixed name, and what was found."""

    facts: dict[str, str]
    noted: tuple[Noted, ...]


def look_at_machine(config: SiteConfig, need: Need, connection: Connection | None) -> Machine:
    """Everything that is not about the data. Nobody is contacted without a `connection`."""
    facts = {name: importlib.metadata.version(name) for name in ("torch", "monai")}
    noted: list[Noted] = []
    for look in (_disk, _memory):
        noted += look(config, need, facts)
    for look_closer in (_device, _rights, _certificate):
        noted += look_closer(config, facts)
    if connection is not None:
        noted += _coordinator(connection, facts)
    return Machine(facts, tuple(noted))


def _disk(config: SiteConfig, need: Need, facts: dict[str, str]) -> Iterator[Noted]:
    volumes = config.volumes or config.store / "volumes"
    # What is prepared already needs no more room.
    wanted: dict[Path, int] = {}
    for folder, size in (
        (volumes, max(0, need.volumes - _size(volumes))),
        (config.store, need.generations + _SPARE_BYTES),
    ):
        place = _existing(folder)
        wanted[place] = wanted.get(place, 0) + size
    devices: dict[int, tuple[int, int]] = {}
    for place, size in wanted.items():
        device = place.stat().st_dev
        before, _ = devices.get(device, (0, 0))
        devices[device] = (before + size, shutil.disk_usage(place).free)
    facts["disk"] = ", ".join(
        f"{_gib(free)} free, about {_gib(size)} needed" for size, free in devices.values()
    )
    for size, free in devices.values():
        if free < size:
            yield "U601", Detail(None, f"{_gib(free)} free, about {_gib(size)} needed")


def _memory(config: SiteConfig, need: Need, facts: dict[str, str]) -> Iterator[Noted]:
    free = available_memory()
    if free is None:
        return
    text = f"{_gib(free)} free, about {_gib(need.memory)} for the largest case"
    if need.carried:
        text += f" and {_gib(need.carried)} for what learning without labels carries"
    facts["memory"] = text
    if free < need.memory + need.carried:
        yield "U602", Detail(None, text)


def _device(config: SiteConfig, facts: dict[str, str]) -> Iterator[Noted]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts["cores"] = str(cores)
    threads = config.resources.threads
    if threads is not None and cores is not None and threads > cores:
        yield "U605", Detail(None, f"{threads} threads, {cores} cores")
    try:
        device = choose_device(config.resources.device)
    except ConfigError as error:
        facts["device"] = "none"
        yield "U603", Detail(None, str(error))
        return
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts["device"] = f"{found.name}, {_gib(found.total_memory)}"
        return
    facts["device"] = "cpu"
    if config.resources.device == "auto":
        yield "U604", Detail(None, "training runs on the CPU")


def _rights(config: SiteConfig, facts: dict[str, str]) -> Iterator[Noted]:
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        yield "U612", Detail(None, "user 0")
    data = config.cases if config.cases.is_dir() else config.cases.parent
    facts["data"] = "writable" if os.access(data, os.W_OK) else "read-only"
    if facts["data"] == "writable":
        yield "U609", Detail(None, "the folder of the case table")
    if not os.access(_existing(config.store), os.W_OK):
        yield "U613", Detail(None, "no right to write")
    if not config.store.is_dir():
        return
    # A closed folder closes what is in it; the keys are looked at themselves all the same.
    places = [("the store's folder", config.store)]
    identity = config.store / "identity"
    if identity.is_dir():
        places.append(("the folder identity", identity))
        places += [("a key of identity", key) for key in identity.glob("*.key")]
    for what, place in places:
        mode = stat.S_IMODE(place.stat().st_mode)
        if mode & 0o007:
            yield "U610", Detail(None, f"{what} has the mode {mode:o}")
        elif mode & 0o070:
            yield "U611", Detail(None, f"{what} has the mode {mode:o}")


def _certificate(config: SiteConfig, facts: dict[str, str]) -> Iterator[Noted]:
    path = config.store / "identity" / "tls.pem"
    if not path.is_file():
        return
    try:
        if path.stat().st_size > _MAX_CERTIFICATE_BYTES:
            yield "U608", Detail(None, "too large for a certificate")
            return
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        yield "U608", Detail(None, "no certificate in PEM")
        return
    now = datetime.now(UTC)
    days = (certificate.not_valid_after_utc - now).total_seconds() / 86400
    facts["certificate"] = f"{days:.1f} days left"
    if days <= 0 or certificate.not_valid_before_utc > now:
        ended = "ended" if days <= 0 else "not valid yet"
        yield "U607", Detail(None, ended)
    elif days < _EARLY_DAYS:
        yield "U606", Detail(None, facts["certificate"])


def _coordinator(connection: Connection, facts: dict[str, str]) -> Iterator[Noted]:
    try:
        reached = connection()
    except (UHarmonyError, OSError) as error:
        facts["coordinator"] = "not reached"
        yield "U614", Detail(None, str(error) if isinstance(error, UHarmonyError) else "no answer")
        return
    facts["coordinator"] = f"answered in {reached.seconds:.2f} s"
    if reached.clock_ahead_s is None:
        return
    facts["clock"] = f"the coordinator's is {reached.clock_ahead_s:+.1f} s ahead"
    if abs(reached.clock_ahead_s) > _CLOCK_S:
        yield "U615", Detail(None, f"{reached.clock_ahead_s:+.1f} s")


def available_memory() -> int | None:
    """Bytes this process may still take, as far as the system says; None where it does not."""
    free: list[int] = []
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            free += [int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")  # a container's own limit
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            free.append(int(limit) - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError, IndexError):
        pass
    return min(free, default=None)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there already."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # training may be replacing it just now
            total += path.stat().st_size if path.is_file() else 0
    return total


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
