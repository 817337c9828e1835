"""Three small loops that show what one core of this machine can do: multiply and add, read memory, transform values.

They are LLVM text of the machine's own vectors, compiled in some hundredths of a second. What is made of their times is said
where they are timed (`runtime/rates.py`, `debug/peaks.py`); nothing of minicc's own kernels takes part.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

CHAINS = 16  # of sums that do not wait for each other: more than latency times units of any core
SIDE = 4  # of the square of values that `transform` loads and stores at once, as Winograd's F(2x2, 3x3) does


@dataclass(frozen=True)
class Probes:
    """The loops as C functions; addresses are those of float32 arrays.

    lanes:     float32 values of a vector.
    multiply:  (sums, rounds): `rounds` multiply-adds of CHAINS vectors, kept in registers; their sum goes to `sums`,
               CHAINS vectors, which start them.
    read:      (data, sums, rounds): adds `rounds` times CHAINS vectors that follow each other in memory.
    transform: (image, forms, pixel, row, form, tiles, rounds): squares of SIDE x SIDE pixels, two pixels apart, in Winograd's
               form. Pixels are `pixel` values, a multiple of lanes; rows of the image and positions of the form are `row` and
               `form` apart.
    engine:    owns the machine code.
    """

    lanes: int
    multiply: Callable[..., None]
    read: Callable[..., None]
    transform: Callable[..., None]
    engine: Any


def compile_probes() -> Probes:
    """Compile the loops for this machine."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    lanes = 16 if features.get("avx512f") else 8 if features.get("avx2") else 4
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    text = _multiply(lanes) + _read(lanes) + _transform(lanes)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(text), machine)
    engine.finalize_object()

    def function(name: str, arrays: int, numbers: int) -> Callable[..., None]:
        parameters = [ctypes.c_void_p] * arrays + [ctypes.c_int64] * numbers
        return ctypes.CFUNCTYPE(None, *parameters)(engine.get_function_address(name))

    return Probes(lanes, function("multiply", 1, 1), function("read", 2, 1), function("transform", 2, 5), engine)


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _sums(lanes: int, parameters: str, steps: Iterable[str]) -> str:
    """A function: CHAINS sums a0, a1.. start with what lies at %x and become b0, b1.. by `steps`, %rounds times."""
    vector, each = f"<{lanes} x float>", range(CHAINS)
    starts = [
        f"%p{i} = getelementptr {vector}, ptr %x, i64 {i}\n%c{i} = load {vector}, ptr %p{i}, align 4" for i in each
    ]
    chains = [f"%a{i} = phi {vector} [%c{i}, %entry], [%b{i}, %loop]" for i in each]
    sums = [f"%t{i + 1} = fadd {vector} %t{i}, %b{i}" for i in each]
    return f"""
define void @{parameters} "min-legal-vector-width"="{lanes * 32}" {{
entry:
%s = load {vector}, ptr %x, align 4
{_lines(starts)}
br label %loop
loop:
%n = phi i64 [0, %entry], [%next, %loop]
{_lines(chains)}
{_lines(steps)}
%next = add i64 %n, 1
%more = icmp slt i64 %next, %rounds
br i1 %more, label %loop, label %done
done:
%t0 = fadd {vector} %s, %s
{_lines(sums)}
store {vector} %t{CHAINS}, ptr %x, align 4
ret void
}}
"""


def _multiply(lanes: int) -> str:
    vector = f"<{lanes} x float>"
    add = f"call {vector} @llvm.fma.v{lanes}f32"
    steps = [f"%b{i} = {add}({vector} %a{i}, {vector} %s, {vector} %s)" for i in range(CHAINS)]
    declared = f"declare {vector} @llvm.fma.v{lanes}f32({vector}, {vector}, {vector})"
    return declared + _sums(lanes, "multiply(ptr %x, i64 %rounds)", steps)


def _read(lanes: int) -> str:
    vector = f"<{lanes} x float>"
    steps = [f"%first = mul i64 %n, {CHAINS}"]
    for i in range(CHAINS):
        steps += [
            f"%o{i} = add i64 %first, {i}",
            f"%q{i} = getelementptr {vector}, ptr %data, i64 %o{i}",
            f"%l{i} = load {vector}, ptr %q{i}, align 4",
            f"%b{i} = fadd {vector} %a{i}, %l{i}",
        ]
    return _sums(lanes, "read(ptr %data, ptr %x, i64 %rounds)", steps)


def _transform(lanes: int) -> str:
    vector, square = f"<{lanes} x float>", list(product(range(SIDE), repeat=2))
    loads, adds, stores = [], [], []
    for i, j in square:
        loads += [
            f"%r{i}{j} = mul i64 %row, {i}",
            f"%u{i}{j} = mul i64 %pixel, {j}",
            f"%v{i}{j} = add i64 %r{i}{j}, %u{i}{j}",
            f"%w{i}{j} = add i64 %v{i}{j}, %from",
            f"%g{i}{j} = getelementptr float, ptr %x, i64 %w{i}{j}",
            f"%d{i}{j} = load {vector}, ptr %g{i}{j}, align 4",
        ]
    combined = (("fsub", 0, 2), ("fadd", 1, 2), ("fsub", 2, 1), ("fsub", 1, 3))
    for (k, (op, a, b)), j in product(enumerate(combined), range(SIDE)):
        adds.append(f"%e{k}{j} = {op} {vector} %d{a}{j}, %d{b}{j}")
    for k, (m, (op, a, b)) in product(range(SIDE), enumerate(combined)):
        stores += [
            f"%f{k}{m} = {op} {vector} %e{k}{a}, %e{k}{b}",
            f"%h{k}{m} = mul i64 %form, {SIDE * k + m}",
            f"%k{k}{m} = add i64 %h{k}{m}, %to",
            f"%z{k}{m} = getelementptr float, ptr %y, i64 %k{k}{m}",
            f"store {vector} %f{k}{m}, ptr %z{k}{m}, align 4",
        ]
    parameters = "ptr %x, ptr %y, i64 %pixel, i64 %row, i64 %form, i64 %tiles, i64 %rounds"
    return f"""
define void @transform({parameters}) "min-legal-vector-width"="{lanes * 32}" {{
entry:
%apart = mul i64 %pixel, 2
br label %round
round:
%n = phi i64 [0, %entry], [%later, %finished]
br label %tile
tile:
%t = phi i64 [0, %round], [%following, %ended]
%left = mul i64 %t, %apart
%place = mul i64 %t, %pixel
br label %channels
channels:
%c = phi i64 [0, %tile], [%next, %channels]
%from = add i64 %left, %c
%to = add i64 %place, %c
{_lines(loads)}
{_lines(adds)}
{_lines(stores)}
%next = add i64 %c, {lanes}
%more = icmp slt i64 %next, %pixel
br i1 %more, label %channels, label %ended
ended:
%following = add i64 %t, 1
%another = icmp slt i64 %following, %tiles
br i1 %another, label %tile, label %finished
finished:
%later = add i64 %n, 1
%again = icmp slt i64 %later, %rounds
br i1 %again, label %round, label %done
done:
ret void
}}
"""
