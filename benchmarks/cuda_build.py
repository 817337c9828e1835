"""CUDA's template kernels as text, and the machine code of cubins as text; minicc.codegen.cuda compiles."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import minicc.kernels
from minicc.codegen.cuda import find_tool
from minicc.kernels.cuda_tiles import ALL_TILES, STREAM, Tile, conv_constants, conv_file, product_constants, product_file
from minicc.kernels.template import epilogue_base

KERNELS = Path(minicc.kernels.__path__[0]) / "cuda"


def render(name: str, constants: Mapping[str, object], changes: Mapping[str, str] | None = None) -> str:
    """A kernel file's text with its constants put in, and further replacements."""
    text = (KERNELS / f"{name}.py").read_text(encoding="utf-8")
    for key, value in constants.items():
        text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        if count != 1:
            raise KeyError(f"{name} has no constant {key}")
    for old, new in (changes or {}).items():
        text = text.replace(old, new)
    return text


def gemm_text(element: str, tile: Tile, piece: int = 16, splits: int = 1, b_piece: int = 16) -> str:
    """The text of a product. piece, b_piece: bytes that divide A and B and their strides. splits: as in kernels' constants."""
    given = {"ELEMENT": element, "TILE": ALL_TILES.index(tile), "SPLITS": splits, "PIECE": piece, "B_PIECE": b_piece,
             "B_ROUNDS": 1}  # fmt: skip
    return render(product_file(given), product_constants(given) | _workspace("gemm", splits), _changes(element))


def conv_text(element: str, tile: Tile, piece: int = 16, splits: int = 1) -> str:
    """The text of a convolution. piece: bytes that divide X, its strides and its channels."""
    given = {"ELEMENT": element, "TILE": ALL_TILES.index(tile), "SPLITS": splits, "PIECE": piece}
    return render(conv_file(given), conv_constants(given) | _workspace("conv", splits), _changes(element))


def _workspace(template: str, splits: int) -> dict[str, object]:
    """Numbers of words, where a workspace follows the only word of the file's own epilogue."""
    words = epilogue_base(template) + 1
    return {"WORKSPACE": words, "WORDS": words + 1} if splits == STREAM else {}


def _changes(element: str) -> dict[str, str]:
    return {"ptr_f32": "ptr_i32"} if element in ("s8", "u8") else {}


def machine_text(cubin: bytes) -> str:
    """The SASS of a cubin. Raises RuntimeError without cuobjdump."""
    tool = find_tool("cuobjdump")
    if tool is None:
        raise RuntimeError("cuobjdump is not installed: pip install nvidia-cuda-cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
