"""What a module of a CUDA target does otherwise than one of a CPU: its runner, arrays that stay on the GPU, replays.

Imported by runtime/module when a target asks for it, so that modules of CPUs start without the device's runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.errors import TargetError
from minicc.runtime.bind import Machine
from minicc.runtime.cuda.array import on_gpu, to_host
from minicc.runtime.cuda.driver import LEGACY, Gpu
from minicc.runtime.cuda.engine import DeviceRunner, Replay, Shared
from minicc.runtime.cuda.facts import waits
from minicc.targets.cuda import CudaTarget

if TYPE_CHECKING:
    from minicc.runtime.module import CompiledModule


def prepare(module: CompiledModule, target: CudaTarget) -> tuple[Machine, DeviceRunner]:
    """What the module's segments share, and its prepared program on the device."""
    number = target.name.partition(":")[2]
    device = Gpu(int(number) if number.isdigit() else 0)
    code, options = module.code, module.options
    loaded = {symbol: device.load(symbol, code.objects[symbol]) for symbol in dict.fromkeys(code.symbols)}
    kernels = [loaded[symbol] for symbol in code.symbols]
    limits = (options.max_bytes, options.max_loop_iterations)
    machine = Machine(module.program.kernels, np.zeros(len(kernels), np.int64), target, 1, *limits)
    # Old files have kernels that do not wait for each other: one of them would let those behind it begin too early.
    overlap = options.overlap and all(waits(code.objects[symbol]) for symbol in loaded)
    shared = Shared(device, kernels, target, device.number, overlap)
    return machine, DeviceRunner(module.program, machine, shared, module.make_step)


def run_on_device(module: CompiledModule, items: Sequence[Any]) -> list[Any] | None:
    """Outputs that stay on the device, where inputs are; None for inputs that are all on the host.

    A program with host steps takes copies of the inputs.
    """
    runner, signature = module.runner, module.signature
    if not isinstance(runner, DeviceRunner) or not any(map(on_gpu, items)):
        return None
    if not runner.stays:
        return module.run_items([to_host(item) if on_gpu(item) else item for item in items])
    names = [port.name for port in module.inputs]
    whole = [i if on_gpu(i) else signature.array(i, n) for n, i in enumerate(items)]
    return list(runner.run_on_device(whole, names, signature.dtypes, signature.check))


def replay(module: CompiledModule, feeds: Mapping[str, Any], stream: int | None) -> Replay:
    """See `CompiledModule.replay`."""
    signature = module.signature
    items = signature.order((), feeds)
    runner = module.runner
    if not isinstance(runner, DeviceRunner) or not runner.stays:
        on_device = isinstance(runner, DeviceRunner)
        why = "it has steps on the host" if on_device else f"its target is {module.target.name!r}"
        raise TargetError(f"{module.program.name!r} cannot be replayed", why=why, hint="call the module")
    whole = [i if on_gpu(i) else signature.array(i, n) for n, i in enumerate(items)]
    names = [port.name for port in module.inputs]
    return runner.hold(whole, names, signature.dtypes, signature.check, LEGACY if stream is None else stream)
