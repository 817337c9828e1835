"""From the source text of one kernel to the bytes of one object file.

Numba types the kernel and lowers it to LLVM IR; everything after that is done here, so that the target
machine is ours to choose and the object needs neither Numba nor Python. This is the only module that touches
private Numba names, and the reason why pyproject.toml pins numba exactly. It neither caches nor loads.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from llvmlite import binding as llvm
from llvmlite import ir
from numba.core import codegen, compiler, config, cpu, types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.imputils import builtin_registry
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys
from numba.core.typing.templates import _IntrinsicTemplate

from minicc.codegen.symbols import ALLOWED, undefined_symbols
from minicc.errors import CodegenError
from minicc.kernels.cpu.intrinsics import EPILOGUE_SYMBOL, FASTMATH
from minicc.kernels.template import split_epilogue
from minicc.targets.cpu import CpuTarget

# void kernel(int64 *args, int64 begin, int64 end)
SIGNATURE = (types.CPointer(types.int64), types.int64, types.int64)

Signature = tuple[Any, ...]
# void epilogue(int64 *args, int64 b0, int64 b1, int64 i, int64 j, float or int32 acc): all but the last
EPILOGUE_SIGNATURE = (types.CPointer(types.int64), *([types.int64] * 4))
_TEMPLATE = "minicc.template"  # symbol of a template's kernel until it gets its own

# A kernel's text sets this to False when its products and sums must round one by one (codegen/source.py).
CONTRACT = "CONTRACT"

# Called by the entry when the kernel reports an error. It is never defined: when nothing in the kernel can
# raise, optimisation removes the call, and a call that remains fails the check of undefined symbols.
_RAISED = "minicc.kernel_raised"


def compile_object(source: str, symbol: str, target: CpuTarget) -> bytes:
    """Compile the function `kernel` of a Python module given as text to an object that defines `symbol`.

    source: module text; its `kernel(args, begin, end)` follows the kernel contract.
    Returns the relocatable object for the target; equal input gives equal bytes.
    Raises CodegenError naming the kernel when it does not compile, can raise, or calls what it must not.
    """
    if symbol in ALLOWED:
        raise CodegenError("a kernel has the name of a library function", where=symbol)
    module, machine = _optimised_module(source, symbol, target)
    data: bytes = machine.emit_object(module)
    undefined = undefined_symbols(data)
    if undefined is None:
        declared = [function.name for function in module.functions if function.is_declaration]
        undefined = frozenset(name for name in declared if not name.startswith("llvm."))
    _check_symbols(undefined - ALLOWED, symbol)
    return data


def assembly(source: str, symbol: str, target: CpuTarget) -> str:
    """The target's assembly text of a kernel, as `compile_object` compiles it; symbols are not checked."""
    module, machine = _optimised_module(source, symbol, target)
    text: str = machine.emit_assembly(module)
    return text


def llvm_ir(source: str, symbol: str, target: CpuTarget) -> str:
    """The optimised LLVM IR of a kernel."""
    return str(_optimised_module(source, symbol, target)[0])


def _optimised_module(source: str, symbol: str, target: CpuTarget) -> tuple[Any, Any]:
    """(optimised LLVM module whose only external function is `symbol`, target machine)."""
    machine = _target_machine(target.triple, target.cpu, target.features)
    with global_compiler_lock:
        parts = split_epilogue(source)
        if parts is None:
            module = _lower(_load_function(source, symbol), symbol, target.triple)
        else:
            module = _with_epilogue(*parts, symbol, target.triple)
    module.triple = target.triple
    module.data_layout = str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = True
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return module, machine


def _with_epilogue(template: str, epilogue: str, symbol: str, triple: str) -> Any:
    """A template's module, lowered once per process for all its epilogues, with one epilogue linked in."""
    module = llvm.parse_bitcode(_template_bitcode(template, triple))
    module.get_function(_TEMPLATE).name = symbol
    function = _load_function(epilogue, symbol, "epilogue")
    *_, acc = module.get_function(EPILOGUE_SYMBOL).arguments
    signature = (*EPILOGUE_SIGNATURE, types.int32 if str(acc.type) == "i32" else types.float32)
    module.link_in(_lower(function, EPILOGUE_SYMBOL, triple, signature))
    inlined = module.get_function(EPILOGUE_SYMBOL)
    inlined.linkage = "internal"
    inlined.add_function_attribute("alwaysinline")
    return module


@lru_cache(maxsize=64)
def _template_bitcode(template: str, triple: str) -> bytes:
    data: bytes = _lower(_load_function(template, _TEMPLATE), _TEMPLATE, triple).as_bitcode()
    return data


@lru_cache(maxsize=8)
def _target_machine(triple: str, cpu_name: str, features: str) -> Any:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu_name, features=features, opt=3, reloc="pic", codemodel="small"
    )


def _load_function(source: str, symbol: str, name: str = "kernel") -> Any:
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


@contextmanager
def _only_linking(context: Any) -> Iterator[None]:
    """Until the end, what Numba compiles goes into `_Library`; the caller holds Numba's lock.

    Numba also looks for new declarations in all its registries at every call of an intrinsic, in case it has gone from one
    target to another since; meanwhile it does not.
    """
    usual, context._internal_codegen = context._internal_codegen, _codegen()
    looking = _IntrinsicTemplate._get_target_registry
    _IntrinsicTemplate._get_target_registry = _cpu_registry
    try:
        yield
    finally:
        context._internal_codegen = usual
        _IntrinsicTemplate._get_target_registry = looking


def _cpu_registry(_template: Any, _reason: str) -> Any:
    """Where Numba registers what it makes for the CPU."""
    return builtin_registry


def _flags(contract: bool) -> Any:
    """Numba's flags for a kernel; contract: whether a product and a sum may become one fused operation."""
    flags = compiler.Flags()
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True  # leaves the library open
    flags.nrt = flags.boundscheck = flags.enable_pyobject = flags.enable_looplift = False
    flags.error_model = "numpy"
    flags.fastmath = cpu.FastMathOptions(set(FASTMATH) if contract else set(FASTMATH) - {"contract"})
    return flags


def _lower(function: Any, symbol: str, triple: str, signature: Signature = SIGNATURE) -> Any:
    """Numba's unoptimised LLVM module of the function and its helpers, with a C entry named `symbol`."""
    context, typing = cpu_target.target_context, cpu_target.typing_context
    context.refresh()  # makes intrinsics known that were defined since the last call
    typing.refresh()
    flags = _flags(function.__globals__.get(CONTRACT, True))
    try:
        with _only_linking(context):
            result = compiler.compile_extra(typing, context, function, signature, types.void, flags, {})
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
    """The C function that calls Numba's function and reports its status through `_RAISED`."""
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
        builder.call(ir.Function(module, ir.FunctionType(ir.VoidType(), []), _RAISED), [])
    builder.ret_void()
    return module


def _check_symbols(refused: frozenset[str], symbol: str) -> None:
    if not refused:
        return
    names = sorted(refused)
    if _RAISED in refused:
        why = "an operation in it can raise (a helper's error model, a runtime range step, a tuple index)"
    else:
        why = f"it calls {', '.join(names)}"
    intel = any(name.startswith("__svml") for name in names)
    hint = "set NUMBA_DISABLE_INTEL_SVML=1" if intel else "this is a bug of minicc; please report the kernel"
    raise CodegenError("a kernel is not free-standing code", where=symbol, why=why, hint=hint)
