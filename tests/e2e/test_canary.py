"""Canaries: markers planted wherever a hospital has something to hide, and none of them leaves.

Real processes run a whole study. Everything that the gateway reads and writes after TLS is
recorded and searched, and so is the coordinator's folder. The control goes the same way.
"""

from __future__ import annotations

import csv
import hashlib
import http.client
import json
import os
import random
import re
import string
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import ConfigRecord
from flwr.proto.message_pb2 import PushObjectRequest
from safetensors.torch import load_file

from tests.integration.test_gateway import node_headers
from tests.support.canaries import Search, compressed, forms, number_forms, windows
from tests.support.nifti_files import nifti_bytes
from tests.support.tiny import tiny_study
from uharmony_client.dry_run import dry_run
from uharmony_client.home import Home
from uharmony_client.identity import Identity
from uharmony_client.site import Site
from uharmony_model.exchange.codec import unpack
from uharmony_model.exchange.payload import Kind, decode, encode, open_payload
from uharmony_model.exchange.schema import unflatten
from uharmony_model.initial import initial_weights
from uharmony_simulation.deployed import CLIENT, SERVER, Deployment

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SITES = {"alpha": 5, "beta": 4}
SHAPE = (16, 16, 16)
MAGIC = b"\x89UHARM1\n"
RECORDER = Path(__file__).resolve().parent.parent / "support" / "record_gateway"
DRAW = random.Random(20_26)  # noqa: S311 - markers, no keys
TEXTS = {"descrip": 80, "aux_file": 24, "intent_name": 16, "db_name": 18}


@dataclass
class Scene:
    """What was planted, and what was seen."""

    deployment: Deployment
    planted: dict[bytes, str] = field(default_factory=dict)
    control: dict[bytes, str] = field(default_factory=dict)
    names: list[bytes] = field(default_factory=list)
    dry: dict[str, object] = field(default_factory=dict)
    up: dict[str, list[bytes]] = field(default_factory=dict)
    down: list[bytes] = field(default_factory=list)

    @property
    def traffic(self) -> list[bytes]:
        """All that crossed the gateway, a piece for each connection and direction."""
        return [*self.down, *(piece for pieces in self.up.values() for piece in pieces)]


def word() -> str:
    """A text of 16 characters that occurs nowhere else."""
    return "".join(DRAW.choices(string.ascii_letters + string.digits, k=16))


def plant(scene: Scene, secret: bytes, where: str) -> bytes:
    scene.planted[secret] = where
    return secret


def volume(scene: Scene, kind: str, number: int, label: np.ndarray | None) -> bytes:
    """A volume whose header, extension and (an image's) voxels hold markers."""
    fields: dict[str, Any] = {
        name: plant(scene, word().encode(), f"{kind} {name}") for name in TEXTS
    }
    comment = plant(scene, word().encode(), f"{kind} extension")
    extension = np.array([32, 6], "<i4").tobytes() + comment.ljust(24, b"\0")
    if label is not None:
        return nifti_bytes(label, extension=extension, **fields)
    draws = np.random.default_rng(number)
    image = draws.normal(100, 8, SHAPE).astype("<i2")
    for row in range(8):
        secret = plant(scene, DRAW.randbytes(16), "voxels")
        image[:8, row, number % 16] = np.frombuffer(secret, "<i2") // 64 + 100
        # Voxels of a scanner have 12 bits or so; their own bytes are what is looked for.
        del scene.planted[secret]
        plant(scene, image[:8, row, number % 16].tobytes(), "voxels")
    return nifti_bytes(image, extension=extension, **fields)


