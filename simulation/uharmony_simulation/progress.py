"""What a run says while it runs: bars on a terminal, lines in a pipe, JSON for machines."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from uharmony_server.checkpoint import Checkpoint
from uharmony_simulation.arms import Arm


class Progress:
    """Says nothing. The base of the ways to say something."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def making(self, site: str, done: int, total: int) -> None:
        """A case of a simulated site is being made."""

    def preparing(self, site: str, done: int, total: int) -> None:
        """A case of a site is being read and prepared."""

    def arm(self, arm: Arm) -> None:
        """An arm begins, or goes on."""

    def step(self, site: str, round_: int, step: int, loss: float) -> None:
        """A site took one training step."""

    def round(self, arm: Arm, state: Checkpoint) -> None:
        """A round is complete and on disk."""

    def arm_done(self, arm: Arm) -> None:
        """An arm is finished."""

    def finished(self, results: Path, report: Path) -> None:
        """The whole run is finished."""


class Lines(Progress):
    """A line a round, as text or as JSON."""

    def __init__(self, console: Console, *, as_json: bool) -> None:
        self._console, self._json = console, as_json

    def making(self, site: str, done: int, total: int) -> None:
        """Say it once a site."""
        if done == 0:
            self._say({"event": "making", "site": site, "cases": total})

    def preparing(self, site: str, done: int, total: int) -> None:
        """Say it once a site."""
        if done == 0:
            self._say({"event": "preparing", "site": site, "cases": total})

    def round(self, arm: Arm, state: Checkpoint) -> None:
        """Round, sites' mean validation Dice when it was measured, refusals so far."""
        facts: dict[str, object] = {
            "event": "finale" if state.at_home else "round",
            "arm": arm.name,
            "seed": arm.seed,
            "round": state.round,
            "rounds": arm.study.training.rounds,
        }
        if (dice := _validation_dice(state)) is not None:
            facts["validation_dice"] = round(dice, 4)
        if state.refusals:
            facts["refusals"] = len(state.refusals)
        self._say(facts)

    def arm_done(self, arm: Arm) -> None:
        """The arm's name and seed."""
        self._say({"event": "arm", "arm": arm.name, "seed": arm.seed})

    def finished(self, results: Path, report: Path) -> None:
        """Where the records and the report lie; the text form ends with a table instead."""
        if self._json:
            self._say({"event": "done", "results": str(results), "report": str(report)})

    def _say(self, facts: dict[str, object]) -> None:
        if self._json:
            self._console.print(json.dumps(facts), soft_wrap=True, markup=False, highlight=False)
        else:
            words = " ".join(f"{k} {v}" for k, v in facts.items() if k != "event")
            self._console.print(f"{facts['event']}: {words}", markup=False, highlight=False)


class TerminalBars(Progress):
    """One bar over an arm's steps, with the site at work and the time that is left."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task: int | None = None
        self._done = 0
        self._note = ""

    def __enter__(self) -> TerminalBars:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def making(self, site: str, done: int, total: int) -> None:
        """A bar over a site's cases."""
        if done == 0:
            self._finish()
            self._task = self._bars.add_task(f"making {site}", total=total, note="")
        self._update(completed=done + 1)

    def preparing(self, site: str, done: int, total: int) -> None:
        """A bar over a site's cases."""
        if done == 0:
            self._finish()
            self._task = self._bars.add_task(f"preparing {site}", total=total, note="")
        self._update(completed=done + 1)

    def arm(self, arm: Arm) -> None:
        """A bar over all steps of all sites."""
        self._finish()
        training, finale = arm.study.training, arm.study.finale
        # Own part and whole are two ways; where a site has no own part the bar ends early.
        ways = len({"own", "whole"} & set(finale.candidates)) or 1
        steps = training.rounds * training.local_steps + ways * finale.steps
        steps *= len(arm.sites)
        self._per_round = arm.study.training.local_steps * len(arm.sites)
        self._done, self._note = 0, ""
        label = f"{arm.name} (seed {arm.seed})"
        self._task = self._bars.add_task(label, total=steps, note="")

    def step(self, site: str, round_: int, step: int, loss: float) -> None:
        """One step further."""
        self._done += 1
        self._update(
            completed=self._done, note=f"round {round_}, {site}, loss {loss:.3f} {self._note}"
        )

    def round(self, arm: Arm, state: Checkpoint) -> None:
        """Steps that were not repeated count too, so that a resumed bar is right."""
        self._done = max(state.round * self._per_round, self._done if state.at_home else 0)
        if (dice := _validation_dice(state)) is not None:
            self._note = f"| validation Dice {dice:.3f}"
        self._update(completed=self._done, note=f"round {state.round} {self._note}")

    def arm_done(self, arm: Arm) -> None:
        """Leave the full bar."""
        self._finish()

    def _update(self, **values: object) -> None:
        if self._task is not None:
            self._bars.update(self._task, **values)  # type: ignore[arg-type]

    def _finish(self) -> None:
        if self._task is not None:
            total = self._bars.tasks[self._task].total
            self._bars.update(self._task, completed=total)  # type: ignore[arg-type]
            self._task = None


def make_progress(console: Console, output: str) -> Progress:
    """`auto` draws bars on a terminal and writes JSON lines elsewhere."""
    if output == "json" or (output == "auto" and not console.is_terminal):
        return Lines(console, as_json=True)
    return TerminalBars(console) if console.is_terminal else Lines(console, as_json=False)


def _validation_dice(state: Checkpoint) -> float | None:
    found = [
        float(r["dice"])
        for r in state.records
        if r["round"] == state.round and r["split"] == "validation" and r["dice"] is not None
    ]
    return statistics.fmean(found) if found else None
