"""From a path, bytes or a ModelProto to a parsed model whose versions minicc knows.

Every way in which a file can fail to be an ONNX model ends in InvalidModelError here. What is inside the
graph is not looked at; external data is opened by `tensors`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx

from minicc.errors import InvalidModelError
from minicc.frontend.weights import OwnFile, without_weights
from minicc.ops.host import newest_opset

OLDEST_OPSET = 1
NEWEST_IR = 14
# protobuf refuses messages of 2 GiB and more
_MAX_FILE = (1 << 31) - 1
_MAGIC = (
    (0, b"PK\x03\x04", "a zip archive"),
    (4, b"ORTM", "an ONNX Runtime (.ort) file"),
    (4, b"TFL3", "a TensorFlow Lite file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x7fELF", "an executable"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)


@dataclass(frozen=True)
class ModelFile:
    """A parsed model, the folder of its external data (None: it may have none), and its name for messages.

    own: where its larger weights are, which `proto` then refers to as external data; None where it holds them itself.
    """

    proto: onnx.ModelProto
    base_dir: Path | None
    name: str
    own: OwnFile | None = None


@contextmanager
def open_model(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto,
    base_dir: str | os.PathLike[str] | None = None,
) -> Iterator[ModelFile]:
    """Parse a model and check its IR version and opsets; its file stays open inside. Raises InvalidModelError."""
    folder = Path(base_dir) if base_dir is not None else None
    if isinstance(source, onnx.ModelProto):
        _check_versions(source, "ModelProto")
        yield ModelFile(source, folder, "ModelProto")
        return
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), "bytes"
        own = OwnFile(data, len(data))
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        name = path.name or str(path)
        own = _open(path)
        folder = folder if folder is not None else path.absolute().parent
    else:
        raise InvalidModelError(f"a model is a path, bytes or onnx.ModelProto, not {type(source).__name__}")
    with closing(own):
        proto = _parse(own, name)
        _check_versions(proto, name)
        yield ModelFile(proto, folder, name, own)


def _open(path: Path) -> OwnFile:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InvalidModelError(f"{path} is not a file")
        if status.st_size > _MAX_FILE:
            raise InvalidModelError(
                f"{path} is larger than the 2 GiB of an ONNX file", hint="save the weights as external data"
            )
        file = path.open("rb")
        return OwnFile(file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        raise InvalidModelError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise InvalidModelError(f"{path} cannot be read", why=str(error)) from error


def _parse(own: OwnFile, name: str) -> onnx.ModelProto:
    if not own.size:
        raise InvalidModelError(f"{name} is empty")
    with own.whole() as data:
        for offset, magic, what in _MAGIC:
            if data[offset : offset + len(magic)] == magic:
                raise InvalidModelError(f"{name} is {what}, not an ONNX model")
        rest = without_weights(data, own.location)
    try:
        return onnx.ModelProto.FromString(rest)
    except Exception as error:  # protobuf raises its own kinds
        raise InvalidModelError(
            f"{name} is not an ONNX model, or is damaged",
            why=str(error) or type(error).__name__,
            hint="the file may be truncated, or nested deeper than protobuf's limit of 100 messages",
        ) from error


def _check_versions(proto: onnx.ModelProto, name: str) -> None:
    if not proto.HasField("graph"):
        raise InvalidModelError(f"{name} holds no graph", hint="it may not be an ONNX model")
    if not 1 <= proto.ir_version <= NEWEST_IR:
        raise InvalidModelError(f"{name} has IR version {proto.ir_version}, known are 1 to {NEWEST_IR}")
    check_opsets(opset_versions(proto.opset_import, name), name)


def opset_versions(imports: object, where: str) -> dict[str, int]:
    """Domain to version of the imported operator sets. Raises InvalidModelError for two versions of one
    domain.
    """
    versions: dict[str, int] = {}
    for entry in imports:  # type: ignore[attr-defined]
        domain = canonical_domain(entry.domain)
        if versions.setdefault(domain, entry.version) != entry.version:
            raise InvalidModelError(f"{where} imports two versions of operator set {domain or 'ai.onnx'!r}")
    return versions


def check_opsets(versions: dict[str, int], where: str) -> None:
    """Refuse a missing operator set, and versions of ai.onnx outside those that can be upgraded."""
    if not versions:
        raise InvalidModelError(f"{where} imports no operator set", hint="opset_import is required")
    version = versions.get("", newest_opset())
    if not OLDEST_OPSET <= version <= newest_opset():
        raise InvalidModelError(
            f"{where} uses opset {version}, supported are {OLDEST_OPSET} to {newest_opset()}",
            hint="export again" if version > newest_opset() else "convert it with onnx.version_converter",
        )


def canonical_domain(domain: str) -> str:
    """The IR's name of a domain: "ai.onnx" is ""."""
    return "" if domain == "ai.onnx" else domain
