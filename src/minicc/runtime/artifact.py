"""Saved modules: one zip file, stored uncompressed, readable with any zip tool and free of pickle.

    manifest.json   format, versions, target, options, and size and digest of every other member
    signature       SHA-256 of the manifest, and its HMAC by the saving user's key
    program.json    the program (lower/serialize)
    weights.bin     constants, each at a multiple of 64 bytes, memory-mapped on load
    objects/*.o     machine code by symbol        kernels/*.py    its texts, for reading, never executed
    report.json, graph.txt    what compilation had to say
    variants/1/...            the same but for weights, of the module for another target, where there are several: a machine
                              takes the first that it can run. Weights that are equal are in weights.bin once.

Everything is checked against the manifest before it is used; digests are those of runtime/digest. Machine code is used
only when the signature is this user's (or with `trust=True`) and versions and target fit; otherwise kernels are generated
again from the program.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import secrets
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minicc.errors import ArtifactError
from minicc.ir.types import DType
from minicc.lower.program import Program
from minicc.lower.serialize import from_data, to_data
from minicc.options import Options
from minicc.runtime.code import Code, build_code
from minicc.runtime.digest import digest, digest_stream
from minicc.runtime.executor import executor_sources
from minicc.runtime.installed import installation
from minicc.runtime.memory import ALIGNMENT
from minicc.runtime.store import Store
from minicc.runtime.validate import check_program
from minicc.targets.cpu import CpuTarget, host_target
from minicc.targets.cuda import CudaTarget
from minicc.targets.parse import Target, fitting

FORMAT = "minicc-3"
_REQUIRED = ("manifest.json", "signature", "program.json", "weights.bin")
_MEMBER = re.compile(r"(report\.json|graph\.txt|(kernels/\w{1,128}\.py)|(objects/\w{1,128}\.o))", re.ASCII)
_VARIANT = re.compile(r"variants/[1-9]\d?/", re.ASCII)
_MAX_MEMBERS = 1 << 16
_MAX_TEXT = 1 << 30
# Options that belong to the program; the others are the loading caller's.
_KEPT_OPTIONS = ("threads", "precision", "winograd", "fft", "rounding", "opt_level", "max_bytes", "max_loop_iterations")
_LOCAL_HEADER = 30
_LARGE_FIELD = 20  # bytes
_PADDING_FIELD = b"\x35\xd9"  # an extra field that zip tools ignore
Array = np.ndarray[Any, Any]
Buffer = bytes | memoryview


class Saved(NamedTuple):
    """What a file holds, checked and ready for a module.

    others: the same for other targets.
    """

    program: Program
    code: Code
    target: Target
    options: Options
    pass_runs: int
    notes: Mapping[str, Any]
    others: tuple[Saved, ...] = ()


def save(path: str | os.PathLike[str], saved: Saved, store: Store, *, durable: bool = True) -> None:
    """Write a module to a file, replacing it in one step. Raises ArtifactError when that cannot be done.

    durable: wait until the disk has it.
    """
    every = sorted((saved, *saved.others), key=lambda variant: variant.target.preference, reverse=True)
    programs = [to_data(variant.program) for variant in every]
    weights, tables = _layout([arrays for _, arrays in programs])
    members: dict[str, list[Buffer]] = {"weights.bin": weights}
    for number, (variant, (data, _), table) in enumerate(zip(every, programs, tables)):
        texts = _texts(variant, {**data, "weights": table, "symbols": list(variant.code.symbols)})
        members |= {_folder(number) + name: [text] for name, text in texts.items()}
    described = [{"target": asdict(variant.target), "pass_runs": variant.pass_runs} for variant in every]
    manifest = {
        "format": FORMAT,
        **({} if isinstance(saved.target, CudaTarget) else {"installation": installation(), **_versions()}),
        **described[0],
        **({"variants": described[1:]} if saved.others else {}),
        "options": {name: getattr(saved.options, name) for name in _KEPT_OPTIONS},
        "members": {name: [sum(map(len, parts)), digest_stream(parts)] for name, parts in members.items()},
    }
    text = json.dumps(manifest, indent=1).encode()
    signature = hashlib.sha256(text).digest() + store.sign(text)
    _write(Path(path), {"manifest.json": [text], "signature": [signature], **members}, durable)


def _texts(saved: Saved, program: Mapping[str, Any]) -> dict[str, bytes]:
    """The members of one variant, but for its weights."""
    notes = dict(saved.notes)
    return {
        "program.json": json.dumps(program, separators=(",", ":")).encode(),
        **{f"objects/{symbol}.o": code for symbol, code in saved.code.objects.items()},
        **{f"kernels/{symbol}.py": text.encode() for symbol, text in saved.code.sources.items()},
        "graph.txt": str(notes.pop("graph", "")).encode(),
        "report.json": json.dumps(notes, indent=1, default=str).encode(),
    }


def _folder(variant: int) -> str:
    """Where the members of a variant are."""
    return f"variants/{variant}/" if variant else ""


def read(
    path: str | os.PathLike[str],
    store: Store,
    options: Options,
    *,
    trust: bool = False,
    own: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Saved:
    """Read and check a saved module; code is built anew where the file's own may not or cannot be used.

    options: the caller's; the file's own are kept for what belongs to the program. own: refuse a file that this user has not
    signed, and take it for one of this toolchain. Raises ArtifactError.
    """
    members = _open(Path(path))
    manifest_text = bytes(members["manifest.json"])
    signature = bytes(members["signature"])
    if signature[:32] != hashlib.sha256(manifest_text).digest():
        raise ArtifactError(
            "manifest.json is damaged", hint="copy the file again, or compile the model again"
        )
    trusted = trust or store.verify(manifest_text, signature[32:])
    if own and not trusted:
        raise ArtifactError(f"{path} is not signed by this user")
    manifest = _json(manifest_text, "manifest.json")
    try:
        if manifest.get("format") != FORMAT:
            raise ArtifactError(
                f"the file has format {manifest.get('format')!r}, this minicc reads {FORMAT!r}",
                hint="compile the model again",
            )
        _check_members(members, manifest["members"])
        described = [manifest, *manifest.get("variants", ())]
        targets = [_target(variant["target"]) for variant in described]
        pass_runs = [int(variant["pass_runs"]) for variant in described]
        kept = _options(manifest["options"])
        merged = options.override(
            **{k: v for k, v in kept.items() if getattr(options, k) == getattr(Options(), k)}
        )
    except ArtifactError:
        raise
    except Exception as error:  # a manifest can be wrong in any way
        raise ArtifactError("the manifest is not valid", why=f"{type(error).__name__}: {error}") from error

    def variant(number: int) -> tuple[Saved, bool]:
        """A variant with the file's code, and whether that may be used and is complete."""
        folder, target = _folder(number), targets[number]
        own_members = {name.removeprefix(folder): data for name, data in members.items() if name.startswith(folder)}
        if "program.json" not in own_members:
            raise ArtifactError(f"the file has no program of variant {number}")
        data = _json(bytes(own_members["program.json"]), "program.json")
        program = from_data(data, _constants(data, members["weights.bin"]))
        check_program(program)
        code = _code_of(data, own_members, program, isinstance(target, CpuTarget)) if trusted else None
        notes = _json(bytes(own_members.get("report.json", b"{}")), "report.json")
        notes["graph"] = bytes(own_members.get("graph.txt", b"")).decode(errors="replace")
        saved = Saved(program, code or Code((), {}, {}), target, merged, pass_runs[number], notes)
        return saved, code is not None

    chosen = fitting(targets)
    saved, complete = variant(chosen)
    others = [variant(number) for number in range(len(targets)) if number != chosen]
    target = saved.target
    runs = isinstance(target, CudaTarget) or not target.missing_features()
    if not (complete and runs and (own or _fits(manifest, target))):
        if isinstance(target, CpuTarget):
            # Packed weights and tiles keep the shape they were lowered for; instructions are this machine's, as
            # nothing of an unknown file reaches LLVM.
            width, registers = target.vector_width, target.vector_registers
            target = replace(host_target(), vector_width=width, vector_registers=registers)
        saved = saved._replace(target=target, code=build_code(saved.program.kernels, target, store, progress))
    return saved._replace(others=tuple(other for other, has_code in others if has_code))


