"""The same networks in PyTorch: eager and `torch.compile(mode="max-autotune")`, on the device, in a precision.

Their weights are their own: time does not depend on them. Networks come from `benchmarks.networks`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tools.gpu_check.layers import LAYERS, layer_module

Array = np.ndarray[Any, Any]
DEPTH = 2  # as the generated transformers are exported
# Of floating numbers; in "int8" those that are integers stay so.
DTYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32,
}  # fmt: skip


def set_precision(precision: str) -> None:
    """Whether PyTorch's own products may use TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def network(name: str) -> Any | None:
    """A network of that name, on the CPU in float32; None when there is none."""
    return copy.deepcopy(_built(name))


@lru_cache(maxsize=1)
def _built(name: str) -> Any | None:
    if name in LAYERS:
        return layer_module(LAYERS[name])
    from benchmarks.networks import builders

    make = builders(DEPTH).get(name)
    return None if make is None else make().module.eval()


def tensors(arrays: Sequence[Array], precision: str, device: str) -> list[Any]:
    """Arrays on the device, floats in the precision's type."""
    found = [torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays]
    return [t.to(DTYPES[precision]) if t.is_floating_point() else t for t in found]


def eager(module: Any, arrays: Sequence[Array], precision: str, device: str) -> dict[str, Callable[[], object]]:
    """Calls of the network by memory layout, both when its first input is an image; warmed up."""
    module = module.to(device=device, dtype=DTYPES[precision])
    given = tensors(arrays, precision, device)
    calls: dict[str, Callable[[], object]] = {"eager": _call(module, given)}
    if given[0].ndim == 4:
        last = copy.deepcopy(module).to(memory_format=torch.channels_last)
        calls["eager channels-last"] = _call(last, [given[0].to(memory_format=torch.channels_last), *given[1:]])
    return calls


def compiled(module: Any, arrays: Sequence[Array], precision: str, device: str) -> Callable[[], object]:
    """A call of the network compiled by PyTorch for most speed (CUDA Graphs included); compilation happens here."""
    torch._dynamo.reset()
    module = module.to(device=device, dtype=DTYPES[precision])
    given = tensors(arrays, precision, device)
    if given[0].ndim == 4:
        module = module.to(memory_format=torch.channels_last)
        given[0] = given[0].to(memory_format=torch.channels_last)
    mode = "max-autotune" if device == "cuda" else "default"
    return _call(torch.compile(module, mode=mode), given)


def _call(module: Any, given: Sequence[Any]) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return module(*given)

    for _ in range(3):
        call()
    return call
