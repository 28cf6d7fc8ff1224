"""Two arms of recorded studies, over all sites and at each: `python -m benchmarks compare`.

    python -m benchmarks compare docs/evidence/NAME ARM REFERENCE [--cell C]
        [--other RECORDS] [--other-cell C]

The tables of a study compare its arms with a few references; this is every other pair, from the
records alone, with the same paired comparison. `--other` is where the reference's records lie, if
not in the same folder, `--other-cell` their condition, if it is another; what counts are the cases
that both have, after the last round.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from uharmony_model.errors import ConfigError
from uharmony_simulation.lab_publish import recorded_scores
from uharmony_simulation.paired import CaseScore, compare
from uharmony_simulation.study_text import short_difference


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the difference of the two arms.

    Raises:
        ConfigError: an arm has no record there.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("records", type=Path)
    parser.add_argument("arm")
    parser.add_argument("reference")
    parser.add_argument("--cell", default="none", help="folder of the condition")
    parser.add_argument("--other", type=Path, help="records of the reference")
    parser.add_argument("--other-cell", help="the reference's condition")
    options = parser.parse_args(arguments)
    own = _scores(options.records / options.cell, options.arm)
    place = (options.other or options.records) / (options.other_cell or options.cell)
    other = _scores(place, options.reference)
    print(f"{options.arm} less {options.reference}: {short_difference(compare(own, other))}")
    for site in sorted({score.site for score in own}):
        print(f"  {site}: {short_difference(compare(own, other, site=site))}")
    return 0


def _scores(folder: Path, arm: str) -> list[CaseScore]:
    records = [json.loads(path.read_bytes()) for path in sorted(folder.glob(f"{arm}_seed-*.json"))]
    if not records:
        raise ConfigError(f"{folder}: no record of {arm}; is the study's cell another?")
    scores = [score for record in records for score in recorded_scores(record, folder.name)]
    return [score for score in scores if not score.at_home]


if __name__ == "__main__":
    sys.exit(main())
