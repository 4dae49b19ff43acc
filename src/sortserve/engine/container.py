"""What the control groups of this process allow it: a container sees the whole machine's memory and processors, not its own.

Groups nest, and the tightest counts. Both versions are read: one tree with files like `memory.max` (v2), or one tree per
controller with files like `memory/memory.limit_in_bytes` (v1). `/proc/self/cgroup` names the group as the machine sees it,
which a container may not see; what it does see is the root, and that is its own group then. No groups, no limits.
"""

from collections.abc import Iterator
from pathlib import Path

MOUNTED = Path("/sys/fs/cgroup")
NAMED = Path("/proc/self/cgroup")


def free_bytes(mounted: Path = MOUNTED, named: Path = NAMED) -> int | None:
    """Memory that may still be taken; None: nothing limits it. Cached files that nobody uses any more count as free, as
    they do for the kernel."""
    found = []
    for folder in _groups(mounted, named, "memory"):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most = _number(
                folder / limit
            )  # v1 has a number of 19 digits where there is no limit: it changes no minimum
            if most is not None:
                taken = (_number(folder / used) or 0) - _entry(folder / "memory.stat", cached)
                found.append(max(0, most - max(0, taken)))
    return min(found, default=None)


def cpus(mounted: Path = MOUNTED, named: Path = NAMED) -> float | None:
    """Processors' worth of time it may use; None: nothing limits it."""
    found = []
    for folder in _groups(mounted, named, "cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        pairs = [(quota, period), (_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))]
        # "max" (v2) and "-1" (v1) are no numbers of this kind: no limit
        found += [int(share) / int(of) for share, of in pairs if share.isdigit() and of.isdigit() and int(of) > 0]
    return min(found, default=None)


def _groups(mounted: Path, named: Path, controller: str) -> Iterator[Path]:
    """Folders of the process' groups, of v2 and of a controller of v1, each with those above it."""
    for line in _text(named).splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        root = mounted if not controllers else mounted / controller
        if controllers and controller not in controllers.split(","):
            continue
        # a group that lies outside of what is seen here is named with dots
        parts = [] if ".." in path.split("/") else [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:depth])


def _text(path: Path) -> str:
    """Content without blanks around it; nothing if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _entry(path: Path, name: str) -> int:
    """A number of a file of `name number` lines; 0 if it is not there."""
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0
