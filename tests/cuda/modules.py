"""Whole modules for CUDA on a pretended device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime
from onnx import ModelProto, ValueInfoProto, helper

import minicc
from minicc.ir.graph import Graph
from minicc.lower.lower import lower
from minicc.options import Options
from minicc.runtime.code import build_code
from minicc.runtime.cuda import calls
from minicc.runtime.module import CompiledModule
from minicc.runtime.store import Store
from minicc.targets.cuda import CudaTarget
from tests.cuda.fake_device import FakeDevice
from tests.cuda.loop_kernels import TARGET

Array = np.ndarray[Any, Any]


def node_model(op: str, feeds: Mapping[str, Array | None], outputs: list[str], constants: tuple[str, ...] = (),
               opset: int = 18, **attributes: Any) -> ModelProto:  # fmt: skip
    """A model of one node; inputs without an array are left out, those of `constants` are initializers."""
    given = {name: array for name, array in feeds.items() if array is not None}
    node = helper.make_node(op, [name if name in given else "" for name in feeds], outputs, **attributes)
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in given.items() if n not in constants
    ]  # fmt: skip
    weights = [
        helper.make_tensor(n, helper.np_dtype_to_tensor_dtype(given[n].dtype), given[n].shape, given[n].tobytes(), raw=True)
        for n in constants if n in given
    ]  # fmt: skip
    results = [ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph([node], "g", inputs, results, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def reference(proto: ModelProto, feeds: Mapping[str, Array | None]) -> list[Array]:
    """What ONNX Runtime answers."""
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    answers: list[Array] = session.run(None, {n: a for n, a in feeds.items() if n in names and a is not None})
    return answers


@contextmanager
def pretended(module: CompiledModule) -> Iterator[None]:
    """Where a module compiled for CUDA runs in the PTX interpreter."""
    with (
        patch.object(calls, "Gpu", lambda _number: FakeDevice(module.code.sources, 1 << 24)),
        patch.object(CudaTarget, "missing_features", lambda _self: ()),
    ):
        yield


def run_module(module: CompiledModule, feeds: Mapping[str, Array | None]) -> list[Array]:
    """The results of a module compiled for CUDA."""
    with pretended(module):
        found = module(**{spec.name: feeds[spec.name] for spec in module.inputs})
    return list(found) if isinstance(found, tuple) else [found]


def run_model(proto: ModelProto, feeds: Mapping[str, Array | None]) -> list[Array]:
    """The results of a model of which no node stays on the host."""
    return run_module(minicc.compile(proto, target=TARGET.name, strict=True), feeds)


def compile_graph(graph: Graph) -> CompiledModule:
    """The module of a graph as it is."""
    chosen = Options.from_env()
    program = lower(graph, TARGET, chosen)
    return CompiledModule(program, build_code(program.kernels, TARGET, Store(chosen.store_dir)), TARGET, chosen)
