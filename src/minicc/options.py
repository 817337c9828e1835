"""The only configuration, and the only reader of environment variables.

Every option is a keyword of `minicc.compile` and a variable `MINICC_<NAME>`. Nothing here acts on the options.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from minicc.errors import InputError


def default_cache_dir() -> Path:
    """The user's private cache folder, without creating it."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "minicc"


@dataclass(frozen=True)
class Options:
    """How to compile and run.

    threads:     worker threads; None takes the affinity mask and the cgroup quota.
    precision:   arithmetic of float32 models. "fp32" is exact. "tf32" lets products round their operands to 10 bits where the
                 target has units for it, and is "fp32" elsewhere. "bf16" and "fp16" keep values in 16 bits between kernels
                 wherever that is safe (`passes/precision.py`), sums in float32; every target runs them, CPUs not faster.
    strict:      an error instead of a warning when a node has no compiled kernel.
    dims:        sizes of symbolic input dimensions by name, fixed when the model is compiled: {"batch": 1}. Known sizes let
                 kernels be chosen and arrays be placed beforehand; other sizes are then refused. Text: batch=1,sequence=128.
    winograd:    allow Winograd convolution where it measures faster (on GPUs: where it is estimated to be, by far); it errs by
                 about 3e-6 of a layer's largest output, a direct sum by 1e-6; with tf32 by 2e-3, with 16 bits see docs/cuda.md.
    fft:         allow convolution by Fourier transforms, of large kernels at stride 1, where it measures faster; it errs by
                 less than 1e-6 of the largest output, and values that are not finite spread over a tile of up to 64 x 64.
    rounding:    allow products with weights of 2 or 4 bits to round their left operand to 8 bits, block by block, where the
                 model says that this is accurate enough (accuracy_level 4 of MatMulNBits) and the processor has AVX2.
    tune:        compile and time what else lowering may choose for this model on this machine, and keep what is faster
                 (minicc.tune); symbolic sizes count as those of `dims`, else as small ones. For another machine nothing can be
                 timed: the usual module, and a warning.
    tune_seconds: after so many seconds no further choice is tried.
    overlap:     for GPUs of capability 9.0 and later: launch a kernel while the one before it ends, as far as its first access to
                 memory (programmatic dependent launch). Not yet run on a GPU; elsewhere it changes nothing.
    opt_level:   0 correctness only (no fusion), 1 fusion without layout, 2 everything.
    cache_dir:   folder of compiled kernels and kept modules; the empty string keeps nothing.
    keep_bytes:  most bytes of modules kept in that folder: a model file that was compiled before, with the same options and
                 for the same target, is loaded instead. The least recently used go first; 0 keeps none.
    max_bytes:   largest single tensor, and largest arena, in bytes.
    max_loop_iterations: bound on the trip count of one ONNX Loop.
    debug:       MINICC_DEBUG level, 0 to 6 (see docs/debugging.md).
    dump:        folder for the numbered dump; empty for none.
    check:       0 nothing, 1 verify the graph after each pass, 2 also compare numbers after each pass.
    skip:        names of passes to leave out.
    stop_after:  name of the pass after which compilation stops and prints; empty for none.
    """

    threads: int | None = None
    precision: str = "fp32"
    strict: bool = False
    dims: Mapping[str, int] = field(default_factory=dict, hash=False)
    winograd: bool = True
    fft: bool = True
    rounding: bool = True
    tune: bool = False
    tune_seconds: int = 120
    overlap: bool = False
    opt_level: int = 2
    cache_dir: str | None = None
    keep_bytes: int = 4 << 30
    max_bytes: int = 16 << 30
    max_loop_iterations: int = 1_000_000
    debug: int = 0
    dump: str = ""
    check: int = 1
    skip: tuple[str, ...] = ()
    stop_after: str = ""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads must be at least 1, got {self.threads}")
        if self.precision not in ("fp32", "tf32", "bf16", "fp16"):
            raise InputError(f"unknown precision {self.precision!r}", hint="one of fp32, tf32, bf16, fp16")
        if isinstance(self.dims, str):
            object.__setattr__(self, "dims", parse_dims(self.dims))
        for name, size in self.dims.items():
            if not isinstance(name, str) or isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise InputError(f"dims: {name!r} has size {size!r}", hint="a number that is not negative for each name")
        if self.tune_seconds < 0:
            raise InputError(f"tune_seconds must not be negative, got {self.tune_seconds}")
        if self.keep_bytes < 0:
            raise InputError(f"keep_bytes must not be negative, got {self.keep_bytes}")
        if self.check not in (0, 1, 2):
            raise InputError(f"check must be 0, 1 or 2, got {self.check}")

    @property
    def store_dir(self) -> Path | None:
        """Folder of the kernel store, or None when it is switched off."""
        if self.cache_dir is None:
            return default_cache_dir()
        return Path(self.cache_dir).expanduser() if self.cache_dir else None

    def override(self, **changes: Any) -> Options:
        """A copy with some options changed; unknown names are an InputError."""
        known = {f.name for f in fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise InputError(f"unknown option(s) {', '.join(unknown)}", hint=f"known: {', '.join(sorted(known))}")
        if isinstance(changes.get("skip"), str):
            changes["skip"] = tuple(p for p in changes["skip"].split(",") if p)
        for name in ("cache_dir", "dump"):
            if isinstance(changes.get(name), Path):
                changes[name] = str(changes[name])
        return replace(self, **changes)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Options:
        """Options from `MINICC_*` variables; a value that does not parse is an InputError naming the variable."""
        env = os.environ if env is None else env
        changes: dict[str, Any] = {}
        names = {"cache_dir": "MINICC_CACHE"}
        for option in fields(cls):
            variable = names.get(option.name, f"MINICC_{option.name.upper()}")
            if variable not in env:
                continue
            text = env[variable]
            try:
                changes[option.name] = _parse(str(option.type), text)
            except ValueError:
                raise InputError(f"{variable}={text!r} is not a valid {option.type}") from None
        return cls().override(**changes)


def parse_dims(text: str) -> dict[str, int]:
    """Sizes by name from "batch=1,sequence=128". Raises InputError."""
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, size = (p.strip() for p in part.rpartition("="))
        if not name or not size.isdecimal():
            raise InputError(f"{part!r} is not a size of a dimension", hint="write batch=1,sequence=128")
        if sizes.setdefault(name, int(size)) != int(size):
            raise InputError(f"dimension {name!r} is given two sizes, {sizes[name]} and {size}")
    return sizes


def _parse(type_name: str, text: str) -> Any:
    """One environment variable as the field's type; raises ValueError."""
    if type_name.startswith("int"):
        return int(text)
    if type_name == "bool":
        lowered = text.lower()
        if lowered not in ("0", "1", "true", "false", "yes", "no"):
            raise ValueError(text)
        return lowered in ("1", "true", "yes")
    if type_name.startswith("tuple"):
        return tuple(part for part in text.split(",") if part)
    return text
