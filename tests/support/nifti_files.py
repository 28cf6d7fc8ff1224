"""NIfTI-1 files written byte by byte, independently of the code that reads them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np

CODES = {
    "u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64,
    "i1": 256, "u2": 512, "u4": 768, "i8": 1024, "u8": 1280,
}  # fmt: skip
Order = Literal["<", ">"]
DIAGONAL = ((2.0, 0.0, 0.0, 10.0), (0.0, 3.0, 0.0, -20.0), (0.0, 0.0, 4.0, 30.0))
# NIfTI-1 byte offsets, from the standard's header file
FIELDS = {
    "sizeof_hdr": (0, "i"), "dim": (40, "8h"), "datatype": (70, "h"), "bitpix": (72, "h"),
    "pixdim": (76, "8f"), "vox_offset": (108, "f"), "scl_slope": (112, "f"),
    "scl_inter": (116, "f"), "xyzt_units": (123, "B"), "descrip": (148, "80s"),
    "aux_file": (228, "24s"), "data_type": (4, "10s"), "db_name": (14, "18s"),
    "intent_name": (328, "16s"), "qform_code": (252, "h"), "sform_code": (254, "h"),
    "quatern": (256, "3f"),
    "qoffset": (268, "3f"), "srow_x": (280, "4f"), "srow_y": (296, "4f"), "srow_z": (312, "4f"),
    "magic": (344, "4s"),
}  # fmt: skip


def nifti_bytes(
    array: np.ndarray, *, order: Order = "<", extension: bytes = b"", **fields: Any
) -> bytes:
    """A NIfTI-1 file of `array` (i, j, k[, t]); `fields` overwrite the header's."""
    offset = 352 + len(extension)
    values: dict[str, Any] = {
        "sizeof_hdr": 348,
        "dim": [array.ndim, *array.shape, *[1] * (7 - array.ndim)],
        "datatype": CODES.get(array.dtype.str[1:], 0),
        "bitpix": array.dtype.itemsize * 8,
        "pixdim": [1.0, 2.0, 3.0, 4.0, 1.0, 0.0, 0.0, 0.0],
        "vox_offset": float(offset),
        "scl_slope": 1.0,
        "scl_inter": 0.0,
        "xyzt_units": 2,
        "sform_code": 1,
        "srow_x": DIAGONAL[0],
        "srow_y": DIAGONAL[1],
        "srow_z": DIAGONAL[2],
        "magic": b"n+1\0",
        **fields,
    }
    header = bytearray(352)
    for name, value in values.items():
        place, code = FIELDS[name]
        content = value if isinstance(value, (list, tuple)) else [value]
        struct.pack_into(order + code, header, place, *content)
    if extension:
        header[348] = 1
    body = array.astype(array.dtype.newbyteorder(order)).tobytes(order="F")
    return bytes(header) + extension + body


def read_nifti(path: Path) -> Any:
    """What nibabel reads: the independent reference."""
    return nib.load(path)
