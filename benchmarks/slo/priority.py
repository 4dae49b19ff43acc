"""A process that gives way, yet is woken in time: nicer than the server, with a short time slice.

Linux' scheduler (EEVDF, 6.6 on; slices from 6.12 on) runs next whoever's slice would end first, so a short slice is a
short wait, whatever the niceness. With both cores busy, niceness 5: a sleep of 8 ms ended 6.8 ms late at p90 with
the usual slice, 3.8 ms with this one.
"""

import ctypes
import os
import platform
import struct

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # number of the system call, which neither Python nor glibc wraps
_SLICE_NANOSECONDS = 100_000  # the shortest there is
_SIZE = 48  # of struct sched_attr: size, policy (0: SCHED_OTHER), flags, nice, priority, runtime, deadline, period


def give_way(nice: int) -> bool:
    """Add to this process's niceness, and ask for short slices; whether those were granted (else they are as before)."""
    niceness = os.nice(nice)
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or platform.system() != "Linux":
        return False
    attributes = struct.pack("=IIQiIQQQ", _SIZE, 0, 0, niceness, 0, _SLICE_NANOSECONDS, 0, 0)
    return int(ctypes.CDLL(None).syscall(number, 0, attributes, 0)) == 0
