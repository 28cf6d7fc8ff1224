"""What a coordinator expects beside a site's update, where only its statistics matter."""

from __future__ import annotations

from tests.support import wire
from tests.support.fake_sites import SCHEMA
from uharmony_model.study import Study
from uharmony_server.admission import Expected


def expected_of(study: Study, site: str) -> Expected:
    """Of this site in round 5."""
    return Expected(
        site=site,
        study=study.digest,
        round=5,
        base=wire.BASE,
        schema=SCHEMA,
        codec="bf16",
        max_cases=1000,
        norm_limit=1e-9,  # of updates; a statistic has no such limit
    )
