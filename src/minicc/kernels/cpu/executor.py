"""The native executor: walks a table of kernel calls and shares each one out among a pool of threads.

A row is six int64 words: kernel address, argument block address, domain size n, chunk, number of chunks
(ceil(n / chunk)), first unit of the domain. Rows run in order; the chunks of one row run in any order, on any thread.
A guard, a row with GUARD for the number of chunks, makes the next rows depend on a condition: its second word is the
address of a word that holds the address of a byte; unless this is not 0 where the third is not 0, and 0 where it is,
as many rows are passed over as the fourth says.

Each thread has a share of a row's chunks, the caller the first ones, so that row after row a thread meets the
part of the data that it has written before; when its share is done it takes from the others'. Shares are handed
out by 64-bit tickets, `row << 42 | end << 21 | next`. Claiming is one atomic addition whose answer names both
the row and the chunk, so a thread that comes late can never take a chunk of the wrong row, and it reads the row
only while the caller waits for that chunk. One caller owns the pool at a time; another one that comes meanwhile
does not wait but runs its rows alone.

Threads spin for a short time and then sleep. When the machine is busy, pieces of work get stuck on a
thread that lost its core; the throttle watches for that and lets the caller run alone, in the end for ten times the time
lost, which bounds the loss at about a tenth. Turns of a loop are runs of one table whose arguments move on in between.
Nothing here allocates, raises, or knows what a kernel does.
"""

# ruff: noqa: ARG001  (the kernel signature is fixed)

from minicc.kernels.cpu.intrinsics import helper, ld_scratch, ptr_i64, ptr_u8, st_scratch, stack_i64
from minicc.kernels.cpu.system import (
    AFFINITY_WORDS,
    atomic_add,
    atomic_exchange_if,
    atomic_load,
    atomic_store,
    call_kernel,
    clock,
    current_core,
    futex_wait,
    futex_wake,
    get_affinity,
    involuntary_switches,
    pause,
    set_affinity,
    thread_number,
)

ROW_WORDS = 6
ROW_BYTES = 8 * ROW_WORDS
GUARD = -1

# Words that describe a loop whose turns run the same rows. What differs from turn to turn is in the rows' arguments: a
# move, four words, names one of them by its address and says what is added to it before the second turn, the third, the
# fourth; from then on the last two alternate.
TABLE = 0  # address of the rows
TABLE_ROWS = 1
MOVES = 2  # address of the moves
MOVES_COUNT = 3
CONDITION = 4  # address of a byte that ends the loop when a turn leaves 0 there; or 0
TURNS_DONE = 5
TURN_WORDS = 6
MOVE_BYTES = 32

# Words of the pool's state. Those which different threads write lie 128 bytes apart.
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
LOST = 134  # ns of such waiting up to then, older ones counted less
PRESSED = 135  # 1 when others took the caller's core before the last look
FACTOR = 136  # how often the time lost the caller ran alone after the last loss
REGIONS = 130  # shared rows since the last look at the preemption counter
REGION_TIME = 131  # ns spent in them
SWITCHES = 132  # the counter at that look
CORE = 133  # 1 + the core that workers are kept off; 0 when they have never been kept off one
TICKETS = 144  # of the caller, then of the workers
TICKET_WORDS = 16
THREAD = 8  # behind a worker's ticket: the system's number of the thread

FIELD_BITS = 21
FIELD = (1 << FIELD_BITS) - 1
MAX_CHUNKS = FIELD - 4096  # threads may draw past the end once each
MAX_ROWS = FIELD

SPIN = 400  # pauses of the caller before sleeping, a few microseconds
# Pauses of a worker, 50 to 200 us: longer than the short rows which the caller runs alone between shared ones, as waking a
# worker takes tens of microseconds, in which the caller does the whole next row.
LINGER = 4000
EXCESS = 20_000  # ns of waiting that count as a lost core
LOOK_EVERY = 8  # shared rows
SLICE = 1_000_000  # ns; a thread that takes a core keeps it about as long, what the system does itself takes less
# ns; one that wants a core all the time takes it at least so often. Rarer losses are those of any machine, and longer rows
# meet more of them.
SWITCH_EVERY = 8_000_000
PENALTY = 10


@helper
def run_chunk(row, index):
    """Run one chunk of the row at this address."""
    words = ptr_i64(row)
    begin = index * words[3]
    call_kernel(words[0], words[1], words[5] + begin, words[5] + min(begin + words[3], words[2]))


