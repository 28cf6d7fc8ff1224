"""Whether an instruction is one that the hospital approved, before any work is done.

It approved one study: so many rounds, what is measured after each, the finale, the publication,
and the statistics that sites share.
"""

from __future__ import annotations

from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.schedule import publication_due, publication_round, splits_due
from uharmony_model.study import Study


def approved_order(text: str, study: Study, action: str) -> Instruction:
    """The instruction that `text` is, in a message that asks for `action`.

    Raises:
        ExchangeError: it cannot be read, is of a study this site did not approve, or asks for
            another thing than the message it came in.
    """
    order = Instruction.from_json(text)
    if order.action != action:
        raise ExchangeError(f"a message for {action} asks for {order.action}; send one of a kind")
    if order.study != study.digest:
        raise ExchangeError(
            f"asked for study {order.study[:12]}, this site approved {study.digest[:12]}; "
            "approve the changed study as a new one"
        )
    require_approved(order, study)
    return order


def require_approved(order: Instruction, study: Study) -> None:
    """The hospital approved so many rounds, what is measured after each, and the statistics.

    Raises:
        ExchangeError: the order asks for another round, for other measurements or statistics.
    """
    rounds = study.training.rounds
    _require_statistics(order, study)
    if order.action == "finale" and (order.round != rounds + 1 or not study.finale.steps):
        raise ExchangeError(
            f"asked for a finale as round {order.round}; approved are {study.finale.steps} steps "
            f"at home, after round {rounds}"
        )
    if order.action == "publish" and (
        order.round != publication_round(study) or not publication_due(study)
    ):
        raise ExchangeError(
            f"asked to publish as round {order.round}; approved is to publish "
            f"{', '.join(publication_due(study)) or 'nothing'}, as round {publication_round(study)}"
        )
    if order.action in ("train", "evaluate") and not 1 <= order.round <= rounds:
        raise ExchangeError(f"asked for round {order.round}, approved are rounds 1 to {rounds}")
    if order.action == "evaluate":
        due, last = splits_due(study, order.round), order.round == rounds
        if order.splits != due or order.final != last:
            raise ExchangeError(
                f"asked to measure {', '.join(order.splits) or 'nothing'} after round "
                f"{order.round}; approved is {', '.join(due) or 'nothing'}"
            )


def _require_statistics(order: Instruction, study: Study) -> None:
    """They are asked for and given with a round, each once, and only those that the study names."""
    due = study.statistics if order.action == "train" else ()
    asked, named = order.statistics, ", ".join(due) or "none"
    if not set(asked) <= set(due) or len(set(asked)) != len(asked):
        raise ExchangeError(
            f"asked for statistics {', '.join(asked)} with {order.action}; approved is {named}"
        )
    if order.given and not due:
        raise ExchangeError(f"statistics are given with {order.action}; approved is {named}")
