"""From a site's named values to records: only what the study asks for is taken."""

from __future__ import annotations

from typing import get_args

from pydantic import ValidationError

from uharmony_model.errors import ExchangeError
from uharmony_model.evaluation_settings import Split
from uharmony_model.exchange.payload import Value
from uharmony_model.study import Study
from uharmony_model.training_settings import CANDIDATES
from uharmony_server.admission import AdmittedMetrics
from uharmony_server.records import Record

_SPLITS = get_args(Split)
_COUNT = frozenset({"n_cases"})
_INTERVAL = frozenset({"dice_low", "dice_high"})


def records_from_metrics(study: Study, round_: int, metrics: AdmittedMetrics) -> list[Record]:
    """One record for each split, site, domain and class that `metrics` speaks of.

    Those of the finale, in the round after the last, say which model the site kept.

    A site may speak of itself only; where a study pools the cases of several sites in one place,
    that place speaks of all.

    Raises:
        ExchangeError: a name or a value that the study does not allow.
    """
    asked = frozenset(study.evaluation.metrics)
    known = asked | _COUNT | (_INTERVAL if "dice" in asked else frozenset())
    groups: dict[tuple[str, str, str, str], dict[str, Value]] = {}
    finale = {"kept": metrics.values.get("kept")} if round_ > study.training.rounds else {}
    if finale and finale["kept"] not in CANDIDATES:
        raise ExchangeError(
            f"the finale kept {finale['kept']!r:.80}, expected one of {', '.join(CANDIDATES)}"
        )
    for name, value in metrics.values.items():
        if name in finale:
            continue
        parts = name.split("/")
        if len(parts) != 5:
            raise ExchangeError(f"metric {name!r:.80}: expected split/site/domain/class/metric")
        split, site, domain, class_name, metric = parts
        if (
            split not in _SPLITS
            or class_name not in study.task.classes
            or metric not in known
            or not (study.plan.pooled or site == metrics.site)
        ):
            raise ExchangeError(f"metric {name!r:.120}: not one that this study has at this site")
        groups.setdefault((split, site, domain, class_name), {})[metric] = value
    try:
        return [
            Record.model_validate(
                {
                    "arm": study.method,
                    "seed": study.seed,
                    "round": round_,
                    "split": split,
                    "site": site,
                    "domain": domain,
                    "class": class_name,
                    **values,
                    **finale,
                }
            )
            for (split, site, domain, class_name), values in sorted(groups.items())
        ]
    except ValidationError as error:
        first = error.errors()[0]
        raise ExchangeError(f"metric {first['loc']!r:.80}: {first['msg']:.120}") from None
