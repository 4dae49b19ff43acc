"""Short turns on the processor, in a process of its own: they cannot be taken back."""

import subprocess
import sys

import pytest

_TOLD = """
import ctypes, os, struct, threading
from sortserve.engine.time_slices import ask_for_short_slices

def slice_now():
    held = ctypes.create_string_buffer(48)
    ctypes.CDLL(None).syscall({"x86_64": 315, "aarch64": 275}[os.uname().machine], 0, held, 48, 0)
    return struct.unpack("=IIQiIQQQ", held.raw)[5]

os.nice(3)
granted = ask_for_short_slices()
thread = threading.Thread(target=lambda: print(granted, slice_now(), os.getpriority(0, 0)))
thread.start()
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux' scheduler")
def test_threads_that_are_started_have_short_slices_too() -> None:
    done = subprocess.run([sys.executable, "-c", _TOLD], capture_output=True, text=True, check=True)
    granted, nanoseconds, niceness = done.stdout.split()
    if granted != "True":
        pytest.skip("not granted here")
    assert niceness == "3", "as it was"
    if nanoseconds == "0":
        pytest.skip("this kernel has no slices that can be asked for")
    assert nanoseconds == "100000"
