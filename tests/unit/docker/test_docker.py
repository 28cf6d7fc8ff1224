"""The files under docker/, as far as they can be judged where no engine runs."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import AfterValidator, Field

from uharmony_model.frozen import Frozen
from uharmony_model.study import load_study
from uharmony_service.health import Health

ROOT = Path(__file__).resolve().parents[3]
DOCKER = ROOT / "docker"
SIDES = ("server", "client")
SITES = ("north", "harbour", "valley")
HARDENING = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "CapabilityBoundingSet": "",
    "SystemCallFilter": "@system-service",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    "User": "uharmony",
    "Restart": "on-failure",
    "UMask": "0077",
    "StateDirectoryMode": "0700",
}


# --- Dockerfiles --------------------------------------------------------------------------------


def _instructions(side: str) -> list[tuple[str, str]]:
    """Instruction and its text, continued lines joined, comments dropped."""
    text = (DOCKER / f"{side}.Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (word, rest.strip()) for word, _, rest in (x.partition(" ") for x in joined.split("\n"))
        if word
    ]  # fmt: skip


def _stages(side: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    found = _instructions(side)
    first, last = (i for i, (word, _) in enumerate(found) if word == "FROM")
    return found[first:last], found[last:]


def _copied(side: str) -> list[str]:
    build, _ = _stages(side)
    return [name for word, rest in build if word == "COPY" for name in rest.split()[:-1]]


@pytest.mark.parametrize("side", SIDES)
class TestDockerfile:
    def test_the_base_is_one_exact_version(self, side):
        found = _instructions(side)
        assert found[0] == ("ARG", "PYTHON_IMAGE=python:3.11.14-slim-bookworm")
        assert [rest for word, rest in found if word == "FROM"] == [
            "${PYTHON_IMAGE} AS build",
            "${PYTHON_IMAGE}",
        ]

    def test_it_ends_as_an_ordinary_user(self, side):
        _, final = _stages(side)
        words = [word for word, _ in final]
        assert dict(final)["USER"] == "10001:10001"
        assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")

    def test_nothing_is_compiled_or_fetched_in_the_final_stage(self, side):
        _, final = _stages(side)
        text = "\n".join(rest for word, rest in final if word == "RUN")
        assert not re.search(r"\b(apt|pip|gcc|curl|wget|git)\b", text)
        assert [rest for word, rest in final if word == "COPY"] == [
            "--from=build /opt/uharmony /opt/uharmony"
        ]

    def test_nothing_comes_by_url_and_no_secret_by_a_variable(self, side):
        text = (DOCKER / f"{side}.Dockerfile").read_text()
        assert "://" not in text
        names = {word for word, _ in _instructions(side)}
        assert "ADD" not in names
        given = " ".join(rest for word, rest in _instructions(side) if word in ("ARG", "ENV"))
        assert not re.search(r"(?i)token|secret|password|key\b", given)

    def test_commands_are_in_exec_form_and_exist(self, side):
        _, final = _stages(side)
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        words = dict(final)
        for name in ("ENTRYPOINT", "CMD"):
            assert isinstance(yaml.safe_load(words[name]), list)
        assert yaml.safe_load(words["ENTRYPOINT"]) == [f"uharmony-{side}"]
        assert f"uharmony-{side}" in known
        probe = yaml.safe_load(words["HEALTHCHECK"].partition("CMD ")[2])
        port = yaml.safe_load(words["CMD"])[-1]
        assert probe == ["python", "/opt/uharmony/probe.py", port]

    def test_only_the_coordinator_opens_a_port(self, side):
        exposed = [rest for word, rest in _instructions(side) if word == "EXPOSE"]
        assert exposed == (["8443"] if side == "server" else [])

    def test_what_is_copied_is_there_and_let_through(self, side):
        ignored = (DOCKER / f"{side}.Dockerfile.dockerignore").read_text().splitlines()
        rules = [line for line in ignored if line and not line.startswith("#")]
        assert rules[0] == "*"
        for name in _copied(side):
            assert (ROOT / name).exists(), name
            assert f"!{name}" in rules

    def test_version_and_index_of_torch_are_read_where_they_stand(self, side):
        build, _ = _stages(side)
        scripts = re.findall(r"sed -n '([^']+)' (\S+?)\)", "\n".join(rest for _, rest in build))
        assert [name for _, name in scripts] == ["requirements.lock", "scripts/setup"]
        found = [
            subprocess.run(
                ["sed", "-n", program, ROOT / name], capture_output=True, text=True, check=True
            ).stdout.split()
            for program, name in scripts
        ]
        assert [len(words) for words in found] == [1, 1]
        assert re.fullmatch(r"\d+\.\d+\.\d+", found[0][0])
        assert found[1][0].startswith("https://")


def test_both_images_are_built_alike():
    assert _stages("server")[0] == _stages("client")[0]


def test_the_copied_files_make_the_wheel(tmp_path):
    source = tmp_path / "src"
    for name in _copied("client"):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            skipped = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(ROOT / name, target, ignore=skipped)
        else:
            shutil.copy(ROOT / name, target)
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    made = subprocess.run(
        [*command, "--directory", tmp_path / "dist"],
        cwd=source, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (wheel,) = (tmp_path / "dist").glob("uharmony-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for side in SIDES:
        assert f"uharmony_{side}/app.py" in names
    assert "uharmony_service/py.typed" in names


# --- compose.yaml -------------------------------------------------------------------------------


def _named_or_bound(text: str) -> str:
    source, target, *mode = text.split(":")
    assert target.startswith("/")
    assert mode in ([], ["ro"])
    assert source == "./example" or re.fullmatch(r"[a-z-]+", source), text
    return text


Volume = Annotated[str, AfterValidator(_named_or_bound)]
Seconds = Annotated[str, Field(pattern=r"^\d+s$")]


class Build(Frozen):
    context: Literal[".."]
    dockerfile: Literal["docker/server.Dockerfile", "docker/client.Dockerfile"]
    args: dict[str, str] = Field(default_factory=dict)


class Probe(Frozen):
    disable: bool = False
    test: tuple[str, ...] = ()
    interval: Seconds = "30s"
    timeout: Seconds = "10s"
    start_period: Seconds = "30s"
    retries: int = 3


class Condition(Frozen):
    condition: Literal["service_healthy", "service_completed_successfully"]


class Service(Frozen):
    """What our services may say; every key is one of the compose specification's."""

    image: Literal["uharmony-server", "uharmony-client", "uharmony-example"]
    build: Build
    init: Literal[True]
    read_only: Literal[True]
    tmpfs: tuple[str, ...]
    cap_drop: tuple[Literal["ALL"]]
    security_opt: tuple[Literal["no-new-privileges:true"]]
    pids_limit: Annotated[int, Field(gt=0)]
    mem_limit: Annotated[str, Field(pattern=r"^\d+[mg]$")]
    restart: Literal["no", "on-failure"]
    healthcheck: Probe
    volumes: tuple[Volume, ...]
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    stop_grace_period: Seconds = "10s"
    depends_on: dict[str, Condition] = Field(default_factory=dict)
    networks: tuple[str, ...] = ()
    network_mode: Literal["none"] | None = None


