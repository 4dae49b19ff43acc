"""GPU kernels run on the CPU here, through Triton's interpreter: the variable is read when a kernel is defined."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
