"""The PTX interpreter's instructions on numbers and memory; matrices are in ptx_matrix.

A handler takes (block, parts of the instruction's name, operands, mask of threads).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from tests.cuda import ptx_cluster, ptx_tma
from tests.cuda.ptx_values import WIDTH, Array, PtxError, pack, to_bf16, unpack

if TYPE_CHECKING:
    from tests.cuda.ptx_interpreter import Block

Parts = tuple[str, ...]
Handler = Callable[["Block", Parts, Parts, Array], None]
_SPACES = ("global", "shared", "local", "param", "const")
# Results are rounded to the register's type after a computation in a wider one.
_FUSED = {np.dtype(np.float32): np.float64, np.dtype(np.float16): np.float64}


def _unary(function: Callable[[Array], Array]) -> Handler:
    def handle(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
        found = block.read(operands[1], parts[-1])
        block.write(operands[0], function(found).astype(found.dtype), mask)

    return handle


def _binary(function: Callable[[Array, Array], Array]) -> Handler:
    def handle(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
        a, b = (block.read(o, parts[-1]) for o in operands[1:3])
        result = function(a, b).astype(a.dtype)
        block.write(operands[0], np.clip(result, 0, 1) if "sat" in parts else result, mask)

    return handle


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = np.abs(a) // np.abs(safe) if a.dtype.kind == "i" else a // safe
    signed = np.where((a < 0) ^ (safe < 0), -quotient, quotient) if a.dtype.kind == "i" else quotient
    return np.where(b == 0, -1 if a.dtype.kind == "i" else np.iinfo(a.dtype).max, signed)


def _remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, a - _divide(a, b).astype(a.dtype) * b)


def _extreme(function: Callable[[Array, Array], Array], number: Callable[[Array, Array], Array]) -> Handler:
    """min and max: without `.NaN` a number wins against NaN."""

    def handle(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
        a, b = (block.read(o, parts[-1]) for o in operands[1:3])
        block.write(operands[0], (function if "NaN" in parts else number)(a, b), mask)

    return handle


def _shift(left: bool) -> Handler:
    def handle(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
        a, by = block.read(operands[1], parts[-1]), block.read(operands[2], "u32").astype(np.uint64)
        bits = 8 * a.dtype.itemsize
        within = np.minimum(by, bits - 1).astype(a.dtype)
        moved = a << within if left else a >> within
        beyond = np.where(a < 0, -1, 0).astype(a.dtype) if a.dtype.kind == "i" and not left else np.zeros_like(a)
        block.write(operands[0], np.where(by < bits, moved, beyond), mask)

    return handle


def _product(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    """mul and mad for integers (.lo, .hi, .wide), mul and fma for floats."""
    type_ = parts[-1]
    a, b = (block.read(o, type_) for o in operands[1:3])
    added = len(operands) > 3
    if a.dtype.kind == "f":
        wide = _FUSED.get(a.dtype, a.dtype)
        result = a.astype(wide) * b.astype(wide)
        if added:
            result = result + block.read(operands[3], type_).astype(wide)
        result = result.astype(a.dtype)
        block.write(operands[0], np.clip(result, 0, 1) if "sat" in parts else result, mask)
    elif "wide" in parts:
        double = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        result = a.astype(double) * b.astype(double)
        block.write(operands[0], result + (unpack(block.value(operands[3]), _name(double)) if added else 0), mask)
    elif "hi" in parts:
        exact = a.astype(object) * b.astype(object)
        high = np.array([int(x) >> (8 * a.dtype.itemsize) for x in exact], a.dtype)
        block.write(operands[0], high + block.read(operands[3], type_) if added else high, mask)
    else:
        block.write(operands[0], a * b + block.read(operands[3], type_) if added else a * b, mask)


def _name(dtype: np.dtype[np.generic]) -> str:
    return f"{'s' if dtype.kind == 'i' else 'u'}{8 * dtype.itemsize}"


_COMPARE: Mapping[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def compare(name: str, a: Array, b: Array) -> Array:
    """setp's comparison; names ending in u are also true for NaN."""
    unordered = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(a.shape, bool)
    if name in ("num", "nan"):
        return ~unordered if name == "num" else unordered
    if name in _COMPARE:
        found: Array = _COMPARE[name](a, b)
        return found & ~unordered if name == "ne" else found
    return np.asarray(_COMPARE[name[:-1]](a, b)) | unordered


