"""Objects for many kernels at once: from the store, else compiled, in parallel when that pays.

The key of a kernel is its text, the text of the words it may use, the versions of the compilers and the
target: never the object itself. Numba is imported only when something has to be compiled.
"""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from minicc.errors import CodegenError
from minicc.kernels.template import split_epilogue
from minicc.targets.cpu import available_threads
from minicc.targets.cuda import CudaTarget
from minicc.targets.parse import Target

MOST_PROCESSES = 4  # this one and workers
# Starting a worker costs about as much as compiling this many kernels.
IN_PROCESS = 4
# A worker's answer: a finished kernel, an error, or None when the worker has ended.
Result = tuple[str, bytes] | CodegenError | None

_PACKAGE = Path(__file__).parent.parent


class ObjectStore(Protocol):
    """What `build_objects` needs of the kernel store."""

    def get(self, key: str) -> bytes | None:
        """The object under a key, or None."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Keep an object under a key."""
        ...


@lru_cache(maxsize=2)
def toolchain(cuda: bool = False) -> str:
    """A key of everything but the source and the target that decides about an object (of CUDA: about a cubin)."""
    from importlib import metadata  # slow to import

    digest = hashlib.sha256()
    for package in ("numba", "llvmlite", *(("numba-cuda", "nvidia-cuda-nvcc", "nvidia-nvvm") if cuda else ())):
        with suppress(metadata.PackageNotFoundError):
            digest.update(f"{package} {metadata.version(package)}\n".encode())
    folder, modules = ("cuda", ("cuda.py", "cuda_wait.py")) if cuda else ("cpu", ("numba_to_llvm.py", "objects.py"))
    # Kernel texts import these modules, so their text counts as well.
    kernels = _PACKAGE / "kernels"
    shared = (kernels / "winograd_axes.py",)
    for path in (*sorted((kernels / folder).glob("*.py")), *shared, *(_PACKAGE / "codegen" / m for m in modules)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def object_key(symbol: str, source: str, target: Target) -> str:
    """The store's key of a kernel: hexadecimal, the same in every process and on every machine."""
    facts = "\0".join((toolchain(isinstance(target, CudaTarget)), target.fingerprint(), symbol, source))
    return hashlib.sha256(facts.encode()).hexdigest()


def build_objects(
    sources: Mapping[str, str],
    target: Target,
    store: ObjectStore | None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, bytes]:
    """Objects of all kernels, by symbol and in the order of `sources` (symbol -> module text).

    progress: called with the symbol each time a kernel was compiled (not when the store had it).
    Raises CodegenError naming the first kernel that does not compile.
    """
    keys = {symbol: object_key(symbol, source, target) for symbol, source in sources.items()}
    found = {symbol: store.get(key) for symbol, key in keys.items()} if store else dict.fromkeys(keys)
    missing = {symbol: source for symbol, source in sources.items() if found[symbol] is None}

    def finished(symbol: str, data: bytes) -> None:
        found[symbol] = data
        if store is not None:
            store.put(keys[symbol], data)
        if progress is not None:
            progress(symbol)

    processes = min(available_threads(), MOST_PROCESSES, len(missing) // 2)
    with rare_collections():
        if len(missing) > IN_PROCESS and processes > 1 and sys.executable:
            _compile_together(missing, target, processes, finished)
        for symbol, source in missing.items():
            if found[symbol] is None:
                finished(symbol, compile_here(source, symbol, target))
    return {symbol: data for symbol, data in found.items() if data is not None}


@contextmanager
def rare_collections() -> Iterator[None]:
    """Until the end, Python looks for unreachable cycles less often: compilers make many objects and few cycles."""
    usual = gc.get_threshold()
    gc.set_threshold(max(usual[0], 50_000) if usual[0] else 0, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def compile_here(source: str, symbol: str, target: Target) -> bytes:
    """The object of a kernel, compiled in this process; for CUDA a cubin, or PTX with the zero byte that the driver wants."""
    if isinstance(target, CudaTarget):
        from minicc.codegen.cuda import compile_cubin, compile_ptx

        if target.is_text:
            return compile_ptx(source, symbol, target).encode() + b"\0"
        return compile_cubin(source, symbol, target).data
    from minicc.codegen.objects import compile_object

    return compile_object(source, symbol, target)


def _compile_together(
    sources: Mapping[str, str], target: Target, count: int, finished: Callable[[str, bytes], None]
) -> None:
    """Compile in `count` processes, this one and workers; what a dying worker leaves undone is left to the caller.

    Each worker is fed by one thread of this process over pipes, one kernel at a time, so neither side can
    fill a pipe while the other one waits.
    """
    tasks: SimpleQueue[list[tuple[str, str]]] = SimpleQueue()
    for group in _groups(sources, -(-len(sources) // (2 * count))):
        tasks.put(group)
    results: SimpleQueue[Result] = SimpleQueue()
    workers: list[subprocess.Popen[bytes]] = []
    feeders: list[threading.Thread] = []

    def take(result: Result) -> bool:
        """Hand a result on; whether it was one."""
        if isinstance(result, CodegenError):
            raise result
        if result is not None:
            finished(*result)
        return result is not None

    try:
        for _ in range(count - 1):
            workers.append(_start_worker())
            feeder = threading.Thread(
                target=_feed, args=(workers[-1], tasks, results, target), name="compile"
            )
            feeder.start()
            feeders.append(feeder)
        running = count - 1
        with suppress(Empty):
            while True:
                for symbol, source in tasks.get_nowait():
                    finished(symbol, compile_here(source, symbol, target))
                    while not results.empty():
                        running -= not take(results.get())
        while running:
            running -= not take(results.get())
    except OSError:  # no process can be started here
        return
    finally:
        for worker in workers:
            worker.kill()  # harmless after a normal end
        for feeder in feeders:
            feeder.join()
        for worker in workers:
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    with suppress(OSError):  # unsent words for a worker that is gone
                        pipe.close()
            worker.wait()


def _groups(sources: Mapping[str, str], most: int) -> list[list[tuple[str, str]]]:
    """Up to `most` kernels of one template together, which one process lowers once for all of them.

    So are all kernels whose text only imports them from one module: they share its other functions. Longest first, as a long
    group at the end would keep the other processes waiting.
    """
    templates: dict[str, list[tuple[str, str]]] = {}
    imported: dict[str, list[tuple[str, str]]] = {}
    for symbol, source in sources.items():
        parts = split_epilogue(source)
        if source.startswith("from ") and "def " not in source:
            imported.setdefault(source.partition(" import ")[0], []).append((symbol, source))
        else:
            templates.setdefault(parts[0] if parts else symbol, []).append((symbol, source))
    groups = [kernels[at : at + most] for kernels in templates.values() for at in range(0, len(kernels), most)]
    return [*imported.values(), *sorted(groups, key=lambda group: -sum(len(source) for _, source in group))]


def _start_worker() -> subprocess.Popen[bytes]:
    # With the same search path the worker imports this very package; it never imports the user's main module.
    start = "import sys, json; sys.path[:] = json.loads(sys.argv[1])"
    start += "; from minicc.codegen.worker import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", start, json.dumps(sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _feed(
    worker: subprocess.Popen[bytes],
    tasks: SimpleQueue[list[tuple[str, str]]],
    results: SimpleQueue[Result],
    target: Target,
) -> None:
    """Give one worker kernels until there are none or it dies; ends with None in `results`."""
    try:
        while True:
            for symbol, source in tasks.get_nowait():
                facts = {"target": vars(target), "cuda": isinstance(target, CudaTarget)}
                answer = _ask(worker, {"symbol": symbol, "source": source, **facts})
                if "object" in answer:
                    results.put((symbol, bytes.fromhex(answer["object"])))
                else:
                    results.put(
                        CodegenError(
                            answer["what"], where=answer["where"], why=answer["why"], hint=answer["hint"]
                        )
                    )
    except (Empty, OSError, ValueError, KeyError):  # no work left, a broken pipe, a cut line
        pass
    finally:
        results.put(None)


def _ask(worker: subprocess.Popen[bytes], request: dict[str, Any]) -> dict[str, str]:
    """One request line and its answer line; OSError or ValueError when the worker is gone."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(json.dumps(request).encode() + b"\n")
    worker.stdin.flush()
    answer: dict[str, str] = json.loads(worker.stdout.readline())
    return answer
