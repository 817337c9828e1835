"""Square tiles of float32 transposed in vector registers, for loops whose operand lies along another axis than their result.

A tile as wide as a vector is read line by line and turned by log2(width) rounds of interleaving. It knows no arrays and
no shapes; generated loops (codegen/tiles.py) walk over an operand with it.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from minicc.kernels.cpu.intrinsics import F32, I32, I64, load_vector, stack_array, store_vector, vector
from minicc.kernels.cpu.tiles import are_literals, masked_load

_FLOATS = types.CPointer(types.float32)


@intrinsic
def transpose_tile(typing_context, width, source, step, rows, columns, target, pitch):
    """target[l * pitch + m] = source[l + m * step] for l < min(rows, width), m < min(columns, width).

    width: literal vector width VW. source: float32, of which nothing else is read. target: float32 scratch [VW][pitch] with a
    pitch of at least VW; what lies beyond `rows` and `columns` is overwritten with numbers that mean nothing.
    """
    if not are_literals(width):
        return None
    vw = width.literal_value

    def emit(context, builder, signature, values):
        _, source, step, rows, columns, target, pitch = values
        lines = [stack_array(builder, vector(F32, vw), 1) for _ in range(vw)]
        whole = builder.and_(*(builder.icmp_signed(">=", size, I64(vw)) for size in (rows, columns)))
        with builder.if_else(whole) as (then, otherwise):
            with then:
                for m, line in enumerate(lines):
                    at = builder.gep(source, [builder.mul(step, I64(m))])
                    builder.store(load_vector(builder, at, vw, "input"), line)
            with otherwise:
                inside = _lanes_below(builder, rows, vw)
                last = builder.sub(columns, I64(1))
                for m, line in enumerate(lines):  # the last line again where there are no more
                    place = builder.select(builder.icmp_signed("<", last, I64(m)), last, I64(m))
                    at = builder.gep(source, [builder.mul(step, place)])
                    builder.store(masked_load(builder, at, vw, inside), line)
        for number, turned in enumerate(_turned(builder, [builder.load(line) for line in lines], vw)):
            store_vector(builder, turned, builder.gep(target, [builder.mul(pitch, I64(number))]), "scratch")
        return context.get_dummy_value()

    size = types.int64
    return types.void(types.literal(vw), _FLOATS, size, size, size, _FLOATS, size), emit


def _lanes_below(builder, count, width):
    """A mask of the lanes with numbers below `count`."""
    numbers = ir.Constant(ir.VectorType(I32, width), list(range(width)))
    narrow = builder.trunc(count, I32)
    single = builder.insert_element(ir.Constant(numbers.type, ir.Undefined), narrow, I32(0))
    bound = builder.shuffle_vector(single, single, ir.Constant(numbers.type, [0] * width))
    return builder.icmp_signed("<", numbers, bound)


def _turned(builder, lines, width):
    """The transposed square: in each round, lines that lie half of them apart are interleaved."""
    half = width // 2
    low = [lane // 2 + (width if lane % 2 else 0) for lane in range(width)]
    orders = [ir.Constant(ir.VectorType(I32, width), [lane + shift for lane in low]) for shift in (0, half)]
    while half:
        lines = [
            builder.shuffle_vector(lines[m], lines[m + width // 2], order) for m in range(width // 2) for order in orders
        ]
        half //= 2
    return lines
