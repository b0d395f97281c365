"""The restricted reader gives back what nnU-Net writes, and refuses what could run code or exhaust memory."""

import io
import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from pgps_jax.errors import InputError
from pgps_jax.interop import pickles
from pgps_jax.interop.pickles import read_checkpoint, read_properties

PROPERTIES = {
    "spacing": [3.0, np.float64(0.7), np.float32(0.5)],
    "shape_before_cropping": (10, np.int64(11), 12),
    "bbox_used_for_cropping": [[0, 10], [1, 9], [2, 8]],
    "nibabel_stuff": {"original_affine": np.asfortranarray(np.arange(16, dtype=np.float64).reshape(4, 4))},
    "class_locations": OrderedDict({1: np.arange(40).reshape(10, 4), (1, 2): [], 3: np.zeros((0, 4), np.int64)}),
    "flags": [True, None, "text", b"bytes", np.bool_(True), np.arange(3, dtype=">i2")],
}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_properties_come_back_as_they_were_written(tmp_path, protocol):
    path = tmp_path / "case.pkl"
    path.write_bytes(pickle.dumps(PROPERTIES, protocol))
    read = read_properties(path)
    assert read.keys() == PROPERTIES.keys()
    assert read["spacing"] == PROPERTIES["spacing"] and type(read["spacing"][2]) is np.float32
    np.testing.assert_array_equal(
        read["nibabel_stuff"]["original_affine"], PROPERTIES["nibabel_stuff"]["original_affine"]
    )
    locations = read["class_locations"]
    np.testing.assert_array_equal(locations[1], PROPERTIES["class_locations"][1])
    assert locations[(1, 2)] == [] and locations[3].shape == (0, 4)
    assert read["flags"][:5] == PROPERTIES["flags"][:5]
    np.testing.assert_array_equal(read["flags"][5], [0, 1, 2])


class Calls:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class Thing:
    pass


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "attack",
    [
        lambda mark: Calls(os.system, f"touch {mark}"),
        lambda mark: Calls(subprocess.call, ["touch", str(mark)]),
        lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: Calls(getattr, "", "join"),
        lambda mark: Calls(np.fromfile, str(mark)),
        lambda mark: Thing(),
        lambda mark: np.array([{}], dtype=object),
    ],
)
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, attack, protocol):
    mark, path = tmp_path / "ran", tmp_path / "case.pkl"
    path.write_bytes(pickle.dumps({"spacing": attack(mark)}, protocol))
    with pytest.raises(InputError, match=r"case\.pkl was refused"):
        read_properties(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04.",
        pickle.dumps(PROPERTIES)[:-40],
        b"not a pickle at all",
        b"\x80\x02}r\xff\xff\xff\x7f.",  # one dictionary, memorised under number 2147483647
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00.",  # bytes said to be 2**48 long
        b"(" * 2000 + b"\x80\x04" + b"]" * 500000,
        b"\x80\x02ccollections\nOrderedDict\n}X\x08\x00\x00\x00__call__K\x01sb.",  # gives a function a state
        pickle.dumps([1, 2, 3]),
    ],
)
def test_a_damaged_pickle_is_refused_with_a_sentence(tmp_path, data):
    path = tmp_path / "case.pkl"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"case\.pkl"):
        read_properties(path)


def test_shared_references_stay_shared(tmp_path):
    value = [1]
    for _ in range(20):
        value = [value, value]
    path = tmp_path / "case.pkl"
    path.write_bytes(pickle.dumps({"v": value}))
    read = read_properties(path)["v"]
    assert read[0] is read[1]


def nested(depth, value=(1,)):
    for _ in range(depth):
        value = (value, value)
    return value


def nested_list(depth, value=1):
    for _ in range(depth):
        value = [value, value]
    return value


def endless():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pickle.dumps({"v": nested_list(60)}), "shares"),  # 2**60 values for whoever looks at each of them
        (pickle.dumps({"v": nested(60)}), "tuple of too many"),
        (pickle.dumps({"v": endless()}), "holds itself"),
        # {((..), (..)): 1}: the hash of a tuple is computed again each time, 2**40 of them
        (pickle.dumps(nested(40))[:-1] + b"}" + b"\x94" + b"2K\x01s.", "tuple of too many"),
        (pickle.dumps({nested(6): 1}), "key of too many"),
        (pickle.dumps({"v": 2**64}), "64 bits"),
        (pickle.dumps({"v": {1, 2}}), "sets"),
        (b"\x80\x02}X\x01\x00\x00\x00vcnumpy\ndtype\n" + pickle.dumps(nested_list(40), 2)[2:-1] + b"\x85Rs.", "are not numbers"),
        (b"\x80\x04\x8c\x03\xed\xa0\x80.", "surrogates|utf-8"),
        (b"\x80\x02" + b"]0" * 6_000_000 + b"}.", "operations"),
    ],
    ids=["list", "tuple", "itself", "hash", "key", "number", "set", "repr", "text", "long"],
)
def test_a_pickle_that_would_never_end_is_refused(tmp_path, monkeypatch, data, words):
    monkeypatch.setattr(pickles, "MOST_OPERATIONS", 10**5)
    path = tmp_path / "case.pkl"
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"case\.pkl was refused.*({words})"):
        read_properties(path)


def test_missing_files_are_said_to_be_missing(tmp_path):
    with pytest.raises(InputError, match=r"case\.pkl"):
        read_properties(tmp_path / "case.pkl")
    with pytest.raises(InputError, match=r"x\.pth.*missing"):
        read_checkpoint(tmp_path / "x.pth")


# --------------------------------------------------------------------------------------------------------- checkpoints


