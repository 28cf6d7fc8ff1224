"""How pages are made and print what they are given: one way for every report of this project."""

from __future__ import annotations

import base64

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

UNDEFINED = "\u2014"  # an em dash: not measured, or undefined


def pages_of(package: str) -> Environment:
    """The templates beside the modules of a package, in which every text is escaped.

    They know `number`, `points`, `tone`, `undefined` and the filter `png`; a page adds its own.
    """
    environment = Environment(
        loader=PackageLoader(package, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=shown,
    )
    environment.globals |= {
        "number": number,
        "points": points,
        "tone": tone,
        "undefined": UNDEFINED,
    }
    environment.filters |= {"png": data_uri}
    return environment


def printable(text: object, longest: int = 300) -> str:
    """Foreign text as one line without control characters or direction marks."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text)[:longest])


def number(value: float | None, digits: int) -> str:
    """A number with fixed digits, or the sign for undefined."""
    return UNDEFINED if value is None else f"{value:.{digits}f}"


def points(difference: float | None) -> str:
    """A Dice difference in points (hundredths) with its sign; zero has none."""
    if difference is None:
        return UNDEFINED
    text = f"{100 * difference:+.1f}".replace("-", "\u2212")
    return "0.0" if text in ("+0.0", "\u22120.0") else text


def tone(difference: float | None) -> str:
    """The class of a difference: what is rounded to nothing has no colour."""
    text = points(difference)
    return "up" if text.startswith("+") else "down" if text.startswith("\u2212") else ""


def data_uri(png: bytes) -> Markup:
    """A picture inside the page."""
    # Markup, as there is nothing to escape in base64 and its length is not foreign text's.
    return Markup("data:image/png;base64," + base64.b64encode(png).decode("ascii"))  # noqa: S704


def shown(value: object) -> object:
    """What a template prints: foreign text as one printable line, None as undefined."""
    if value is None:
        return UNDEFINED
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value, 2000)
    return value
