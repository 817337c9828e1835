"""From a kernel's function to LLVM IR, by Numba's front half: bytecode, types, instructions.

Numba is a compiler for any Python function on this machine; a kernel needs little of it. So it runs here with a short list of
passes, what it has found out about a call is kept, and its code generator is replaced by one that only links. This is the only
module that touches private Numba names, and the reason why pyproject.toml pins numba exactly. It neither optimises nor makes
machine code: codegen/objects.py does.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from llvmlite import ir
from numba.core import codegen, compiler, compiler_machinery, config, cpu, typed_passes, types, untyped_passes
from numba.core.imputils import builtin_registry
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys
from numba.core.typing.templates import _IntrinsicTemplate

from minicc.errors import CodegenError
from minicc.kernels.cpu.intrinsics import FASTMATH

Signature = tuple[Any, ...]
# void kernel(int64 *args, int64 begin, int64 end)
KERNEL = (types.CPointer(types.int64), types.int64, types.int64)
# void epilogue(int64 *args, int64 b0, int64 b1, int64 i, int64 j, float or int32 acc): all but the last
EPILOGUE = (types.CPointer(types.int64), *([types.int64] * 4))

# A kernel's text sets this to False when its products and sums must round one by one (codegen/source.py).
CONTRACT = "CONTRACT"

# Called by the entry when the kernel reports an error. It is never defined: when nothing in the kernel can
# raise, optimisation removes the call, and a call that remains fails the check of undefined symbols.
RAISED = "minicc.kernel_raised"

# What Numba does to a kernel and to minicc's own helpers, in order. Left out of its usual list is what a kernel cannot contain
# (closures, generators, raised errors, unrolled tuples, arrays) and the bookkeeping for reference counts, of which there are
# none: half the passes, and most of the instructions that only say where a variable ends.
PASSES = (
    untyped_passes.TranslateByteCode,
    untyped_passes.FixupArgs,
    untyped_passes.IRProcessing,
    untyped_passes.RewriteSemanticConstants,
    untyped_passes.DeadBranchPrune,
    untyped_passes.GenericRewrites,
    untyped_passes.ReconstructSSA,
    typed_passes.NopythonTypeInference,
    typed_passes.PreLowerStripPhis,
    typed_passes.NativeLowering,
    typed_passes.NoPythonBackend,
)


class _Library(codegen.JITCodeLibrary):  # type: ignore[misc]
    """Numba's container for the LLVM module of a kernel or of one of its helpers, which does no more than link.

    Numba's own would optimise every function, then every helper with all that it calls, and make machine code of it.
    All of that was thrown away, and took a fifth to two fifths of a template's compile time: a kernel is optimised
    once, when its helpers are in it, for the target.
    """

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, _name: str) -> int:
        return 0  # also Numba's own answer for a helper, which has no entry for Python


class _Codegen(codegen.JITCPUCodegen):  # type: ignore[misc]
    """Makes such containers."""

    _library_class = _Library

    def set_env(self, _name: str, _environment: Any) -> None:
        """Nothing: there is no machine code that could ask for its Python environment."""


@lru_cache(maxsize=1)
def _codegen() -> _Codegen:
    return _Codegen("minicc")


class _Passes(compiler_machinery.PassManager):  # type: ignore[misc]
    """Runs passes without working out the control flow, uses and lifetimes of all variables anew after each."""

    _ENFORCING = False


class _Compiler(compiler.CompilerBase):  # type: ignore[misc]
    """Numba's compiler with the passes of kernels."""

    def define_pipelines(self) -> list[_Passes]:
        passes = _Passes("kernel")
        for one in PASSES:
            passes.add_pass(one, one._name)
        passes.finalize()
        return [passes]


_usual_compile = compiler.compile_extra
_usual_call_type = types.Function.get_call_type


def _compile(  # the parameters of Numba's, which its helpers' compilers name
    typingctx: Any, targetctx: Any, func: Any, args: Any, return_type: Any, flags: Any, locals: Any,
    library: Any = None, pipeline_class: Any = compiler.Compiler,
) -> Any:  # fmt: skip
    """As Numba compiles a function; those of minicc with `_Compiler`, its own (`min`, `max`) with all passes."""
    ours = func.__module__.startswith("minicc.")
    return _usual_compile(
        typingctx, targetctx, func, args, return_type, flags, locals, library, _Compiler if ours else pipeline_class
    )


@lru_cache(maxsize=4096)
def _known_call_type(function: Any, context: Any, arguments: Any, keywords: Any) -> Any:
    return _usual_call_type(function, context, arguments, dict(keywords))


