from __future__ import annotations

import gzip
import io
import itertools
import random
import struct
import tracemalloc
import warnings

import nibabel as nib
import numpy as np
import pytest

from tests.support.nifti_files import CODES, nifti_bytes, read_nifti
from uharmony_client.nifti import load_volume
from uharmony_client.volume_header import encode_volume
from uharmony_model.errors import DataError

RAMP = np.arange(3 * 4 * 5).reshape(3, 4, 5)
CANARY = b"MUSTERMANN^ERIKA"


def load(content, tmp_path, name="v.nii", **keywords):
    path = tmp_path / name
    path.write_bytes(content)
    return load_volume(path, **keywords)


def save(path, array, header):
    path.write_bytes(encode_volume(array, header))


def expect_refusal(content, tmp_path, name="v.nii", **keywords):
    with pytest.raises(DataError) as caught:
        load(content, tmp_path, name, **keywords)
    message = str(caught.value)
    assert message.startswith(str(tmp_path))
    assert "\n" not in message
    assert CANARY.decode() not in message
    return message.removeprefix(str(tmp_path / name))


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
@pytest.mark.parametrize(("dtype", "order"), list(itertools.product(CODES, "<>")))
def test_reads_what_nibabel_reads(write_nifti, name, dtype, order):
    path = write_nifti(name, RAMP.astype(dtype), order=order, scl_slope=0.5, scl_inter=-3.0)
    loaded = load_volume(path)
    reference = read_nifti(path)
    np.testing.assert_array_equal(loaded.array, reference.get_fdata(dtype=np.float64))
    np.testing.assert_array_equal(loaded.array, RAMP * 0.5 - 3)
    np.testing.assert_array_equal(loaded.affine, reference.affine)
    assert loaded.array.dtype == np.float32


def test_channels_come_first_and_a_single_one_has_no_axis(write_nifti):
    four = np.arange(2 * 3 * 4 * 5).reshape(3, 4, 5, 2).astype("i2")
    loaded = load_volume(write_nifti("v.nii", four))
    np.testing.assert_array_equal(loaded.array, np.moveaxis(four, -1, 0))
    assert load_volume(write_nifti("w.nii", four[..., :1])).array.shape == (3, 4, 5)


def test_a_slope_of_zero_means_not_scaled(write_nifti):
    path = write_nifti("v.nii", RAMP.astype("i2"), scl_slope=0.0, scl_inter=7.0)
    np.testing.assert_array_equal(load_volume(path).array, RAMP)


def test_extensions_are_passed_over(write_nifti):
    path = write_nifti("v.nii.gz", RAMP.astype("u1"), extension=CANARY * 4)
    np.testing.assert_array_equal(load_volume(path).array, RAMP)


def test_reads_nifti_2(tmp_path):
    image = nib.Nifti2Image(RAMP.astype("f8"), np.diag([1.5, 2, 3, 1]))
    loaded = load(image.to_bytes(), tmp_path)
    np.testing.assert_array_equal(loaded.array, RAMP)
    np.testing.assert_array_equal(loaded.affine, image.affine)


U1 = RAMP.astype("u1")
F4 = RAMP.astype("f4")
NAN = float("nan")
INF = float("inf")


def f4_with(value):
    array = F4.copy()
    array[1, 2, 3] = value
    return array


def nifti_2_with(offset, code, value):
    content = bytearray(nib.Nifti2Image(F4, np.eye(4)).to_bytes())
    struct.pack_into(code, content, offset, value)
    return bytes(content)