def write_checkpoint(monkeypatch, path, content, storages, compression=zipfile.ZIP_STORED):
    """A file in torch's zip format, made without torch: names are looked up in modules that exist only meanwhile."""
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
    for module, name in [("torch", "FloatStorage"), ("torch", "LongStorage"), ("torch", "BFloat16Storage"),
                         ("torch._utils", "_rebuild_tensor_v2")]:  # fmt: skip
        kind = type(name, (), {"__module__": module})
        setattr(modules[module], name, kind)

    class Writer(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, tuple) and value and value[0] == "storage":
                return ("storage", getattr(modules["torch"], value[1]), *value[2:])
            return None

        def reducer_override(self, value):
            if isinstance(value, Calls) and value.function == "tensor":
                return modules["torch._utils"]._rebuild_tensor_v2, value.args
            return NotImplemented

    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        buffer = io.BytesIO()
        Writer(buffer, protocol=2).dump(content)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("net/data.pkl", buffer.getvalue())
        archive.writestr("net/byteorder", "little")
        for key, values in storages.items():
            archive.writestr(f"net/data/{key}", values.tobytes())


def tensor(kind, key, numel, offset, size, stride):
    return Calls("tensor", ("storage", kind, key, "cpu", numel), offset, size, stride, False, OrderedDict())


def test_tensors_of_a_checkpoint_come_back_with_shape_stride_and_type(tmp_path, monkeypatch):
    values = np.arange(24, dtype=np.float32)
    half = np.array([0x3F80, 0x4000], np.uint16)  # 1 and 2 in bfloat16
    content = {
        "network_weights": OrderedDict(
            a=tensor("FloatStorage", "0", 24, 0, (2, 3, 4), (12, 4, 1)),
            b=tensor("FloatStorage", "0", 24, 4, (4, 2), (1, 4)),
            c=tensor("BFloat16Storage", "1", 2, 0, (2,), (1,)),
            d=tensor("LongStorage", "2", 1, 0, (), ()),
        ),
        "current_epoch": 7,
    }
    path = tmp_path / "checkpoint_final.pth"
    write_checkpoint(monkeypatch, path, content, {"0": values, "1": half, "2": np.array([5])})
    read = read_checkpoint(path)
    weights = read["network_weights"]
    np.testing.assert_array_equal(weights["a"], values.reshape(2, 3, 4))
    np.testing.assert_array_equal(weights["b"], values[4:12].reshape(2, 4).T)
    np.testing.assert_array_equal(weights["c"].astype(np.float32), [1, 2])
    assert weights["d"] == 5 and weights["a"].dtype == np.float32 and read["current_epoch"] == 7
    assert np.shares_memory(weights["a"], weights["b"])


@pytest.mark.parametrize(
    "bad",
    [
        tensor("FloatStorage", "0", 4, 0, (5,), (1,)),
        tensor("FloatStorage", "0", 4, 2, (2,), (2,)),
        tensor("FloatStorage", "0", 4, 0, (10**9,), (0,)),
        tensor("FloatStorage", "0", 4, -1, (2,), (1,)),
        tensor("FloatStorage", "0", 400, 0, (400,), (1,)),
        tensor("FloatStorage", "missing", 4, 0, (4,), (1,)),
        tensor("FloatStorage", "../0", 4, 0, (4,), (1,)),
        Calls(os.system, "true"),
    ],
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path, monkeypatch, bad):
    path = tmp_path / "x.pth"
    write_checkpoint(monkeypatch, path, {"network_weights": bad}, {"0": np.zeros(4, np.float32)})
    with pytest.raises(InputError, match=r"x\.pth"):
        read_checkpoint(path)


def test_compressed_and_foreign_files_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    content = {"w": tensor("FloatStorage", "0", 10**6, 0, (10**6,), (1,))}
    write_checkpoint(monkeypatch, path, content, {"0": np.zeros(10**6, np.float32)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="compressed"):
        read_checkpoint(path)
    path.write_bytes(b"\x80\x02old torch format")
    with pytest.raises(InputError, match="zip format"):
        read_checkpoint(path)


def test_any_flipped_bit_of_a_checkpoint_is_refused_or_changes_nothing(tmp_path, monkeypatch):
    path, rng = tmp_path / "x.pth", np.random.default_rng(0)
    values = rng.normal(size=64).astype(np.float32)
    content = {"network_weights": {"w": tensor("FloatStorage", "0", 64, 0, (64,), (1,))}}
    write_checkpoint(monkeypatch, path, content, {"0": values})
    good, refused = path.read_bytes(), 0
    for position in rng.permutation(len(good) * 8)[:1500].tolist():
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        path.write_bytes(bytes(bad))
        try:
            np.testing.assert_array_equal(read_checkpoint(path)["network_weights"]["w"], values)
        except InputError as error:
            assert "x.pth" in str(error)
            refused += 1
    assert refused > 500


def test_a_checkpoint_that_nnunet_wrote_is_read_without_torch(real_parity):
    folder = real_parity / "inference" / "Dataset004_Hippocampus" / "model" / "fold_0"
    checkpoint = read_checkpoint(folder / "checkpoint_final.pth")
    weights = checkpoint["network_weights"]
    assert weights["encoder.stages.0.0.convs.0.conv.weight"].shape == (8, 1, 3, 3, 3)
    assert all(np.isfinite(w).all() for w in weights.values())
    assert np.shares_memory(
        weights["encoder.stages.0.0.convs.0.conv.weight"], weights["encoder.stages.0.0.convs.0.all_modules.0.weight"]
    )
    assert checkpoint["init_args"]["configuration"] == "3d_fullres"
    assert len(checkpoint["logging"]["train_losses"]) == checkpoint["current_epoch"]
    assert isinstance(checkpoint["logging"]["train_losses"][0], np.float32)
    assert "torch" not in sys.modules
