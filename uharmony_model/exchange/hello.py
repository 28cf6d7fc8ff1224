"""What a site says before any round: who it is and what it agreed to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from uharmony_model import __version__
from uharmony_model.errors import ExchangeError
from uharmony_model.frozen import Frozen
from uharmony_model.task import Name

EXCHANGE_FORMAT = 1


class Hello(Frozen):
    """A site's answer to the coordinator's first question. No case, no path, no count.

    `weight` is `equal` where the site has too few cases to tell their number; then all sites of
    the study weigh equally.
    """

    site: Name
    study: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    format: int = EXCHANGE_FORMAT
    version: Annotated[str, Field(max_length=40)] = __version__
    weight: Literal["cases", "equal"] = "cases"


def check_hello(hello: Hello, study: str) -> None:
    """Refuse a site that approved another study or speaks another format.

    Raises:
        ExchangeError: both values and what to do.
    """
    if hello.format != EXCHANGE_FORMAT:
        raise ExchangeError(
            f"site {hello.site} speaks exchange format {hello.format}, this coordinator "
            f"{EXCHANGE_FORMAT}; install the same version on both"
        )
    if hello.version.split(".")[0] != __version__.split(".")[0]:
        raise ExchangeError(
            f"site {hello.site} runs version {hello.version}, this coordinator {__version__}; "
            "install the same major version on both"
        )
    if hello.study != study:
        raise ExchangeError(
            f"site {hello.site} approved study {hello.study[:12]}, this is {study[:12]}; "
            "a changed study is a new study: approve it at the site"
        )
