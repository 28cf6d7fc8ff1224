"""What a site has published: kept as it was sent, so that it is made once and never again.

    <store>/ledger/releases/<study>/experts.bin, prototypes.bin

The noise of a prototype protects its patients for one release. Drawn a second time, the two could
be averaged. So a release is on disk before it is sent, is sent again as it is, and lies with the
ledger: like the ledger it is in every backup, and stays when a site leaves a study.
"""

from __future__ import annotations

from pathlib import Path

from uharmony_model.atomic import make_directory, write_atomic
from uharmony_model.errors import PayloadError, StoreError
from uharmony_model.exchange.payload import Manifest, read_manifest
from uharmony_model.exchange_settings import Publishable
from uharmony_model.unlabelled_settings import Statistic

PLACE = Path("ledger") / "releases"
Released = Publishable | Statistic


class Releases:
    """The releases of one study in a site's store."""

    def __init__(self, store: Path, study: str) -> None:
        self._study, self._folder = study, store / PLACE / study

    def get(self, what: Released, *, max_bytes: int) -> tuple[bytes, Manifest] | None:
        """What was released, with its manifest; None when nothing was.

        Raises:
            StoreError: it is damaged; a new one must not be drawn in its place.
        """
        path = self._path(what)
        try:
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
            manifest = read_manifest(data, max_bytes=max_bytes)
        except FileNotFoundError:
            return None
        except (OSError, PayloadError) as error:
            raise StoreError(
                f"{path}: not readable ({type(error).__name__}); restore it from a backup. It is "
                "not made anew: a second release of the same patients would tell more of them"
            ) from None
        if manifest.study != self._study:
            raise StoreError(f"{path}: was released for study {manifest.study[:12]}; restore it")
        return data, manifest

    def keep(self, what: Released, data: bytes) -> None:
        """Keep a release, before it is sent.

        Raises:
            StoreError: there is one already, or the disk is full.
        """
        path = self._path(what)
        if path.exists():
            raise StoreError(f"{path}: is there already; a study has one release")
        make_directory(path.parent)
        write_atomic(path, data)

    def _path(self, what: Released) -> Path:
        return self._folder / f"{what}.bin"
