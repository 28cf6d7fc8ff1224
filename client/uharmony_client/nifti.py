"""Reads NIfTI volumes that come from outside and may be damaged or hostile.

Nothing is allocated before the header's claims are checked, no more is decompressed than the
header declares, and no text field of a header (they hold names of patients) is kept or shown.

Arrays keep the voxel axes of the file: (D, H, W) = (i, j, k), channels in front.
"""

from __future__ import annotations

import io
import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from uharmony_client.volume_error import Reason, VolumeError
from uharmony_client.volume_header import (
    DATA_OFFSETS,
    HEADERS,
    Triple,
    VolumeHeader,
)
from uharmony_client.volume_stream import HEADER_SIZES, open_stream, read_block

MAX_VOXELS = 512**3
MAX_CHANNELS = 16

_CHUNK = 1 << 20  # bytes; a multiple of every voxel size
MAX_OFFSET = 16 << 20  # bytes of header extensions; scanners write some kilobytes
_SPACING_MM = (1e-3, 1e3)  # outside, the file's unit is no millimetre
_FAR_MM = 1e6  # a kilometre from the scanner's centre
_MIN_VOLUME = 1e-3  # of the unit cell, relative to a right-angled one

_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8",
    256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_OTHER_DTYPES = {1: "binary", 32: "complex", 128: "RGB", 1792: "complex", 2304: "RGBA"}
_UNITS = {1: "metre", 3: "micrometre"}


class LoadedVolume(NamedTuple):
    """Voxels (D, H, W) or (C, D, H, W) float32, their affine to RAS mm, and the grid."""

    array: NDArray[np.float32]
    affine: NDArray[np.float64]
    header: VolumeHeader


def load_volume(
    path: Path, max_voxels: int = MAX_VOXELS, *, max_channels: int = MAX_CHANNELS
) -> LoadedVolume:
    """Read a NIfTI-1 or NIfTI-2 file (.nii or .nii.gz, told apart by content).

    Raises:
        VolumeError: a DataError: the file is missing, damaged, larger than allowed, or no 3D
            volume of finite real numbers on a usable grid.
    """
    if not path.is_file():
        _fail(path, "missing", "no such volume")
    try:
        with open_stream(path) as (stream, available):
            header, dtype, (slope, offset), start = _read_header(stream, path, max_channels)
            _check_size(path, header, dtype, start, available, max_voxels)
            flat = _read_voxels(stream, path, header, dtype, slope, offset)
            if stream.read(1):
                _fail(path, "damaged", "holds more than its header declares; export it again")
    except PermissionError:
        _fail(path, "missing", "may not be read by this user; give it the right to")
    except (OSError, EOFError, zlib.error) as error:
        kind = type(error).__name__
        _fail(path, "damaged", f"cannot be read to its end ({kind}); copy or export it again")
    except MemoryError:
        _fail(path, "too-large", "does not fit in memory; lower resources.max_voxels")
    # The file has i fastest, so the reversed shape is C-contiguous and its transpose a view.
    array = flat.reshape(header.channels, *reversed(header.shape)).transpose(0, 3, 2, 1)
    return LoadedVolume(array[0] if header.channels == 1 else array, header.affine, header)


def _read_header(
    stream: Any, path: Path, max_channels: int
) -> tuple[VolumeHeader, np.dtype[Any], tuple[float, float], int]:
    """Header, voxel type, (slope, offset) and the number of bytes before the voxels."""
    block, order, version = read_block(stream, path)
    fields = HEADERS[version](block, endianness=order, check=False).structarr
    if bytes(fields["magic"])[:3] != f"n+{version}".encode():
        _fail(path, "format", "is not a single-file NIfTI; convert it to .nii or .nii.gz")

    shape, channels = _dimensions(fields["dim"], path, max_channels)
    code = int(fields["datatype"])
    if code not in _DTYPES:
        kind = _OTHER_DTYPES.get(code, f"type {code}")
        _fail(path, "voxel-type", f"has {kind} voxels; expected integers or real numbers")
    slope, offset = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0:  # the standard's "not scaled"
        slope, offset = 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(offset)):
        _fail(
            path, "scaling", f"has the scaling slope {slope} and offset {offset}; export it again"
        )
    begin = float(fields["vox_offset"]) or float(DATA_OFFSETS[version])
    if not (HEADER_SIZES[version] <= begin <= MAX_OFFSET) or begin != int(begin):
        _fail(path, "damaged", f"says that its voxels begin at byte {begin}; export it again")
    header = _grid(fields, version, shape, channels, path)
    left = int(begin) - len(block)
    while left > 0:  # header extensions are passed over, never kept
        piece = stream.read(min(left, _CHUNK))
        if not piece:
            _fail(path, "damaged", "ends before its voxels; copy or export it again")
        left -= len(piece)
    dtype = np.dtype(f"{order}{_DTYPES[code]}")
    return header, dtype, (slope, offset), int(begin)


