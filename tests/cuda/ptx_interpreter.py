"""A PTX interpreter: runs the exact text that is assembled for a GPU, on arrays, so that kernels are tested without one.

It executes one block after another, or several blocks that have nothing in common as if they were one. All threads of
a block that stand at the smallest program counter go together, as arrays, which reconverges branches; with
`schedule="warps"` each warp runs as far as it can before the next one starts, last warp first, which turns missing
barriers into wrong results. Registers are uint64.

Global memory is a `Memory` of placed arrays with gaps between them; touching a gap raises. Shared memory is
filled with ones (NaN in every float format) and keeps its size. `cp.async` lands at `wait_group` and no
earlier; until then its target is filled with ones too. Unknown instructions raise.

A kernel for capability 9.0 or later has to execute `griddepcontrol.wait` in a thread before this thread touches global memory.
Where a kernel has atomic operations, what its blocks read of each other must be ordered by them (ptx_order).

What it does not model: time, bank conflicts, and denormals flushed by `.ftz`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import product
from typing import Any

import numpy as np

from tests.cuda import ptx_cluster, ptx_matrix, ptx_operations, ptx_order, ptx_races, ptx_tma, ptx_wgmma
from tests.cuda.ptx_values import WIDTH, Array, PtxError, pack, unpack

WARP = 32
POISON = 0xFF
GAP = 4096
# Generic addresses of shared and local memory begin here; those of global memory lie below.
SHARED_WINDOW = 1 << 40
LOCAL_WINDOW = 1 << 41
NEXT_PC_LIMIT = 50_000_000


class Memory:
    """Global memory, which grows: arrays at addresses that are multiples of 256, each between two gaps."""

    def __init__(self, size: int = 1 << 22) -> None:
        self.bytes: Array = np.full(size, POISON, np.uint8)
        self.allowed: Array = np.zeros(size, bool)
        self.used = GAP

    def place(self, array: Array, offset: int = 0) -> int:
        """Address of a copy of an array, `offset` bytes behind a multiple of 256."""
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start = -(-self.used // 256) * 256 + offset
        if (more := start + raw.size + GAP - self.bytes.size) > 0:
            more = max(more, self.bytes.size)
            self.bytes = np.append(self.bytes, np.full(more, POISON, np.uint8))
            self.allowed = np.append(self.allowed, np.zeros(more, bool))
        self.bytes[start : start + raw.size] = raw
        self.allowed[start : start + raw.size] = True
        self.used = start + raw.size + GAP
        return start

    def read(self, address: int, shape: tuple[int, ...], dtype: Any) -> Array:
        """A copy of an array in memory."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.bytes[address : address + count].copy().view(dtype).reshape(shape)

    def check(self, places: Array) -> None:
        """PtxError where a byte address is outside every array."""
        if places.size and (places.min() < 0 or places.max() >= self.bytes.size or not self.allowed[places].all()):
            wrong = places[(places < 0) | (places >= self.bytes.size)]
            first = wrong.flat[0] if wrong.size else places[~self.allowed[places]].flat[0]
            raise PtxError(f"global address {int(first)} is outside every array")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its guard ("" for none), whether that is negated, parts of its name, operands, text."""

    guard: str
    negated: bool
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Program:
    """A parsed entry: parameter names, instructions, places of labels, sizes of named memory, blocks of a cluster.

    early: whether it may be launched before the kernel before it has ended.
    """

    parameters: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]
    shared: Mapping[str, int]
    static_shared: int
    local: Mapping[str, int]
    cluster: int
    early: bool

    @cached_property
    def multiplies(self) -> bool:
        """Whether four warps work together."""
        return any(i.parts[0] == "wgmma" for i in self.instructions)

    @cached_property
    def pairs(self) -> bool:
        """Whether there are barriers of warps."""
        return any(i.parts[:2] == ("bar", "warp") for i in self.instructions)

    @cached_property
    def counts(self) -> bool:
        """Whether there are atomic operations."""
        return any(i.parts[0] in ("atom", "red") for i in self.instructions)


@lru_cache(maxsize=16)
def parse(text: str, entry: str = "") -> Program:
    """The entry of a PTX module, or its first one. Raises PtxError when there is none."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    name = re.escape(entry) if entry else r"[$\w]+"
    found = re.search(r"\.entry\s+(" + name + r")\s*\((.*?)\)([^{]*)\{", text, re.S)
    if found is None:
        raise PtxError(f"no entry {entry!r}")
    body = text[found.end() : _closing(text, found.end())]
    shared, local, used = {}, {}, 0
    declaration = r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.b8\s+([$\w]+)\[(\d*)\]"
    for space, align, name, size in re.findall(declaration, text):
        if space == "local":
            local[name] = int(size)
        elif size:
            used = -(-used // int(align or 1)) * int(align or 1)
            shared[name] = used
            used += int(size)
    for space, _, name, size in re.findall(declaration, text):
        if space == "shared" and not size:
            shared[name] = -(-used // 1024) * 1024
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in body.split(";"):
        rest = re.sub(r"^[\s{}]+", "", statement).rstrip()
        while label := re.match(r"([$\w]+):(?!:)[\s{}]*", rest):
            labels[label[1]] = len(instructions)
            rest = rest[label.end() :]
        if rest and not rest.startswith("."):
            instructions.append(_instruction(rest))
    names = tuple(re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.\w+\s+([$\w]+)", found[2]))
    together = re.search(r"\.reqnctapercluster\s+(\d+)", found[3])
    cluster, target = int(together[1]) if together else 1, re.search(r"\.target\s+sm_(\d+)", text)
    early = target is not None and int(target[1]) >= 90
    return Program(names, tuple(instructions), labels, shared, used, local, cluster, early)


def _closing(text: str, start: int) -> int:
    depth = 1
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return start + match.start()
    raise PtxError("a brace is not closed")


def _instruction(text: str) -> Instruction:
    found = re.match(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)$", text, re.S)
    if found is None:
        raise PtxError(f"cannot read {text!r}")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", found[4])
    return Instruction(
        found[2] or "", found[1] == "!", tuple(found[3].split(".")), tuple(o.strip() for o in operands), text
    )


@dataclass(eq=False)
class Block:
    """The state of a running block, or of several; `registers` hold one uint64 per thread.

    places: of the blocks in the grid. size: threads of one block. shared_bytes: of one block; `shared` has those of all.
    """

    program: Program
    memory: Memory
    words: Sequence[int]
    places: Sequence[tuple[int, int, int]]
    grid: tuple[int, int, int]
    size: int
    shared_bytes: int
    registers: dict[str, Array] = field(default_factory=dict)
    local: dict[str, Array] = field(default_factory=dict)
    copies: list[dict[str, Any]] = field(default_factory=list)
    cluster: Sequence[Block] = ()
    ended: bool = False
    watch: ptx_order.Watch | None = None

    def __post_init__(self) -> None:
        self.threads = self.size * len(self.places)
        self.lanes = np.arange(self.threads)
        self.shared: Array = np.full(self.shared_bytes * len(self.places), POISON, np.uint8)
        self.shared_start = self.lanes // self.size * self.shared_bytes
        self.committed = np.zeros(self.threads, np.int64)
        self.waited = np.full(self.threads, not self.program.early)
        size = max(self.program.local.values(), default=0)
        self.products = ptx_wgmma.Products(self.threads, self.shared.size)
        self.boxes = ptx_tma.Boxes(self.threads, self.shared.size)
        self.races = ptx_races.Races(self.threads, self.shared.size)
        self.stack = np.full((self.threads, size), POISON, np.uint8)
        self.parameters = dict(zip(self.program.parameters, self.words, strict=True))
        self.special = {"%tid.x": self.lanes % self.size, "%laneid": self.lanes % WARP, "%ntid.x": self.size}
        self.special |= {"%tid.y": 0, "%tid.z": 0, "%ntid.y": 1, "%ntid.z": 1, "%dynamic_smem_size": self.shared_bytes}
        for axis, places, extent in zip("xyz", zip(*self.places), self.grid, strict=True):
            self.special |= {f"%ctaid.{axis}": np.repeat(places, self.size), f"%nctaid.{axis}": extent}
        self.constants: dict[str, Array] = {}  # operands that never change

    # ------------------------------------------------------------------------------------- operands

    def value(self, operand: str) -> Array:
        """Raw bits of an operand, one uint64 per thread."""
        found = self.registers.get(operand)
        if found is None:
            found = self.constants.get(operand)
        if found is None:
            found = self.constants[operand] = self._constant(operand)
        return found

    def _constant(self, operand: str) -> Array:
        number: Any
        if operand in self.special:
            number = self.special[operand]
        elif operand[:2] in ("0f", "0F", "0d", "0D"):
            number = int(operand[2:], 16)
        elif re.match(r"-?\d", operand):
            number = int(operand.rstrip("U"), 0) & 0xFFFFFFFFFFFFFFFF
        elif operand in self.program.shared:
            number = self.program.shared[operand]
        elif operand in self.program.local:
            number = 0
        elif operand in self.parameters:
            number = self.parameters[operand] & 0xFFFFFFFFFFFFFFFF
        else:
            raise PtxError(f"{operand} is read before it is written")
        return np.broadcast_to(np.asarray(number).astype(np.uint64), (self.threads,))

    def read(self, operand: str, type_: str) -> Array:
        """An operand as numbers of a PTX type."""
        return unpack(self.value(operand), type_)

    def write(self, operand: str, numbers: Array, mask: Array) -> None:
        """Numbers of any type into a register, where the mask is set."""
        if operand == "_":
            return
        register = self.registers.get(operand)
        if register is None:
            register = self.registers[operand] = np.zeros(self.threads, np.uint64)
        np.copyto(register, pack(numbers), where=mask)

    def address(self, operand: str) -> Array:
        """The address in brackets, int64."""
        found = re.fullmatch(r"\[\s*([^+\]\s]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if found is None:
            raise PtxError(f"cannot read the address {operand}")
        return self.value(found[1]).astype(np.int64) + int(found[2] or "0", 0)

    # --------------------------------------------------------------------------------------- memory

    def gather(self, space: str, address: Array, size: int, mask: Array) -> Array:
        """uint8 [threads][size] from memory; zeros where the mask is not set."""
        result = np.zeros((self.threads, size), np.uint8)
        if mask.any():
            for part, source, places, rows in self._reach(space, address, size, mask):
                result[part] = source[places] if rows is None else source[rows, places]
        return result

    def scatter(self, space: str, address: Array, content: Array, mask: Array) -> None:
        """uint8 [threads][size] into memory where the mask is set; of several at one address the last stays."""
        if mask.any():
            for part, target, places, rows in self._reach(space, address, content.shape[1], mask, True):
                if rows is None:
                    target[places] = content[part]
                else:
                    target[rows, places] = content[part]

    def _reach(
        self, space: str, address: Array, size: int, mask: Array, writes: bool = False
    ) -> list[tuple[Array, Array, Array, Any]]:
        """(mask, bytes, places in them, threads for local memory) of the kinds of memory that addresses are in."""
        if (address[mask] % size).any() and size in (1, 2, 4, 8, 16):
            raise PtxError(f"an address is not a multiple of {size}")
        windows = {"global": 0, "shared": 0, "local": 0}
        kinds = {space: mask}
        if space == "generic":
            windows = {"global": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
            kinds = {
                "global": mask & (address < SHARED_WINDOW),
                "shared": mask & (address >= SHARED_WINDOW) & (address < LOCAL_WINDOW),
                "local": mask & (address >= LOCAL_WINDOW),
            }
        reached = []
        for kind, part in kinds.items():
            if not part.any():
                continue
            places = (address[part] - windows[kind])[:, None] + np.arange(size)
            if kind == "global":
                self.check_waited(part)
                self.memory.check(places)
                if self.watch is not None:
                    self.watch.touched(places, self.lanes[part], writes)
                reached.append((part, self.memory.bytes, places, None))
                continue
            limit = self.shared_bytes if kind == "shared" else self.stack.shape[1]
            if places.min() < 0 or places.max() >= limit:
                raise PtxError(f"{kind} address {int(places.max())} is outside {limit} bytes")
            if kind == "shared":
                places += self.shared_start[part][:, None]
                if self.program.pairs:
                    self.races.touched(places, self.lanes[part], writes)
                if writes and self.program.multiplies:
                    self.products.written(places, self.lanes[part])
                    self.boxes.written(places)
                reached.append((part, self.shared, places, None))
            else:
                reached.append((part, self.stack, places, self.lanes[part][:, None]))
        return reached

    def check_waited(self, mask: Array) -> None:
        """PtxError where a thread has not waited for the kernel before this one."""
        if not self.waited[mask].all():
            raise PtxError("a thread does not wait for the kernel before this one")

    # ---------------------------------------------------------------------------- asynchronous copies

    def start_copy(self, target: Array, source: Array, size: int, there: Array, mask: Array) -> None:
        """Notes copies of `size` bytes per thread of which only `there` are read, the others being 0."""
        if (target[mask] % size).any() or (source[mask] % size).any():
            raise PtxError(f"cp.async of {size} bytes is not aligned")
        self.check_waited(mask)
        self.scatter("shared", target, np.full((self.threads, size), POISON, np.uint8), mask)
        copy = {"target": target, "source": source, "size": size, "there": there}
        self.copies.append({**copy, "open": mask.copy(), "group": np.full(self.threads, -1)})

    def commit(self, mask: Array) -> None:
        """Ends the group of each thread."""
        for copy in self.copies:
            mine = copy["open"] & mask & (copy["group"] < 0)
            copy["group"][mine] = self.committed[mine]
        self.committed[mask] += 1

    def land(self, groups: int, mask: Array) -> None:
        """Completes all but the last `groups` groups of each thread."""
        for copy in self.copies:
            done = copy["open"] & mask & (copy["group"] >= 0) & (copy["group"] < self.committed - groups)
            if done.any():
                size = copy["size"]
                content = self.gather("global", copy["source"], size, done & (copy["there"] == size))
                parts = done & (copy["there"] < size)
                for byte in range(int(copy["there"][parts].max(initial=0))):
                    some = parts & (copy["there"] > byte)
                    content[some, byte] = self.gather("global", copy["source"] + byte, 1, some)[some, 0]
                self.scatter("shared", copy["target"], content, done)
                copy["open"] &= ~done
        self.copies = [copy for copy in self.copies if copy["open"].any()]

    # --------------------------------------------------------------------------------------- control

    def run(self, schedule: str) -> Iterator[str]:
        """Runs all threads to their end, yielding where they wait for their "cluster", and where they all wait for a "phase".

        Raises PtxError for a deadlock and for what the kernel does wrong.
        """
        instructions, labels = self.program.instructions, self.program.labels
        counter = np.zeros(self.threads, np.int64)
        done = np.zeros(self.threads, bool)
        waiting = np.zeros(self.threads, bool)
        arrived, meeting, paired, voting, votes = (np.zeros(self.threads, bool) for _ in range(5))
        ballot = ""  # the register of a vote that is being taken
        boxes = self.boxes
        warp = self.lanes // (ptx_wgmma.GROUP if self.program.multiplies else WARP)
        for _ in range(NEXT_PC_LIMIT):
            live = ~done & ~waiting & ~meeting & ~paired & ~boxes.blocked
            if not live.any():
                if boxes.land(self, schedule == "warps"):
                    continue
                if done.all():
                    return
                if paired.any():
                    raise PtxError("some threads of a warp wait for others, which do not come")
                if boxes.blocked.any():
                    yield "phase"
                    continue
                if meeting.any():
                    if (waiting & ~done).any():
                        raise PtxError("some threads wait for their block, others for the cluster")
                    yield "cluster"
                    meeting[:] = False
                self.races.passed[waiting] += 1
                if self.watch is not None:
                    self.watch.met()
                if ballot:
                    if (waiting & ~voting).any():
                        raise PtxError("some threads of a block vote while others wait")
                    self.write(ballot, np.repeat(votes.reshape(-1, self.size).any(1), self.size), waiting)
                    ballot, votes[:], voting[:] = "", False, False
                waiting[:] = False
                continue
            if (live & boxes.woken).any():
                live &= boxes.woken
            if schedule == "warps":
                live &= warp == warp[live].max()
            current = int(counter[live].min())
            mask = live & (counter == current)
            if current >= len(instructions):
                done |= mask
                continue
            instruction = instructions[current]
            active = mask
            if instruction.guard:
                guard = self.value(instruction.guard).astype(bool)
                active = mask & (~guard if instruction.negated else guard)
            counter[mask] += 1
            match instruction.parts[0]:
                case "bra":
                    counter[active] = labels[instruction.operands[0]]
                case "ret" | "exit":
                    done |= active
                case "barrier" if instruction.parts[1] == "cluster":
                    if instruction.parts[2] == "wait":
                        if (active & ~arrived).any():
                            raise PtxError("a thread waits for the cluster without having arrived")
                        meeting |= active
                    arrived[active] = instruction.parts[2] == "arrive"
                case "bar" | "barrier" if instruction.parts[1] == "sync" or instruction.parts[1:3] == ("cta", "sync"):
                    waiting |= active
                case "bar" if instruction.parts[1:] == ("red", "or", "pred"):
                    ballot = instruction.operands[0]
                    votes |= active & self.value(instruction.operands[2]).astype(bool)
                    voting |= active
                    waiting |= active
                case "bar" if instruction.parts[1] == "warp":
                    paired |= active
                    together = np.repeat((paired | done).reshape(-1, WARP).all(1), WARP)
                    self.races.passed[paired & together] += 1
                    paired &= ~together
                case _ if active.any():
                    self._execute(instruction, active)
                    counter[active & boxes.blocked] = current  # to look once more
        raise PtxError("the kernel does not end")

    def _execute(self, instruction: Instruction, mask: Array) -> None:
        name = instruction.parts[0]
        handler = HANDLERS.get(name)
        if handler is None:
            raise PtxError(f"unknown instruction: {instruction.text}")
        try:
            handler(self, instruction.parts, instruction.operands, mask)
        except PtxError as error:
            raise PtxError(f"{error}, in: {instruction.text}") from None


HANDLERS = {**ptx_operations.HANDLERS, **ptx_matrix.HANDLERS, **ptx_wgmma.HANDLERS, **ptx_tma.HANDLERS, "mapa": ptx_cluster.mapa}


def run(
    ptx: str,
    entry: str,
    grid: tuple[int, int, int],
    block: int,
    shared_bytes: int,
    words: Sequence[int],
    memory: Memory,
    schedule: str = "together",
    threads: int = 1,
    order: Sequence[int] = (),
) -> None:
    """Launches a kernel whose parameters are int64 words; results are in `memory`.

    entry: its name, or "" for the only one. block: threads. schedule: "together", or "warps": one warp runs as far as it
    can, then another (with wgmma four warps). threads: blocks without a cluster run together up to about so many threads, which
    is quicker. order: numbers of blocks of a grid without clusters, in which they run, if not by their numbers.
    """
    program = parse(ptx, entry)
    places = [(x, y, z) for z, y, x in product(*map(range, reversed(grid)))]
    launch = ptx_order.Launch(len(places), memory.bytes.size) if program.counts else None
    watches = {place: launch and ptx_order.Watch(launch, number, block) for number, place in enumerate(places)}
    places = [places[number] for number in order] if order else places
    alone = program.cluster > 1 or program.multiplies or program.counts or block % WARP
    count = 1 if alone else max(1, threads // block)
    with np.errstate(all="ignore"):
        for first in range(0, len(places), count * program.cluster):
            some = places[first : first + count * program.cluster]
            parts = [some] if count > 1 else [[place] for place in some]
            shared = program.static_shared + shared_bytes
            blocks = [Block(program, memory, words, part, grid, block, shared, watch=watches[part[0]]) for part in parts]
            ptx_cluster.run_together(blocks, schedule)


__all__ = ["WIDTH", "Memory", "PtxError", "parse", "run"]
