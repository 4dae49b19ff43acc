"""What was measured. Imports nothing of the engine: a machine with a GPU may have little installed."""

import subprocess


def commit() -> str:
    """What was measured, as git names it."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
