"""The grid of a volume file, and the bytes of another volume on exactly the same grid."""

from __future__ import annotations

import gzip
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from uharmony_model.errors import DataError
from uharmony_model.frozen import Frozen

HEADERS: dict[int, type[Any]] = {1: nib.Nifti1Header, 2: nib.Nifti2Header}
DATA_OFFSETS = {1: 352, 2: 544}

Triple = tuple[float, float, float]


class VolumeHeader(Frozen):
    """The grid of a file, enough to write another volume on exactly the same grid."""

    nifti: Literal[1, 2] = 1
    shape: tuple[int, int, int]
    channels: int = 1
    qfac: float = 1.0
    spacing_mm: Triple
    qform_code: int = 0
    quaternion: Triple = (0.0, 0.0, 0.0)
    qoffset: Triple = (0.0, 0.0, 0.0)
    sform_code: int = 0
    sform: tuple[tuple[float, float, float, float], ...] = ((0.0,) * 4,) * 3

    @property
    def affine(self) -> NDArray[np.float64]:
        """(4, 4), voxel indices to RAS in mm; the sform where there is one, as nibabel does."""
        return np.asarray(self.to_nibabel().get_best_affine(), dtype=np.float64)

    def to_nibabel(self) -> Any:
        """A fresh nibabel header of this grid, with no text in it."""
        header = HEADERS[self.nifti]()
        header.set_data_shape(self.shape)
        header.set_xyzt_units("mm")
        header["pixdim"][:4] = (self.qfac, *self.spacing_mm)
        header["qform_code"], header["sform_code"] = self.qform_code, self.sform_code
        for field, value in zip("bcd", self.quaternion, strict=True):
            header[f"quatern_{field}"] = value
        for field, value in zip("xyz", self.qoffset, strict=True):
            header[f"qoffset_{field}"] = value
        for field, row in zip("xyz", self.sform, strict=True):
            header[f"srow_{field}"] = row
        return header


def encode_volume(array: NDArray[Any], header: VolumeHeader) -> bytes:
    """The bytes of a .nii.gz; equal arrays on equal grids give equal bytes."""
    if array.shape[-3:] != header.shape:
        raise DataError(f"array {array.shape} does not lie on the grid {header.shape}")
    channels_last = np.moveaxis(array, 0, -1) if array.ndim == 4 else array
    fresh = header.to_nibabel()
    fresh.set_data_shape(channels_last.shape)
    fresh.set_data_dtype(array.dtype)
    fresh["scl_slope"], fresh["scl_inter"] = 1.0, 0.0
    fresh["vox_offset"] = DATA_OFFSETS[header.nifti]
    fresh["magic"] = b"n+1" if header.nifti == 1 else b"n+2\0\r\n\x1a\n"
    native = np.asarray(channels_last, dtype=array.dtype.newbyteorder("="))
    content = fresh.binaryblock + b"\0\0\0\0" + native.tobytes(order="F")
    return gzip.compress(content, compresslevel=4, mtime=0)
