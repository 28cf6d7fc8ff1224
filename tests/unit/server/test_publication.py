"""What the coordinator admits of what sites publish, hands out of it, and keeps of it."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support import wire
from tests.support.tiny import tiny_study
from uharmony_model.errors import StoreError
from uharmony_model.exchange.payload import Kind, encode
from uharmony_model.exchange.published import (
    KINDS,
    MAX_DOMAINS,
    PublicationForm,
    Reason,
    patient_values,
)
from uharmony_model.initial import initial_weights
from uharmony_model.prototypes import Prototype, noise_deviation
from uharmony_model.publication import SiteExperts, read_publication
from uharmony_server.admission import (
    AdmittedRelease,
    Expected,
    Refusal,
    RefusalReason,
    admit_release,
)
from uharmony_server.checkpoint import Checkpoint, load_latest, save
from uharmony_server.export import export_model, model_card
from uharmony_server.publication import (
    Answer,
    Published,
    abstention_limit,
    hand_out,
    publication_of,
    take,
)
from uharmony_server.published_store import read_published, write_published

STUDY = tiny_study(
    publication={"experts": True, "prototypes": True, "center": [0.0], "scale": [1.0]}
)
FORM = PublicationForm.of(STUDY)
EXPERTS_ONLY = tiny_study(publication={"experts": True})
SAID = '{"experts":["published"],"prototypes":["published"]}'
EPSILON, DELTA = 1.0, 1e-5
BUDGET = {"epsilon": EPSILON, "delta": DELTA}


def expected(site: str = "north") -> Expected:
    return Expected(
        site=site,
        study=STUDY.digest,
        round=5,
        base=wire.BASE,
        schema=None,
        codec="bf16",
        max_cases=1000,
        norm_limit=1e-9,
    )


def release(what="experts", patients=None, **changes) -> bytes:
    patients = patients or {"mr": 12, "ct": 10}
    schema = FORM.schema(what, patients)
    values = patient_values(patients) | (BUDGET if what == "prototypes" else {})
    fields = {
        "kind": KINDS[what],
        "study": STUDY.digest,
        "round": 5,
        "site": "north",
        "base": wire.BASE,
        "schema": schema,
        "flat": torch.linspace(-0.1, 0.1, schema.numel),
        "values": values,
    }
    return encode(**{**fields, **changes})


def admitted(data: object, what="experts") -> AdmittedRelease | Refusal:
    return admit_release(data, expected(), what, STUDY.publication, FORM)


# --- admission ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["experts", "prototypes"])
def test_an_honest_release_is_admitted_as_it_was_sent(what):
    found = admitted(release(what), what)
    assert isinstance(found, AdmittedRelease)
    assert (found.site, found.patients) == ("north", {"ct": 10, "mr": 12})
    schema = FORM.schema(what, ("ct", "mr"))
    assert found.schema == schema
    assert torch.equal(found.flat, torch.linspace(-0.1, 0.1, schema.numel))


def long_row(length: float) -> torch.Tensor:
    """One prototype of this norm, and one of zeros."""
    return torch.cat((torch.full((8,), length / math.sqrt(8)), torch.zeros(8)))


@pytest.mark.parametrize(
    ("what", "changes", "reason"),
    [
        ("experts", {"kind": Kind.PROTOTYPE}, RefusalReason.WRONG_KIND),
        ("prototypes", {"kind": Kind.UPDATE}, RefusalReason.WRONG_KIND),
        ("experts", {"study": "0" * 64}, RefusalReason.WRONG_STUDY),
        ("experts", {"site": "south"}, RefusalReason.WRONG_SITE),
        ("experts", {"round": 4}, RefusalReason.WRONG_ROUND),
        ("experts", {"base": "0" * 64}, RefusalReason.WRONG_BASE),
        ("experts", {"codec": "bf16"}, RefusalReason.WRONG_CODEC),
        ("experts", {"schema": None, "flat": None}, RefusalReason.WRONG_SCHEMA),
        ("experts", {"values": {}}, RefusalReason.WRONG_SCHEMA),
        ("experts", {"values": {"patients/mr": 12}}, RefusalReason.WRONG_SCHEMA),
        ("experts", {"values": {"patients/mr": 12, "patients/xy": 12}}, RefusalReason.WRONG_SCHEMA),
        ("experts", {"patients": {"mr": 9}}, RefusalReason.BAD_CASE_COUNT),
        ("experts", {"patients": {"mr": 1001}}, RefusalReason.BAD_CASE_COUNT),
        ("experts", {"patients": {"mr": -12}}, RefusalReason.BAD_CASE_COUNT),
        ("prototypes", {"flat": torch.full((16,), math.nan)}, RefusalReason.NOT_FINITE),
        ("prototypes", {"flat": torch.full((16,), -math.inf)}, RefusalReason.NOT_FINITE),
        ("prototypes", {"flat": torch.full((16,), 3e38)}, RefusalReason.NORM_TOO_LARGE),
        (
            "prototypes",
            {"values": {"patients/mr": 12, "patients/ct": 10, "epsilon": 0.9, "delta": 1e-5}},
            RefusalReason.WRONG_BUDGET,
        ),
        (
            "prototypes",
            {"values": {"patients/mr": 12, "patients/ct": 10, "epsilon": 1.0, "delta": None}},
            RefusalReason.WRONG_BUDGET,
        ),
        ("prototypes", {"values": {"patients/mr": 12}}, RefusalReason.WRONG_SCHEMA),
    ],
)  # fmt: skip
def test_what_is_not_what_was_asked_is_refused(what, changes, reason):
    found = admitted(release(what, **changes), what)
    assert isinstance(found, Refusal)
    assert (found.site, found.round, found.reason) == ("north", 5, reason)


@pytest.mark.parametrize("data", [None, "text", b"", b"\x00" * 500])
def test_what_is_no_payload_is_damaged(data):
    found = admitted(data)
    assert isinstance(found, Refusal)
    assert found.reason is RefusalReason.DAMAGED


def test_more_than_any_site_can_publish_is_not_opened():
    found = admitted(bytes(FORM.max_bytes("experts") + 1))
    assert isinstance(found, Refusal)
    assert found.reason is RefusalReason.OVERSIZED


def test_a_prototype_may_be_one_long_and_have_noise():
    # sigma of the domain "ct", whose ten patients give the larger noise; its row comes first.
    noise = 2 / 10 * math.sqrt(2 * math.log(1.25 / 1e-5))
    longest = 1 + 10 * noise * math.sqrt(8)
    assert isinstance(admitted(release("prototypes", flat=long_row(0.999 * longest)), "prototypes"),
                      AdmittedRelease)  # fmt: skip
    found = admitted(release("prototypes", flat=long_row(1.001 * longest)), "prototypes")
    assert isinstance(found, Refusal)
    assert found.reason is RefusalReason.NORM_TOO_LARGE


# --- one answer -----------------------------------------------------------------------------------


def taken(
    published: Published, payloads, site="north", said=SAID, study=STUDY
) -> tuple[Published, list[Refusal]]:
    return take(published, Answer(payloads, said), expected(site), study, FORM)


def test_what_counts_is_added_under_the_names_it_has_outside():
    payloads = {"experts": release(), "prototypes": release("prototypes")}
    published, refused = taken(Published(), payloads)
    assert refused == []
    assert published.said == {
        "north": {"experts": (Reason.PUBLISHED,), "prototypes": (Reason.PUBLISHED,)}
    }
    assert dict(published.experts["north"].patients) == {"ct": 10, "mr": 12}
    assert set(published.experts["north"].residuals) == {
        f"{key}@{domain}" for key in FORM.residuals for domain in ("ct", "mr")
    }
    first, second = published.prototypes
    assert (first.domain, second.domain) == ("north.ct", "north.mr")
    assert first.noise == pytest.approx(2 / 10 * math.sqrt(2 * math.log(1.25 / DELTA)) / EPSILON)
    assert second.mean == tuple(torch.linspace(-0.1, 0.1, 16)[8:].double().tolist())


def test_one_bad_part_does_not_spoil_the_other():
    payloads = {"experts": release(round=4), "prototypes": release("prototypes")}
    published, (refused,) = taken(Published(), payloads)
    assert refused.reason is RefusalReason.WRONG_ROUND
    assert published.experts == {}
    assert len(published.prototypes) == 2


def test_what_was_not_asked_for_is_refused():
    payloads = {"experts": release(), "prototypes": release("prototypes")}
    published, (refused,) = taken(Published(), payloads, study=EXPERTS_ONLY)
    assert refused.reason is RefusalReason.WRONG_KIND
    assert published.prototypes == ()


@pytest.mark.parametrize("said", ["", "{", "7", '{"experts":"published"}', '{"experts":["x"]}'])
def test_an_answer_must_say_why_in_codes(said):
    published, (refused,) = taken(Published(), {"experts": release()}, said=said)
    assert refused.reason is RefusalReason.DAMAGED
    assert (published.said, published.experts, published.prototypes) == ({}, {}, ())


@pytest.mark.parametrize("what", ["experts", "prototypes"])
def test_two_sites_cannot_have_one_name(what):
    """Site a, domain b.c and site a.b, domain c would both be a.b.c."""
    first = release(what, patients={"b.c": 10}, site="a")
    published, refused = taken(Published(), {what: first}, site="a")
    assert refused == []
    second = release(what, patients={"c": 10}, site="a.b")
    published, (refusal,) = taken(published, {what: second}, site="a.b")
    assert refusal.reason is RefusalReason.DUPLICATE
    assert set(published.experts) <= {"a"}
    assert len(published.prototypes) <= 1


def test_a_name_that_is_too_long_outside_is_refused():
    long = "d" * 60
    _, (refused,) = taken(Published(), {"experts": release(patients={long: 10})})
    assert refused.reason is RefusalReason.WRONG_SCHEMA


def test_as_many_domains_as_a_site_may_have():
    patients = {f"d{i}": 10 for i in range(MAX_DOMAINS)}
    _, refused = taken(Published(), {"experts": release(patients=patients)})
    assert refused == []


# --- handed out -----------------------------------------------------------------------------------


def prototype(name: str, *mean: float, patients: int = 10_000) -> Prototype:
    return Prototype(
        domain=name,
        mean=(*mean, *(0.0,) * (8 - len(mean))),
        patients=patients,
        noise=noise_deviation(patients, epsilon=EPSILON, delta=DELTA),
        epsilon=EPSILON,
        delta=DELTA,
    )


def test_the_limit_is_the_farthest_nearest_neighbour_and_a_margin():
    line = [prototype(f"s.d{i}", place) for i, place in enumerate((0.0, 1.0, 1.5))]
    # Nearest neighbours lie 1, 0.5 and 0.5 away.
    limit = abstention_limit(line)
    assert limit is not None
    assert limit.limit == pytest.approx(1.1 * 1.0)
    assert limit.familiar == pytest.approx(0.5 * 1.0)
    assert limit.margin == 0.1
    assert limit.false_rate is None
    assert abstention_limit(line[:1]) is None
    assert abstention_limit([]) is None


def handed_out(*prototypes: Prototype) -> list[str]:
    found = publication_of(Published(prototypes=prototypes), STUDY, FORM).prototypes
    return [] if found is None else [p.domain for p in found.prototypes]


def test_a_prototype_that_its_noise_hides_is_not_handed_out_and_hides_no_other():
    clear = prototype("a.a", 0.0), prototype("b.b", 1.0), prototype("d.d", 0.0, 50.0)
    # Of 20 patients: sigma 0.48, a norm of 1.4 over 8 numbers, more than half of what is between.
    hidden = prototype("c.c", 0.0, 1.0, patients=20)
    assert handed_out(*clear) == ["a.a", "b.b", "d.d"]
    assert handed_out(hidden, *clear) == ["a.a", "b.b", "d.d"]


def test_one_alone_is_not_handed_out():
    """It would be the nearest to every volume, and no limit could be made of it."""
    noisy = prototype("a.a", 0.0, patients=20), prototype("b.b", 1.0, patients=20)
    assert handed_out(*noisy) == []
    assert handed_out(noisy[0]) == []
    assert handed_out(prototype("a.a", 0.0)) == []


def test_the_frame_is_written_down_as_the_site_used_it(tmp_path):
    published = Published(prototypes=(prototype("a.a", 0.0), prototype("b.b", 1.0)))
    hand_out(tmp_path, published, STUDY)
    found = read_publication(tmp_path)
    assert found is not None
    assert found.prototypes is not None
    assert FORM.frame is not None
    frame = found.prototypes.frame.public
    for name in ("projection", "center", "scale"):
        assert (getattr(frame, name) == getattr(FORM.frame, name)).all()


@pytest.mark.parametrize("published", [None, Published(), Published(said={"north": {}})])
def test_where_nothing_was_published_nothing_is_written(tmp_path, published):
    hand_out(tmp_path, published, STUDY)
    assert list(tmp_path.iterdir()) == []


# --- kept -----------------------------------------------------------------------------------------


def whole() -> Published:
    published, refused = taken(
        Published(), {"experts": release(), "prototypes": release("prototypes")}
    )
    assert refused == []
    return published


def same(one: Published, other: Published) -> bool:
    tensors = [
        torch.equal(found.residuals[key], other.experts[site].residuals[key])
        for site, found in one.experts.items()
        for key in found.residuals
    ]
    return (
        one.said == other.said
        and one.prototypes == other.prototypes
        and one.experts.keys() == other.experts.keys()
        and all(tensors)
    )


def test_what_was_published_is_kept_to_the_bit(tmp_path):
    write_published(tmp_path / "published", whole())
    found = read_published(tmp_path / "published")
    assert found is not None
    assert same(whole(), found)
    assert read_published(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "harm", ["published.json", "experts/north.json", "experts/north.safetensors"]
)
@pytest.mark.parametrize("how", ["gone", "flipped"])
def test_a_damaged_file_is_seen(tmp_path, harm, how):
    write_published(tmp_path, whole())
    path = tmp_path / harm
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    else:
        content[-20] ^= 1
        path.write_bytes(content)
    with pytest.raises(StoreError):
        read_published(tmp_path)


def checkpoint() -> Checkpoint:
    schema, flat = initial_weights(STUDY)
    return Checkpoint(round=3, global_=flat, schema=schema, study=STUDY.digest)


def test_a_checkpoint_carries_it_and_one_without_has_no_folder_of_it(tmp_path):
    state = checkpoint()
    path = save(tmp_path, state)
    assert {p.name for p in path.iterdir()} == {"weights.safetensors", "state.json"}
    save(tmp_path, state.with_changes(published=whole()))
    found = load_latest(tmp_path, STUDY.digest, state.schema)
    assert found is not None
    assert found.published is not None
    assert same(whole(), found.published)


def test_the_model_that_is_handed_out_says_what_is_beside_it(tmp_path):
    state = checkpoint().with_changes(published=whole())
    assert "Published" not in model_card(checkpoint(), STUDY)
    assert "Experts of north" in model_card(state, STUDY)
    assert "north.ct, north.mr" in model_card(state, STUDY)
    export_model(state, STUDY, tmp_path / "model")
    found = read_publication(tmp_path / "model")
    assert found is not None
    assert set(found.experts) == {"north"}
    export_model(checkpoint(), STUDY, tmp_path / "model")
    assert read_publication(tmp_path / "model") is None


def test_experts_alone_need_no_frame(tmp_path):
    expert = SiteExperts({"mr": 10}, {"gain@mr": torch.ones(3)})
    hand_out(tmp_path, Published(experts={"north": expert}), EXPERTS_ONLY)
    found = read_publication(tmp_path)
    assert found is not None
    assert found.prototypes is None
