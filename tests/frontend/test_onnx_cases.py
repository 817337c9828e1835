"""All of ONNX's backend cases, more than 2,000 models with their outputs, through import and evaluation."""

import warnings
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import pytest
from onnx import numpy_helper

from minicc.frontend.model import load_model
from minicc.ir.evaluate import evaluate

# Name to the reason why it is not compared.
LEFT_OUT = {
    **dict.fromkeys(("test_gradient_of_add", "test_gradient_of_add_and_mul"), "Gradient is training"),
    **dict.fromkeys(
        (
            "test_bernoulli",
            "test_bernoulli_expanded",
            "test_bernoulli_double",
            "test_bernoulli_double_expanded",
            "test_bernoulli_seed",
            "test_bernoulli_seed_expanded",
            "test_training_dropout_default",
            "test_training_dropout_default_mask",
            "test_training_dropout",
            "test_training_dropout_mask",
        ),
        "random numbers of another generator",
    ),
}


HALF = {"bfloat16": 2.0**-8, "float16": 2.0**-10}  # distance of neighbours, relative


def _items(proto):
    if isinstance(proto, onnx.SequenceProto):
        return numpy_helper.to_list(proto)
    if isinstance(proto, onnx.OptionalProto):
        return numpy_helper.to_optional(proto)
    return numpy_helper.to_array(proto) if isinstance(proto, onnx.TensorProto) else proto


_PARSE = {
    "tensor_type": onnx.TensorProto,
    "sequence_type": onnx.SequenceProto,
    "optional_type": onnx.OptionalProto,
}


def _stored(folder, kind, infos):
    files = ((folder / f"{kind}_{i}.pb", info) for i, info in enumerate(infos))
    return [
        _items(_PARSE[info.type.WhichOneof("value")].FromString(f.read_bytes()))
        for f, info in files
        if f.exists()
    ]


@cache
def all_cases():
    import onnx.backend.test.case.node as node_cases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {
            c.name: (c.model, list(c.data_sets), c.rtol, c.atol) for c in node_cases.collect_testcases(None)
        }
    for path in sorted((Path(onnx.backend.test.__file__).parent / "data").glob("*/*/model.onnx")):
        model = onnx.load(path)
        sets = [
            (_stored(folder, "input", model.graph.input), _stored(folder, "output", model.graph.output))
            for folder in sorted(path.parent.glob("test_data_set_*"))
        ]
        found[path.parent.name] = (model, sets, 1e-3, 1e-5)
    return found


def compare(ours, theirs, rtol, atol):
    if isinstance(ours, list):
        theirs = theirs if isinstance(theirs, list) else [theirs]  # one element is stored without its list
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            compare(a, b, rtol, atol)
        return
    if theirs is None:
        assert ours is None
        return
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    if theirs.dtype.kind in "OUST":
        assert ours.astype(str).tolist() == theirs.astype(str).tolist()
        return
    assert ours.dtype == theirs.dtype
    if theirs.dtype.kind in "iub":
        np.testing.assert_array_equal(ours, theirs)
    elif theirs.dtype.kind == "c":
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)
    elif theirs.dtype.name in HALF:  # ONNX rounds after each step: two units in the last place
        unit = HALF[theirs.dtype.name]
        np.testing.assert_allclose(
            ours.astype(np.float64), theirs.astype(np.float64), rtol=2 * unit, atol=2 * unit
        )
    else:  # numpy cannot compare the small floats itself
        np.testing.assert_allclose(ours.astype(np.float64), theirs.astype(np.float64), rtol=rtol, atol=atol)


def check(name):
    model, data_sets, rtol, atol = all_cases()[name]
    imported = load_model(model)
    names = {a.name for a in imported.inputs}
    for inputs, outputs in data_sets:
        feeds = {i.name: _items(item) for i, item in zip(model.graph.input, inputs) if i.name in names}
        for ours, theirs in zip(evaluate(imported.graph, feeds), outputs, strict=True):
            compare(ours, _items(theirs), rtol, max(atol, 1e-5))


LETTERS = "abcdefghilmnopqrstuwxz"


@pytest.mark.parametrize("letter", LETTERS)
def test_onnx_cases(letter):
    """One test per first letter: a test per case would take longer to collect than to run."""
    problems = {}
    for name in all_cases():
        if name.removeprefix("test_")[0].lower() != letter or name in LEFT_OUT:
            continue
        try:
            check(name)
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {error}"[:300]
    assert not problems


def test_number_of_cases():
    assert {name.removeprefix("test_")[0].lower() for name in all_cases()} == set(LETTERS)
    assert len(all_cases()) > 2000
    assert set(LEFT_OUT) <= set(all_cases())
