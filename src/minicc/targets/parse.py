"""From a target's name, as the user writes it, to its facts."""

from __future__ import annotations

from minicc.targets.cpu import CpuTarget, host_identity, parse_target
from minicc.targets.cuda import CudaTarget, parse_cuda_target

Target = CpuTarget | CudaTarget


def target_of(text: str) -> Target:
    """The target with this name: "cpu...", "cuda", "cuda:<device number>" or "cuda:<model>". Raises TargetError."""
    kind = text.strip().lower().partition(":")[0]
    return parse_cuda_target(text) if kind == "cuda" else parse_target(text)


def identity_of(text: str) -> str:
    """A text that is the same for equal facts of the target with this name, found without LLVM. Raises TargetError."""
    return host_identity() if text.strip().lower() in ("cpu", "cpu:") else repr(target_of(text))