def write_site(scene: Scene, folder: Path, name: str, count: int) -> Path:
    """Cases of one hospital with markers for names; its site.yaml."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        label = np.zeros(SHAPE, "u1")
        label[4:10, 5:11, 6:12] = 1
        case, patient, image, mask = (word() for _ in range(4))
        for secret, where in (
            (case, "case"),
            (patient, "patient"),
            (image, "file"),
            (mask, "file"),
        ):
            scene.names.append(plant(scene, secret.encode(), where))
        (folder / f"{image}.nii").write_bytes(volume(scene, "image", number, None))
        (folder / f"{mask}.nii").write_bytes(volume(scene, "label", number, label))
        rows.append({"case": case, "patient": patient, "site": name, "modality": "MR",
                     "image": f"{image}.nii", "label": f"{mask}.nii"})  # fmt: skip
    with (folder / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    content = {"name": name, "cases": "cases.csv", "store": "store", "policy": {"min_cases": 1}}
    (folder / "site.yaml").write_text(yaml.safe_dump(content))
    return folder / "site.yaml"


def client(environment: dict[str, str], *words: str) -> None:
    """A command of a hospital, in its own environment."""
    done = subprocess.run(
        [sys.executable, "-m", CLIENT, *words], env={**os.environ, **environment},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def send_control(scene: Scene, identity: Identity) -> None:
    """Markers in every form, sent by an enrolled site to a path that takes bodies."""
    port = scene.deployment.port
    body = b""
    for name in forms(b"a" * 16):
        secret = word().encode()
        scene.control[secret] = f"as {name}"
        body += os.urandom(DRAW.randrange(9)) + forms(secret)[name]
    for name in compressed(b"a" * 16):
        secret = word().encode()
        scene.control[secret] = f"in {name}"
        body += os.urandom(DRAW.randrange(9)) + compressed(os.urandom(99) + secret)[name]
    secret = word().encode()
    scene.control[secret] = "as the name of a metric"
    metric = {secret.decode(): 1.0}
    body += encode(kind=Kind.METRICS, study="a" * 64, round=1, site="alpha", values=metric)
    connection = http.client.HTTPSConnection(
        "localhost", port, context=identity.context(), timeout=10
    )
    with closing(connection):
        connection.request("POST", "/v1/fleet/push-object", body, node_headers(identity))
        assert connection.getresponse().status >= 400  # it is no message of Flower's


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    work = tmp_path_factory.mktemp("canary")
    study = tiny_study(
        training={"rounds": 2, "local_steps": 2}, codec={"up": "bf16"}, federation={"min_sites": 2}
    )
    with pytest.MonkeyPatch.context() as patch:
        (work / "record").mkdir()
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(RECORDER))
        patch.setenv("UHARMONY_TEST_RECORD", str(work / "record"))
        empty = Scene(None)  # type: ignore[arg-type]
        sources = {n: write_site(empty, work / "data" / n, n, c) for n, c in SITES.items()}
        deployment = Deployment(work / "deployed", study, sources)
        empty.deployment = deployment
        surroundings = {
            name: {
                f"HOSPITAL_{i}": plant(empty, word().encode(), "environment").decode()
                for i in range(20)
            }
            for name in SITES
        }
        try:
            run(empty, study.digest, surroundings)
            for path in sorted((work / "record").iterdir()):
                site = path.stem.rpartition("-")[2]
                if path.suffix == ".up":
                    empty.up.setdefault(site, []).append(path.read_bytes())
                else:
                    empty.down.append(path.read_bytes())
            yield empty
        finally:
            deployment.stop()


def run(scene: Scene, study: str, surroundings: dict[str, dict[str, str]]) -> None:
    """Join, look at what would leave, send the control, train to the end."""
    deployment = scene.deployment
    deployment.init()
    deployment.call(SERVER, "pause", "--dir", str(deployment.server))
    deployment.start_server()
    deployment.await_gateway()
    codes = {name: deployment.invite(name) for name in SITES}

    def join(name: str) -> None:
        words = ("--site", str(deployment.site_yaml(name)), "join", codes[name], "--approve", study)
        client(surroundings[name], *words)

    with ThreadPoolExecutor() as pool:
        list(pool.map(join, SITES))
    site = str(deployment.site_yaml("alpha"))
    home = Home.find(site)
    scene.dry = json.loads(dry_run(Site.open(home.config, home.study())).to_json())
    send_control(scene, Identity(deployment.store("alpha") / "identity"))
    deployment.call(SERVER, "resume", "--dir", str(deployment.server))
    for name in SITES:
        deployment.start_site(name, surroundings[name])
    deployment.finish(180)
    for name in SITES:
        deployment.processes[name].wait(60)


def patterns(secrets: dict[bytes, str]) -> dict[bytes, str]:
    """Every form of every secret; the label says where it was and which form it is."""
    return {
        form: f"{where} [{name}]"
        for secret, where in secrets.items()
        for name, form in forms(secret).items()
    }


def test_the_control_hits_in_every_form(scene: Scene):
    by_name = {s: f"{w}:{s.decode()}" for s, w in scene.control.items()}
    found = Search(patterns(by_name)).within(scene.up["alpha"])
    seen = {label.partition(" [")[0] for label in found}
    assert seen == set(by_name.values())
    assert len(seen) >= 20


def test_no_marker_crosses_the_gateway(scene: Scene):
    assert len(scene.planted) >= 200
    wheres = Counter(scene.planted.values())
    assert {"voxels", "image descrip", "label extension", "case", "patient", "file",
            "environment"} <= set(wheres)  # fmt: skip
    assert sum(map(len, scene.traffic)) > 100_000
    assert Search(patterns(scene.planted)).within(scene.traffic) == set()


def test_no_prepared_voxel_and_no_local_parameter_crosses_the_gateway(scene: Scene):
    """The values that the sites trained themselves, not only planted ones."""
    looked_for: dict[bytes, str] = {}
    for name in SITES:
        volumes = yaml.safe_load(scene.deployment.site_yaml(name).read_text())["volumes"]
        for path in sorted(Path(volumes).glob("*/image.npy")):
            for part in list(windows(np.load(path, mmap_mode="r")))[::8]:
                looked_for |= dict.fromkeys(number_forms(part).values(), "prepared voxels")
        for path in locals_of(scene, name):
            for key, tensor in load_file(path).items():
                for part in windows(tensor.numpy()):
                    label = f"{path.parent.name} {key}"
                    looked_for |= dict.fromkeys(number_forms(part).values(), label)
    assert len(looked_for) > 10_000
    assert len({label for label in looked_for.values() if "@" in label}) > 30
    every, found = Search(looked_for), set()
    for piece in scene.traffic:
        found |= every.within([piece, *decoded(piece)])
    assert {label for label in found if not told_by_the_update(label)} == set()


def locals_of(scene: Scene, site: str) -> list[Path]:
    """What a site keeps to itself, a file a round."""
    return sorted(scene.deployment.store(site).glob("generations/*/*/local.safetensors"))


def told_by_the_update(label: str) -> bool:
    """Some local parameters have a shared twin that learns the same; see the next test.

    y = s (a0 + a1 z) + b: until s moves away from 1, the shift b learns what a0 does and the gain
    log s what a1 does. A residual that is added to a shared weight always learns the same as it; a
    depthwise one has no twin.
    """
    twins = ("weight_residual@", ".gain@", ".shift@")
    return label.startswith("round-000001 network.") and any(name in label for name in twins)


@pytest.mark.parametrize("round_", [1, 2])
def test_known_limit_the_change_of_a_residual_is_that_of_its_shared_weight(
    scene: Scene, round_: int
):
    """Not a leak of the transport but of the method: W + D has one gradient for W and for D.

    With one domain a site, whoever sees all its updates can add them up to the residual. It is
    written down in docs/hostile_input.md; if this fails, the sentence there is wrong.
    """
    schema, _ = initial_weights(scene.deployment.study)
    now = locals_of(scene, "alpha")[round_ - 1]
    before = load_file(locals_of(scene, "alpha")[0]) if round_ == 2 else {}
    update = (now.parent / "update.bin").read_bytes()
    shared = unflatten(decode(update, kind=Kind.UPDATE, schema=schema)[1], schema)
    seen = 0
    for key, value in load_file(now).items():
        if "weight_residual@" in key and not key.startswith("optimizer/"):
            change = value - before[key] if round_ == 2 else value
            twin = shared[key.partition("weight_residual@")[0] + "shared.weight"]
            assert torch.allclose(change, twin, rtol=2**-7, atol=1e-6)
            seen += 1
    assert seen == 2


def decoded(piece: bytes) -> list[bytes]:
    """The numbers of each payload in a stream, as its receiver gets them."""
    found = []
    for payload in payloads_in(piece):
        manifest, body, _ = open_payload(payload, max_bytes=len(payload))
        if manifest.numel:
            numbers = unpack(body, manifest.numel, manifest.codec).numpy()
            found += [numbers.tobytes(), numbers.astype(">f4").tobytes()]
    return found


def payloads_in(piece: bytes) -> list[bytes]:
    """Whole payloads, found by their first bytes and cut by their own declared lengths."""
    found = []
    for match in re.finditer(re.escape(MAGIC), piece):
        start = match.start()
        header = int.from_bytes(piece[start + 8 : start + 12], "little")
        manifest = json.loads(piece[start + 44 : start + 44 + header])
        found.append(piece[start : start + 44 + header + manifest["body_bytes"]])
    return found


def test_the_numbers_searched_for_are_found_where_they_are(scene: Scene):
    """The same search over a site's own generation must hit, or it could find nothing."""
    for name in SITES:
        path = max(scene.deployment.store(name).glob("generations/*/*/local.safetensors"))
        part = next(p for t in load_file(path).values() for p in windows(t.numpy()))
        assert Search({part.tobytes(): "here"}).here(path.read_bytes()) == {"here"}


