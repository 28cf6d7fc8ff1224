"""Make the data of one of the example's sites: `make_site.py STUDY SITE FOLDER`.

The volumes are those that `uharmony-simulate` would make; site.yaml is what a hospital would
write, but for the threshold: a simulated hospital has too few cases to keep any back.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from uharmony_model.atomic import write_atomic
from uharmony_model.frozen import parse
from uharmony_model.study import load_study
from uharmony_simulation.config import Simulation
from uharmony_simulation.sites import make_sites

SITE = """\
name: {site}
cases: cases.csv
store: /var/lib/uharmony/store
policy:
  min_cases: 1          # simulated patients; leave this out where they are real
resources:
  threads: 1
  device: cpu
"""


def main(study: str, site: str, folder: str) -> None:
    """Write case table, volumes and site.yaml; a folder that has them is left alone."""
    target = Path(folder)
    if (target / "site.yaml").is_file():
        return
    known, section = load_study(Path(study))
    with TemporaryDirectory() as place:
        made = Path(place) / "sites"
        make_sites(known, parse(Simulation, section, f"{study}: simulation"), None, made)
        shutil.copytree(made / site, target, dirs_exist_ok=True)
        # The table names its volumes by where they were made.
        table = (made / site / "cases.csv").read_text().replace(f"{made / site}/", "")
        write_atomic(target / "cases.csv", table.encode())
    # Last: where it is, everything else is.
    write_atomic(target / "site.yaml", SITE.format(site=site).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
