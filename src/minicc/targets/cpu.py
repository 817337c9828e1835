"""Facts about CPUs: instruction set, vector shape, cache sizes, and how many threads this process may use.

A `CpuTarget` is plain data, usable without the machine it describes. Nothing here compiles or runs code.
"""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from minicc.errors import TargetError

DEFAULT_L1_BYTES = 32 << 10
DEFAULT_L2_BYTES = 512 << 10

# What Linux calls some features of LLVM's list; the others have the same names but for punctuation.
_LINUX_NAMES = {
    "64bit": "lm", "bmi": "bmi1", "crc32": "sse4_2", "lzcnt": "abm", "pclmul": "pclmulqdq", "prfchw": "3dnowprefetch",
    "rdrnd": "rdrand", "sahf": "lahf_lm", "sha": "sha_ni", "sse3": "pni",
}  # fmt: skip
# Linux does not list these; their instructions are for operating systems and tools, and no kernel of ours has them.
_NEVER_USED = frozenset({"hreset", "ptwrite", "shstk", "uintr", "usermsr"})
# The lines of Linux's description that are the same for equal processors.
_LASTING = (
    "vendor_id", "cpu family", "model", "model name", "stepping", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features",
)  # fmt: skip

_DESCRIPTION = Path("/proc/cpuinfo")
_CPU_FOLDER = Path("/sys/devices/system/cpu")
_CGROUP_FOLDER = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class CpuTarget:
    """One CPU model as the compiler sees it.

    name:             as the user writes it: "cpu" is this machine, "cpu:avx2" and so on are fixed models.
    triple:           LLVM target triple.
    cpu:              LLVM processor name.
    features:         LLVM feature string, such as "+avx2,+fma"; what the processor name implies is included.
    vector_width:     float32 lanes of one vector register.
    vector_registers: number of vector registers.
    l1_bytes, l2_bytes: data caches of one core.
    """

    name: str
    triple: str
    cpu: str
    features: str
    vector_width: int
    vector_registers: int
    l1_bytes: int = DEFAULT_L1_BYTES
    l2_bytes: int = DEFAULT_L2_BYTES

    def fingerprint(self) -> str:
        """A stable key of everything that decides about machine code; equal facts give equal keys."""
        facts = (self.triple, self.cpu, self.features, str(self.vector_width), str(self.vector_registers))
        return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]

    @property
    def preference(self) -> tuple[int, ...]:
        """Of several variants that a machine can run, the one with the largest is the best."""
        return (self.vector_width, self.vector_registers)

    @property
    def multiplies_bytes(self) -> bool:
        """Whether one instruction adds the products of four unsigned by four signed bytes to a 32-bit lane (VNNI)."""
        words = self.features.split(",")
        return "+avx512vnni" in words if self.vector_width == 16 else "+avxvnni" in words

    def missing_features(self) -> tuple[str, ...]:
        """What this machine lacks to run code for the target; empty when it can."""
        machine = platform.machine().lower()
        architecture = self.triple.split("-")[0]
        if _architecture(machine) != _architecture(architecture):
            return (architecture,)
        wanted = [word[1:] for word in self.features.split(",") if word.startswith("+")]
        listed = _listed_features()
        if listed >= {_plain(_LINUX_NAMES.get(feature, feature)) for feature in wanted} - _NEVER_USED:
            return ()
        present = _host_features()
        return tuple(feature for feature in wanted if not present.get(feature, False))


# name -> (triple, LLVM processor, features checked against the machine, vector width, vector registers)
_FIXED = {
    # x86-64-v2: SSE4.1 is needed to round without a library call.
    "sse": ("x86_64-unknown-linux-gnu", "x86-64-v2", "+sse4.1,+sse4.2,+ssse3,+popcnt", 4, 16),
    "avx2": ("x86_64-unknown-linux-gnu", "x86-64-v3", "+avx,+avx2,+fma,+f16c,+bmi,+bmi2", 8, 16),
    "avx512": (
        "x86_64-unknown-linux-gnu",
        "x86-64-v4",
        "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl,-prefer-256-bit",
        16,
        32,
    ),
    "neon": ("aarch64-unknown-linux-gnu", "generic", "+neon,+fp-armv8", 4, 32),
}


