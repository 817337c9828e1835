"""The interface `onnx.backend.base.Backend` over minicc, for tools that speak it.

import minicc
rep = minicc.backend.prepare(model); outputs = rep.run([x])
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.backend.base import Backend, BackendRep, namedtupledict

from minicc.api import HostNodesWarning, Module
from minicc.api import compile as compile_model
from minicc.errors import InputError, MiniccError

DEVICE = "CPU"


class MiniccRep(BackendRep):  # type: ignore[misc]  # onnx has no type information
    """A prepared model."""

    def __init__(self, module: Module) -> None:
        self.module = module

    def run(self, inputs: Any, **_: Any) -> tuple[Any, ...]:
        """All outputs; inputs are a list in order, a mapping by name, or one array. Raises InputError."""
        if isinstance(inputs, Mapping):
            outputs = self.module.run(None, inputs)
        else:
            items = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
            outputs = self.module.run_items(self.module.signature.order(items, {}))
        names = [p.name for p in self.module.outputs]
        return namedtupledict("Outputs", names)(*outputs)  # type: ignore[no-any-return]


class MiniccBackend(Backend):  # type: ignore[misc]
    """Compiles and runs ONNX models on the CPU."""

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = DEVICE, **_: Any) -> bool:
        """Whether the model compiles."""
        try:
            cls.prepare(model, device)
        except MiniccError:
            return False
        return True

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = DEVICE, **options: Any) -> MiniccRep:
        """Compile a model; options are those of `minicc.compile`. Raises MiniccError."""
        if not cls.supports_device(device):
            raise InputError(f"unknown device {device!r}", hint="minicc's backend runs on CPU")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HostNodesWarning)  # the interface has no place for it
            return MiniccRep(compile_model(model, **options))

    @classmethod
    def run_model(
        cls, model: onnx.ModelProto, inputs: Any, device: str = DEVICE, **options: Any
    ) -> tuple[Any, ...]:
        """Compile and run once."""
        return cls.prepare(model, device, **options).run(inputs)

    @classmethod
    def run_node(
        cls,
        node: onnx.NodeProto,
        inputs: Any,
        device: str = DEVICE,
        outputs_info: Sequence[tuple[Any, Sequence[int]]] | None = None,  # noqa: ARG003  of the interface
        **options: Any,
    ) -> tuple[Any, ...]:
        """Run one node on arrays; `opset_version` is an option."""
        opset = options.pop("opset_version", min(int(onnx.defs.onnx_opset_version()), 28))
        arrays = [np.asarray(x) for x in inputs]
        names = [name for name in node.input if name]
        infos = [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in zip(names, arrays)
        ]
        outs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output]
        graph = onnx.helper.make_graph([node], "node", infos, outs)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(node.domain, opset)])
        return cls.run_model(model, arrays, device, **options)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether it is "CPU" or "CPU:0"."""
        return device.upper() in ("CPU", "CPU:0")


is_compatible = MiniccBackend.is_compatible
prepare = MiniccBackend.prepare
run = MiniccBackend.run_model
run_model = MiniccBackend.run_model
run_node = MiniccBackend.run_node
supports_device = MiniccBackend.supports_device
