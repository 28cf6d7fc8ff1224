"""What sites published by opt-in, beside the model that is handed out; a model may have none.

    model/experts/<site>.safetensors    residuals by KEY@DOMAIN
          experts/<site>.json           patients of each domain, SHA-256 of the tensors
          prototypes.json               the public frame, released prototypes, abstention limit

An expert and a prototype of one domain have one name, SITE.DOMAIN. Prototypes are private in the
sense of `uharmony_model.prototypes`; experts are trained on patients without such a claim. Each
JSON file is `{"sha256": ..., "content": ...}`, so that damage is seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import safetensors.torch
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from safetensors import SafetensorError
from torch import Tensor

from uharmony_model.abstention import AbstentionLimit
from uharmony_model.atomic import (
    make_directory,
    remove_directory,
    replace_directory,
    temporary_directory,
    write_atomic,
)
from uharmony_model.errors import ConfigError, StoreError
from uharmony_model.experts import Expert, experts_of
from uharmony_model.frozen import Frozen, parse
from uharmony_model.prototypes import MAX_RELEASED, MIN_PATIENTS, Prototype, PublicFrame
from uharmony_model.task import Name

EXPERTS, PROTOTYPES = "experts", "prototypes.json"

_MAX_JSON_BYTES = 4 << 20
_MAX_TENSOR_BYTES = 256 << 20  # residuals of one site; those of a large network are a few MB
_MAX_SITES = 1024

Content = TypeVar("Content", bound=Frozen)
_NAMES: TypeAdapter[tuple[str, ...]] = TypeAdapter(tuple[Name, ...])


class Frame(Frozen):
    """The numbers of a `PublicFrame`, from which it is drawn again; `seed` is the study's.

    `center` and `scale` are one number, or one for each of the `dimension` numbers of a
    descriptor.
    """

    dimension: Annotated[int, Field(ge=1, le=4096)]
    seed: NonNegativeInt
    coordinates: Annotated[int, Field(ge=1, le=MAX_RELEASED)] = MAX_RELEASED
    center: Annotated[tuple[float, ...], Field(min_length=1, max_length=4096)] = (0.0,)
    scale: Annotated[tuple[PositiveFloat, ...], Field(min_length=1, max_length=4096)] = (1.0,)

    @model_validator(mode="after")
    def _consistent(self) -> Frame:
        for numbers in (self.center, self.scale):
            if len(numbers) not in (1, self.dimension):
                raise ValueError(f"expected one number or {self.dimension}, got {len(numbers)}")
        return self

    @property
    def public(self) -> PublicFrame:
        """The frame that descriptors are brought into."""
        return PublicFrame.of(
            self.dimension,
            seed=self.seed,
            coordinates=self.coordinates,
            center=self.center,
            scale=self.scale,
        )


class Prototypes(Frozen):
    """prototypes.json: the released prototypes, each named SITE.DOMAIN, and their frame."""

    frame: Frame
    prototypes: Annotated[tuple[Prototype, ...], Field(min_length=1, max_length=4096)]
    abstention: AbstentionLimit | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Prototypes:
        names = [prototype.domain for prototype in self.prototypes]
        if len(set(names)) != len(names):
            raise ValueError("two prototypes have one name")
        numbers = min(self.frame.coordinates, self.frame.dimension)
        for made in self.prototypes:
            if len(made.mean) != numbers:
                raise ValueError(f"a prototype of {len(made.mean)} numbers, not {numbers}")
            if made.epsilon is None or made.patients < MIN_PATIENTS:
                raise ValueError(f"prototype {made.domain} was not released with privacy")
        return self


class _ExpertEntry(Frozen):
    """experts/<site>.json."""

    patients: Annotated[
        dict[Name, Annotated[int, Field(ge=MIN_PATIENTS)]], Field(min_length=1, max_length=4096)
    ]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, eq=False)
class SiteExperts:
    """One site's residuals by KEY@DOMAIN, and the patients of each of their domains."""

    patients: Mapping[str, int]
    residuals: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Publication:
    """What was published: experts by site, and prototypes where there are some.

    `digest` is the SHA-256 over the files that it was read from.
    """

    experts: Mapping[str, SiteExperts] = field(default_factory=dict)
    prototypes: Prototypes | None = None
    digest: str = ""

    @property
    def all_experts(self) -> tuple[Expert, ...]:
        """The experts of all sites, named SITE.DOMAIN, in the order of their sites.

        Raises:
            ConfigError: a domain has too few patients, or a name is too long or not the only one.
            PartitionError: a tensor belongs to no domain.
        """
        found = tuple(
            expert
            for site, published in sorted(self.experts.items())
            for expert in experts_of(site, published.residuals, published.patients)
        )
        names = [expert.name for expert in found]
        try:
            _NAMES.validate_python(names)
        except ValidationError:
            raise ConfigError(
                f"experts {', '.join(names):.300}: expected at most 64 letters each; shorten one"
            ) from None
        if len(set(names)) != len(names):
            raise ConfigError(f"experts {', '.join(names):.300}: two have one name; rename a site")
        return found


