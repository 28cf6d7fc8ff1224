"""The last steps at home: a site's own turn after the last round, and its choice.

The federation's model is trained further on the site's own cases, in one or two ways; then the
site keeps what is best on its own validation split, so that no site has to be worse off for having
taken part. Nothing of it leaves but the means of its metrics and the name of what was kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from uharmony_client.evaluate import dice_by_case, evaluate_split
from uharmony_client.finale_choice import choose, mean
from uharmony_client.local_store import UNFINISHED, RoundKey
from uharmony_client.local_train import learning_rate
from uharmony_client.optimizer import make_optimizer, restore_moments
from uharmony_client.personal import by_name, from_names, model_state, personal_part
from uharmony_client.predictor import predictor
from uharmony_client.site import Site
from uharmony_client.step_checkpoint import StepCheckpoint
from uharmony_client.training_steps import StepListener, cosine, run_steps
from uharmony_model.atomic import make_directory, remove_directory, write_atomic
from uharmony_model.exchange.partition import Partition
from uharmony_model.study import Study
from uharmony_model.training_settings import Candidate as Name

State = dict[str, Tensor]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A whole state and a network that takes it; `method` is the one whose network that is."""

    network: nn.Module
    method: str
    state: State


@dataclass(frozen=True)
class Choice:
    """What a site kept, and the validation Dice of every candidate."""

    kept: Name
    model: Candidate
    validation: Mapping[Name, float | None]


def play_finale(
    site: Site,
    network: nn.Module,
    partition: Partition,
    shared: Mapping[str, Tensor],
    carried: Mapping[str, Tensor],
    key: RoundKey,
    *,
    alone: Callable[[], Candidate] | None = None,
    on_step: StepListener | None = None,
) -> Choice:
    """Make the study's candidates from the federation's last weights and choose one.

    `carried` is what the site has after the last round, `key` names the finale as the round after
    it; `alone` gives the model that the site trained without anybody. A finished candidate is kept
    on disk (see `clear_shelf`), so an interruption costs steps of one. Where none of the study's
    candidates can be made, as at a site without labels, the federated model is kept.

    Raises:
        TrainingError: a loss is not finite.
        StoreError: the disk is full.
    """
    names = set(site.study.finale.candidates) if site.training_data().volumes else set()
    federated = model_state(network, partition, shared, carried)
    made: dict[Name, State] = {"federated": federated}
    ways: tuple[Name, ...] = ("own", "whole")
    for way in ways:
        wanted = way in names or (way == "whole" and "between" in names)
        if wanted and (way == "whole" or _has_own_part(network, partition)):
            made[way] = _kept(
                _shelf(site, key) / f"{way}.safetensors",
                network,
                lambda way=way: _trained(  # type: ignore[misc]
                    way, site, network, partition, federated, carried, key, on_step
                ),
            )
    if "between" in names:
        made["between"] = _half_way(federated, made["whole"])
    method = site.study.method
    found = {n: Candidate(network, method, state) for n, state in made.items() if n in names}
    if "local" in names and alone is not None:
        found["local"] = alone()
    found = found or {"federated": Candidate(network, method, federated)}
    if not names:  # what such a site could choose by are labels that may not be used
        return Choice("federated", found["federated"], {})
    by_case = {name: _validation(model, site, shared) for name, model in found.items()}
    kept = choose(by_case, site.study.finale.choice)
    return Choice(kept, found[kept], {name: mean(dice) for name, dice in by_case.items()})


def clear_shelf(site: Site, key: RoundKey) -> None:
    """Remove finished candidates, once the choice is in the site's store."""
    remove_directory(_shelf(site, key))


def detached(network: nn.Module) -> State:
    """A copy of a network's state on the CPU."""
    return {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}


def _shelf(site: Site, key: RoundKey) -> Path:
    # What the site carries belongs to it: a site without shared weights has one base for ever.
    mark = site.store.mark_before(key.round)
    return site.store.folder / f"finale-{key.base[:16]}-{mark[:16]}"


def _has_own_part(network: nn.Module, partition: Partition) -> bool:
    """Whether there are parameters to train while others stay."""
    names = {name for name, _ in network.named_parameters()}
    return bool(names & set(partition.local_keys)) and bool(names & set(partition.shared_keys))


def _trained(
    way: Name,
    site: Site,
    network: nn.Module,
    partition: Partition,
    start: State,
    carried: Mapping[str, Tensor],
    key: RoundKey,
    on_step: StepListener | None,
) -> State:
    study, settings = site.study, site.study.finale
    network.load_state_dict(start)
    optimizer = make_optimizer(network, study.training)
    if study.training.keep_optimizer:
        restore_moments(optimizer, network, personal_part(carried) or carried)
    own = frozenset(partition.local_keys)
    # Its own name goes into the checkpoint, so that one way is not taken up as the other.
    checkpoint = StepCheckpoint(
        site.store.folder,
        RoundKey(key.study, key.round, f"{key.base}/{way}"),
        site.config.resources.checkpoint_steps,
    )
    run_steps(
        network,
        optimizer,
        site.training_data(),
        study,
        round_=key.round,
        count=settings.steps,
        rate=lambda step: _rate(study, step),
        learns=lambda step: own if way == "own" else None,
        unfinished=checkpoint.of(network, optimizer, carried),
        on_step=on_step,
    )
    trained = detached(network)
    # Statistics of shared norms move while their weights stay.
    return trained | ({k: start[k] for k in partition.shared_keys} if way == "own" else {})


def _rate(study: Study, step: int) -> float:
    training, finale = study.training, study.finale
    if finale.rate is None:
        return learning_rate(study, training.rounds * training.local_steps + step)
    return cosine(finale.rate * training.learning_rate, step / finale.steps)


def _kept(path: Path, network: nn.Module, make: Callable[[], State]) -> State:
    """A candidate that was finished before an interruption, or made now and put on disk."""
    if path.is_file():
        try:
            return from_names(network, load(path.read_bytes()))
        except SafetensorError as error:
            log.warning("%s: not used, trained again: %s", path, error)
    state = make()
    make_directory(path.parent)
    write_atomic(path, save({k: v.contiguous() for k, v in by_name(network, state).items()}))
    (path.parent.parent / UNFINISHED).unlink(missing_ok=True)
    return state


def _half_way(first: State, second: State) -> State:
    """The mean of two states; integers (a norm's counter) are those of the second."""
    return {
        key: (tensor + first[key].to(tensor)) / 2 if tensor.is_floating_point() else tensor
        for key, tensor in second.items()
    }


def _validation(model: Candidate, site: Site, shared: Mapping[str, Tensor]) -> dict[str, float]:
    """Dice of every validation case whose label may be used, the mean over its classes."""
    model.network.load_state_dict(model.state)
    network = predictor(site, model.network, model.state, shared)
    found = dice_by_case(evaluate_split(network, site, "validation", round_=0, slow=False))
    may = {c.case for c in site.split("validation") if site.labels.get(c.site, "all") != "none"}
    return {case: dice for case, dice in found.items() if case in may}
