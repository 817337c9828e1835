"""Winograd's transforms on CUDA: a thread takes a tile of one channel, or of several that lie side by side, in registers.

The sums are those of kernels/winograd_axes.py, in float32 whatever the elements are. Both words unroll themselves while they
emit LLVM. Nothing here knows shapes; the kernels that call these words do.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from minicc.kernels.cuda.intrinsics import bfloat_to_float, float_to_bfloat, float_to_half, half_to_float
from minicc.kernels.cuda.tiles import F32, I16, I32, I64, SHARED, assembly, known
from minicc.kernels.winograd_axes import into_form, out_of_form, side

_GLOBAL = 1
# How elements of 16 bits become float32, and back.
_HALVES = {"f16": (half_to_float, float_to_half), "bf16": (bfloat_to_float, float_to_bfloat)}


class Arithmetic:
    """Sums and multiples of lists of float32, one of each channel."""

    def __init__(self, builder):
        self.builder = builder

    def add(self, x, y):
        return [self.builder.fadd(a, b) for a, b in zip(x, y)]

    def sub(self, x, y):
        return [self.builder.fsub(a, b) for a, b in zip(x, y)]

    def scale(self, factor, x):
        return [self.builder.fmul(F32(factor), a) for a in x]

    def scale_add(self, factor, x, y):
        """factor * x + y"""
        return [self.builder.fma(F32(factor), a, b) for a, b in zip(x, y)]


def _shape(out):
    return out, out, 1, 3


def _load_pixel(builder, element, lanes, address, exists):
    """`lanes` channels of a pixel as float32, zeros where it does not exist."""
    halves = element in _HALVES
    each = 2 if halves and lanes > 1 else 1  # elements in a register
    letter, type_, kind = ("h", I16, "b16") if halves and lanes == 1 else ("r", I32, "b32")
    count = lanes // each
    vector = f".v{count}" if count > 1 else ""
    targets = ", ".join(f"${i}" for i in range(count))
    clear = " ".join(f"mov.{kind} ${i}, 0;" for i in range(count))
    text = (
        f"{{.reg .pred p; setp.ne.u32 p, ${count + 1}, 0; {clear} "
        f"@p ld.global.nc{vector}.{kind} {'{' + targets + '}' if vector else targets}, [${count}];}}"
    )
    result = ir.LiteralStructType([type_] * count) if count > 1 else type_
    found = assembly(builder, text, ",".join([f"=&{letter}"] * count + ["l", "r"]), result, [address, exists], effects=False)
    words = [builder.extract_value(found, i) for i in range(count)] if count > 1 else [found]
    if not halves:
        return [builder.bitcast(word, F32) for word in words]
    if each == 2:
        words = [builder.trunc(builder.lshr(word, I32(16 * place)), I16) for word in words for place in range(2)]
    return [_HALVES[element][0](builder, word) for word in words]


def _store_position(builder, element, values, address):
    """float32 of neighbouring channels to memory, as elements."""
    if element in _HALVES:
        parts = [_HALVES[element][1](builder, value) for value in values]
        if len(parts) > 1:
            wide = [builder.zext(part, I32) for part in parts]
            parts = [builder.or_(low, builder.shl(high, I32(16))) for low, high in zip(wide[::2], wide[1::2])]
    else:
        parts = values
    size = {I16: 2}.get(parts[0].type, 4) * len(parts)
    type_ = ir.VectorType(parts[0].type, len(parts)) if len(parts) > 1 else parts[0].type
    stored = parts[0]
    if len(parts) > 1:
        stored = ir.Constant(type_, ir.Undefined)
        for number, part in enumerate(parts):
            stored = builder.insert_element(stored, part, I32(number))
    builder.store(stored, builder.inttoptr(address, type_.as_pointer(_GLOBAL)), align=size)


@intrinsic
def winograd_input(typing_context, element, out, lanes, source, steps, first, extents, target, apart):
    """A tile's inputs into Winograd's form: the positions of `lanes` channels, row after row, `apart` bytes apart.

    element, out, lanes: literals: type of elements in memory, outputs of a tile along an axis, channels of a thread, at
             whose bytes source, steps and target are aligned.
    source:  address of the first input, at (row, column) `first`, which may lie outside the image of `extents`, as what
             is outside is 0; steps: bytes from row to row and from column to column.
    """
    if not known(element, out, lanes):
        return None
    name, outputs, count = (v.literal_value for v in (element, out, lanes))
    length = side(outputs)
    pair = types.UniTuple(types.int64, 2)

    def emit(context, builder, signature, values):
        source, steps, first, extents, target, apart = values[3:]

        def inside(axis):
            """Addends to the address, and whether positions exist, along an axis."""
            begin, extent, step = (builder.extract_value(v, axis) for v in (first, extents, steps))
            places = [builder.add(begin, I64(number)) for number in range(length)]
            exist = [builder.icmp_unsigned("<", place, extent) for place in places]  # negative ones are too large
            return [builder.mul(step, I64(number)) for number in range(length)], exist

        (down, rows), (across, columns) = inside(0), inside(1)
        pixels = []
        for height, row in zip(down, rows):
            line = builder.add(source, height)
            for width, column in zip(across, columns):
                exists = builder.zext(builder.and_(row, column), I32)
                pixels.append(_load_pixel(builder, name, count, builder.add(line, width), exists))
        for position in into_form(Arithmetic(builder), _shape(outputs), pixels):
            _store_position(builder, name, position, target)
            target = builder.add(target, apart)
        return context.get_dummy_value()

    literals = [types.literal(v) for v in (name, outputs, count)]
    return types.void(*literals, types.int64, pair, pair, pair, types.int64, types.int64), emit


@intrinsic
def winograd_output(typing_context, out, source, apart, target, step):
    """The outputs of a tile from its positions: float32 in global memory, `apart` bytes apart, row after row.

    out:    literal: outputs along an axis.
    target: address in shared memory of the first output; step: bytes from one to the next.
    """
    if not known(out):
        return None
    outputs = out.literal_value

    def emit(context, builder, signature, values):
        _, source, apart, target, step = values
        found = []
        for _ in range(side(outputs) ** 2):
            value = builder.load(builder.inttoptr(source, F32.as_pointer(_GLOBAL)))
            value.set_metadata("invariant.load", builder.module.add_metadata([]))
            found.append([value])
            source = builder.add(source, apart)
        for (value,) in out_of_form(Arithmetic(builder), _shape(outputs), found):
            builder.store(value, builder.inttoptr(target, F32.as_pointer(SHARED)))
            target = builder.add(target, step)
        return context.get_dummy_value()

    return types.void(types.literal(outputs), types.int64, types.int64, types.int32, types.int32), emit