class Network(Frozen):
    internal: Literal[True]


class Compose(Frozen):
    name: str
    services: dict[str, Service]
    networks: dict[str, Network]
    volumes: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def compose() -> Compose:
    content = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return Compose.model_validate({k: v for k, v in content.items() if not k.startswith("x-")})


class TestCompose:
    def test_a_site_shares_a_network_with_the_coordinator_alone(self, compose):
        for site in SITES:
            on_it = {name for name, one in compose.services.items() if site in one.networks}
            assert on_it == {"coordinator", site, f"{site}-join"}
            assert compose.services[site].networks == (site,)
        assert set(compose.networks) == set(SITES)

    def test_the_rest_reaches_nobody(self, compose):
        for one in compose.services.values():
            assert (one.network_mode == "none") != bool(one.networks)

    def test_a_service_reads_data_and_writes_its_own_store_only(self, compose):
        for site in SITES:
            volumes = compose.services[site].volumes
            assert volumes == (f"{site}-data:/data:ro", f"{site}-store:/var/lib/uharmony")
            assert f"{site}-code:/codes:ro" in compose.services[f"{site}-join"].volumes
        sources = {
            volume.split(":")[0] for one in compose.services.values() for volume in one.volumes
        }
        assert sources - {"./example"} == set(compose.volumes)

    def test_stores_of_sites_are_seen_by_nobody_else(self, compose):
        for site in SITES:
            users = {
                name
                for name, one in compose.services.items()
                for volume in one.volumes
                if volume.startswith(f"{site}-") and not volume.startswith(f"{site}-code")
            }
            assert users == {site, f"{site}-join", f"{site}-data"}

    def test_long_running_services_are_probed_and_restarted(self, compose):
        for name in ("coordinator", *SITES):
            one = compose.services[name]
            assert one.restart == "on-failure"
            assert one.healthcheck.test[:3] == ("CMD", "python", "/opt/uharmony/probe.py")

    def test_what_is_waited_for_is_there_and_can_be(self, compose):
        for one in compose.services.values():
            for name, wait in one.depends_on.items():
                ends = compose.services[name].restart == "no"
                assert ends == (wait.condition == "service_completed_successfully")

    def test_the_example_has_these_sites_and_begins_with_all(self):
        study, section = load_study(DOCKER / "example" / "study.yaml")
        assert set(section["source"]["sites"]) == set(SITES)
        assert study.federation.min_sites == len(SITES)

    def test_scripts_are_valid_and_private(self, compose):
        for one in compose.services.values():
            script = next((word for word in one.entrypoint if word.startswith("/example/")), None)
            if script is not None:
                assert (DOCKER / script.lstrip("/")).is_file()
        for path in (DOCKER / "example").glob("*.sh"):
            assert subprocess.run(["sh", "-n", path], check=False).returncode == 0
            assert "set -eu\numask 077\n" in path.read_text()


