"""External data: mapped when it lies plainly in the model's folder, refused in every other case."""

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from minicc.errors import InvalidModelError
from minicc.frontend.model import load_model
from minicc.ir.evaluate import evaluate

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


def model(location="weights.bin", **entries):
    tensor = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[2, 3], data_location=TensorProto.EXTERNAL
    )
    for key, item in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(item))
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "g", info[:1], info[1:], initializer=[tensor]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "weights.bin").write_bytes(b"\1" * 16 + WEIGHT.tobytes())
    (tmp_path / "secret.bin").write_bytes(WEIGHT.tobytes())
    return inside


def load(folder, proto):
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return load_model(path)


def test_weights_are_mapped_read_only(folder):
    graph = load(folder, model(offset=16, length=24)).graph
    (weight,) = graph.constants()
    assert not weight.data.flags.owndata
    assert not weight.data.flags.writeable
    (y,) = evaluate(graph, {"x": np.ones((2, 3), np.float32)})
    np.testing.assert_array_equal(y, WEIGHT + 1)


def test_subfolder_and_unaligned_offset(folder):
    (folder / "a").mkdir()
    (folder / "a" / "w").write_bytes(b"\0" * 3 + WEIGHT.tobytes())
    (weight,) = load(folder, model("a/w", offset=3)).graph.constants()
    np.testing.assert_array_equal(weight.data, WEIGHT)


def test_bytes_need_a_folder(folder):
    proto = model(offset=16)
    with pytest.raises(InvalidModelError, match="without a folder"):
        load_model(proto)
    with pytest.raises(InvalidModelError, match="without a folder"):
        load_model(proto.SerializeToString())
    (weight,) = load_model(proto, base_dir=folder).graph.constants()
    np.testing.assert_array_equal(weight.data, WEIGHT)


REFUSED = {
    "absolute": lambda folder: model(str(folder / "weights.bin")),
    "etc": lambda folder: model("/etc/passwd"),
    "parent": lambda folder: model("../secret.bin"),
    "parent inside": lambda folder: model("a/../weights.bin"),
    "windows parent": lambda folder: model("..\\secret.bin"),
    "windows drive": lambda folder: model("C:\\secret.bin"),
    "nul": lambda folder: model("weights.bin\0"),
    "empty": lambda folder: model(""),
    "folder itself": lambda folder: model("."),
    "missing": lambda folder: model("nothing.bin"),
    "negative offset": lambda folder: model(offset=-4, length=24),
    "offset outside": lambda folder: model(offset=1 << 40, length=24),
    "huge length": lambda folder: model(length=1 << 62),
    "short length": lambda folder: model(length=20),
    "end outside": lambda folder: model(offset=20, length=24),
    "offset no number": lambda folder: model(offset="0x10", length=24),
    "offset too long": lambda folder: model(offset="9" * 5000, length=24),
    "superscript": lambda folder: model(offset="²", length=24),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(folder, name):
    with pytest.raises(InvalidModelError, match="'w'"):
        load(folder, REFUSED[name](folder))


def test_symbolic_link_is_refused(folder):
    (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
    with pytest.raises(InvalidModelError, match="symbolic link"):
        load(folder, model("link.bin"))


def test_symbolic_link_of_a_folder_is_refused(folder):
    (folder / "sub").symlink_to(folder.parent)
    with pytest.raises(InvalidModelError, match="symbolic link"):
        load(folder, model("sub/secret.bin"))


def test_hard_link_is_refused(folder):
    os.link(folder.parent / "secret.bin", folder / "hard.bin")
    with pytest.raises(InvalidModelError, match="hard link"):
        load(folder, model("hard.bin"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipe_is_refused_without_waiting(folder):
    os.mkfifo(folder / "pipe.bin")
    with pytest.raises(InvalidModelError, match="plain file"):
        load(folder, model("pipe.bin"))


def test_empty_file(folder):
    (folder / "weights.bin").write_bytes(b"")
    with pytest.raises(InvalidModelError, match="ends outside"):
        load(folder, model())


def test_model_saved_by_onnx(folder):
    proto = model(offset=16, length=24)
    del proto.graph.initializer[:]
    proto.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "w"))
    onnx.save(
        proto, folder / "saved.onnx", save_as_external_data=True, location="saved.data", size_threshold=0
    )
    (y,) = evaluate(load_model(folder / "saved.onnx").graph, {"x": np.ones((2, 3), np.float32)})
    np.testing.assert_array_equal(y, WEIGHT + 1)
