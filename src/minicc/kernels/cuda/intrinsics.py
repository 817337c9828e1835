"""The words a CUDA kernel is written in: arguments, typed pointers, loads and stores, threads and blocks."""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic

I32 = ir.IntType(32)
I64 = ir.IntType(64)


def helper(function):
    """Decorator for functions which kernels call: always inlined."""
    return cuda.jit(device=True, forceinline=True)(function)


@intrinsic
def arg(typing_context, args, index):
    """Word `index` (a literal) of the kernel's parameters: int64."""
    if not isinstance(index, types.IntegerLiteral):
        return None
    place = index.literal_value

    def emit(context, builder, signature, values):
        return builder.extract_value(values[0], place)

    return types.int64(args, types.literal(place)), emit


def _pointer_to(element):
    pointer = types.CPointer(element)

    @intrinsic
    def pointer_of(typing_context, address):
        def emit(context, builder, signature, values):
            return builder.inttoptr(values[0], context.get_value_type(pointer))

        return pointer(types.int64), emit

    return pointer_of


ptr_f32 = _pointer_to(types.float32)
ptr_i32 = _pointer_to(types.int32)


@intrinsic
def st(typing_context, pointer, index, value):
    """Stores an element; the value is converted to the pointer's type."""
    if not isinstance(pointer, types.CPointer):
        return None
    element = pointer.dtype

    def emit(context, builder, signature, values):
        global_pointer = builder.addrspacecast(
            builder.gep(values[0], [values[1]]), context.get_value_type(element).as_pointer(1)
        )
        builder.store(values[2], global_pointer)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, element), emit