# --- systemd and the probe ----------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
class TestUnit:
    def test_it_is_hardened(self, side):
        settings = _settings(side)
        assert {name: settings.get(name) for name in HARDENING} == HARDENING
        assert settings["ExecStart"].startswith(f"/opt/uharmony/bin/uharmony-{side} ")
        assert "ReadWritePaths" not in settings

    def test_settings_that_no_restart_mends_end_it(self, side):
        from uharmony_service.supervision import PERMANENT

        codes = _settings(side)["RestartPreventExitStatus"].split()
        assert {int(code) for code in codes} == PERMANENT

    def test_memory_is_not_executable_where_torch_allows_it(self, side):
        # oneDNN makes code at run time: a site that convolves cannot have it.
        assert ("MemoryDenyWriteExecute" in _settings(side)) == (side == "server")

    @pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
    def test_systemd_understands_it(self, side, tmp_path):
        # The command is not installed on this machine; `true` is.
        command = shutil.which("true") or "/bin/true"
        text = (DOCKER / f"uharmony-{side}.service").read_text()
        unit = tmp_path / f"uharmony-{side}.service"
        unit.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={command}", text))
        found = subprocess.run(
            ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False
        )
        # Other units of the machine are read too and may be warned about.
        assert unit.name not in found.stderr, found.stderr


def _settings(side: str) -> dict[str, str]:
    lines = (DOCKER / f"uharmony-{side}.service").read_text().splitlines()
    split = (line.partition("=") for line in lines if not line.startswith("#"))
    pairs = [(name, value) for name, equals, value in split if equals]
    names = [name for name, _ in pairs]
    assert len(names) == len(set(names))
    return dict(pairs)


def _probe(port: int) -> int:
    return subprocess.run(
        [sys.executable, DOCKER / "probe.py", str(port)], capture_output=True, check=False
    ).returncode


def test_the_probe_tells_a_serving_service_from_none():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert _probe(port) == 1
    with Health(port):
        assert _probe(port) == 0
