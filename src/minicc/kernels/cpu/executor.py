"""The native executor: walks a table of kernel calls and shares each one out among a pool of threads.

A row is five int64 words: kernel address, argument block address, domain size n, chunk, number of chunks
(ceil(n / chunk)). Rows run in order; the chunks of one row run in any order, on any thread.

Work is handed out by one 64-bit ticket, `row << 42 | chunks << 21 | next`. Claiming is one atomic addition
whose answer names both the row and the chunk, so a thread that comes late can never take a chunk of the wrong
row, and it reads the row only while the caller waits for that chunk. One caller owns the pool at a time;
another one that comes meanwhile does not wait but runs its rows alone.

Threads spin for a few microseconds and then sleep. When the machine is busy, pieces of work get stuck on a
thread that lost its core; the throttle watches for that and lets the caller run alone for ten times the time
lost, which bounds the loss at about a tenth. Nothing here allocates, raises, or knows what a kernel does.
"""

# ruff: noqa: ARG001  (the kernel signature is fixed)

from minicc.kernels.cpu.intrinsics import helper, ptr_i64
from minicc.kernels.cpu.system import (
    atomic_add,
    atomic_exchange_if,
    atomic_load,
    atomic_store,
    call_kernel,
    clock,
    futex_wait,
    futex_wake,
    involuntary_switches,
    pause,
)

ROW_WORDS = 5
ROW_BYTES = 8 * ROW_WORDS

# Words of the pool's state. Those which different threads write lie 128 bytes apart.
TICKET = 0
DONE = 16  # chunks of the current row that are finished
ALARM = 32  # changes whenever sleeping workers are called
SLEEPING = 48  # workers asleep, or about to be
WAITING = 64  # 1 while the caller sleeps on DONE
OWNER = 80  # 1 while a caller owns the pool
ROWS = 96  # address of the owner's table
STOP = 112  # 1 makes the workers return
WORKERS = 113  # number of worker threads; 0 makes every caller run alone
# Used by the owner only:
ALONE_UNTIL = 128  # ns; before this time rows are not shared out
LAST_EXCESS = 129  # ns; when a chunk was last waited for too long
REGIONS = 130  # shared rows since the last look at the preemption counter
REGION_TIME = 131  # ns spent in them
SWITCHES = 132  # the counter at that look
STATE_WORDS = 144

FIELD_BITS = 21
FIELD = (1 << FIELD_BITS) - 1
MAX_CHUNKS = FIELD - 4096  # threads may draw past the end once each
MAX_ROWS = FIELD

SPIN = 400  # pauses before sleeping, a few microseconds
EXCESS = 20_000  # ns of waiting that count as a lost core
LOOK_EVERY = 8  # shared rows
PENALTY = 10


@helper
def run_chunk(row, index):
    """Run one chunk of the row at this address."""
    words = ptr_i64(row)
    begin = index * words[3]
    call_kernel(words[0], words[1], begin, min(begin + words[3], words[2]))


def run_alone(args, begin, end):
    """Run `end` rows at address `begin` on this thread, without a pool."""
    for index in range(end):
        row = ptr_i64(begin + index * ROW_BYTES)
        call_kernel(row[0], row[1], 0, row[2])


def worker(args, begin, end):
    """The life of one pool thread; `args` is the state. Returns when STOP is set."""
    spins = 0
    while atomic_load(args, STOP) == 0:
        ticket = atomic_load(args, TICKET)
        if ticket & FIELD < (ticket >> FIELD_BITS) & FIELD:
            ticket = atomic_add(args, TICKET, 1)
            chunks = (ticket >> FIELD_BITS) & FIELD
            if ticket & FIELD < chunks:
                run_chunk(atomic_load(args, ROWS) + (ticket >> 2 * FIELD_BITS) * ROW_BYTES, ticket & FIELD)
                if atomic_add(args, DONE, 1) == chunks - 1 and atomic_load(args, WAITING) != 0:
                    futex_wake(args, DONE, 1)
            spins = 0
        elif spins < SPIN:
            pause()
            spins += 1
        else:
            alarm = atomic_load(args, ALARM)
            atomic_add(args, SLEEPING, 1)
            ticket = atomic_load(args, TICKET)
            if ticket & FIELD >= (ticket >> FIELD_BITS) & FIELD and atomic_load(args, STOP) == 0:
                futex_wait(args, ALARM, alarm)
            atomic_add(args, SLEEPING, -1)
            spins = 0


@helper
def share_out(args, rows, index, chunks):
    """Run one row together with the workers; gives the time it took in ns."""
    start = clock()
    atomic_store(args, DONE, 0)
    atomic_store(args, TICKET, index << 2 * FIELD_BITS | chunks << FIELD_BITS)
    if atomic_load(args, SLEEPING) > 0:
        atomic_add(args, ALARM, 1)
        futex_wake(args, ALARM, chunks - 1)
    mine = 0
    claimed = atomic_add(args, TICKET, 1) & FIELD
    while claimed < chunks:
        run_chunk(rows + index * ROW_BYTES, claimed)
        mine += 1
        claimed = atomic_add(args, TICKET, 1) & FIELD
    finished = clock()
    done = atomic_add(args, DONE, mine) + mine
    if done == chunks:
        return finished - start
    spins = 0
    while done != chunks:
        if spins < SPIN:
            pause()
            spins += 1
            done = atomic_load(args, DONE)
        else:
            atomic_store(args, WAITING, 1)
            done = atomic_load(args, DONE)
            if done != chunks:
                futex_wait(args, DONE, done)
                done = atomic_load(args, DONE)
    atomic_store(args, WAITING, 0)
    end = clock()
    excess = end - finished
    if mine > 0:
        excess -= 2 * ((finished - start) // mine)
    if excess > EXCESS:  # a worker lost its core with a chunk in hand
        if end - args[LAST_EXCESS] < 2 * PENALTY * excess:
            args[ALONE_UNTIL] = end + PENALTY * excess
        args[LAST_EXCESS] = end
    return end - start


@helper
def watch_preemption(args, region_time):
    """Every few shared rows: when workers keep taking the caller's core, stop sharing for a while."""
    args[REGIONS] += 1
    args[REGION_TIME] += region_time
    if args[REGIONS] < LOOK_EVERY:
        return
    switches = involuntary_switches()
    if switches - args[SWITCHES] >= 2:
        args[ALONE_UNTIL] = clock() + PENALTY * args[REGION_TIME]
    args[SWITCHES] = switches
    args[REGIONS] = 0
    args[REGION_TIME] = 0


def stop(args, begin, end):
    """Make the `end` workers return, and later callers run alone; `args` is the pool's state."""
    atomic_store(args, WORKERS, 0)
    atomic_store(args, STOP, 1)
    atomic_add(args, ALARM, 1)
    futex_wake(args, ALARM, end)


def run(args, begin, end):
    """Run `end` rows at address `begin`; `args` is the pool's state."""
    if atomic_load(args, WORKERS) == 0 or not atomic_exchange_if(args, OWNER, 0, 1):
        for index in range(end):
            row = ptr_i64(begin + index * ROW_BYTES)
            call_kernel(row[0], row[1], 0, row[2])
        return
    atomic_store(args, ROWS, begin)
    for index in range(end):
        row = ptr_i64(begin + index * ROW_BYTES)
        if row[4] <= 1 or (args[ALONE_UNTIL] != 0 and clock() < args[ALONE_UNTIL]):
            call_kernel(row[0], row[1], 0, row[2])
        else:
            watch_preemption(args, share_out(args, begin, index, row[4]))
    atomic_store(args, OWNER, 0)
