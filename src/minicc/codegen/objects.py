"""From the source text of one kernel to the bytes of one object file.

Numba types the kernel and lowers it to LLVM IR (codegen/numba_to_llvm.py); everything after that is done here, so that the
target machine is ours to choose and the object needs neither Numba nor Python. It neither caches nor loads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from llvmlite import binding as llvm
from numba.core import types
from numba.core.compiler_lock import global_compiler_lock

from minicc.codegen.numba_to_llvm import EPILOGUE, RAISED, load_function, lower_function
from minicc.codegen.symbols import ALLOWED, undefined_symbols
from minicc.errors import CodegenError
from minicc.kernels.cpu.intrinsics import EPILOGUE_SYMBOL
from minicc.kernels.template import split_epilogue
from minicc.targets.cpu import CpuTarget

_TEMPLATE = "minicc.template"  # symbol of a template's kernel until it gets its own


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
            module = lower_function(load_function(source, symbol), symbol, target.triple)
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
    function = load_function(epilogue, symbol, "epilogue")
    *_, acc = module.get_function(EPILOGUE_SYMBOL).arguments
    signature = (*EPILOGUE, types.int32 if str(acc.type) == "i32" else types.float32)
    module.link_in(lower_function(function, EPILOGUE_SYMBOL, triple, signature))
    inlined = module.get_function(EPILOGUE_SYMBOL)
    inlined.linkage = "internal"
    inlined.add_function_attribute("alwaysinline")
    return module


@lru_cache(maxsize=64)
def _template_bitcode(template: str, triple: str) -> bytes:
    data: bytes = lower_function(load_function(template, _TEMPLATE), _TEMPLATE, triple).as_bitcode()
    return data


@lru_cache(maxsize=8)
def _target_machine(triple: str, cpu_name: str, features: str) -> Any:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu_name, features=features, opt=3, reloc="pic", codemodel="small"
    )


def _check_symbols(refused: frozenset[str], symbol: str) -> None:
    if not refused:
        return
    names = sorted(refused)
    if RAISED in refused:
        why = "an operation in it can raise (a helper's error model, a runtime range step, a tuple index)"
    else:
        why = f"it calls {', '.join(names)}"
    intel = any(name.startswith("__svml") for name in names)
    hint = "set NUMBA_DISABLE_INTEL_SVML=1" if intel else "this is a bug of minicc; please report the kernel"
    raise CodegenError("a kernel is not free-standing code", where=symbol, why=why, hint=hint)