def _setp(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    a, b = (block.read(o, parts[-1]) for o in operands[1:3])
    found = compare(parts[1], a, b)
    first, _, second = operands[0].partition("|")
    other = ~found
    if len(operands) > 3:
        negated, name = operands[3].startswith("!"), operands[3].removeprefix("!")
        guard = block.value(name).astype(bool) ^ negated
        join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[parts[2]]
        found, other = join(found, guard), join(other, guard)
    block.write(first, found, mask)
    if second:
        block.write(second, other, mask)


def _set(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    found = compare(parts[1], *(block.read(o, parts[-1]) for o in operands[1:3]))
    block.write(operands[0], found.astype(np.float32) if parts[-2] == "f32" else np.where(found, np.int32(-1), np.int32(0)), mask)


def _selp(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    block.write(operands[0], np.where(block.value(operands[3]).astype(bool), *(block.value(o) for o in operands[1:3])), mask)


def _mov(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    target, source = operands
    bits = 8 * WIDTH[parts[-1]] if parts[-1] != "pred" else 1
    if source.startswith("{"):
        pieces = _list(source)
        width = bits // len(pieces)
        low = np.uint64((1 << width) - 1)
        joined = np.zeros(block.threads, np.uint64)
        for i, piece in enumerate(pieces):
            joined |= (block.value(piece) & low) << np.uint64(i * width)
        block.write(target, joined, mask)
    elif target.startswith("{"):
        pieces = _list(target)
        width = bits // len(pieces)
        value = block.value(source)
        for i, piece in enumerate(pieces):
            block.write(piece, (value >> np.uint64(i * width)) & np.uint64((1 << width) - 1), mask)
    else:
        block.write(target, block.value(source), mask)


def _list(operand: str) -> list[str]:
    return [o.strip() for o in operand.strip("{}").split(",")]


def _cvta(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    from tests.cuda.ptx_interpreter import LOCAL_WINDOW, SHARED_WINDOW

    window = SHARED_WINDOW if "shared" in parts else LOCAL_WINDOW if "local" in parts else 0
    value = block.value(operands[1])
    block.write(operands[0], value - np.uint64(window) if "to" in parts else value + np.uint64(window), mask)


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _cvt(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    target, source = parts[-2:]
    if target in ("bf16x2", "f16x2"):
        high, low = (block.read(o, source) for o in operands[1:3])
        halves = [to_bf16(x) if target == "bf16x2" else x.astype(np.float16).view(np.uint16) for x in (low, high)]
        block.write(operands[0], halves[0].astype(np.uint32) | (halves[1].astype(np.uint32) << np.uint32(16)), mask)
        return
    value = block.read(operands[1], source)
    rounding = next((p for p in parts if p in _ROUND), None)
    if value.dtype.kind == "f" and rounding:
        value = _ROUND[rounding](value)
    if target == "tf32":
        result = (value.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        result = np.where(np.isnan(value), np.uint32(0x7FFFE000), result)
    elif target == "bf16":
        result = to_bf16(value)
    elif target[0] == "f":
        result = value.astype(f"f{WIDTH[target]}")
        result = np.clip(np.where(np.isnan(result), 0, result), 0, 1).astype(result.dtype) if "sat" in parts else result
    elif value.dtype.kind == "f":
        result = _saturate(value, target)
    elif "sat" in parts:
        limits = np.iinfo(unpack(np.zeros(1, np.uint64), target).dtype)
        result = np.clip(value.astype(object), limits.min, limits.max).astype(limits.dtype)
    else:
        result = value.astype(unpack(np.zeros(1, np.uint64), target).dtype)
    if result.dtype.kind == "i" and result.dtype.itemsize < 4:
        result = result.astype(np.int32)  # registers hold small numbers extended
    block.write(operands[0], result, mask)


def _saturate(value: Array, target: str) -> Array:
    dtype = unpack(np.zeros(1, np.uint64), target).dtype
    limits = np.iinfo(dtype)
    exact = np.where(np.isnan(value), 0, value).astype(np.float64)
    inside = (exact > float(limits.min) - 1) & (exact < float(limits.max))
    clipped = np.where(exact < 0, limits.min, limits.max).astype(dtype)
    return np.where(inside, np.where(inside, exact, 0).astype(dtype), clipped)


# ------------------------------------------------------------------------------------------------- memory


def _space(parts: Parts) -> str:
    return next((p for part in parts for p in _SPACES if part.split(":")[0] == p), "generic")


def _vector(parts: Parts) -> int:
    return next((int(p[1:]) for p in parts if p in ("v2", "v4", "v8")), 1)


def _ld(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    if "shared::cluster" in parts:
        ptx_cluster.load(block, parts, operands, mask)
        return
    type_, space, count = parts[-1], _space(parts), _vector(parts)
    targets = _list(operands[0])
    if space == "param":
        name, _, offset = operands[1].strip("[]").partition("+")
        if offset:
            raise PtxError("parameters are single words")
        block.write(targets[0], block.value(name.strip()), mask)
        return
    width = WIDTH[type_]
    found = block.gather(space, block.address(operands[1]), width * count, mask)
    for i, target in enumerate(targets):
        numbers = np.ascontiguousarray(found[:, i * width : (i + 1) * width]).view(f"u{width}")[:, 0]
        if type_[0] == "s" and width < 4:
            numbers = numbers.view(f"i{width}").astype(np.int32)
        block.write(target, numbers, mask)


def _st(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    width = WIDTH[parts[-1]]
    raw = [block.value(o).astype(f"u{width}") for o in _list(operands[1])]
    if len(raw) != _vector(parts):
        raise PtxError("a vector store of another length")
    content = np.ascontiguousarray(np.stack(raw, 1)).view(np.uint8).reshape(block.threads, -1)
    block.products.stored(np.flatnonzero(mask), _list(operands[1]))
    block.scatter(_space(parts), block.address(operands[0]), content, mask)


_ATOMIC: Mapping[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "exch": lambda old, new: new, "inc": lambda old, limit: np.where(old >= limit, 0, old + 1),
}  # fmt: skip


def _atom(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    """atom and red: the threads one after another."""
    reduction = parts[0] == "red"
    place, *given = operands if reduction else operands[1:]
    type_, space, address = parts[-1], _space(parts), block.address(place)
    name = next(p for p in parts if p in _ATOMIC or p == "cas")
    values = [block.read(o, type_) for o in given]
    result = np.zeros(block.threads, np.uint64)
    for thread in np.flatnonzero(mask):
        one = block.lanes == thread
        if block.watch is not None and space == "global":
            block.watch.counts(int(thread), int(address[thread]), parts)
        raw = block.gather(space, address, WIDTH[type_], one)[thread]
        old = raw.view(values[0].dtype)
        if name == "cas":
            new = values[1][[thread]] if old[0] == values[0][thread] else old
        else:
            new = _ATOMIC[name](old, values[0][[thread]]).astype(old.dtype)
        result[thread] = pack(old)[0]
        block.scatter(space, address, np.tile(new.view(np.uint8), (block.threads, 1)), one)
    if not reduction:
        block.write(operands[0], result, mask)


def _cp(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    if parts[1] != "async":
        raise PtxError("unknown copy")
    if parts[2] == "commit_group":
        block.commit(mask)
    elif parts[2] in ("wait_group", "wait_all"):
        block.land(int(operands[0]) if operands else 0, mask)
    elif parts[2] == "bulk":
        ptx_tma.copy(block, parts, operands, mask)
    elif parts[2] in ("cg", "ca"):
        size = int(operands[2])
        there = np.full(block.threads, size)
        if len(operands) > 3:
            given = block.value(operands[3]).astype(np.int64)
            predicate = operands[3].startswith(("p", "%p"))  # whether to ignore the source
            there = np.where(given, 0, size) if predicate else given
        if ((there[mask] > size) | (there[mask] < 0)).any() or size not in ((16,) if parts[2] == "cg" else (4, 8, 16)):
            raise PtxError("cp.async of a wrong size")
        block.start_copy(block.address(operands[0]), block.address(operands[1]), size, there, mask)
    else:
        raise PtxError("unknown copy")


# --------------------------------------------------------------------------------------------------- warps


def _full_warps(block: Block, members: str, mask: Array) -> None:
    """PtxError unless all threads that a warp instruction names have come to it."""
    named = ((block.value(members) >> (block.lanes % 32).astype(np.uint64)) & np.uint64(1)).astype(bool)
    warps = np.zeros(block.threads, bool)
    for warp in np.unique(block.lanes[mask] // 32):
        warps |= block.lanes // 32 == warp
    if (warps & named & ~mask).any():
        raise PtxError("a warp instruction is reached by some of its threads only")


def _shfl(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    target, source, by, clamp = operands[:4]
    _full_warps(block, operands[4], mask)
    lane = block.lanes % 32
    b, c = (block.value(o).astype(np.int64) & 31 for o in (by, clamp))
    segment = block.value(clamp).astype(np.int64) >> 8 & 31
    limit = (lane & segment) | (c & ~segment)
    lowest = lane & segment
    match parts[2]:
        case "up":
            other, inside = lane - b, lane - b >= limit
        case "down":
            other, inside = lane + b, lane + b <= limit
        case "bfly":
            other, inside = lane ^ b, (lane ^ b) <= limit
        case _:
            other = lowest | (b & ~segment)
            inside = other <= limit
    place = block.lanes - lane + np.where(inside, other, lane)
    first, _, predicate = target.partition("|")
    result = block.value(source)[np.clip(place, 0, block.threads - 1)]
    block.write(first, result, mask)
    if predicate:
        block.write(predicate, inside, mask)


def _vote(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    _full_warps(block, operands[-1], mask)
    negated, name = operands[1].startswith("!"), operands[1].removeprefix("!")
    value = (block.value(name).astype(bool) ^ negated) & mask
    result = np.zeros(block.threads, np.uint64)
    for start in range(0, block.threads, 32):
        part = slice(start, start + 32)
        ballot = sum(1 << lane for lane in np.flatnonzero(value[part]))
        everyone = bool((value[part] | ~mask[part]).all())
        result[part] = {"ballot": ballot, "any": int(ballot != 0), "all": int(everyone)}[parts[2]]
    block.write(operands[0], result, mask)


def _redux(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    _full_warps(block, operands[-1], mask)
    value = block.read(operands[1], parts[-1])
    result = np.zeros_like(value)
    for start in range(0, block.threads, 32):
        part = np.flatnonzero(mask[start : start + 32]) + start
        if part.size:
            reduce = _ATOMIC[parts[2]]
            total = value[part[0]]
            for lane in part[1:]:
                total = reduce(total, value[lane])
            result[start : start + 32] = total
    block.write(operands[0], result, mask)


# --------------------------------------------------------------------------------------------------- bits


def _bfe(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    a = block.read(operands[1], parts[-1])
    start, length = (block.value(o).astype(np.int64) & 255 for o in operands[2:4])
    bits = 8 * a.dtype.itemsize
    exact = [(int(x) >> int(s)) & ((1 << int(n)) - 1) if s < bits else 0 for x, s, n in zip(a, start, length, strict=True)]
    if parts[-1][0] == "s":
        exact = [x - (1 << int(n)) if n and x >> (int(n) - 1) else x for x, n in zip(exact, length, strict=True)]
    block.write(operands[0], np.array(exact, a.dtype), mask)


def _bfi(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    a, b = (block.read(o, parts[-1]).astype(np.uint64) for o in operands[1:3])
    start, length = (block.value(o) & np.uint64(255) for o in operands[3:5])
    field = ((np.uint64(1) << length) - np.uint64(1)) << start
    block.write(operands[0], (b & ~field) | ((a << start) & field), mask)


def _prmt(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    a, b, selector = (block.value(o) for o in operands[1:4])
    both = (a & np.uint64(0xFFFFFFFF)) | (b << np.uint64(32))
    result = np.zeros(block.threads, np.uint64)
    for i in range(4):
        pick = (selector >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> (np.uint64(8) * (pick & np.uint64(7)))) & np.uint64(255)
        byte = np.where(pick & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        result |= byte << np.uint64(8 * i)
    block.write(operands[0], result, mask)


def _shf(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    low, high = (block.read(o, "u32").astype(np.uint64) for o in operands[1:3])
    by = block.value(operands[3])
    by = by & np.uint64(31) if "wrap" in parts else np.minimum(by & np.uint64(0xFFFFFFFF), np.uint64(32))
    both = low | (high << np.uint64(32))
    moved = both >> by if "r" in parts else (both << by) >> np.uint64(32)
    block.write(operands[0], moved & np.uint64(0xFFFFFFFF), mask)


def _lop3(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    a, b, c = (block.value(o) for o in operands[1:4])
    table, result = int(operands[4], 0), np.zeros(block.threads, np.uint64)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    block.write(operands[0], result & np.uint64(0xFFFFFFFF), mask)


def _count(function: Callable[[int, int], int]) -> Handler:
    def handle(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
        a = block.read(operands[1], parts[-1])
        block.write(operands[0], np.array([function(int(x), 8 * a.dtype.itemsize) for x in a], np.uint32), mask)

    return handle


def _nothing(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    """Orders memory, which the interpreter does anyway."""


def _griddepcontrol(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    """Waits for the kernel before this one, or lets the next one be launched, for which this one must have waited."""
    if parts[1] == "launch_dependents":
        block.check_waited(mask)
    elif parts[1:] == ("wait",):
        block.waited |= mask
    else:
        raise PtxError(f"unknown kind of griddepcontrol: {parts[1:]}")


def _bits(function: Callable[[Array, Array], Array]) -> Handler:
    def handle(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
        block.write(operands[0], function(*(block.read(o, parts[-1]) for o in operands[1:3])), mask)

    return handle


HANDLERS: dict[str, Handler] = {
    "add": _binary(np.add), "sub": _binary(np.subtract), "div": _binary(_divide), "rem": _binary(_remainder),
    "and": _bits(np.bitwise_and), "or": _bits(np.bitwise_or), "xor": _bits(np.bitwise_xor), "not": _unary(np.invert),
    "min": _extreme(np.minimum, np.fmin), "max": _extreme(np.maximum, np.fmax), "abs": _unary(np.abs), "neg": _unary(np.negative),
    "mul": _product, "mad": _product, "fma": _product, "shl": _shift(True), "shr": _shift(False),
    "copysign": _binary(lambda a, b: np.copysign(b, a)),
    "sqrt": _unary(np.sqrt), "rsqrt": _unary(lambda x: 1 / np.sqrt(x.astype(np.float64))), "rcp": _unary(lambda x: 1 / x),
    "ex2": _unary(np.exp2), "lg2": _unary(np.log2), "sin": _unary(np.sin), "cos": _unary(np.cos), "tanh": _unary(np.tanh),
    "setp": _setp, "set": _set, "selp": _selp, "mov": _mov, "cvta": _cvta, "cvt": _cvt, "ld": _ld, "st": _st, "ldu": _ld,
    "atom": _atom, "red": _atom, "cp": _cp, "shfl": _shfl, "vote": _vote, "redux": _redux, "bfe": _bfe, "bfi": _bfi,
    "prmt": _prmt, "shf": _shf, "lop3": _lop3, "popc": _count(lambda x, _: x.bit_count()),
    "clz": _count(lambda x, bits: bits - x.bit_length()),
    "brev": _unary(lambda x: np.array([int(f"{int(v):0{8 * x.dtype.itemsize}b}"[::-1], 2) for v in x], x.dtype)),
    "griddepcontrol": _griddepcontrol, "membar": _nothing, "prefetch": _nothing,
}  # fmt: skip