def _versions() -> dict[str, str]:
    from importlib import metadata  # slow to import

    from minicc.codegen.build import toolchain

    versions = {package: metadata.version(package) for package in ("numba", "llvmlite")}
    return {"toolchain": toolchain(), **versions}


def _fits(manifest: Mapping[str, Any], target: Target) -> bool:
    """Whether the file's machine code was made by this very toolchain; cubins are complete."""
    if isinstance(target, CudaTarget) or manifest.get("installation") == installation():
        return True
    return all(manifest.get(k) == v for k, v in _versions().items())


def _cuda_target(data: Any) -> CudaTarget:
    values = {f.name: data[f.name] for f in fields(CudaTarget)}
    values["capability"] = tuple(map(int, data["capability"]))
    target = CudaTarget(**values)
    numbers = (*target.capability, target.multiprocessors, target.shared_bytes, target.registers, target.l2_bytes)
    if len(target.capability) != 2 or not all(type(n) is int and n >= 0 for n in numbers):
        raise ArtifactError("the target is not valid", why=f"{data}")
    if not re.fullmatch(r"sm_\d{2,3}a?|compute_\d{2,3}", target.arch) or not re.fullmatch(r"cuda(:\w{1,16})?", target.name):
        raise ArtifactError("the target is not valid", why=f"{target.name!r}, {target.arch!r}")
    return target


