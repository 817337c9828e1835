"""What the executor needs from the machine: atomics, pause, futex, clock, calls through an address.

Every atomic is sequentially consistent: the sleeping protocol needs it, and on x86 it costs the same. The
futex part is Linux only. Compiled for the host only, so the machine is asked directly.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

import platform

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from minicc.kernels.cpu.intrinsics import I8, I32, I64, stack_array

ARM = platform.machine().lower() in ("aarch64", "arm64")

FUTEX_SYSCALL = 98 if ARM else 202
GET_THREAD_SYSCALL = 178 if ARM else 186
GETCPU_SYSCALL = 168 if ARM else 309
SET_AFFINITY_SYSCALL = 122 if ARM else 203
GET_AFFINITY_SYSCALL = 123 if ARM else 204
AFFINITY_WORDS = 16  # room for 1024 cores
FUTEX_WAIT_PRIVATE = 0 | 128
FUTEX_WAKE_PRIVATE = 1 | 128
CLOCK_MONOTONIC = 1
RUSAGE_THREAD = 1
RUSAGE_WORDS = 18
INVOLUNTARY_SWITCHES = 17

_WORDS = types.CPointer(types.int64)
_ORDER = "seq_cst"


def _call(builder, name, result, operands, variadic=False):
    """Call an external C function, or an LLVM intrinsic that is not overloaded."""
    parameters = [] if variadic else [operand.type for operand in operands]
    type_ = ir.FunctionType(result, parameters, var_arg=variadic)
    return builder.call(cgutils.get_or_insert_function(builder.module, type_, name), operands)


@intrinsic
def atomic_load(typing_context, words, index):
    """words[index]"""

    def emit(context, builder, signature, values):
        return builder.load_atomic(builder.gep(values[0], [values[1]]), _ORDER, 8)

    return types.int64(_WORDS, types.int64), emit


@intrinsic
def atomic_store(typing_context, words, index, value):
    """words[index] = value"""

    def emit(context, builder, signature, values):
        builder.store_atomic(values[2], builder.gep(values[0], [values[1]]), _ORDER, 8)
        return context.get_dummy_value()

    return types.void(_WORDS, types.int64, types.int64), emit


@intrinsic
def atomic_add(typing_context, words, index, value):
    """words[index] += value; gives the old word."""

    def emit(context, builder, signature, values):
        return builder.atomic_rmw("add", builder.gep(values[0], [values[1]]), values[2], _ORDER)

    return types.int64(_WORDS, types.int64, types.int64), emit


@intrinsic
def atomic_exchange_if(typing_context, words, index, expected, value):
    """If words[index] == expected: words[index] = value. True when it was done."""

    def emit(context, builder, signature, values):
        pair = builder.cmpxchg(builder.gep(values[0], [values[1]]), values[2], values[3], _ORDER)
        return builder.extract_value(pair, 1)

    return types.boolean(_WORDS, types.int64, types.int64, types.int64), emit


@intrinsic
def pause(typing_context):
    """Tell the core that this is a spin loop."""

    def emit(context, builder, signature, values):
        if ARM:
            _call(builder, "llvm.aarch64.hint", ir.VoidType(), [I32(1)])
        else:
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), emit


def _system_call(builder, number, *operands):
    """A call of the system; what it does not take of six operands is 0."""
    return _call(builder, "syscall", I64, [I64(number), *operands, *[I64(0)] * (6 - len(operands))], variadic=True)


def _futex(operation):
    @intrinsic
    def futex(typing_context, words, index, value):
        def emit(context, builder, signature, values):
            address = builder.ptrtoint(builder.gep(values[0], [values[1]]), I64)
            _system_call(builder, FUTEX_SYSCALL, address, I64(operation), values[2])
            return context.get_dummy_value()

        return types.void(_WORDS, types.int64, types.int64), emit

    return futex


# Sleep while the low 32 bits of words[index] equal value; may return early.
futex_wait = _futex(FUTEX_WAIT_PRIVATE)
# Wake up to `value` threads sleeping on words[index].
futex_wake = _futex(FUTEX_WAKE_PRIVATE)


@intrinsic
def thread_number(typing_context):
    """The system's number of this thread."""

    def emit(context, builder, signature, values):
        return _system_call(builder, GET_THREAD_SYSCALL)

    return types.int64(), emit


@intrinsic
def current_core(typing_context):
    """Number of the core this thread is on."""

    def emit(context, builder, signature, values):
        core = stack_array(builder, I32, 1)
        builder.store(I32(0), core)
        _system_call(builder, GETCPU_SYSCALL, builder.ptrtoint(core, I64))
        return builder.zext(builder.load(core), I64)

    return types.int64(), emit


def _affinity(number):
    @intrinsic
    def affinity(typing_context, thread, words):
        def emit(context, builder, signature, values):
            address = builder.ptrtoint(values[1], I64)
            return _system_call(builder, number, values[0], I64(8 * AFFINITY_WORDS), address)

        return types.int64(types.int64, _WORDS), emit

    return affinity


# The set of cores a thread (0: this one) may be on, a bit each in AFFINITY_WORDS words: read, changed. Negative
# when refused.
get_affinity = _affinity(GET_AFFINITY_SYSCALL)
set_affinity = _affinity(SET_AFFINITY_SYSCALL)


@intrinsic
def clock(typing_context):
    """Monotonic time in ns."""

    def emit(context, builder, signature, values):
        time = stack_array(builder, I64, 2)
        _call(builder, "clock_gettime", I32, [I32(CLOCK_MONOTONIC), time])
        seconds = builder.load(time)
        nanoseconds = builder.load(builder.gep(time, [I64(1)]))
        return builder.add(builder.mul(seconds, I64(1_000_000_000)), nanoseconds)

    return types.int64(), emit


@intrinsic
def involuntary_switches(typing_context):
    """How often the system took the core from this thread so far."""

    def emit(context, builder, signature, values):
        usage = stack_array(builder, I64, RUSAGE_WORDS)
        _call(builder, "getrusage", I32, [I32(RUSAGE_THREAD), usage])
        return builder.load(builder.gep(usage, [I64(INVOLUNTARY_SWITCHES)]))

    return types.int64(), emit


@intrinsic
def call_kernel(typing_context, function, args, begin, end):
    """Call a kernel by its address."""

    def emit(context, builder, signature, values):
        type_ = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I64, I64])
        callee = builder.inttoptr(values[0], type_.as_pointer())
        builder.call(callee, [builder.inttoptr(values[1], I8.as_pointer()), values[2], values[3]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), emit
