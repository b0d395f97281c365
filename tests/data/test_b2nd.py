"""Only arrays of plain numbers are opened; what could run code or fill the memory is refused before Blosc2 sees it."""

import io
import struct
import zipfile

import blosc2
import msgpack
import numpy as np
import pytest

from pgps_jax.data import b2nd
from pgps_jax.data.b2nd import open_array
from pgps_jax.errors import InputError

ARRAY = np.random.default_rng(0).normal(size=(2, 9, 10, 11)).astype(np.float32)


def write(path, array=ARRAY, **settings):
    return blosc2.asarray(array, urlpath=str(path), mode="w", **settings)


@pytest.mark.parametrize("codec", [blosc2.Codec.BLOSCLZ, blosc2.Codec.LZ4, blosc2.Codec.LZ4HC, blosc2.Codec.ZLIB, blosc2.Codec.ZSTD])
@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.int8])
def test_an_array_is_read_in_parts(tmp_path, codec, dtype):
    array = (10 * ARRAY).astype(dtype)
    write(tmp_path / "a.b2nd", array, cparams={"codec": codec}, chunks=(1, 4, 10, 11), blocks=(1, 2, 5, 11))
    opened = open_array(tmp_path / "a.b2nd")
    assert opened.shape == array.shape and opened.dtype == array.dtype and opened.nbytes == array.nbytes and len(opened) == 2
    np.testing.assert_array_equal(opened[:], array)
    np.testing.assert_array_equal(opened[1, 2:5, :, 3:4], array[1, 2:5, :, 3:4])


def touch(inputs, output, offset):
    raise SystemExit("a function from a file was run")


def expression(folder):
    (write(folder / "operand.b2nd") + 1).save(urlpath=str(folder / "x.b2nd"))


def function(folder):
    blosc2.lazyudf(touch, (write(folder / "operand.b2nd"),), np.float32).save(urlpath=str(folder / "x.b2nd"))


def stand_in(folder):
    blosc2.Proxy(write(folder / "operand.b2nd"), urlpath=str(folder / "x.b2nd"), mode="w")


def marked(layer):
    return lambda folder: write(folder / "x.b2nd", meta={layer: {"kind": "lazyudf", "version": 1}})


def archive(folder):
    """A frame with a zip archive behind it whose member Blosc2 would open; the frame's head knows its length."""
    write(folder / "x.b2nd")
    frame, zipped = bytearray((folder / "x.b2nd").read_bytes()), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("embed.b2e", bytes(frame))
    frame[16:24] = struct.pack(">q", len(frame) + len(zipped.getvalue()))
    (folder / "x.b2nd").write_bytes(bytes(frame) + zipped.getvalue())


@pytest.mark.parametrize("make", [expression, function, stand_in, marked("b2o"), marked("LazyArray"), marked("proxy-source"), archive])
def test_what_is_more_than_numbers_is_refused_before_blosc2_sees_it(tmp_path, monkeypatch, make):
    make(tmp_path)
    monkeypatch.setattr(b2nd.blosc2, "open", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(InputError, match=r"x\.b2nd.*could run code"):
        open_array(tmp_path / "x.b2nd")


def test_text_and_bytes_are_no_arrays(tmp_path):
    blosc2.SChunk(data=b"123", urlpath=str(tmp_path / "x.b2nd"), mode="w")
    write(tmp_path / "y.b2nd", np.array([["a"]]))
    for name in ("x", "y", "missing"):
        with pytest.raises(InputError, match=rf"{name}\.b2nd"):
            open_array(tmp_path / f"{name}.b2nd")


def test_an_array_of_zeros_that_claims_terabytes_is_refused(tmp_path):
    blosc2.zeros((1, 10**4, 10**4, 10**4), dtype=np.float32, chunks=(1, 100, 1000, 1000), urlpath=str(tmp_path / "x.b2nd"), mode="w")
    assert (tmp_path / "x.b2nd").stat().st_size < 2000
    with pytest.raises(InputError, match="beyond any case"):
        open_array(tmp_path / "x.b2nd")


@pytest.mark.parametrize(("old", "new"), [
    (("shape", 1), 10**12), (("shape", 1), 0), (("chunks", 1), 2**31 - 1), (("chunks", 1), 1), (("chunks", 1), -1), (("shape", 1), 90),
])
def test_a_head_that_contradicts_itself_is_refused(tmp_path, old, new):
    write(tmp_path / "x.b2nd", chunks=(1, 4, 10, 11))
    frame = (tmp_path / "x.b2nd").read_bytes()
    (part, axis), value = old, (ARRAY.shape, (1, 4, 10, 11))[old[0] == "chunks"][old[1]]
    first = frame.index(b"\x94\xd3" if part == "shape" else b"\x94\xd2")
    code = ">q" if part == "shape" else ">i"
    at = first + 1 + axis * (1 + struct.calcsize(code)) + 1
    assert struct.unpack_from(code, frame, at)[0] == value
    changed = bytearray(frame)
    struct.pack_into(code, changed, at, new)
    (tmp_path / "x.b2nd").write_bytes(bytes(changed))
    with pytest.raises(InputError, match=r"x\.b2nd"):
        open_array(tmp_path / "x.b2nd")


def test_plugins_are_not_asked_for(tmp_path):
    write(tmp_path / "x.b2nd")
    frame = bytearray((tmp_path / "x.b2nd").read_bytes())
    at = frame.index(msgpack.packb(msgpack.ExtType(6, bytes(16)))[:2]) + 2
    for place in (0, 5, 6):
        changed = frame.copy()
        changed[at + place] = 160
        (tmp_path / "x.b2nd").write_bytes(bytes(changed))
        with pytest.raises(InputError, match="plugin"):
            open_array(tmp_path / "x.b2nd")


def test_a_file_cut_short_is_found_on_opening(tmp_path):
    write(tmp_path / "x.b2nd")
    frame = (tmp_path / "x.b2nd").read_bytes()
    for length in (0, 5, 100, len(frame) // 2, len(frame) - 1):
        (tmp_path / "x.b2nd").write_bytes(frame[:length])
        with pytest.raises(InputError, match="damaged"):
            open_array(tmp_path / "x.b2nd")