def _target(data: Any) -> Target:
    if "arch" in data:
        return _cuda_target(data)
    values = {f.name: data[f.name] for f in fields(CpuTarget)}
    target = CpuTarget(**values)
    for field in fields(CpuTarget):
        if type(values[field.name]).__name__ != str(field.type):
            raise ArtifactError("the target is not valid", why=f"{field.name} = {values[field.name]!r}")
    if target.vector_width not in (4, 8, 16) or target.vector_registers not in (16, 32):
        raise ArtifactError("the target is not valid", why=f"{target.vector_width} lanes")
    if min(target.l1_bytes, target.l2_bytes) < 1024:
        raise ArtifactError("the target is not valid", why="cache sizes")
    return target


def _options(data: Any) -> dict[str, Any]:
    """The options that belong to the program; those that files of an earlier minicc lack are the usual ones."""
    usual = Options()
    found = {name: data.get(name, getattr(usual, name)) for name in _KEPT_OPTIONS}
    for name, value in found.items():
        allowed = (int, type(None)) if name == "threads" else (type(getattr(usual, name)),)
        if type(value) not in allowed:
            raise ArtifactError("the manifest is not valid", why=f"option {name} = {value!r}")
    return found


def _code_of(data: Mapping[str, Any], members: Mapping[str, memoryview], program: Program, cpu: bool) -> Code | None:
    """The file's own code, or None when it is incomplete."""
    symbols = data.get("symbols")
    if (
        not isinstance(symbols, list)
        or len(symbols) != len(program.kernels)
        or not all(isinstance(s, str) for s in symbols)
    ):
        return None
    if any(f"objects/{s}.o" not in members for s in symbols):
        return None
    wanted = [*symbols, *(s for s in (executor_sources() if cpu else ()) if f"objects/{s}.o" in members)]
    objects = {s: bytes(members[f"objects/{s}.o"]) for s in dict.fromkeys(wanted)}
    texts = {
        s: bytes(members.get(f"kernels/{s}.py", b"")).decode(errors="replace") for s in dict.fromkeys(symbols)
    }
    return Code(tuple(symbols), texts, objects)


def _layout(programs: Sequence[Sequence[Array]]) -> tuple[list[Buffer], list[list[list[int]]]]:
    """(the parts of weights.bin in order, for each program [offset, bytes] of each array).

    Arrays of several programs that are equal are stored once.
    """
    tables: list[list[list[int]]] = []
    parts: list[Buffer] = []
    known: dict[tuple[int, str], list[int]] = {}
    at = 0
    for arrays in programs:
        tables.append([])
        for array in arrays:
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            key = (len(raw), digest(raw)) if len(programs) > 1 else (len(known), "")
            if key not in known:
                skip = -at % ALIGNMENT
                known[key] = [at + skip, len(raw)]
                parts += [bytes(skip), raw]
                at += skip + len(raw)
            tables[-1].append(known[key])
    return parts, tables


def _constants(
    data: Mapping[str, Any], weights: memoryview
) -> Callable[[int, DType, tuple[int, ...]], Array]:
    table = data.get("weights")
    if not isinstance(table, list):
        raise ArtifactError("the program is not valid", why="no table of weights")
    known: dict[tuple[int, DType, tuple[int, ...]], Array] = {}

    def constant(number: int, dtype: DType, shape: tuple[int, ...]) -> Array:
        key = (number, dtype, shape)
        if key not in known:
            offset, size = table[number]
            count = int(np.prod([int(d) for d in shape], dtype=object)) if shape else 1
            fits = type(offset) is int and type(size) is int and offset >= 0 and offset + size <= len(weights)
            if (
                not fits
                or offset % ALIGNMENT
                or count * dtype.numpy.itemsize != size
                or dtype.numpy.hasobject
            ):
                raise ArtifactError(
                    "a constant does not fit the weights", why=f"number {number}, {dtype}{list(shape)}"
                )
            known[key] = (
                np.frombuffer(weights[offset : offset + size], np.uint8).view(dtype.numpy).reshape(shape)
            )
        return known[key]

    return constant