HOSTILE = {
    "empty file": (b"", "no NIfTI"),
    "text": (b"hello" * 200, "no NIfTI"),
    "header only half there": (nifti_bytes(U1)[:200], "inside its header"),
    "no voxels": (nifti_bytes(U1)[:352], "less than its header declares"),
    "one byte short": (nifti_bytes(U1)[:-1], "less than its header declares"),
    "one byte more": (nifti_bytes(U1) + b"\0", "more than its header declares"),
    "magic of a pair": (nifti_bytes(U1, magic=b"ni1\0"), "single-file"),
    "no magic": (nifti_bytes(U1, magic=b"\0\0\0\0"), "single-file"),
    "2-D": (nifti_bytes(U1, dim=[2, 3, 4, 1, 1, 1, 1, 1]), "dimensions"),
    "7-D": (nifti_bytes(U1, dim=[7, 3, 4, 5, 1, 1, 1, 2]), "dimensions"),
    "dim[0] negative": (nifti_bytes(U1, dim=[-3, 3, 4, 5, 1, 1, 1, 1]), "dimensions"),
    "dim[0] too large": (nifti_bytes(U1, dim=[300, 3, 4, 5, 1, 1, 1, 1]), "dimensions"),
    "zero size": (nifti_bytes(U1, dim=[3, 3, 0, 5, 1, 1, 1, 1]), "at least 1"),
    "negative size": (nifti_bytes(U1, dim=[3, 3, -4, 5, 1, 1, 1, 1]), "at least 1"),
    "32767 cubed": (nifti_bytes(U1, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "are allowed"),
    "too many channels": (nifti_bytes(U1, dim=[4, 3, 4, 5, 300, 1, 1, 1]), "channels"),
    "RGB": (nifti_bytes(U1, datatype=128, bitpix=24), "RGB"),
    "RGBA": (nifti_bytes(U1, datatype=2304, bitpix=32), "RGBA"),
    "complex": (nifti_bytes(U1, datatype=32, bitpix=64), "complex"),
    "long double": (nifti_bytes(U1, datatype=1536, bitpix=128), "type 1536"),
    "unknown type": (nifti_bytes(U1, datatype=-7), "type -7"),
    "slope NaN": (nifti_bytes(U1, scl_slope=NAN), "scaling"),
    "slope infinite": (nifti_bytes(U1, scl_slope=INF), "scaling"),
    "offset NaN": (nifti_bytes(U1, scl_inter=NAN), "scaling"),
    "voxels overflow": (nifti_bytes(F4, scl_slope=3e38, scl_inter=3e38), "not finite"),
    "double overflows float": (nifti_bytes(f4_with(1).astype("f8") * 1e300), "not finite"),
    "voxel offset NaN": (nifti_bytes(U1, vox_offset=NAN), "begin at byte"),
    "voxel offset in header": (nifti_bytes(U1, vox_offset=16.0), "begin at byte"),
    "voxel offset 1e30": (nifti_bytes(U1, vox_offset=1e30), "begin at byte"),
    "voxel offset past end": (nifti_bytes(U1, vox_offset=4096.0), "before its voxels"),
    "pixdim zero": (nifti_bytes(U1, pixdim=[1.0, 0, 0, 0, 0, 0, 0, 0]), "voxel size"),
    "pixdim NaN": (nifti_bytes(U1, pixdim=[1.0, NAN, 1, 1, 0, 0, 0, 0]), "voxel size"),
    "pixdim negative": (nifti_bytes(U1, pixdim=[1.0, -1, 1, 1, 0, 0, 0, 0]), "voxel size"),
    "sform NaN": (nifti_bytes(U1, srow_y=[NAN, 0, 0, 0]), "not finite"),
    "sform infinite": (nifti_bytes(U1, srow_y=[0, 3, 0, INF]), "not finite"),
    "sform zero": (nifti_bytes(U1, srow_x=[0, 0, 0, 0]), "voxel size"),
    "sform singular": (nifti_bytes(U1, srow_y=[2.0, 0, 0, 0], srow_x=[2.0, 0, 0, 0]), "voxel size"),
    "axes in one plane": (nifti_bytes(U1, srow_x=[1.0, 1, 0, 0], srow_y=[1.0, 1, 0, 0]), "plane"),
    "sform in metres": (nifti_bytes(U1, srow_x=[1e-4, 0, 0, 0]), "voxel size"),
    "voxel size of a house": (nifti_bytes(U1, srow_x=[5e4, 0, 0, 0]), "voxel size"),
    "sform far too large": (nifti_bytes(U1, srow_x=[1e30, 0, 0, 0]), "absurd"),
    "sform of doubles far too large": (
        nifti_2_with(400, "<d", 1e300),  # srow_x
        "absurd",
    ),
    "qform far away": (
        nifti_bytes(U1, sform_code=0, qform_code=1, qoffset=[1e30, 0, 0]),
        "absurd",
    ),
    "qfac no sign": (
        nifti_bytes(U1, sform_code=0, qform_code=1, pixdim=[0.5, 1, 1, 1, 0, 0, 0, 0]),
        "absurd",
    ),
    "pixdim far too large": (nifti_bytes(U1, pixdim=[1.0, 1e30, 1, 1, 0, 0, 0, 0]), "voxel size"),
    "qform no rotation": (
        nifti_bytes(U1, sform_code=0, qform_code=1, quatern=[1.0, 1, 1]),
        "no rotation",
    ),
    "qform NaN": (nifti_bytes(U1, sform_code=0, qform_code=1, quatern=[NAN, 0, 0]), "not finite"),
    "unit metre": (nifti_bytes(U1, xyzt_units=1), "metre"),
    "unit micrometre": (nifti_bytes(U1, xyzt_units=3), "micrometre"),
    "voxel NaN": (nifti_bytes(f4_with(NAN)), "not finite"),
    "voxel infinite": (nifti_bytes(f4_with(-INF)), "not finite"),
    "gzip cut": (gzip.compress(nifti_bytes(U1))[:-12], "read to its end"),
    "gzip of nothing": (gzip.compress(b""), "no NIfTI"),
    "gzip with a tail": (gzip.compress(nifti_bytes(U1)) + b"tail", "read to its end"),
    "two volumes in one gzip": (gzip.compress(nifti_bytes(U1)) * 2, "more than its header"),
    "gzip wrong checksum": (gzip.compress(nifti_bytes(U1))[:-8] + bytes(8), "read to its end"),
    "not gzip after the magic": (b"\x1f\x8b" + bytes(300), "read to its end"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line(name, tmp_path):
    content, expected = HOSTILE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert expected in expect_refusal(content, tmp_path)


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "absent.nii", tmp_path):
        with pytest.raises(DataError, match="no such volume"):
            load_volume(path)


def peak_mib(action):
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def test_an_86_byte_file_of_32767_cubed_allocates_nothing(tmp_path):
    header = nifti_bytes(U1, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])[:352]
    content = gzip.compress(header, compresslevel=9)
    assert len(content) < 200
    assert peak_mib(lambda: expect_refusal(content, tmp_path)) < 1
    # Within the limit in voxels, but more than so few bytes can decompress to.
    allowed = {"max_voxels": 32767**3}
    assert peak_mib(lambda: expect_refusal(content, tmp_path, **allowed)) < 1
    assert "less than its header declares" in expect_refusal(content, tmp_path, **allowed)


def test_a_gzip_bomb_is_not_decompressed_beyond_the_declared_size(tmp_path):
    bomb = io.BytesIO()
    with gzip.GzipFile(fileobj=bomb, mode="wb") as stream:
        stream.write(nifti_bytes(U1))
        for _ in range(64):
            stream.write(bytes(2**20))
    message = ""

    def action():
        nonlocal message
        message = expect_refusal(bomb.getvalue(), tmp_path)

    assert peak_mib(action) < 2
    assert "more than its header declares" in message


def test_many_empty_gzip_members_are_no_volume(tmp_path):
    assert "no NIfTI" in expect_refusal(gzip.compress(b"") * 2000, tmp_path)


def test_the_peak_is_the_array_and_a_piece_of_the_file(tmp_path, write_nifti):
    path = write_nifti("v.nii.gz", np.zeros((128, 128, 64), "f8"))
    array_mib = 128 * 128 * 64 * 4 / 2**20
    assert peak_mib(lambda: load_volume(path)) < array_mib + 5


def test_the_limits_are_inclusive(tmp_path):
    assert load(nifti_bytes(U1), tmp_path, max_voxels=60).array.shape == (3, 4, 5)
    assert "at most 59" in expect_refusal(nifti_bytes(U1), tmp_path, max_voxels=59)
    two = nifti_bytes(np.zeros((3, 4, 5, 2), "u1"))
    assert load(two, tmp_path, max_channels=2, max_voxels=60).array.shape == (2, 3, 4, 5)
    assert "2 channels" in expect_refusal(two, tmp_path, max_channels=1)


def test_any_bit_flip_in_a_gzip_is_found_or_harmless(tmp_path):
    content = gzip.compress(nifti_bytes(RAMP.astype("i2")), mtime=0)
    refused = 0
    for bit in range(0, len(content) * 8, 3):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            loaded = load(bytes(damaged), tmp_path)
        except DataError:
            refused += 1
        else:  # flips of gzip's own time, system and name fields
            np.testing.assert_array_equal(loaded.array, RAMP)
    assert refused > len(content) * 8 / 3 * 0.8


def test_random_headers_never_end_in_another_exception(tmp_path):
    draw = random.Random(0)  # noqa: S311 - a fixed list of damages
    content = nifti_bytes(RAMP.astype("f4"))
    accepted = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(600):
            damaged = bytearray(content)
            for _ in range(draw.randint(1, 4)):
                damaged[draw.randrange(352)] = draw.choice(
                    [0, 1, 127, 128, 255, draw.randrange(256)]
                )
            try:
                loaded = load(bytes(damaged), tmp_path)
            except DataError as error:
                assert "\n" not in str(error)  # noqa: PT017 - both ways out are checked
            else:
                accepted += 1
                assert np.isfinite(loaded.array).all()
                assert np.isfinite(loaded.affine).all()
    assert 0 < accepted < 600


def quaternion_header(**fields):
    return {
        "sform_code": 0, "qform_code": 1, "quatern": [0.0, 0.0, 0.6], "qoffset": [5.0, 6.0, 7.0],
        "pixdim": [-1.0, 2.0, 3.0, 4.0, 1.0, 0, 0, 0], **fields,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["sform", "qform", "both", "neither", "four"])
def test_what_is_written_lies_exactly_where_the_input_lay(name, tmp_path, write_nifti):
    array = np.zeros((3, 4, 5, 2), "i2") if name == "four" else RAMP.astype("i2")
    fields = {
        "sform": {"srow_x": [1.9, 0.1, 0.2, 3.3]},
        "qform": quaternion_header(),
        "both": quaternion_header(sform_code=2),
        "neither": {"sform_code": 0},
        "four": {"sform_code": 0},
    }[name]
    path = write_nifti("in.nii.gz", array, **fields)
    header = load_volume(path).header
    save(tmp_path / "seg.nii.gz", RAMP.astype(np.uint8), header)
    probabilities = np.random.default_rng(0).random((2, 3, 4, 5), dtype=np.float32)
    save(tmp_path / "prob.nii.gz", probabilities, header)
    before = read_nifti(path)
    for file, expected in (("seg", RAMP), ("prob", np.moveaxis(probabilities, 0, -1))):
        after = read_nifti(tmp_path / f"{file}.nii.gz")
        np.testing.assert_array_equal(after.affine, before.affine)
        np.testing.assert_array_equal(after.get_fdata(), expected)
        assert after.header["qform_code"] == before.header["qform_code"]
        assert after.header["sform_code"] == before.header["sform_code"]
        np.testing.assert_array_equal(after.header.get_qform(), before.header.get_qform())
    assert read_nifti(tmp_path / "seg.nii.gz").get_data_dtype() == np.uint8


def test_a_nifti_2_grid_is_written_as_nifti_2(tmp_path):
    affine = np.diag([1 / 3, 1 / 7, 1.0, 1])
    loaded = load(nib.Nifti2Image(F4, affine).to_bytes(), tmp_path)
    save(tmp_path / "s.nii.gz", U1, loaded.header)
    after = read_nifti(tmp_path / "s.nii.gz")
    assert isinstance(after, nib.Nifti2Image)
    np.testing.assert_array_equal(after.affine, affine)
    np.testing.assert_array_equal(after.get_fdata(), RAMP)


def test_no_text_of_the_input_is_in_the_output(tmp_path, write_nifti):
    texts = dict.fromkeys(["descrip", "aux_file", "data_type", "db_name", "intent_name"], CANARY)
    path = write_nifti("in.nii", U1, extension=CANARY * 2, **texts)
    assert CANARY in path.read_bytes()
    header = load_volume(path).header
    save(tmp_path / "seg.nii.gz", U1, header)
    assert CANARY[:10] not in gzip.decompress((tmp_path / "seg.nii.gz").read_bytes())
    assert CANARY.decode()[:10] not in header.model_dump_json()


def test_equal_results_have_equal_bytes(tmp_path, write_nifti):
    header = load_volume(write_nifti("in.nii", U1)).header
    save(tmp_path / "a.nii.gz", U1, header)
    save(tmp_path / "b.nii.gz", U1, header)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_an_array_of_another_shape_is_not_written(tmp_path, write_nifti):
    header = load_volume(write_nifti("in.nii", U1)).header
    with pytest.raises(DataError, match="does not lie"):
        save(tmp_path / "a.nii.gz", U1[:-1], header)
    assert not (tmp_path / "a.nii.gz").exists()
