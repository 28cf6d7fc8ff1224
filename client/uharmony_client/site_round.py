"""What a site does when it is asked: a round, a measurement, its finale.

The answer is a sealed payload; how it travels is somebody else's business. A round and a finale
that were done already are answered from the site's store.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from uharmony_client.evaluate import CaseRow, evaluate_split, save_rows, summarise
from uharmony_client.finale import Candidate, Choice, State, clear_shelf, play_finale
from uharmony_client.learning import NOTHING, Given, cases_learned_from
from uharmony_client.local_store import RoundKey
from uharmony_client.local_train import RoundResult, train_round
from uharmony_client.objective import LocalData
from uharmony_client.personal import ALONE, PERSONAL, as_personal, by_name, model_state
from uharmony_client.policy import KEPT, STARTED_FROM, Policy, apply_policy
from uharmony_client.predictor import predictor
from uharmony_client.site import Site
from uharmony_client.site_models import site_entry
from uharmony_client.small_cells import update_values
from uharmony_client.step_checkpoint import StepCheckpoint
from uharmony_client.training_steps import StepListener
from uharmony_client.workbench import carried_after
from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ExchangeError
from uharmony_model.evaluation_settings import Split
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.payload import Kind, Value, encode
from uharmony_model.exchange.schema import unflatten
from uharmony_model.initial import initial_local
from uharmony_model.schedule import finale_round, splits_due
from uharmony_model.study import Study


@dataclass(frozen=True)
class Bench:
    """What the site works with: a network, its partition, and the global weights (n,)."""

    network: nn.Module
    partition: Partition
    weights: Tensor
    base: str  # their digest

    @property
    def shared(self) -> State:
        """The global weights by name."""
        return unflatten(self.weights, self.partition.shared_schema)


def round_update(
    site: Site,
    bench: Bench,
    round_: int,
    *,
    given: Given = NOTHING,
    on_step: StepListener | None = None,
) -> bytes:
    """The update of a round: from the site's store when it is there, else trained and stored.

    `given` is what the federation gives for the round beside its weights.

    Raises:
        ExchangeError: the site has done a later round and does not allow to go back.
        StoreError, TrainingError: see `LocalStore` and `train_round`.
    """
    study, policy, store = site.study, site.config.policy, site.store
    key = RoundKey(study.digest, round_, bench.base)
    update = store.update(key)
    if update is not None:
        return update
    _refuse_rollback(site, round_)
    before = store.before(study.digest, round_)
    data = site.training_data()
    result = train_round(
        bench.network,
        data,
        study=study,
        partition=bench.partition,
        base=bench.weights,
        before=initial_local(study, site.domains) if before is None else before,
        round_=round_,
        given=given,
        on_step=on_step,
        checkpoint=StepCheckpoint(store.folder, key, site.config.resources.checkpoint_steps),
    )
    values = values_of(result, data, study, policy)
    update = encode(
        kind=Kind.UPDATE,
        study=study.digest,
        round=round_,
        site=site.name,
        base=bench.base,
        codec=study.codec.up,
        schema=bench.partition.shared_schema,
        values={**values, STARTED_FROM: store.started_from(study.digest, round_)},
        flat=apply_policy(result.update, policy),
    )
    store.write(key, update, result.local, allow_rollback=policy.allow_rollback)
    return update


def values_of(
    result: RoundResult, data: LocalData, study: Study, policy: Policy
) -> dict[str, Value]:
    """What leaves beside the update of a round, under the site's policy."""
    return update_values(
        cases_learned_from(data, study),
        result.loss,
        study,
        policy,
        share=result.share,
        growth=result.growth,
    )


def measure(
    site: Site, bench: Bench, round_: int, splits: tuple[Split, ...], *, slow: bool
) -> list[CaseRow]:
    """Measure the global weights with what the site carries; the rows of every case are kept."""
    carried = carried_after(site, round_)
    bench.network.load_state_dict(
        model_state(bench.network, bench.partition, bench.shared, carried)
    )
    entry, own = site_entry(site, carried)
    network = predictor(site, bench.network, entry, None if own is None else bench.shared)
    rows = []
    for split in splits:
        found = evaluate_split(network, site, split, round_=round_, slow=slow)
        save_rows(found, site, split, round_)
        rows += found
    return rows


def finale_metrics(
    site: Site,
    bench: Bench,
    *,
    alone: Callable[[], Candidate] | None = None,
    on_step: StepListener | None = None,
) -> bytes:
    """Play the finale, keep what was chosen as the site's own model, and measure that.

    Raises:
        StoreError, TrainingError: see `play_finale`.
    """
    study, store = site.study, site.store
    round_ = finale_round(study)
    key = RoundKey(study.digest, round_, bench.base)
    answer = store.update(key)
    if answer is not None:
        clear_shelf(site, key)  # a kill may have come before it
        return answer
    _refuse_rollback(site, round_)
    carried = carried_after(site, round_ - 1)
    choice = play_finale(
        site,
        bench.network,
        bench.partition,
        bench.shared,
        carried,
        key,
        alone=alone,
        on_step=on_step,
    )
    model = choice.model
    model.network.load_state_dict(model.state)
    network = predictor(site, model.network, model.state, bench.shared)
    rows: list[CaseRow] = []
    for split in splits_due(study, study.training.rounds):
        found = evaluate_split(network, site, split, round_=round_, slow=True)
        save_rows(found, site, split, round_)
        rows += found
    _note_choice(site, choice, round_)
    answer = metrics_payload(site, bench.base, round_, {**summarise(rows, site), KEPT: choice.kept})
    prefix = PERSONAL if model.method == study.method else ALONE
    kept = as_personal(by_name(model.network, model.state), prefix)
    store.write(key, answer, kept, allow_rollback=site.config.policy.allow_rollback)
    clear_shelf(site, key)
    return answer


def metrics_payload(site: Site, base: str, round_: int, values: dict[str, Value]) -> bytes:
    """Named values as a payload of the kind metrics."""
    return encode(
        kind=Kind.METRICS,
        study=site.study.digest,
        round=round_,
        site=site.name,
        base=base,
        codec="fp32",
        schema=None,
        values=values,
        flat=None,
    )


def _note_choice(site: Site, choice: Choice, round_: int) -> None:
    """What every candidate was worth on the validation split; it stays here."""
    facts = {"round": round_, "kept": choice.kept, "validation_dice": dict(choice.validation)}
    site.evaluations.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(site.evaluations / "finale.json", json.dumps(facts, indent=1).encode())


def _refuse_rollback(site: Site, round_: int) -> None:
    """A coordinator that lost its disk asks for an old round anew; only the site may allow it.

    Raises:
        ExchangeError: this site has done a later round, and its policy does not allow to go back.
    """
    newest = site.store.newest(site.study.digest)
    if round_ < newest and not site.config.policy.allow_rollback:
        raise ExchangeError(
            f"asked to train round {round_} anew, this site has done round {newest}; if the "
            "coordinator lost its state, the site allows it with policy.allow_rollback: true"
        )