def test_no_image_and_no_name_in_the_coordinators_folder(scene: Scene):
    files = [p for p in scene.deployment.server.rglob("*") if p.is_file()]
    assert {"report.html", "state.json", "gateway.log"} <= {p.name for p in files}
    contents = [p.read_bytes() for p in files]
    contents += [str(p).encode() for p in scene.deployment.server.rglob("*")]
    assert Search(patterns(scene.planted)).within(contents) == set()
    assert not [p for p in files if b"n+1\0" in p.read_bytes() or p.suffix in (".nii", ".gz")]


def objects_of(pieces: list[bytes]) -> list[bytes]:
    """The objects that a site pushed, each once, from the requests on the wire."""
    found: dict[str, bytes] = {}
    for piece in pieces:
        while piece:
            head, _, rest = piece.partition(b"\r\n\r\n")
            size = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            body, piece = rest[: int(size[1])] if size else b"", rest[int(size[1]) if size else 0 :]
            if head.startswith(b"POST /v1/fleet/push-object ") and MAGIC + b"\0" not in body:
                try:
                    request = PushObjectRequest.FromString(body)
                except Exception:  # noqa: S112 - the control is no message
                    continue
                found[request.object_id] = request.object_content
    return list(found.values())


def sent_by(scene: Scene, site: str) -> list[bytes]:
    """Payloads and texts of a site at the application's layer, without the ledger's own head."""
    found = []
    for content in objects_of(scene.up[site]):
        if content.startswith(b"ConfigRecord"):
            text = str(ConfigRecord.inflate(content)["json"])
            if set(json.loads(text)) != {"seq", "sha256"}:
                found.append(text.encode())
        found += payloads_in(content)
    return found