def write_publication(folder: Path, publication: Publication) -> None:
    """Write a publication beside the model in `folder`, in the place of an earlier one.

    Raises:
        ConfigError: it has too few patients, or its names or domains do not fit.
        PartitionError: a tensor belongs to no domain.
        StoreError: the folder cannot be written.
    """
    experts = publication.all_experts  # checked before anything is written
    for site, published in publication.experts.items():
        _require_same_domains(site, published.residuals, published.patients)
    make_directory(folder)
    if publication.prototypes is None:
        (folder / PROTOTYPES).unlink(missing_ok=True)
    else:
        write_atomic(folder / PROTOTYPES, _sealed(publication.prototypes))
    place = folder / EXPERTS
    if not experts:
        remove_directory(place)
        return
    temporary = temporary_directory(place)
    try:
        for site, published in publication.experts.items():
            tensors = safetensors.torch.save(
                {key: t.detach().cpu().contiguous() for key, t in published.residuals.items()}
            )
            digest = hashlib.sha256(tensors).hexdigest()
            entry = _ExpertEntry(patients=dict(published.patients), sha256=digest)
            write_atomic(temporary / f"{site}.safetensors", tensors)
            write_atomic(temporary / f"{site}.json", _sealed(entry))
    except BaseException:
        remove_directory(temporary)
        raise
    replace_directory(temporary, place)


def read_publication(folder: Path) -> Publication | None:
    """What was published with the model in `folder`; None where nothing was.

    Raises:
        StoreError: a file is damaged, too large, or not what was written.
    """
    digest = hashlib.sha256()
    entries, place = sorted((folder / EXPERTS).glob("*.json")), folder / PROTOTYPES
    if len(entries) > _MAX_SITES:
        raise StoreError(f"{folder / EXPERTS}: {len(entries)} sites, at most {_MAX_SITES}")
    experts = {path.stem: _read_experts(path, digest) for path in entries}
    prototypes = _read_sealed(Prototypes, place, digest) if place.exists() else None
    if not experts and prototypes is None:
        return None
    return Publication(experts, prototypes, digest.hexdigest())


def _read_experts(path: Path, digest: hashlib._Hash) -> SiteExperts:
    try:
        _NAMES.validate_python((path.stem,))
    except ValidationError:
        raise StoreError(f"{path}: {path.stem!r:.80} is no site's name; take it away") from None
    entry = _read_sealed(_ExpertEntry, path, digest)
    place = path.with_suffix(".safetensors")
    content = _read_bytes(place, _MAX_TENSOR_BYTES, digest)
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise StoreError(f"{place}: not the tensors that were written; copy the model again")
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, ValueError) as error:
        raise _unreadable(place, error) from None
    try:
        _require_same_domains(path.stem, tensors, entry.patients)
    except ConfigError as error:
        raise StoreError(f"{place}: {error}") from None
    return SiteExperts(entry.patients, tensors)


def _require_same_domains(site: str, names: Iterable[str], patients: Mapping[str, int]) -> None:
    domains = {name.rpartition("@")[2] for name in names}
    if domains != patients.keys():
        raise ConfigError(
            f"experts of {site:.80}: tensors of {', '.join(sorted(domains)) or 'no domain':.200}, "
            f"patients of {', '.join(sorted(patients)) or 'none':.200}; expected the same domains"
        )


def _sealed(content: Frozen) -> bytes:
    plain = content.model_dump(mode="json")
    return json.dumps({"sha256": _digest_of(plain), "content": plain}, indent=1).encode()


def _read_sealed(kind: type[Content], path: Path, digest: hashlib._Hash) -> Content:
    raw = _read_bytes(path, _MAX_JSON_BYTES, digest)
    try:
        sealed = json.loads(raw)
        if not isinstance(sealed, dict) or sealed.keys() != {"sha256", "content"}:
            raise StoreError(f"{path}: expected sha256 and content; copy the model again")
        if _digest_of(sealed["content"]) != sealed["sha256"]:
            raise StoreError(f"{path}: not what was written; copy the model again")
        return parse(kind, sealed["content"], str(path))
    except ConfigError as error:
        raise StoreError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None


def _read_bytes(path: Path, at_most: int, digest: hashlib._Hash) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(at_most + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(content) > at_most:
        raise StoreError(f"{path}: larger than {at_most} bytes; copy the model again")
    digest.update(hashlib.sha256(content).digest())
    return content


def _unreadable(path: Path, error: Exception) -> StoreError:
    return StoreError(f"{path}: not readable ({type(error).__name__}); copy the model again")


def _digest_of(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
