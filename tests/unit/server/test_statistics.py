"""What the coordinator takes of statistics, keeps, and asks for."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support import wire
from tests.support.fake_sites import SCHEMA
from tests.support.gathering import expected_of
from tests.support.tiny import tiny_study
from uharmony_model.alignment.class_prototypes import Prototypes
from uharmony_model.errors import StoreError
from uharmony_model.exchange.combined import open_combined
from uharmony_model.exchange.payload import Kind, encode
from uharmony_model.exchange.schema import flatten
from uharmony_model.exchange.statistics import Said, StatisticsForm
from uharmony_server.admission import RefusalReason
from uharmony_server.checkpoint import Checkpoint, load_latest, save
from uharmony_server.gathered import Gathered, packed, unpacked
from uharmony_server.statistics import Answer, Gathering

STUDY = tiny_study(method="glua-fed", unlabelled={"min_patients": 3})
FORM = StatisticsForm.of(STUDY)  # styles (1, 3, 3, 3); 2 classes of 8 features
BOTH = '{"amplitude":"given","prototypes":"given"}'


def style(value: float = 0.5) -> torch.Tensor:
    return torch.full((1, 3, 3, 3), value)


def tables(mean: float = 1.0, voxels: float = 1.0, variance: float = 4.0) -> Prototypes:
    return Prototypes(
        mean=torch.tensor([[0.0] * 8, [mean] * 8]),
        variance=torch.tensor([[0.0] * 8, [variance] * 8]),
        voxels=torch.tensor([0.0, voxels]),
    )


def amplitude(value: float = 0.5, **changes) -> bytes:
    fields = {
        "kind": Kind.STATISTICS,
        "study": STUDY.digest,
        "round": 0,
        "site": "north",
        "schema": FORM.schema("amplitude"),
        "values": {"patients": 3},
        "flat": style(value).flatten(),
    }
    return encode(**{**fields, **changes})


def prototypes(found: Prototypes | None = None, **changes) -> bytes:
    schema = FORM.schema("prototypes")
    fields = {
        "kind": Kind.STATISTICS,
        "study": STUDY.digest,
        "round": 5,
        "site": "north",
        "base": wire.BASE,
        "schema": schema,
        "values": {"patients": 3},
        "flat": flatten((found or tables()).tensors(), schema),
    }
    return encode(**{**fields, **changes})


@pytest.fixture
def gathering() -> Gathering:
    return Gathering(STUDY)


def take(gathering, payloads, said=BOTH, held=None, site="north"):
    return gathering.take(held or Gathered(), Answer(payloads, said), expected_of(STUDY, site))


def test_both_are_taken_by_the_name_of_their_site(gathering):
    held, refused = take(gathering, {"amplitude": amplitude(), "prototypes": prototypes()})
    assert refused == []
    assert torch.equal(held.styles["north"], style())
    assert torch.equal(held.prototypes["north"].mean, tables().mean)
    assert held.said == {"north": {"amplitude": Said.GIVEN, "prototypes": Said.GIVEN}}


def test_the_newest_of_a_site_is_kept_and_what_it_did_not_send_stays(gathering):
    held, _ = take(gathering, {"amplitude": amplitude(), "prototypes": prototypes()})
    newer = prototypes(tables(mean=7.0))
    held, refused = take(gathering, {"prototypes": newer}, '{"prototypes":"given"}', held)
    assert refused == []
    assert held.prototypes["north"].mean[1, 0] == 7.0
    assert torch.equal(held.styles["north"], style())
    assert set(held.said["north"]) == {"amplitude", "prototypes"}


LOPSIDED = torch.linspace(0, 1, 27)


@pytest.mark.parametrize(
    ("what", "payload", "reason"),
    [
        ("amplitude", b"", RefusalReason.DAMAGED),
        ("amplitude", amplitude()[:-1], RefusalReason.DAMAGED),
        ("amplitude", amplitude() + bytes(1 << 21), RefusalReason.OVERSIZED),
        ("amplitude", prototypes(), RefusalReason.WRONG_ROUND),
        ("amplitude", amplitude(kind=Kind.UPDATE), RefusalReason.WRONG_KIND),
        ("amplitude", amplitude(site="south"), RefusalReason.WRONG_SITE),
        ("amplitude", amplitude(study=wire.STUDY), RefusalReason.WRONG_STUDY),
        ("amplitude", amplitude(round=5), RefusalReason.WRONG_ROUND),
        ("amplitude", amplitude(codec="bf16"), RefusalReason.WRONG_CODEC),
        ("amplitude", amplitude(values={"patients": 2}), RefusalReason.BAD_CASE_COUNT),
        ("amplitude", amplitude(values={"patients": 1001}), RefusalReason.BAD_CASE_COUNT),
        ("amplitude", amplitude(values={}), RefusalReason.BAD_CASE_COUNT),
        ("amplitude", amplitude(flat=torch.full((27,), float("nan"))), RefusalReason.NOT_FINITE),
        ("amplitude", amplitude(99.0), RefusalReason.WRONG_SCHEMA),
        ("amplitude", amplitude(flat=LOPSIDED), RefusalReason.WRONG_SCHEMA),
        ("prototypes", prototypes(round=4), RefusalReason.WRONG_ROUND),
        ("prototypes", prototypes(base="c" * 64), RefusalReason.WRONG_BASE),
        ("prototypes", prototypes(tables(voxels=0.0)), RefusalReason.WRONG_SCHEMA),
        ("prototypes", prototypes(tables(mean=501.0)), RefusalReason.WRONG_SCHEMA),
        ("prototypes", prototypes(tables(mean=-1e7)), RefusalReason.WRONG_SCHEMA),
    ],
)
def test_what_does_not_count_is_refused_with_its_reason(gathering, what, payload, reason):
    good = {"amplitude": amplitude(), "prototypes": prototypes()}
    held, refused = take(gathering, {**good, what: payload})
    assert [(r.site, r.round, r.reason) for r in refused] == [("north", 5, reason)]
    assert refused[0].detail.startswith(f"{what}: ")
    # The other one is taken all the same.
    assert (set(held.styles), set(held.prototypes)) == (
        (set(), {"north"}) if what == "amplitude" else ({"north"}, set())
    )


@pytest.mark.parametrize("said", ["", "[]", '{"amplitude":"perhaps"}', "{" * 9000])
def test_words_that_cannot_be_read_are_refused(gathering, said):
    held, (refused,) = take(gathering, {"amplitude": amplitude()}, said)
    assert refused.reason is RefusalReason.DAMAGED
    assert not held.styles


def test_what_the_study_does_not_ask_for_is_refused():
    styles_only = tiny_study(method="ust-run-fed", unlabelled={"min_patients": 3})
    held, (refused,) = take(Gathering(styles_only), {"prototypes": prototypes()})
    assert refused.reason is RefusalReason.WRONG_KIND
    assert not held.prototypes


# --- who is asked ---------------------------------------------------------------------------------


def test_a_style_is_asked_for_until_it_is_there_and_prototypes_always(gathering):
    both, tables_only = ("amplitude", "prototypes"), ("prototypes",)
    assert gathering.asked("north", Gathered()) == both
    assert gathering.asked("north", Gathered(styles={"north": style()})) == tables_only
    assert gathering.asked("south", Gathered(styles={"north": style()})) == both


@pytest.mark.parametrize(
    ("said", "payloads"),
    [
        ('{"amplitude":"not_opted_in"}', {}),
        ('{"amplitude":"too_few_patients"}', {}),
        (BOTH, {"amplitude": amplitude(99.0)}),  # it would be the same again
    ],
)
def test_who_gives_no_style_is_asked_again_by_the_next_process_alone(gathering, said, payloads):
    held, _ = take(gathering, payloads, said)
    # A round that is asked anew, for want of a quorum, is asked as it was.
    assert gathering.asked("north", Gathered()) == ("amplitude", "prototypes")
    held = gathering.closed(held)
    assert gathering.asked("north", held) == ("prototypes",)
    assert gathering.asked("south", held) == ("amplitude", "prototypes")
    assert Gathering(STUDY).asked("north", held) == ("amplitude", "prototypes")


# --- what is handed out ---------------------------------------------------------------------------


def test_styles_are_handed_out_by_name_and_prototypes_as_one(gathering):
    held = Gathered(
        styles={"b": style(0.2), "c": style(0.3), "a": style(0.1)},
        prototypes={"b": tables(mean=4.0), "a": tables(mean=0.0)},
    )
    data = gathering.payload(held, 4, wire.BASE)
    assert data is not None
    assert not any(site in data.decode("latin1") for site in ('"a"', '"b"', '"c"'))
    manifest, found = open_combined(data, FORM)
    assert (manifest.round, manifest.base, manifest.site) == (4, wire.BASE, "server")
    assert [round(float(s.mean()), 3) for s in found.styles] == [0.1, 0.2, 0.3]
    assert found.prototypes is not None
    # (0 + 4) / 2 = 2; E[x^2] - 4 = (4 + 20) / 2 - 4 = 8
    assert found.prototypes.present.tolist() == [False, True]
    torch.testing.assert_close(found.prototypes.mean[1], torch.full((8,), 2.0))
    torch.testing.assert_close(found.prototypes.variance[1], torch.full((8,), 8.0))


def test_where_nothing_was_given_nothing_is_handed_out(gathering):
    assert gathering.payload(Gathered(), 4, wire.BASE) is None
    nobody = Prototypes(torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(2))
    assert gathering.payload(Gathered(prototypes={"a": nobody}), 4, wire.BASE) is None


# --- what is kept ---------------------------------------------------------------------------------

HELD = Gathered(
    {"north.1": style(), "south": style(0.25)},
    {"south": tables()},
    {"south": {"amplitude": Said.GIVEN}, "west": {"amplitude": Said.NOT_OPTED_IN}},
)
SILENT = Gathered(said={"west": {"amplitude": Said.NOT_OPTED_IN}})


@pytest.mark.parametrize("held", [HELD, SILENT, Gathered()], ids=["some", "words", "nothing"])
def test_what_is_kept_comes_back_whole(held):
    facts, data = packed(held)
    found = unpacked(data, facts)
    assert found.said == held.said
    assert (found.styles.keys(), found.prototypes.keys()) == (
        held.styles.keys(),
        held.prototypes.keys(),
    )
    assert all(torch.equal(found.styles[site], held.styles[site]) for site in held.styles)
    for site, kept in held.prototypes.items():
        for name, tensor in kept.tensors().items():
            assert torch.equal(found.prototypes[site].tensors()[name], tensor)


def checkpoint(statistics: Gathered | None) -> Checkpoint:
    return Checkpoint(1, torch.linspace(-1, 1, 5), SCHEMA, STUDY.digest, statistics=statistics)


def test_a_checkpoint_holds_them_and_one_without_is_as_before(tmp_path):
    save(tmp_path / "with", checkpoint(HELD))
    found = load_latest(tmp_path / "with", STUDY.digest, SCHEMA)
    assert found is not None
    assert found.statistics is not None
    assert found.statistics.said == HELD.said
    assert torch.equal(found.statistics.styles["south"], style(0.25))
    path = save(tmp_path / "without", checkpoint(None))
    assert {p.name for p in path.iterdir()} == {"state.json", "weights.safetensors"}
    assert "statistics" not in json.loads((path / "state.json").read_text())["state"]
    again = load_latest(tmp_path / "without", STUDY.digest, SCHEMA)
    assert again is not None
    assert again.statistics is None


def test_a_flipped_bit_in_them_is_a_damaged_checkpoint(tmp_path):
    path = save(tmp_path, checkpoint(HELD)) / "statistics.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="none of 1 checkpoints"):
        load_latest(tmp_path, STUDY.digest, SCHEMA)


def test_what_each_site_may_give_every_site_takes_of_all(gathering):
    """The farthest that pass alone: nobody's place is taken, whoever comes first."""
    held = Gathered()
    for site, mean in (("a-hostile", 500.0), ("north", 0.0), ("z-hostile", -500.0)):
        sent = prototypes(tables(mean=mean, variance=5e5), site=site)
        held, refused = take(gathering, {"prototypes": sent}, held=held, site=site)
        assert refused == []
    assert set(held.prototypes) == {"a-hostile", "north", "z-hostile"}
    combined = gathering.payload(held, 5, wire.BASE)
    assert combined is not None
    found = open_combined(combined, FORM)[1].prototypes
    assert found is not None
    # E[x^2] = (3 * 5e5 + 2 * 500^2) / 3
    torch.testing.assert_close(found.variance[1], torch.full((8,), 5e5 + 2 * 500.0**2 / 3))


def test_no_site_says_how_much_it_has(gathering):
    """As an honest site with a hundred voxels sends it, and one that claims to have many."""
    schema = FORM.schema("prototypes")
    honest = tables(voxels=100.0).tensors()
    assert honest["present"].tolist() == [0.0, 1.0]
    boast = {**honest, "present": torch.tensor([0.0, 1e9])}
    sent = prototypes(tables(), flat=flatten(boast, schema))
    (refused,) = take(gathering, {"prototypes": sent})[1]
    assert refused.reason is RefusalReason.WRONG_SCHEMA


def test_prototypes_are_those_of_one_round_and_styles_stay():
    held = Gathered({"north": style()}, {"north": tables()})
    following = held.of_next_round()
    assert following.prototypes == {}
    assert torch.equal(following.styles["north"], style())


def test_the_order_of_styles_does_not_tell_whose_they_are():
    one, other = style(0.1), style(0.9)
    first = Gathered({"a": one, "b": other}).combined().styles
    second = Gathered({"a": other, "b": one}).combined().styles
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
