"""What the machine code of kernels looks like: registers, shared memory, spills and the mix of instructions, by kernel family.

Read from cubins with cuobjdump, so it needs no GPU. A family is what kernel symbols have in common before their hash.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from minicc.codegen.cuda import find_tool
from minicc.errors import TargetError

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_HASH = re.compile(r"_?[0-9a-f]{8,}$")
# Column and the instructions that count in it. An instruction counts in the first column that it fits.
COLUMNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("HGMMA", "HGMMA|IGMMA|QGMMA"), ("HMMA", "HMMA"), ("IMMA", "IMMA"), ("FFMA", "FFMA|HFMA2"),
        ("LDGSTS", "LDGSTS|UTMALDG|UBLKCP"), ("LDG.128", r"LDG\..*128"), ("LDG", "LDG"), ("STG.128", r"STG\..*128"),
        ("STG", "STG"), ("LDSM", "LDSM"), ("LDS", "LDS"),
        ("STS", "STS"), ("SHFL", "SHFL"), ("BAR", "BAR|SYNCS|WARPSYNC"), ("MUFU", "MUFU"),
        ("local", "LDL|STL"),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """One kernel: registers per thread, bytes of stack and static shared memory, and its instructions with their number."""

    registers: int
    stack: int
    shared: int
    instructions: Mapping[str, int]

    def mix(self) -> Counter[str]:
        """Instructions by column; what fits none counts as "other"."""
        counts: Counter[str] = Counter()
        for name, times in self.instructions.items():
            counts[next((column for column, pattern in COLUMNS if pattern.match(name)), "other")] += times
        return counts


def facts_of(cubin: bytes) -> Facts:
    """The facts of a cubin with one kernel. Raises TargetError where cuobjdump is missing or refuses it."""
    tool = find_tool("cuobjdump")
    if tool is None:
        raise TargetError("cuobjdump is not installed", hint="pip install nvidia-cuda-cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=False)
    usage = _USAGE.search(done.stdout)
    if done.returncode or usage is None:
        raise TargetError("cuobjdump cannot read this kernel", why=(done.stderr or done.stdout).strip()[:200])
    names = Counter(found.group(1) for line in done.stdout.splitlines() if (found := _INSTRUCTION.match(line)))
    del names["NOP"]
    return Facts(int(usage[1]), int(usage[2]), int(usage[3]), dict(names))


def cubins_of(artifacts: Iterable[Path]) -> dict[str, bytes]:
    """Every distinct kernel of saved modules, by symbol."""
    found: dict[str, bytes] = {}
    for path in artifacts:
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                if name.endswith(".cubin"):
                    found.setdefault(Path(name).stem, file.read(name))
    return found


def family_of(symbol: str) -> str:
    return _HASH.sub("", symbol) or symbol


def facts_table(cubins: Mapping[str, bytes]) -> str:
    """A Markdown table, one line per family: the ranges of its kernels, and the instructions of all of them together."""
    families: dict[str, list[Facts]] = {}
    for symbol, cubin in sorted(cubins.items()):
        families.setdefault(family_of(symbol), []).append(facts_of(cubin))
    columns = [name for name, _ in COLUMNS]
    lines = [_line(["family", "kernels", "registers", "stack", "shared", *columns, "other"]), _line(["---"] * (len(columns) + 6))]
    for family, kernels in families.items():
        mix = sum((k.mix() for k in kernels), Counter[str]())
        ranges = [_range([getattr(k, name) for k in kernels]) for name in ("registers", "stack", "shared")]
        lines.append(_line([family, str(len(kernels)), *ranges, *(str(mix[c] or "") for c in (*columns, "other"))]))
    return "\n".join(lines)


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
