"""What `options.debug` (MINICC_DEBUG) shows on the error stream; each level includes those before it."""

from __future__ import annotations

import sys

from minicc.options import Options

SUMMARY = 1  # one line per compilation
RUNS = 2  # one line per kernel call, at each run
RULES = 3  # rules that fired, and refusals
SOURCES = 4  # generated texts
GRAPHS = 5  # the graph after each pass that changed it
ASSEMBLY = 6  # machine code


def show(level: int, options: Options, text: str) -> None:
    """Print a text that belongs to a level, when the options ask for that much."""
    if options.debug >= level:
        print(text, file=sys.stderr)
