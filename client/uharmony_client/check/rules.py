# ruff: noqa: E501 - a table
"""What the doctor of a site can find: a fixed table of codes, each with a severity and a remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from uharmony_client.finale_plan import NOTHING_TO_LEARN_FROM


class Severity(IntEnum):
    """How bad a finding is; `exit_code` is what the command ends with."""

    NOTE = 0
    WARNING = 1
    ERROR = 2

    @property
    def exit_code(self) -> int:
        """0 for notes, 10 for warnings, 11 for errors."""
        return (0, 10, 11)[self]

    @property
    def word(self) -> str:
        """The severity in lower case."""
        return self.name.lower()


@dataclass(frozen=True)
class Rule:
    """One thing that can be found. Codes are never given to another meaning."""

    code: str
    severity: Severity
    text: str
    remedy: str


_N, _W, _E = Severity.NOTE, Severity.WARNING, Severity.ERROR
_EXPORT = "export the volume again, or take the case out of the table"
_LEFT_OUT = "; until then the case is left out"

_TABLE = (
    # The table and the study
    ("U001", _E, "the case table cannot be read", "correct it; the names shown on request say where"),
    ("U002", _E, "the table has no case of this site", "write the name of site.yaml in its site column"),
    ("U003", _E, "site.yaml and the study do not fit", "correct annotated, missing, label_map or modality_map"),
    ("U004", _W, "the table names no patients, each case counts as one", "add the column patient, so that a person is in one split only"),
    ("U005", _E, "the splits cannot be drawn", "give each patient one site, and a split to all labelled cases or to none"),
    # Cases that training would refuse; they are quarantined
    ("U101", _W, "a volume is missing or may not be read", "correct the path or the rights" + _LEFT_OUT),
    ("U102", _W, "a volume is damaged", "copy or export it again" + _LEFT_OUT),
    ("U103", _W, "a file is no NIfTI volume", "convert it to .nii or .nii.gz" + _LEFT_OUT),
    ("U104", _W, "a volume has dimensions that cannot be used", _EXPORT + _LEFT_OUT),
    ("U105", _W, "a volume is too large", "raise resources.max_voxels if the memory allows it" + _LEFT_OUT),
    ("U106", _W, "a volume has voxels that are no numbers", "export it in grey values" + _LEFT_OUT),
    ("U107", _W, "a volume has a scaling that cannot be used", _EXPORT + _LEFT_OUT),
    ("U108", _W, "a volume has a position, direction or voxel size that cannot be used", _EXPORT + _LEFT_OUT),
    ("U109", _W, "a volume has voxels that are not finite", _EXPORT + _LEFT_OUT),
    ("U110", _W, "every voxel of a channel has one value", _EXPORT + _LEFT_OUT),
    ("U111", _W, "the channels are not those of the study", "name one file or one channel for each of the study's" + _LEFT_OUT),
    ("U112", _W, "the channels do not lie on one grid", "resample them to the first one" + _LEFT_OUT),
    ("U113", _W, "the modality is missing or not in the study", "name it in the table or rename it in modality_map" + _LEFT_OUT),
    ("U114", _W, "the label does not lie on the image's grid", "resample it to the image" + _LEFT_OUT),
    ("U115", _W, "the label holds something else than the declared classes", "map its values in label_map, to 0 for background" + _LEFT_OUT),
    ("U116", _W, "voxels cannot be scaled as the study says", _EXPORT + _LEFT_OUT),
    ("U190", _E, "too many cases would be left out; nothing was quarantined", "mend the cases above, or take them out of the table"),
    ("U191", _E, "the list of quarantined cases cannot be written", "check the rights and the space of the store"),
    # Grids
    ("U201", _W, "voxels below 0.1 mm or above 10 mm", "see that the header's unit is mm and the volume is the original"),
    ("U202", _W, "voxels more than ten times longer than wide", "prefer the reconstruction with thin slices, where there is one"),
    ("U203", _N, "left-handed voxel axes", "none is needed: the axes are reordered"),
    ("U204", _N, "voxel axes turned by more than 15 degrees", "none is needed: axes are reordered, never rotated"),
    ("U205", _W, "the header gives no orientation", "export with an sform or qform, or left and right may be swapped"),
    ("U206", _W, "the header's two orientations disagree", "see which is right; the sform is used"),
    ("U207", _W, "smaller than a training patch, and filled up with a constant", "take the case out where it is only a part of an examination"),
    # Intensities
    ("U301", _W, "not the values of a CT in HU", "export with the rescale slope and intercept applied"),
    ("U302", _W, "nearly all voxels lie outside the study's window", "see that the modality is right and values are HU"),
    ("U303", _W, "not the values of a PET in SUV", "convert Bq/ml to SUV before the export"),
    ("U304", _W, "nearly all voxels have one value", "see that the volume is the original image and no mask"),
    # The cases together
    ("U401", _W, "the same image under two cases of one patient", "take one of them out"),
    ("U402", _W, "the same image under two patients", "take one of them out, or correct the column patient"),
    ("U403", _E, "the same image in two splits", "take one of them out: the results would be too good"),
    ("U404", _N, "cases without a label", "none is needed: the method of a study says whether they are learned from"),
    ("U405", _W, "labels that hold background only", "see that the label is the right file"),
    ("U406", _W, "a class that no case of this site shows", "leave it out of annotated where it is not drawn here"),
    ("U407", _N, "a modality of the study that neither occurs here nor is declared missing", "none is needed; name it in missing where the study takes presence masks"),
    ("U408", _E, "fewer cases to train on than needed", NOTHING_TO_LEARN_FROM),
    ("U409", _W, "no case to test on", "add labelled patients, or write splits in the table"),
    ("U410", _W, "no case to validate on", "add labelled patients, or write splits in the table"),
    ("U411", _N, "fewer cases than policy.min_cases", "none is needed: what is measured on them leaves as a bound only"),
    ("U412", _N, "cases without a label that the study learns from", "none is needed: they count as training cases"),
    ("U413", _N, "labels that site.yaml keeps out of training", "none is needed: labels of test and validation cases still measure"),
    ("U414", _N, "no case has a label: nothing can be measured here", "none is needed; to measure, label patients that were not trained on and write test in the column split"),
    ("U415", _N, "nothing is trained here: this site receives the model and sends no change", "none is needed: the study's method says so"),
    # Texts that may name people; none of them leaves the site
    ("U501", _N, "header fields with text", "none is needed: headers never leave; empty them where the files are shared otherwise"),
    ("U502", _W, "header fields that look like a name, a date or a number of a person", "have the fields emptied; they never leave the site"),
    ("U503", _W, "header extensions, which may hold DICOM attributes or comments", "export without extensions; they never leave the site"),
    ("U504", _W, "files beside the volumes with attributes of persons", "remove the attributes or the files; they are not read by training"),
    ("U505", _N, "files beside the volumes that were not looked into", "none is needed: they are not read by training"),
    ("U506", _W, "names of files, folders or cases that look like a person or a date", "rename them; they never leave the site"),
    # The machine
    ("U601", _E, "too little space on the disk", "free space, or move store and volumes in site.yaml"),
    ("U602", _W, "little memory for the largest volume", "lower resources.max_voxels or add memory"),
    ("U603", _E, "the device of resources.device cannot be used", "install the driver, or write device: auto"),
    ("U604", _N, "no GPU", "none is needed; training takes longer"),
    ("U605", _W, "more threads than cores", "lower resources.threads"),
    ("U606", _W, "the certificate ends soon", "start the service; it renews the certificate by itself"),
    ("U607", _E, "the certificate is not valid now", "check the clock, or ask the coordinator for a new invitation"),
    ("U608", _W, "the certificate cannot be read", "restore the folder identity from the backup, or join again"),
    ("U609", _N, "this user may write to the data", "mount the data read-only; nothing needs to write there"),
    ("U610", _E, "files of the store are open to every user of the machine", "chmod -R go-rwx the store"),
    ("U611", _W, "files of the store are open to the user's group", "chmod -R g-rwx the store"),
    ("U612", _W, "running as root", "run the service as a user of its own"),
    ("U613", _E, "the store cannot be written", "give this user the right to write there"),
    ("U614", _E, "the coordinator was not reached", "check address, firewall and proxy; one outbound connection is needed"),
    ("U615", _W, "the clock differs from the coordinator's", "switch on time synchronisation (NTP)"),
    # What will leave
    ("U701", _E, "the study's network cannot be built", "ask the coordinator for a corrected study"),
    ("U702", _E, "the study asks for more than this site's policy allows", "change policy in site.yaml if the site agrees"),
)  # fmt: skip

RULES: Mapping[str, Rule] = {row[0]: Rule(*row) for row in _TABLE}

# A case is refused for the reason of `volume_error.Reason`.
VOLUME_CODES: Mapping[str, str] = {
    "missing": "U101",
    "damaged": "U102",
    "format": "U103",
    "dimensions": "U104",
    "too-large": "U105",
    "voxel-type": "U106",
    "scaling": "U107",
    "grid": "U108",
    "not-finite": "U109",
}
