"""The PTX interpreter's copy engine: tensor maps, copies of boxes, and barriers in shared memory with phases (mbarrier).

What the hardware may do at any time is done when it hurts most. A box lands as late as possible, when no thread can go on
otherwise; until then its target holds ones, and whoever writes there, or asks for a box where products still read, errs. Who
waits for a phase goes on at once when it ends, before all others. The first look at a phase that has not ended only says so.
With `schedule="warps"` the box that was asked for last lands first. Boxes for several blocks of a cluster land in each by itself.

Encoded maps have a form of their own here, since only NVIDIA's driver knows the real one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from minicc.kernels.cuda_launch import MAP_BYTES, Positions, TensorMap
from minicc.kernels.cuda_tiles import SIZES
from tests.cuda import ptx_cluster
from tests.cuda.ptx_values import Array, PtxError

if TYPE_CHECKING:
    from tests.cuda.ptx_interpreter import Block

Parts = tuple[str, ...]
MAGIC = 0x6D696E69636300
GROUP = 128
RANK = 4
NAMES = tuple(SIZES)


def encode(map_: TensorMap) -> bytes:
    """A map as the interpreter reads it. PtxError for what the driver would refuse."""
    size, at = SIZES[map_.element], map_.positions
    fits = (
        map_.address % 16 == 0
        and len(map_.extents) == len(map_.strides) + 1 == RANK
        and len(map_.box) == (RANK if at is None else 2)
        and all(0 < extent <= 1 << 32 for extent in map_.extents)
        and all(0 < stride < 1 << 40 and stride % 16 == 0 for stride in map_.strides)
        and all(0 < side <= 256 for side in map_.box)
        and map_.box[0] * size == 128
    )
    corners = () if at is None else (*at.lower, *at.upper, *at.steps)
    if not fits or not all(-128 <= c <= 127 for c in corners[:4]) or not all(1 <= step <= 8 for step in corners[4:]):
        raise PtxError(f"not a valid map: {map_}")
    numbers = [MAGIC, NAMES.index(map_.element), map_.address, *map_.extents, *map_.strides]
    small = [*map_.box, *corners]
    raw = np.array(numbers, np.int64).tobytes() + np.array([len(small), *small], np.int16).tobytes()
    return raw.ljust(MAP_BYTES, b"\0")


def decode(raw: bytes) -> TensorMap:
    """The inverse of `encode`; PtxError for anything else."""
    numbers = np.frombuffer(raw, np.int64).tolist()
    if numbers[0] != MAGIC:
        raise PtxError("there is no tensor map")
    first = 2 + 2 * RANK
    count, *small = np.frombuffer(raw[8 * first :], np.int16).tolist()
    at = None
    if count > RANK:
        lower, upper, steps = ((small[i], small[i + 1]) for i in (2, 4, 6))
        at = Positions(lower, upper, steps)
    box = tuple(small[: 2 if at else RANK])
    return TensorMap(0, numbers[2], NAMES[numbers[1]], tuple(numbers[3 : 3 + RANK]), tuple(numbers[3 + RANK : first]), box, at)


@dataclass
class Phase:
    """A barrier: arrivals that make a phase; arrivals and bytes missing in the present one; its parity; who has to publish it."""

    arrivals: int
    missing: int
    bytes: int = 0
    parity: int = 0
    unpublished: int = -1


@dataclass
class Box:
    """A copy on its way: bytes of shared memory, what they will be, and the barrier."""

    places: Array
    content: Array
    barrier: int


class Boxes:
    """Barriers of a block, threads that wait for them, and copies on their way.

    busy: bytes of shared memory that no thread may write: barriers, and targets of copies.
    blocked: threads that wait; woken: those that have just been let go, with the warps they work together with.
    """

    def __init__(self, threads: int, shared: int) -> None:
        self.phases: dict[int, Phase] = {}
        self.flying: list[Box] = []
        self.busy = np.zeros(shared, bool)
        self.blocked, self.woken, self.looked = (np.zeros(threads, bool) for _ in range(3))
        self.waits = np.zeros(threads, np.int64)  # for 2 * address + parity
        self.acquired: set[tuple[int, int]] = set()  # thread, address of a map
        self.events = 0  # landings and ends of phases

    def phase(self, address: int) -> Phase:
        found = self.phases.get(address)
        if found is None:
            raise PtxError(f"there is no barrier at {address}")
        return found

    def changed(self, address: int) -> None:
        """Ends the phase of a barrier if nothing is missing, and lets go who waits for it."""
        phase = self.phase(address)
        if phase.missing < 0:
            raise PtxError("more arrivals than a phase has")
        if phase.missing or phase.bytes:
            return
        self.events += 1
        mine = self.blocked & (self.waits == 2 * address + phase.parity)
        phase.parity ^= 1
        phase.missing = phase.arrivals
        self.blocked &= ~mine
        groups = np.unique(np.flatnonzero(mine) // GROUP)
        self.woken |= np.isin(np.arange(len(mine)) // GROUP, groups)

    def wait(self, address: Array, parity: Array, mask: Array) -> Array:
        """Which threads find the phase of this parity ended; of the others those block that have looked before."""
        ended = np.zeros(len(mask), bool)
        for thread in np.flatnonzero(mask):
            ended[thread] = self.phase(int(address[thread])).parity != parity[thread]
        late = mask & ~ended
        self.blocked |= late & self.looked
        self.waits[late] = 2 * address[late] + parity[late]
        self.woken &= ~self.blocked
        self.looked = (self.looked | late) & ~ended
        return ended

    def land(self, block: Block, last_first: bool) -> bool:
        """Completes a copy; False when there is none."""
        if not self.flying:
            return False
        self.events += 1
        box = self.flying.pop(-1 if last_first else 0)
        block.shared[box.places] = box.content
        self.busy[box.places] = False
        self.phase(box.barrier).bytes -= box.places.size
        self.changed(box.barrier)
        return True

    def written(self, places: Array) -> None:
        """PtxError where threads must not write."""
        if self.busy[places].any():
            raise PtxError("a barrier, or the target of a copy on its way, is written")


def mbarrier(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    boxes = block.boxes
    match parts[1]:
        case "init":
            for thread in np.flatnonzero(mask):
                address, arrivals = int(block.address(operands[0])[thread]), int(block.value(operands[1])[thread])
                if address % 8 or not 0 <= address <= block.shared_bytes - 8 or arrivals < 1:
                    raise PtxError("no place for a barrier")
                boxes.phases[address] = Phase(arrivals, arrivals, unpublished=int(thread))
                boxes.busy[address : address + 8] = True
        case "arrive":
            address, remote = block.address(operands[1]), parts[2:4] == ("release", "cluster")
            for thread in np.flatnonzero(mask):
                rank, at = divmod(int(address[thread]), 1 << ptx_cluster.RANK) if remote else (-1, int(address[thread]))
                here = ptx_cluster.member(block, rank).boxes if remote else boxes
                phase = here.phase(at)
                if parts[2] == "expect_tx":
                    phase.bytes += int(block.value(operands[2])[thread])
                phase.missing -= 1
                here.changed(at)
        case "try_wait" if parts[2] == "parity":
            ended = boxes.wait(block.address(operands[1]), block.value(operands[2]).astype(np.int64), mask)
            block.write(operands[0], ended, mask & ~boxes.blocked)
        case _:
            raise PtxError("unknown use of a barrier")


def fence(block: Block, parts: Parts, operands: Parts, mask: Array) -> bool:
    """Fences for the copy engine; False for others."""
    if parts[1] == "mbarrier_init":
        for phase in block.boxes.phases.values():
            if phase.unpublished >= 0 and mask[phase.unpublished]:
                phase.unpublished = -1
        return True
    if parts[1:4] == ("proxy", "tensormap::generic", "acquire"):
        address = block.address(operands[0])
        block.boxes.acquired |= {(int(thread), int(address[thread])) for thread in np.flatnonzero(mask)}
        return True
    return False


def copy(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    """cp.async.bulk.tensor.4d.shared::cluster.global.MODE... [target], [map, {coordinates}], [barrier]

    With MODE "tile" perhaps the blocks of the cluster that get it, with "im2col" the offsets {right, down} from positions.
    """
    wanted = ("async", "bulk", "tensor", f"{RANK}d", "shared::cluster", "global", parts[7], "mbarrier::complete_tx::bytes")
    several = parts[9:] == ("multicast::cluster",)
    if parts[1:9] != wanted or parts[7] not in ("tile", "im2col") or len(operands) != 3 + (several or parts[7] == "im2col"):
        raise PtxError("unknown copy of a box")
    found = re.fullmatch(r"\[\s*(\S+?)\s*,\s*\{(.*)\}\s*\]", operands[1])
    if found is None:
        raise PtxError(f"cannot read {operands[1]}")
    at = [block.value(name.strip()).astype(np.uint32).view(np.int32) for name in found[2].split(",")]
    target, barrier, source = block.address(operands[0]), block.address(operands[2]), block.value(found[1])
    names = operands[3].strip("{}").split(",") if parts[7] == "im2col" else []
    offsets = [block.value(name.strip()) & np.uint64(0xFFFF) for name in names]
    for thread in np.flatnonzero(mask):
        if (int(thread), int(source[thread])) not in block.boxes.acquired:
            raise PtxError("a tensor map is used without its fence")
        rows = _box(block, int(source[thread]), [int(c[thread]) for c in at], [int(o[thread]) for o in offsets])
        whom = int(block.value(operands[3])[thread]) if several else 0
        for other in [ptx_cluster.member(block, r) for r in range(16) if whom >> r & 1] or [block]:
            _start(other, int(target[thread]), int(barrier[thread]), rows)


def _box(block: Block, source: int, at: list[int], offsets: list[int]) -> Array:
    """The numbers of a box, uint8 [rows][8][16], zeros where it reaches outside."""
    memory = block.memory
    if source % 64:
        raise PtxError("a tensor map is no multiple of 64")
    memory.check(np.arange(source, source + MAP_BYTES))
    map_ = decode(memory.bytes[source : source + MAP_BYTES].tobytes())
    if bool(offsets) != (map_.positions is not None):
        raise PtxError("a map of another kind")
    offset, exists = _windows(map_, at, offsets) if map_.positions else _tile(map_, at)
    size = SIZES[map_.element]
    raw = np.zeros((len(offset), size), np.uint8)
    places = map_.address + offset[exists, None] + np.arange(size)
    memory.check(places)
    raw[exists] = memory.bytes[places]
    if map_.element == "tf32":
        raw = _rounded(raw.view(np.float32)[:, 0]).view(np.uint8).reshape(raw.shape)
    return raw.reshape(-1, 8, 16)


def _tile(map_: TensorMap, at: list[int]) -> tuple[Array, Array]:
    """Offsets in bytes of a box's elements, and which of them exist."""
    size = SIZES[map_.element]
    indices = [np.arange(side) + first for side, first in zip(map_.box, at)]
    inside = [(index >= 0) & (index < extent) for index, extent in zip(indices, map_.extents)]
    # From the outermost axis to the innermost: offsets of elements in memory, and which of them exist.
    offset, exists = np.zeros(1, np.int64), np.ones(1, bool)
    for index, there, stride in reversed([*zip(indices, inside, (size, *map_.strides))]):
        offset = (offset[:, None] + index * stride).ravel()
        exists = (exists[:, None] & there).ravel()
    return offset, exists


