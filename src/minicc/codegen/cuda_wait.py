"""Where a kernel waits for the one before it, so that it may be launched while that one still runs.

Programmatic dependent launch (capability 9.0 and later): every thread of every kernel executes `griddepcontrol.wait` once, before
it touches memory that another kernel may have written, and then allows the next kernel to be launched. Both do nothing where
the launch does not ask for it (runtime/cuda/driver). What a kernel computes before its first access comes before its wait.
Works on the text that numba-cuda has written; docs/decisions.md says why this is right.
"""

from __future__ import annotations

import re

from minicc.targets.cuda import CudaTarget

FIRST = (9, 0)  # the first capability that has it
_WAIT = "\tgriddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;"
_ENTRY = re.compile(r"\s*\.visible \.entry\b")
_LABEL = re.compile(r"([$\w]+):\s*(//.*)?")
_BRANCH = re.compile(r"\s*(?:@!?%\w+\s+)?bra(?:\.uni)?\s+([$\w]+);\s*")
# Lines that compute in registers, read the kernel's parameters, declare, or say nothing.
_ALONE = re.compile(
    r"\s*(//.*|\.(reg|shared|local|loc|pragma)\b.*|(@!?%\w+\s+)?"
    r"(ld\.param|mov|cvta?|add|sub|mul|mad|div|rem|min|max|neg|abs|and|or|xor|not|shl|shr|shf|bfe|bfi|prmt|lop3|setp|selp)\b[^;{]*;)?\s*"
)


def with_wait(ptx: str, target: CudaTarget) -> str:
    """The text of a kernel, its wait as late as every thread comes by and none has touched memory."""
    if target.capability < FIRST:
        return ptx
    lines = ptx.split("\n")
    entry = next(n for n, line in enumerate(lines) if _ENTRY.match(line))
    first = lines.index("{", entry) + 1
    labels = {found[1]: n for n, line in enumerate(lines) if (found := _LABEL.fullmatch(line))}
    # Between a branch and its target some threads may come by never or several times.
    between = [sorted((n, labels[found[1]])) for n, line in enumerate(lines) if (found := _BRANCH.fullmatch(line))]
    at = last = first
    while _ALONE.fullmatch(lines[at]) or _LABEL.fullmatch(lines[at]) or _BRANCH.fullmatch(lines[at]):
        at += 1
        if not any(start < at <= end for start, end in between):
            last = at
    return "\n".join([*lines[:last], _WAIT, *lines[last:]])
