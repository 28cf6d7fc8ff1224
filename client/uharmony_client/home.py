"""A site's own folder: where its identity, its approval and its running service lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from uharmony_client.identity import Identity
from uharmony_client.site_config import SiteConfig, load_site
from uharmony_model.errors import ConfigError
from uharmony_model.exchange.joining import Membership
from uharmony_model.study import Study, load_study
from uharmony_service.lock import only_one

_PLACES = ("{name}/site.yaml", "{name}.yaml", "site.yaml")


@dataclass(frozen=True)
class Home:
    """The site's configuration and the paths in its store."""

    config: SiteConfig
    source: Path

    @classmethod
    def find(cls, name: str) -> Home:
        """The home of a site by its name, or by the path of its site.yaml or of the folder of it.

        A name is looked for below the working folder, then below `$UHARMONY_SITES`, then in
        `/etc/uharmony`.

        Raises:
            ConfigError: there is no such file, it cannot be followed, or it is of another site.
        """
        given = Path(name)
        if given.is_file():
            return cls(load_site(given), given)
        if given.is_dir() and (given / "site.yaml").is_file():
            return cls(load_site(given / "site.yaml"), given / "site.yaml")
        roots = [Path(), Path(os.environ.get("UHARMONY_SITES", ".")), Path("/etc/uharmony")]
        tried = [root / place.format(name=name) for root in roots for place in _PLACES]
        for path in tried:
            if path.is_file():
                config = load_site(path)
                if config.name == name:
                    return cls(config, path)
        raise ConfigError(
            f"site {name!r:.80}: no site.yaml of it; looked for "
            f"{', '.join(str(p) for p in tried[:2])} and below $UHARMONY_SITES and /etc/uharmony; "
            f"make one with: uharmony-client --site {name} init --cases FOLDER"
        )

    @property
    def identity(self) -> Identity:
        """Keys, certificates, the approved study, the membership."""
        return Identity(self.config.store / "identity")

    @property
    def run(self) -> Path:
        """What the running service keeps for itself."""
        return self.config.store / "run"

    @property
    def log(self) -> Path:
        """Logs of the service."""
        return self.config.store / "log"

    @property
    def ledger(self) -> Path:
        """The ledger's folder."""
        return self.config.store / "ledger"

    @property
    def joined(self) -> bool:
        """Whether this site has joined a study."""
        return self.identity.membership.is_file()

    def membership(self) -> Membership:
        """Where and what this site joined.

        Raises:
            ConfigError: it has not joined.
            StoreError: the file is damaged.
        """
        if not self.joined:
            raise ConfigError(
                f"site {self.config.name} has not joined a study; ask the coordinator for a code "
                f"and run: uharmony-client --site {self.config.name} join CODE"
            )
        return self.identity.member()

    def study(self) -> Study:
        """The study as this site approved it.

        Raises:
            ConfigError: it has not joined, or the file is not the study it approved.
        """
        approved = self.membership().study
        study, _ = load_study(self.identity.study)
        if study.digest != approved:
            raise ConfigError(
                f"{self.identity.study}: has digest {study.digest}, approved was "
                f"{approved}; restore the folder from a backup or join again"
            )
        return study

    @contextmanager
    def only_one(self) -> Iterator[None]:
        """Hold the store's lock; the kernel drops it however this process ends.

        Raises:
            ConfigError: another process works with this store.
        """
        message = (
            f"{self.config.store}: the service of site {self.config.name} is running; stop it first"
        )
        with only_one(self.run, message):
            yield