@pytest.mark.parametrize("site", SITES)
def test_the_ledger_holds_exactly_what_was_on_the_wire(scene: Scene, site: str):
    lines = (scene.deployment.store(site) / "ledger" / "ledger.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    seen = sent_by(scene, site)
    assert {e["kind"] for e in entries} == {"hello", "update", "metrics", "status"}
    digests = Counter(hashlib.sha256(data).hexdigest() for data in seen)
    written = Counter(e["sha256"] for e in entries)
    assert not digests - written
    # An entry comes before what it speaks of; the last word of a site ("finished") may find the
    # coordinator gone already. Anything else that was written down has left.
    unsent = written - digests
    assert all(e["kind"] == "status" for e in entries if e["sha256"] in unsent)
    left = [e for e in entries if e["sha256"] not in unsent]
    assert sum(map(len, seen)) == sum(e["bytes"] for e in left)


def test_the_dry_run_told_exactly_what_left_in_the_first_round(scene: Scene):
    path = scene.deployment.store("alpha") / "ledger" / "ledger.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    first = next(e for e in entries if e["kind"] == "update" and e["round"] == 1)
    assert scene.dry["sha256"] == first["sha256"]
    assert scene.dry["bytes"] == first["bytes"]
    assert scene.dry["tensors"] == first["tensors"]
    assert scene.dry["values"] == first["values"]
