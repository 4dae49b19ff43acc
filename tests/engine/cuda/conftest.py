"""Triton's interpreter, for what runs on a GPU. It must be chosen before triton is first imported."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="triton is not installed")