def _dimensions(dim: Any, path: Path, max_channels: int) -> tuple[tuple[int, int, int], int]:
    rank = int(dim[0])
    sizes = [int(size) for size in dim[1 : rank + 1]] if 1 <= rank <= 7 else []
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) not in (3, 4):
        _fail(
            path,
            "dimensions",
            f"has {max(rank, 0)} dimensions; expected 3, or 4 with the channels last",
        )
    if min(sizes) < 1:
        _fail(path, "dimensions", f"has the size {_times(sizes)}; every size must be at least 1")
    channels = sizes[3] if len(sizes) == 4 else 1
    if channels > max_channels:
        _fail(path, "dimensions", f"has {channels} channels; at most {max_channels} are expected")
    return (sizes[0], sizes[1], sizes[2]), channels


def _grid(
    fields: Any, version: Any, shape: tuple[int, int, int], channels: int, path: Path
) -> VolumeHeader:
    spacing = [float(value) for value in fields["pixdim"][1:4]]
    if not all(0 < value <= _FAR_MM for value in spacing):
        _fail(path, "grid", f"has the voxel size {_times(spacing)}; expected positive millimetres")
    unit = int(fields["xyzt_units"]) & 7
    if unit in _UNITS:
        _fail(path, "grid", f"is in {_UNITS[unit]}s; expected millimetres")
    # An unused transform may hold anything, and must not keep a good file out.
    uses_sform, uses_qform = int(fields["sform_code"]) != 0, int(fields["qform_code"]) != 0
    rows = [[float(v) for v in fields[f"srow_{axis}"]] for axis in "xyz"]
    quaternion = [float(fields[f"quatern_{part}"]) for part in "bcd"]
    qoffset = [float(fields[f"qoffset_{axis}"]) for axis in "xyz"]
    qfac = float(fields["pixdim"][0]) or 1.0  # the standard reads 0 as 1
    # Comparisons with NaN are false, so these refuse it as well.
    good_sform = all(abs(v) <= _FAR_MM for row in rows for v in row)
    good_qform = all(abs(v) <= _FAR_MM for v in (*quaternion, *qoffset)) and abs(qfac) == 1
    if (uses_sform and not good_sform) or (uses_qform and not uses_sform and not good_qform):
        _fail(
            path,
            "grid",
            "has a position or direction that is not finite or absurd; export it again",
        )
    keep_qform = uses_qform and good_qform
    header = VolumeHeader(
        nifti=version,
        shape=shape,
        channels=channels,
        qfac=qfac if keep_qform else 1.0,
        spacing_mm=_triple(spacing),
        qform_code=int(fields["qform_code"]) if keep_qform else 0,
        quaternion=_triple(quaternion) if keep_qform else (0.0, 0.0, 0.0),
        qoffset=_triple(qoffset) if keep_qform else (0.0, 0.0, 0.0),
        sform_code=int(fields["sform_code"]),
        sform=tuple((r[0], r[1], r[2], r[3]) for r in rows) if uses_sform else ((0.0,) * 4,) * 3,
    )
    try:
        affine = header.affine
    except (HeaderDataError, ValueError) as error:
        _fail(path, "grid", f"has a direction that is no rotation ({type(error).__name__})")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.all((lengths > _SPACING_MM[0]) & (lengths < _SPACING_MM[1])):
        _fail(path, "grid", f"has the voxel size {_times(lengths)}; expected millimetres")
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < _MIN_VOLUME:
        _fail(path, "grid", "has axes that lie in one plane (singular affine); export it again")
    return header


def _check_size(
    path: Path,
    header: VolumeHeader,
    dtype: np.dtype[Any],
    start: int,
    available: int,
    max_voxels: int,
) -> None:
    voxels = math.prod(header.shape)
    if voxels > max_voxels:
        _fail(
            path,
            "too-large",
            f"declares {_times(header.shape)} voxels; at most {max_voxels} are allowed "
            "(resources.max_voxels)",
        )
    if start + voxels * header.channels * dtype.itemsize > available:
        _fail(path, "damaged", "holds less than its header declares; copy or export it again")


def _read_voxels(
    stream: Any,
    path: Path,
    header: VolumeHeader,
    dtype: np.dtype[Any],
    slope: float,
    offset: float,
) -> NDArray[np.float32]:
    """Convert piece by piece, so that the peak is the float32 array and one piece."""
    flat = np.empty(math.prod(header.shape) * header.channels, dtype=np.float32)
    done = 0
    while done < flat.size:
        count = min(_CHUNK // dtype.itemsize, flat.size - done)
        piece = _read_exactly(stream, path, count * dtype.itemsize)
        values = np.frombuffer(piece, dtype=dtype)
        target = flat[done : done + count]
        with np.errstate(over="ignore", invalid="ignore"):
            if (slope, offset) == (1.0, 0.0):
                target[:] = values
            else:
                target[:] = values.astype(np.float64) * slope + offset
        if not np.isfinite(target).all():
            _fail(
                path,
                "not-finite",
                "has voxels that are not finite (NaN or infinite); export it again",
            )
        done += count
    return flat


def _read_exactly(stream: Any, path: Path, size: int) -> bytes:
    buffer = io.BytesIO()
    while buffer.tell() < size:
        piece = stream.read(size - buffer.tell())
        if not piece:
            _fail(path, "damaged", "holds less than its header declares; copy or export it again")
        buffer.write(piece)
    return buffer.getvalue()


def _times(sizes: Any) -> str:
    return " x ".join(f"{size:g}" for size in sizes)


def _triple(values: Any) -> Triple:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _fail(path: Path, reason: Reason, what: str) -> NoReturn:
    raise VolumeError(path, reason, what) from None
