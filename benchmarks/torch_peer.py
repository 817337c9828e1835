"""PyTorch as a peer of the generated models: the networks that they were exported from, run eagerly.

Needs the exporter's environment (benchmarks/README.md). Trained models exist as ONNX files only and have no row.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.export import NAMES, flatten
from minicc.errors import InputError


def torch_peer(name: str, feeds: Mapping[str, np.ndarray], threads: int, layers: int | None = 2) -> Callable[[], Sequence[Any]]:
    """A call of the network in eager PyTorch, its outputs as arrays. Raises InputError where it cannot be had."""
    if name not in NAMES:
        raise InputError(f"{name} is no generated model")
    if any(find_spec(package) is None for package in ("torch", "transformers")):
        raise InputError("torch and transformers are not installed")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    warnings.filterwarnings("ignore")
    import torch

    from benchmarks.networks import builders

    torch.set_num_threads(threads)
    network = builders(layers)[name]()
    network.module.eval()
    names = iter(network.inputs)

    def given(argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return type(argument)(given(each) for each in argument)
        return torch.from_numpy(np.ascontiguousarray(feeds[next(names)]))

    def call() -> Sequence[Any]:
        nonlocal names
        names = iter(network.inputs)
        with torch.inference_mode():
            return [tensor.numpy() for tensor in flatten(network.module(*(given(a) for a in network.arguments)))]

    return call
