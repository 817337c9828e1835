"""From a target's name, as the user writes it, to its facts; several models of one kind are variants of a module."""

from __future__ import annotations

from collections.abc import Sequence

from minicc.targets.cpu import CpuTarget, host_identity, parse_target
from minicc.targets.cuda import CudaTarget, parse_cuda_target

Target = CpuTarget | CudaTarget


def target_of(text: str) -> Target:
    """The target with this name: "cpu...", "cuda", "cuda:<device number>" or "cuda:<model>". Raises TargetError."""
    kind = text.strip().lower().partition(":")[0]
    return parse_cuda_target(text) if kind == "cuda" else parse_target(text)


def targets_of(text: str) -> tuple[Target, ...]:
    """The targets with these names, the best first: "cuda:compute_80+sm_90" are two. Raises TargetError."""
    kind, colon, models = text.partition(":")
    found = dict.fromkeys(target_of(kind + colon + model) for model in models.split("+"))
    return tuple(sorted(found, key=lambda target: target.preference, reverse=True))


def fitting(targets: Sequence[Target]) -> int:
    """The number of the first target that this machine can run; 0 where it can run none."""
    return next((n for n, target in enumerate(targets) if not target.missing_features()), 0) if len(targets) > 1 else 0


def identity_of(text: str) -> str:
    """A text that is the same for equal facts of the targets with these names, found without LLVM. Raises TargetError."""
    return host_identity() if text.strip().lower() in ("cpu", "cpu:") else repr(targets_of(text))