@helper
def run_row(row):
    """Run the whole row at this address."""
    words = ptr_i64(row)
    call_kernel(words[0], words[1], words[5], words[5] + words[2])


@helper
def passed_over(row):
    """How many rows are passed over after the guard at this address."""
    words = ptr_i64(row)
    holds = ptr_u8(ptr_i64(words[1])[0])[0] != 0
    return 0 if holds == (words[2] != 0) else words[3]


@helper
def run_rows_alone(begin, end):
    """Run `end` rows at address `begin` on this thread."""
    index = 0
    while index < end:
        row = begin + index * ROW_BYTES
        if ptr_i64(row)[4] == GUARD:
            index += passed_over(row)
        else:
            run_row(row)
        index += 1


def run_alone(args, begin, end):
    """Run `end` rows at address `begin` on this thread, without a pool."""
    run_rows_alone(begin, end)


@helper
def keep_apart(args, threads):
    """Let the workers be on every core where the caller may be but the one where it is now.

    Left to itself the system often wakes a thread on the core of the one that wakes it, even when another core is
    idle (a virtual machine's idle cores count as busy), and there it waits until the caller's time is up.
    """
    core = current_core()
    if core + 1 != args[CORE]:
        allowed = stack_i64(AFFINITY_WORDS)
        for word in range(AFFINITY_WORDS):
            st_scratch(allowed, word, 0)
        moved = 0
        if get_affinity(0, allowed) > 0 and core >> 6 < AFFINITY_WORDS:
            st_scratch(allowed, core >> 6, ld_scratch(allowed, core >> 6) & ~(1 << (core & 63)))
            for number in range(1, threads):
                thread = atomic_load(args, TICKETS + number * TICKET_WORDS + THREAD)
                if thread != 0:  # it has begun
                    set_affinity(thread, allowed)  # refused when no core is left
                    moved += 1
        if moved == threads - 1:
            args[CORE] = core + 1


@helper
def claim(args, own, threads):
    """A ticket whose `next` is the caller's to do, of its own share or else of another; 0 when all are empty."""
    number = own
    for _ in range(threads):
        at = TICKETS + number * TICKET_WORDS
        ticket = atomic_load(args, at)
        if ticket & FIELD < (ticket >> FIELD_BITS) & FIELD:
            ticket = atomic_add(args, at, 1)
            if ticket & FIELD < (ticket >> FIELD_BITS) & FIELD:
                return ticket
        number = number + 1 if number + 1 < threads else 0
    return 0


@helper
def is_idle(args, threads):
    """Whether no share has a chunk left."""
    for number in range(threads):
        ticket = atomic_load(args, TICKETS + number * TICKET_WORDS)
        if ticket & FIELD < (ticket >> FIELD_BITS) & FIELD:
            return False
    return True


def worker(args, begin, end):
    """The life of pool thread number `begin` (from 1) of `end` threads; `args` is the state. Returns when STOP is set."""
    spins = 0
    atomic_store(args, TICKETS + begin * TICKET_WORDS + THREAD, thread_number())
    while atomic_load(args, STOP) == 0:
        ticket = claim(args, begin, end)
        if ticket != 0:
            row = atomic_load(args, ROWS) + (ticket >> 2 * FIELD_BITS) * ROW_BYTES
            chunks = ptr_i64(row)[4]
            run_chunk(row, ticket & FIELD)
            if atomic_add(args, DONE, 1) == chunks - 1 and atomic_load(args, WAITING) != 0:
                futex_wake(args, DONE, 1)
            spins = 0
        elif spins < LINGER:
            pause()
            spins += 1
        else:
            alarm = atomic_load(args, ALARM)
            atomic_add(args, SLEEPING, 1)
            if is_idle(args, end) and atomic_load(args, STOP) == 0:
                futex_wait(args, ALARM, alarm)
            atomic_add(args, SLEEPING, -1)
            spins = 0


@helper
def withdraw(args, now, lost):
    """Let the caller run alone for as long as it has lost; longer, up to PENALTY times, where losses follow each other."""
    soon = now - args[ALONE_UNTIL] < PENALTY * lost
    args[FACTOR] = min(2 * args[FACTOR], PENALTY) if soon else 1
    args[ALONE_UNTIL] = now + args[FACTOR] * lost