def _call_type(function: Any, context: Any, arguments: Any, keywords: Any) -> Any:
    """What an operator or intrinsic makes of its arguments' types, found once: Numba goes through all its rules each time."""
    return _known_call_type(function, context, tuple(arguments), tuple(keywords.items()))


def _cpu_registry(_template: Any, _reason: str) -> Any:
    """Where Numba registers what it makes for the CPU.

    It looks for new declarations in all its registries at every call of an intrinsic, in case it has gone from one target
    to another since.
    """
    return builtin_registry


@contextmanager
def _kernels_only(context: Any) -> Iterator[None]:
    """Until the end, Numba compiles as this module says; the caller holds Numba's lock."""
    changes: tuple[tuple[Any, str, Any], ...] = (
        (context, "_internal_codegen", _codegen()),
        (compiler, "compile_extra", _compile),
        (types.Function, "get_call_type", _call_type),
        (_IntrinsicTemplate, "_get_target_registry", _cpu_registry),
    )
    usual = [getattr(owner, name) for owner, name, _ in changes]
    for owner, name, ours in changes:
        setattr(owner, name, ours)
    try:
        yield
    finally:
        for (owner, name, _), before in zip(changes, usual, strict=True):
            setattr(owner, name, before)


def _flags(contract: bool) -> Any:
    """Numba's flags for a kernel; contract: whether a product and a sum may become one fused operation."""
    flags = compiler.Flags()
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True  # leaves the library open
    flags.nrt = flags.boundscheck = flags.enable_pyobject = flags.enable_looplift = False
    flags.error_model = "numpy"
    flags.fastmath = cpu.FastMathOptions(set(FASTMATH) if contract else set(FASTMATH) - {"contract"})
    return flags


def load_function(source: str, symbol: str, name: str = "kernel") -> Any:
    """Execute the module text and take its function `name`."""
    if config.DISABLE_JIT:
        raise CodegenError(
            "Numba's compiler is switched off", where=symbol, hint="unset the variable NUMBA_DISABLE_JIT"
        )
    file = f"<kernel {symbol}>"
    # Numba quotes source lines in its messages.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {"__name__": f"minicc.generated.{symbol}"}
    try:
        exec(compile(source, file, "exec"), namespace)
        return namespace[name]
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise CodegenError("the text of a kernel is not a valid module", where=symbol, why=why) from error


def lower_function(function: Any, symbol: str, triple: str, signature: Signature = KERNEL) -> Any:
    """Numba's unoptimised LLVM module of the function and its helpers, with a C entry named `symbol`."""
    context, typing = cpu_target.target_context, cpu_target.typing_context
    context.refresh()  # makes intrinsics known that were defined since the last call
    typing.refresh()
    flags = _flags(function.__globals__.get(CONTRACT, True))
    try:
        with _kernels_only(context):
            result = _compile(typing, context, function, signature, types.void, flags, {})
    except Exception as error:  # Numba's own, and whatever an intrinsic raises
        line = getattr(getattr(error, "loc", None), "line", None)
        text = linecache.getline(f"<kernel {symbol}>", line).strip() if line else ""
        where = f"{symbol}, line {line}: {text}" if text else symbol
        raise CodegenError("a kernel does not compile", where=where, why=str(error)) from error
    finally:
        linecache.cache.pop(f"<kernel {symbol}>", None)
    library, description = result.library, result.fndesc
    library.add_ir_module(_entry(context, description, symbol, triple, signature))
    module = library._final_module.clone()
    for linked in library._linking_libraries:
        if linked is not rtsys.library:  # memory management, which kernels do without
            module.link_in(linked._get_module_for_linking(), preserve=True)
    for definition in (*module.functions, *module.global_variables):
        if not definition.is_declaration and definition.name != symbol:
            definition.linkage = "internal"
    return module


def _entry(context: Any, description: Any, symbol: str, triple: str, signature: Signature) -> ir.Module:
    """The C function that calls Numba's function and reports its status through `RAISED`."""
    convention = context.call_conv
    result, operands = description.restype, description.argtypes
    module = ir.Module(f"{symbol}.entry")
    module.triple = triple
    inner_type = convention.get_function_type(result, operands)
    inner = ir.Function(module, inner_type, description.llvm_func_name)
    arguments = [context.get_value_type(argument) for argument in signature]
    entry = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), symbol)
    builder = ir.IRBuilder(entry.append_basic_block("entry"))
    status, _ = convention.call_function(builder, inner, result, operands, entry.args)
    with builder.if_then(status.is_error, likely=False):
        builder.call(ir.Function(module, ir.FunctionType(ir.VoidType(), []), RAISED), [])
    builder.ret_void()
    return module