def parse_target(text: str) -> CpuTarget:
    """The CPU target with this name: "cpu", "cpu:sse", "cpu:avx2", "cpu:avx512" or "cpu:neon".

    Raises TargetError for any other name.
    """
    kind, _, model = text.strip().lower().partition(":")
    if kind == "cpu" and not model:
        return host_target()
    if kind != "cpu" or model not in _FIXED:
        known = ", ".join(["cpu"] + [f"cpu:{name}" for name in _FIXED])
        raise TargetError(f"unknown CPU target {text!r}", hint=f"one of {known}")
    triple, cpu, features, width, registers = _FIXED[model]
    return CpuTarget(f"cpu:{model}", triple, cpu, features, width, registers)


@lru_cache(maxsize=1)
def host_target() -> CpuTarget:
    """This machine, with every instruction-set extension it has."""
    from llvmlite import binding as llvm

    present = _host_features()
    triple = llvm.get_process_triple()
    words = [("+" if on else "-") + name for name, on in sorted(present.items())]
    if triple.startswith(("aarch64", "arm64")):
        width, registers = 4, 32
    elif all(present.get(name) for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl")):
        width, registers = 16, 32
        words.append("-prefer-256-bit")
    elif present.get("avx2") and present.get("fma"):
        width, registers = 8, 16
    else:
        width, registers = 4, 16
    l1_bytes, l2_bytes = _cache_bytes()
    cpu = llvm.get_host_cpu_name()
    return CpuTarget("cpu", triple, cpu, ",".join(words), width, registers, l1_bytes, l2_bytes)


@lru_cache(maxsize=1)
def _host_features() -> dict[str, bool]:
    from llvmlite import binding as llvm

    return dict(llvm.get_host_cpu_features())


def host_identity() -> str:
    """What tells this machine's `host_target` from other machines', without asking LLVM where Linux describes the processor."""
    description = _description()
    if "flags" not in description and "Features" not in description:
        return repr(host_target())
    return repr((platform.machine(), sorted(description.items()), _cache_bytes()))


@lru_cache(maxsize=1)
def _description() -> dict[str, str]:
    """Linux's lasting facts about the first processor; empty on other systems."""
    try:
        with _DESCRIPTION.open("rb", buffering=0) as file:
            first = file.read(1 << 14).decode(errors="replace").partition("\n\n")[0]  # not those of hundreds of others
    except OSError:
        return {}
    pairs = [line.partition(":") for line in first.splitlines()]
    return {name.strip(): value.strip() for name, _, value in pairs if name.strip() in _LASTING}


@lru_cache(maxsize=1)
def _listed_features() -> frozenset[str]:
    """Features of an x86 processor that Linux lists, which are those that a program may use, in plain letters."""
    return frozenset(map(_plain, _description().get("flags", "").split()))


def _plain(feature: str) -> str:
    return "".join(filter(str.isalnum, feature))


def _architecture(name: str) -> str:
    aliases = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
    return aliases.get(name, name)


def _cache_bytes() -> tuple[int, int]:
    """(L1 data, L2) of CPU 0 as the kernel reports them, or the defaults."""
    sizes = {1: DEFAULT_L1_BYTES, 2: DEFAULT_L2_BYTES}
    for index in range(8):
        folder = _CPU_FOLDER / "cpu0" / "cache" / f"index{index}"
        level, kind, size = (_read(folder / name) for name in ("level", "type", "size"))
        if not level:
            break
        if level in ("1", "2") and kind in ("Data", "Unified") and size[:-1].isdigit():
            sizes[int(level)] = int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
    return sizes[1], sizes[2]


def available_threads() -> int:
    """Threads this process can really run at once: affinity mask and cgroup quota, at least 1."""
    try:
        count = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        count = os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, count if quota is None else min(count, int(quota)))


def _cgroup_quota() -> float | None:
    """CPUs granted by the tightest cgroup (v1 or v2) on the way to the root, or None when unlimited."""
    quotas = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for name in (controllers, "cpu") if controllers else ("",):
            root = _CGROUP_FOLDER / name
            folder = root / path.lstrip("/")
            for place in (folder, *folder.parents):
                quotas.append(_quota_of(place))
                if place == root:
                    break
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of(folder: Path) -> float | None:
    words = _read(folder / "cpu.max").split()  # v2: "<quota or max> <period>"
    if not words:
        # v1: a quota of -1 means none.
        words = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
        return int(words[0]) / int(words[1])
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
