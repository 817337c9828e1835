"""A compile worker process: one JSON request per line in, one JSON answer per line out.

Request: {"symbol", "source", "target": the fields of CpuTarget}. Answer: {"object": hexadecimal}, or the
fields of a CodegenError. It ends at the end of its input and touches neither the store nor any other file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from minicc.errors import CodegenError


def main() -> None:
    """Serve requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends this process
    # Anything a library prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from minicc.codegen.build import rare_collections

    with rare_collections():
        for line in sys.stdin:
            print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


def _answer(request: dict[str, Any]) -> dict[str, str]:
    from minicc.codegen.build import compile_here
    from minicc.targets.cpu import CpuTarget
    from minicc.targets.cuda import CudaTarget
    from minicc.targets.parse import Target

    facts: dict[str, Any] = request["target"]
    if request["cuda"]:  # JSON has no tuples
        facts["capability"] = tuple(facts["capability"])
    target: Target = CudaTarget(**facts) if request["cuda"] else CpuTarget(**facts)
    try:
        return {"object": compile_here(request["source"], request["symbol"], target).hex()}
    except CodegenError as error:
        return {"what": error.what, "where": error.where, "why": error.why, "hint": error.hint}