@helper
def share_out(args, rows, index, chunks):
    """Run one row together with the workers; gives the time it took in ns."""
    start = clock()
    atomic_store(args, DONE, 0)
    threads = atomic_load(args, WORKERS) + 1
    for number in range(threads):
        first = number * chunks // threads
        last = (number + 1) * chunks // threads
        ticket = index << 2 * FIELD_BITS | last << FIELD_BITS | first
        atomic_store(args, TICKETS + number * TICKET_WORDS, ticket)
    if atomic_load(args, SLEEPING) > 0:
        keep_apart(args, threads)
        atomic_add(args, ALARM, 1)
        futex_wake(args, ALARM, chunks - 1)
    mine = 0
    ticket = claim(args, 0, threads)
    while ticket != 0:
        run_chunk(rows + index * ROW_BYTES, ticket & FIELD)
        mine += 1
        ticket = claim(args, 0, threads)
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
        # One loss says nothing about the next: it counts when there was one like it a short time ago.
        lost = max(0, args[LOST] - (end - args[LAST_EXCESS]) // (2 * PENALTY))
        if 4 * lost >= excess:
            withdraw(args, end, excess)
        args[LOST] = lost + excess
        args[LAST_EXCESS] = end
    return end - start


@helper
def watch_preemption(args, region_time):
    """Every few shared rows: when others keep taking the caller's core, stop sharing for a while; when it has moved to
    the workers' core, move these.
    """
    args[REGIONS] += 1
    args[REGION_TIME] += region_time
    if args[REGIONS] < LOOK_EVERY:
        return
    count = involuntary_switches()
    switches = count - args[SWITCHES]
    pressed = switches >= 2 and args[REGION_TIME] > SLICE and switches * SWITCH_EVERY > args[REGION_TIME]
    if pressed and args[PRESSED] != 0:
        withdraw(args, clock(), args[REGION_TIME])
    args[PRESSED] = 1 if pressed else 0
    keep_apart(args, atomic_load(args, WORKERS) + 1)
    args[SWITCHES] = count
    args[REGIONS] = 0
    args[REGION_TIME] = 0


def stop(args, begin, end):
    """Make the `end` workers return, and later callers run alone; `args` is the pool's state."""
    atomic_store(args, WORKERS, 0)
    atomic_store(args, STOP, 1)
    atomic_add(args, ALARM, 1)
    futex_wake(args, ALARM, end)


@helper
def run_rows(args, begin, end):
    """Run `end` rows at address `begin`; `args` is the pool's state."""
    if atomic_load(args, WORKERS) == 0 or not atomic_exchange_if(args, OWNER, 0, 1):
        run_rows_alone(begin, end)
        return
    atomic_store(args, ROWS, begin)
    index = 0
    while index < end:
        row = begin + index * ROW_BYTES
        chunks = ptr_i64(row)[4]
        if chunks == GUARD:
            index += passed_over(row)
        elif chunks <= 1 or (args[ALONE_UNTIL] != 0 and clock() < args[ALONE_UNTIL]):
            run_row(row)
        else:
            watch_preemption(args, share_out(args, begin, index, chunks))
        index += 1
    atomic_store(args, OWNER, 0)


@helper
def next_turn(turn):
    """Make the words of a turn at address `turn` those of the next one; whether there is to be one."""
    words = ptr_i64(turn)
    for index in range(words[MOVES_COUNT]):
        move = ptr_i64(words[MOVES] + index * MOVE_BYTES)
        ptr_i64(move[0])[0] += move[1]
        move[1] = move[2]
        move[2] = move[3]
        move[3] = move[1]
    words[TURNS_DONE] += 1
    return words[CONDITION] == 0 or ptr_u8(words[CONDITION])[0] != 0


def run(args, begin, end):
    """Run `end` rows at address `begin`; `args` is the pool's state."""
    run_rows(args, begin, end)


def turns(args, begin, end):
    """Up to `end` turns of a loop described at address `begin` (see TURN_WORDS); `args` is the pool's state."""
    words = ptr_i64(begin)
    for _ in range(end):
        run_rows(args, words[TABLE], words[TABLE_ROWS])
        if not next_turn(begin):
            return


def turns_alone(args, begin, end):
    """As `turns`, on this thread, without a pool."""
    words = ptr_i64(begin)
    for _ in range(end):
        run_rows_alone(words[TABLE], words[TABLE_ROWS])
        if not next_turn(begin):
            return
