"""The model to hand out: the shared weights with a card that says what they are and are not.

No site's own parameters are in it: the coordinator never had them. Groups of fewer than
`SMALL_CELL` cases are not told, as the card is read outside of the federation.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from uharmony_model.bundle import save_bundle
from uharmony_model.errors import ConfigError, StoreError
from uharmony_model.exchange.schema import unflatten
from uharmony_model.study import Study
from uharmony_server.checkpoint import Checkpoint
from uharmony_server.publication import hand_out
from uharmony_server.records import Record

SMALL_CELL = 11
CARD = "README.md"
UNDEFINED = "not stated"
_RESULTS: tuple[tuple[str, str, int], ...] = (
    ("dice", "Dice", 3),
    ("surface_dice", "surface Dice", 3),
    ("hd95_mm", "HD95, mm", 1),
    ("lesion_recall", "lesion recall", 2),
    ("fp_per_case", "false positives a case", 2),
)


def export_model(checkpoint: Checkpoint, study: Study, folder: Path) -> None:
    """Write the bundle that `uharmony-predict` reads, whole or not at all, with its card.

    What sites published by opt-in comes beside it.

    Raises:
        ConfigError: the folder holds something that is no model, or the checkpoint is of another
            study.
        StoreError: a record cannot be read, or the folder cannot be written.
    """
    if checkpoint.study != study.digest:
        raise ConfigError(
            f"checkpoint of study {checkpoint.study[:12]}, expected {study.digest[:12]}; give the "
            "study that was trained"
        )
    if folder.is_symlink() or (folder.exists() and not _replaceable(folder)):
        raise ConfigError(f"{folder}: holds something that is no model; give a new folder")
    shared = unflatten(checkpoint.global_, checkpoint.schema)
    card = model_card(checkpoint, study).encode()
    save_bundle(folder, study, shared, {}, {}, notes={CARD: card})
    hand_out(folder, checkpoint.published, study)


def model_card(checkpoint: Checkpoint, study: Study) -> str:
    """What a reader has to know before the model is used, as Markdown.

    Raises:
        StoreError: a record of the checkpoint is not one.
    """
    try:
        records = [Record.model_validate(dict(record)) for record in checkpoint.records]
    except ValidationError as error:
        raise StoreError(
            f"round {checkpoint.round}: a record is damaged ({error.error_count()} errors); "
            "restore the checkpoint"
        ) from None
    # What a site made of it at home is not in this folder.
    records = [r for r in records if r.split == "test" and r.kept is None]
    last = max((r.round for r in records), default=0)
    test = [r for r in records if r.round == last]
    sections = (
        _facts(checkpoint, study),
        _sites(checkpoint, test),
        _results(study, test),
        *_published(checkpoint, study),
        _use(study),
    )
    return f"# {study.name}\n\n" + "\n\n".join(sections) + "\n"


def _facts(checkpoint: Checkpoint, study: Study) -> str:
    rounds = study.training.rounds
    state = "" if checkpoint.round >= rounds else ", **training was not finished**"
    classes = ", ".join(
        f"{name} ({', '.join(map(str, values))})" for name, values in study.task.classes.items()
    )
    return "\n".join(
        (
            "A 3D segmentation model, trained across institutions; images stayed where they were.",
            "",
            "| | |",
            "|---|---|",
            f"| study digest | `{study.digest}` |",
            f"| weights digest | `{checkpoint.digest}` |",
            f"| method | {study.method}: {study.plan.meaning} |",
            f"| network | {study.network.name}, {study.task.channels} input channels |",
            f"| modalities | {', '.join(study.task.intensity)} |",
            f"| classes (label values) | {classes} |",
            f"| rounds | {checkpoint.round} of {rounds}{state} |",
            f"| steps a round at each site | {study.training.local_steps} |",
        )
    )


def _sites(checkpoint: Checkpoint, test: Sequence[Record]) -> str:
    rounds = Counter(site for sites in checkpoint.counted for site in set(sites))
    names = sorted({*rounds, *(record.site for record in test)})
    lines = ["## Sites", ""]
    if not names:
        return "\n".join((*lines, "Not stated."))
    lines += [
        "Sites that took part, the rounds in which their update counted, and the test cases on "
        "which they measured the model:",
        "",
        "| site | rounds | test cases |",
        "|---|---|---|",
    ]
    for name in names:
        cases = _cases(record for record in test if record.site == name)
        lines.append(f"| {_plain(name)} | {rounds[name]} | {cases} |")
    return "\n".join(lines)


def _results(study: Study, test: Sequence[Record]) -> str:
    lines = ["## Results", ""]
    if not test:
        return "\n".join((*lines, "The test split has not been measured."))
    lines += [
        "Each site measured the model with its own parameters on its own test cases, once, after "
        f"round {test[0].round}. Mean over the sites that have a value, each site with equal "
        "weight; at a site outside of the federation expect less. A mean over fewer than "
        f"{SMALL_CELL} cases is not stated.",
        "",
        f"| class | sites | {' | '.join(title for _, title, _ in _RESULTS)} |",
        f"|---|---|{'---|' * len(_RESULTS)}",
    ]
    for name in study.task.class_names:
        of_class = [r for r in test if r.class_ == name]
        cells = []
        for metric, _, digits in _RESULTS:
            found = _site_means(of_class, metric)
            cells.append(f"{statistics.fmean(found):.{digits}f}" if found else UNDEFINED)
        sites = len(_site_means(of_class, "dice"))
        lines.append(f"| {name} | {sites} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _published(checkpoint: Checkpoint, study: Study) -> tuple[str, ...]:
    found = checkpoint.published
    if found is None or not (found.experts or found.prototypes):
        return ()
    settings = study.publication
    lines = ["## Published by sites", "", "By opt-in, once, after the last round:", ""]
    if found.experts:
        sites = ", ".join(map(_plain, sorted(found.experts)))
        lines.append(
            f"- Experts of {sites}: the residuals of their domains. They are trained on patients, "
            "and no privacy is claimed for them."
        )
    if found.prototypes:
        names = ", ".join(_plain(p.domain) for p in found.prototypes)
        lines.append(
            f"- Prototypes of {names}: mean descriptors with noise, each private with epsilon "
            f"{settings.epsilon:g} and delta {settings.delta:g}. Those that their noise hides are "
            "left out of prototypes.json."
        )
    return ("\n".join(lines),)


def _use(study: Study) -> str:
    needed = [] if study.plan.serves_unseen else sorted(study.plan.local)
    without = (
        f"This method keeps {', '.join(needed)} at the sites, so these weights alone do not "
        "predict: a site that took part uses them with its own parameters."
        if needed
        else "It predicts without any site's own parameters: "
        "`uharmony-predict FOLDER VOLUME.nii.gz`. A site that took part uses its own copy, which "
        "has its own parameters."
    )
    return "\n".join(
        (
            "## Intended use",
            "",
            f"Research on the classes and modalities above. {without}",
            "",
            "## Limits",
            "",
            "- For research only. It is not a medical device, and no compliance with any "
            "regulation is claimed.",
            "- It must not decide about a patient. Nobody has tested it for that.",
            "- Scanners, protocols, modalities and patients other than those of the sites were not "
            "tested; check it on your own labelled cases first.",
            "- Weights are made from patients' images. No formal privacy guarantee is claimed for "
            "them; hand them out under the terms of the sites.",
        )
    )


def _cases(records: Iterable[Record]) -> str:
    """How many cases a site measured, over its domains; small numbers are not told."""
    counts: dict[str, object] = {record.domain: record.n_cases for record in records}
    known = [count for count in counts.values() if isinstance(count, int)]
    if not counts or (len(known) < len(counts) and len(counts) > 1):
        return UNDEFINED  # the part that is told would pass for the whole
    total = sum(known)
    return str(total) if total >= SMALL_CELL else f"<{SMALL_CELL}"


def _site_means(records: Sequence[Record], metric: str) -> list[float]:
    """One mean a site, over its domains by their cases; none where all cases together are few."""
    sites: dict[str, list[tuple[float, int]]] = {}
    for record in records:
        found, cases = getattr(record, metric), record.n_cases
        if found is not None and isinstance(cases, int):
            sites.setdefault(record.site, []).append((found, max(cases, 1)))
    if sum(n for pairs in sites.values() for _, n in pairs) < SMALL_CELL:
        return []
    return [
        statistics.fmean([v for v, _ in pairs], [n for _, n in pairs])
        for _, pairs in sorted(sites.items())
    ]


def _plain(name: str) -> str:
    """A site's name as one cell, whatever it is called."""
    return re.sub(r"[^A-Za-z0-9_.-]", "?", name)


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "study.json").is_file() or not any(folder.iterdir()))
