"""Short turns of this process on the processor, where Linux grants them: who waits for it waits for as short a time.

A step is hundreds of pieces of work for all threads, each of which ends when the slowest thread does. Beside a busy
process one of the threads shares its core, and loses it for a whole slice of the other's, 3 to 4 ms, in the middle of a
piece. Linux' scheduler (EEVDF, 6.6 on; slices that can be asked for from 6.12 on) runs next whoever's slice would end
first and lets a thread that wakes interrupt one with a longer slice, so short slices are short waits, at any niceness,
and the share of the processor stays the same.
"""

import ctypes
import os
import platform
import struct

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # number of the system call, which neither Python nor glibc wraps
_SLICE_NANOSECONDS = 100_000  # the shortest there is
_SIZE = 48  # of struct sched_attr: size, policy (0: SCHED_OTHER), flags, nice, priority, runtime, deadline, period


def ask_for_short_slices() -> bool:
    """For this thread, and the threads and processes that it starts from now on; whether they were granted."""
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or platform.system() != "Linux":
        return False
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = struct.pack("=IIQiIQQQ", _SIZE, 0, 0, niceness, 0, _SLICE_NANOSECONDS, 0, 0)
    return int(ctypes.CDLL(None).syscall(number, 0, attributes, 0)) == 0
