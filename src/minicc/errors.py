"""Every error a user of minicc can meet.

Each error says what went wrong, where (ONNX node, operator, opset, types), why, and what to do about it. One class per
party who must act: the model's author, the caller, the machine's owner, or us. Nothing here formats tracebacks.
"""

from __future__ import annotations


class MiniccError(Exception):
    """An error with its place, its reason and its remedy.

    what:  one sentence in plain words.
    where: the node, value, file or kernel concerned; empty when there is none.
    why:   the facts that led to it (types, sizes, limits).
    hint:  what the reader can do.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = "") -> None:
        self.what, self.where, self.why, self.hint = what, where, why, hint
        lines = [what]
        if where:
            lines.append(f"  at: {where}")
        if why:
            lines.append(f"  why: {why}")
        if hint:
            lines.append(f"  hint: {hint}")
        super().__init__("\n".join(lines))


class InvalidModelError(MiniccError):
    """The model file breaks the ONNX format or its own types."""


class UnsupportedOpError(MiniccError):
    """The model uses operators minicc does not know; lists all of them at once."""


class ShapeError(MiniccError):
    """Shapes or types of a node's inputs do not fit together."""


class InputError(MiniccError):
    """An array given by the caller does not fit the module's signature."""


class TargetError(MiniccError):
    """The target is unknown, or the machine lacks what it needs."""


class ResourceLimitError(MiniccError):
    """A limit on bytes, loop iterations or nesting depth would be exceeded."""


class ArtifactError(MiniccError):
    """A saved module is damaged, of another version, or not to be trusted."""


class PlacementError(MiniccError):
    """`strict=True` and some node has no compiled kernel."""


class VerifyError(MiniccError):
    """A pass left a graph or a program that breaks an invariant: a bug of minicc."""


class CodegenError(MiniccError):
    """A generated kernel did not compile to a clean object: a bug of minicc."""