def _windows(map_: TensorMap, at: list[int], offsets: list[int]) -> tuple[Array, Array]:
    """As `_tile`, for channels of positions: from the given one on along rows, then columns, then images."""
    assert map_.positions is not None
    lower, upper, steps = map_.positions.lower, map_.positions.upper, map_.positions.steps
    channel, *begin = at
    # Positions along width and height, and where the first one is among them.
    counts = [(map_.extents[1 + a] - 1 + upper[a] - lower[a]) // steps[a] + 1 for a in (0, 1)]
    first = [(begin[a] - lower[a]) // steps[a] for a in (0, 1)]
    if any((begin[a] - lower[a]) % steps[a] or not 0 <= first[a] < counts[a] for a in (0, 1)):
        raise PtxError("a window begins at no position")
    number = (begin[2] * counts[1] + first[1]) * counts[0] + first[0] + np.arange(map_.box[1])
    across, rest = number % counts[0], number // counts[0]
    indices = [across * steps[0] + lower[0] + offsets[0], rest % counts[1] * steps[1] + lower[1] + offsets[1], rest // counts[1]]
    offset, exists = np.zeros(len(number), np.int64), np.ones(len(number), bool)
    for index, extent, stride in zip(indices, map_.extents[1:], map_.strides):
        offset, exists = offset + index * stride, exists & (index >= 0) & (index < extent)
    channels = channel + np.arange(map_.box[0])
    inside = (channels >= 0) & (channels < map_.extents[0])
    return (offset[:, None] + channels * SIZES[map_.element]).ravel(), (exists[:, None] & inside).ravel()


def _start(block: Block, target: int, barrier: int, rows: Array) -> None:
    boxes = block.boxes
    if target % 1024:
        raise PtxError("the target of a box is no multiple of 1024")
    if boxes.phase(barrier).unpublished >= 0:
        raise PtxError("the copy engine has not seen a barrier's beginning")
    row = np.arange(len(rows))[:, None, None]
    to = target + row * 128 + ((np.arange(8)[:, None] ^ (row & 7)) << 4) + np.arange(16)
    if to.max() >= block.shared_bytes:
        raise PtxError("a box reaches outside shared memory")
    block.products.written(to.reshape(1, -1), np.array([-1]))
    boxes.written(to)
    block.shared[to] = 0xFF
    boxes.busy[to] = True
    boxes.flying.append(Box(to, rows, barrier))


def _rounded(numbers: Array) -> Array:
    """To 11 significant bits, halves away from zero."""
    return (numbers.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


def setmaxnreg(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    whole = mask.reshape(-1, GROUP)
    if (whole.any(1) != whole.all(1)).any():
        raise PtxError("registers are changed by some threads of four warps only")
    count, known = int(operands[0]), [(change, "sync", "aligned", "u32") for change in ("inc", "dec")]
    if parts[1:] not in known or count % 8 or not 24 <= count <= 256:
        raise PtxError("unknown change of registers")


HANDLERS = {"mbarrier": mbarrier, "setmaxnreg": setmaxnreg}
