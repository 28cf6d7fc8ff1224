"""Every error this project raises on purpose, and the exit code a command ends with.

    UHarmonyError            1
    |- ConfigError           2   study.yaml, site.yaml or an option
    |- DataError             3   a folder, a volume, a label
    |- ExchangeError         4   something received does not match what was agreed
    |   |- PartitionError        a tensor that is neither declared shared nor local
    |   `- PayloadError          bytes that are damaged or not what they declare
    |- StoreError            5   a checkpoint, a generation, a preprocessed volume
    |- QuorumError           6   too few sites or cases answered
    |- NetworkError          7   a backbone that cannot be built or harmonised
    |- TrainingError         8   a round that cannot be trained
    `- AbstainedError        9   predict --strict: a volume unlike all that was learned from

130 is an interruption by the user; `check` ends with 10 for warnings and 11 for errors. A message
says what is wrong, what was got, what was expected and what to do; it stands on one line.
"""

from __future__ import annotations


class UHarmonyError(Exception):
    """Root of the tree; a command prints its message on one line and exits with `exit_code`."""

    exit_code = 1


class ConfigError(UHarmonyError):
    """A study, a site file or an option says something that cannot be followed."""

    exit_code = 2


class DataError(UHarmonyError):
    """A folder, a volume or a label is missing, damaged or outside what the study declares."""

    exit_code = 3


class ExchangeError(UHarmonyError):
    """What was received does not match what was agreed."""

    exit_code = 4


class PartitionError(ExchangeError):
    """A tensor of the model is neither declared shared nor declared local."""


class PayloadError(ExchangeError):
    """Bytes are damaged, or are not what their manifest declares."""


class StoreError(UHarmonyError):
    """Something written earlier is missing, damaged or was written by another study."""

    exit_code = 5


class QuorumError(UHarmonyError):
    """Too few sites or cases answered for a round to count."""

    exit_code = 6


class TrainingError(UHarmonyError):
    """A round of training went wrong; the text speaks of the round, never of a case."""

    exit_code = 8


class NetworkError(UHarmonyError):
    """A backbone cannot be built, or holds a layer that harmonisation does not know."""

    exit_code = 7
