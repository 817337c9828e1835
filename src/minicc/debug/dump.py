"""The dump folder (`options.dump`, MINICC_DUMP): every stage of one compilation as text, in walk order.

    00-import.txt  01-<pass>.txt ...  program.txt  memory.txt  kernels/*.py  report.json

`diff 03-* 04-*` shows what a pass did. The same events feed the levels of `options.debug`. With neither
option this costs nothing. A folder that cannot be written is an InputError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicc.debug import levels
from minicc.debug.inputs import symbol_sizes
from minicc.errors import InputError, MiniccError
from minicc.ir.dims import evaluate
from minicc.ir.graph import Graph
from minicc.ir.text import print_graph
from minicc.lower.program import Program
from minicc.lower.text import print_program
from minicc.options import Options
from minicc.runtime.bind import Segment, itemsize
from minicc.runtime.code import Code
from minicc.runtime.context import Bound
from minicc.runtime.executor import GUARD
from minicc.runtime.module import CompiledModule, segments_of
from minicc.targets.cuda import CudaTarget
from minicc.targets.parse import Target


class Dump:
    """Receives the events of one compilation."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.folder = Path(options.dump).expanduser() if options.dump else None
        self._count = 0
        self._last = ""

    def graph(self, name: str, graph: Graph) -> None:
        """The graph after a pass (or the import)."""
        if self.folder is None and self.options.debug < levels.GRAPHS:
            return
        text = print_graph(graph)
        changed = text != self._last
        self._last = text
        self._write(f"{self._count:02}-{name}.txt", text if changed else "unchanged\n")
        self._count += 1
        levels.show(levels.GRAPHS, self.options, f"-- after {name}{'' if changed else ': unchanged'}")
        if changed:
            levels.show(levels.GRAPHS, self.options, text)

    def program(self, program: Program) -> None:
        """The lowered program."""
        if self.folder is not None:
            self._write("program.txt", print_program(program))

    def kernels(self, code: Code, target: Target) -> None:
        """The generated texts, and their assembly on the highest level."""
        for symbol, text in code.sources.items():
            if self.folder is not None:
                self._write(f"kernels/{symbol}.py", runnable(symbol, text))
            levels.show(levels.SOURCES, self.options, f"-- {symbol}\n{text}")
            if self.options.debug < levels.ASSEMBLY:
                continue
            if isinstance(target, CudaTarget):
                from minicc.codegen.cuda import compile_ptx

                levels.show(levels.ASSEMBLY, self.options, compile_ptx(text, symbol, target))
            else:
                from minicc.codegen.objects import assembly

                levels.show(levels.ASSEMBLY, self.options, assembly(text, symbol, target))

    def report(self, report: Mapping[str, Any], module: CompiledModule) -> None:
        """What compilation did, in numbers."""
        stats = module.stats()
        seconds = ", ".join(f"{stage} {spent:.2f} s" for stage, spent in report["seconds"].items())
        levels.show(
            levels.SUMMARY,
            self.options,
            (
                f"minicc {module.program.name}: {stats['kernels']} kernels ({stats['compiles']} compiled), "
                f"{stats['kernel_calls']} calls, {len(stats['host_nodes'])} host nodes, {seconds}"
            ),
        )
        if self.options.debug >= levels.RULES:
            for row in report["passes"]:
                for what in ("rules", "refusals"):
                    for name, times in row[what].items():
                        levels.show(levels.RULES, self.options, f"{row['name']}: {what} {name} {times}")
        if self.folder is not None:
            self._write("report.json", json.dumps({**report, "stats": stats}, indent=1, default=str))
            self._write("memory.txt", memory_text(module))
            self._write("kernels/calls.json", json.dumps(recorded_calls(module)))

    def _write(self, name: str, text: str) -> None:
        if self.folder is None:
            return
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"the dump folder {self.folder} cannot be written", why=str(error)) from error


def memory_text(module: CompiledModule) -> str:
    """Lifetimes of all temporaries, and the offsets for the sizes bound last."""
    lines = []
    for number, segment in enumerate(() if module.target.missing_features() else segments_of(module.runner)):
        lines.append(f"segment {number} of {segment.program.name}: {len(segment.steps)} calls")
        bound = next(iter(segment.recent.values()[-1:]), None)
        if bound is not None:
            plan = bound.plan
            lines.append(
                f"  sizes {bound.sizes}: {plan.arena_bytes} bytes, {plan.lower_bound} alive at most, "
                f"{plan.naive_bytes} without reuse"
            )
        for i, b in enumerate(segment.temporaries):
            buffer, interval = segment.program.buffers[b], segment.layout.intervals[i]
            offset = f" at {bound.plan.offsets[i]}" if bound is not None else ""
            lines.append(
                f"  {buffer.name:<32} steps {interval.first:>4}-{interval.last:<4} {buffer.shape}{offset}"
            )
    return "\n".join(lines) + "\n"


def recorded_calls(module: CompiledModule) -> dict[str, Any]:
    """One call of every kernel, for sizes nobody chose: words, which are addresses in which buffer, units."""
    calls: dict[str, Any] = {}
    try:
        sizes = symbol_sizes(module.inputs)
        for segment in segments_of(module.runner):
            if set(segment.symbols) <= set(sizes):
                _record_calls(segment, segment.bind(sizes), sizes, module, calls)
    except MiniccError:  # these sizes make no sense to this model: its kernels come without calls
        pass
    return calls


def _record_calls(
    segment: Segment, bound: Bound, sizes: Mapping[str, int], module: CompiledModule, calls: dict[str, Any]
) -> None:
    buffers = segment.program.buffers
    for row, at in zip(bound.rows.tolist(), bound.steps.tolist()):
        if row[4] == GUARD:
            continue
        step = segment.steps[at]
        symbol = module.code.symbols[step.kernel]
        if symbol in calls:
            if row[5] > 0 and calls[symbol]["layers"] is step.origin:  # a further stage of the same call
                calls[symbol]["units"] = row[5] + row[2]
            continue
        words = bound.words[row[1] // 8 :][: len(step.words)].tolist()
        used = list(dict.fromkeys(w.buffer for w in step.words if w.buffer is not None))
        for i, word in enumerate(step.words):
            if word.buffer is not None:
                words[i] = evaluate(word.value, sizes) * itemsize(buffers[word.buffer])
        calls[symbol] = {
            "words": words,
            "units": row[2],
            "layers": step.origin,
            "addresses": [
                [i, used.index(w.buffer)] for i, w in enumerate(step.words) if w.buffer is not None
            ],
            "buffers": [evaluate(buffers[b].elements, sizes) * itemsize(buffers[b]) for b in used],
        }


def runnable(symbol: str, text: str) -> str:
    """A kernel's text that times itself when run as a file."""
    footer = [
        "",
        "",
        'if __name__ == "__main__":',
        "    from minicc.debug.bench_kernel import bench_file",
        "",
        f"    bench_file(__file__, {symbol!r})",
    ]
    return text.rstrip("\n") + "\n" + "\n".join(footer) + "\n"