def _check_members(members: Mapping[str, memoryview], listed: Mapping[str, Any]) -> None:
    present = set(members) - {"manifest.json", "signature"}
    if present != set(listed):
        odd = ", ".join(sorted(present ^ set(listed))[:5])
        raise ArtifactError("the file's members are not those of its manifest", why=odd)
    for name, (size, expected) in listed.items():
        if len(members[name]) != size or digest(members[name]) != expected:
            raise ArtifactError(
                f"{name} is damaged",
                why="its size or SHA-256 is not that of the manifest",
                hint="copy the file again, or compile the model again",
            )


def _json(text: bytes, name: str) -> dict[str, Any]:
    if len(text) > _MAX_TEXT:
        raise ArtifactError(f"{name} is too large")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name} is not valid JSON", why=str(error)) from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{name} is not a table")
    return data


def _write(path: Path, members: Mapping[str, Sequence[Buffer]], durable: bool) -> None:
    temporary = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name, parts in members.items():
                    info = zipfile.ZipInfo(name)  # its fixed date makes equal modules equal files
                    info.external_attr = 0o644 << 16
                    info.file_size = sum(map(len, parts))
                    large = info.file_size * 1.05 > zipfile.ZIP64_LIMIT  # then zipfile adds a field of its own
                    if name == "weights.bin":
                        info.extra = _padding(file.tell() + _LOCAL_HEADER + len(name) + _LARGE_FIELD * large)
                    with archive.open(info, "w", force_zip64=large) as member:
                        for part in parts:
                            member.write(part)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written", why=str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _padding(header_end: int) -> bytes:
    """An extra field after which the member's data is aligned."""
    size = -(header_end + 4) % ALIGNMENT
    return _PADDING_FIELD + size.to_bytes(2, "little") + bytes(size)


def _open(path: Path) -> dict[str, memoryview]:
    """Views of all members on the mapped file. Raises ArtifactError for anything but a plain stored zip."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ArtifactError(f"{path} is empty")
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                members = _views(mapped, infos)
    except ArtifactError:
        raise
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read", why=error.strerror or str(error)) from error
    except Exception as error:  # zipfile raises many kinds for damaged files
        raise ArtifactError(
            f"{path} is not a saved module", why=f"{type(error).__name__}: {error}"
        ) from error
    missing = [name for name in _REQUIRED if name not in members]
    if missing:
        raise ArtifactError(f"{path} is not a saved module", why=f"it has no {', '.join(missing)}")
    return members


def _is_member(name: str) -> bool:
    """Whether a file may have such a member beside the required ones."""
    own = _VARIANT.sub("", name, count=1) if _VARIANT.match(name) else name
    return bool(_MEMBER.fullmatch(own)) or (own != name and own == "program.json")


def _views(mapped: memoryview, infos: list[zipfile.ZipInfo]) -> dict[str, memoryview]:
    if len(infos) > _MAX_MEMBERS:
        raise ArtifactError("the file has too many members")
    members: dict[str, memoryview] = {}
    for info in infos:
        name = info.filename
        if name in members:
            raise ArtifactError(f"the file has two members called {name!r}")
        if name not in _REQUIRED and not _is_member(name):
            raise ArtifactError(f"the file has an unknown member {name[:100]!r}")
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.file_size != info.compress_size
            or info.flag_bits & 0x1
        ):
            raise ArtifactError(f"member {name!r} is compressed or encrypted")
        header = mapped[info.header_offset : info.header_offset + _LOCAL_HEADER]
        if len(header) != _LOCAL_HEADER or bytes(header[:4]) != b"PK\x03\x04":
            raise ArtifactError(f"member {name!r} is damaged")
        name_size, extra_size = (
            int.from_bytes(header[26:28], "little"),
            int.from_bytes(header[28:30], "little"),
        )
        start = info.header_offset + _LOCAL_HEADER + name_size + extra_size
        if start + info.file_size > len(mapped):
            raise ArtifactError(f"member {name!r} is cut short")
        members[name] = mapped[start : start + info.file_size]
    return members
