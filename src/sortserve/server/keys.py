"""API keys, and what each of them may ask for: the keys file.

The file is TOML, one `[[keys]]` table per key (docs/operating.md has an example). A key's bounds narrow what a client
asks; they never widen it. Only digests of keys are kept, and a key is compared with every one of them, so that the time
a comparison takes tells nothing.
"""

import hashlib
import hmac
import math
import re
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from sortserve.engine.budget import MAX_BUDGET_MS
from sortserve.engine.errors import KeysFileError, NotFoundError, RateLimitedError
from sortserve.engine.ladder import Ladder

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_BURST_SECONDS = 10.0  # of the rate, where no burst is given


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a key may ask for; None: no bound. Budgets are totals in milliseconds, `floor` is an id of the ladder."""

    min_budget_ms: float | None = None
    max_budget_ms: float | None = None
    floor: str | None = None

    def narrow(self, total_ms: float | None) -> float | None:
        """A total budget within the bounds: the largest where none is asked for, None where there is no largest."""
        if total_ms is None:
            return self.max_budget_ms
        return min(max(total_ms, self.min_budget_ms or 0.0), self.max_budget_ms or MAX_BUDGET_MS)


NO_BOUNDS = Bounds()


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it was found: its name for the log, None for one of `--api-key`, and its bounds."""

    digest: bytes = field(repr=False)
    name: str | None = None
    bounds: Bounds = NO_BOUNDS
    bucket: "Bucket | None" = None

    def spend(self) -> None:
        """Count one request. Raises RateLimitedError, with the time to wait, if the key has made too many."""
        if self.bucket is not None and (wait := self.bucket.take()) > 0:
            raise RateLimitedError(
                f"this key may make {self.bucket.per_minute:g} requests a minute, {self.bucket.burst} at once; "
                f"try again in {wait:.3g} s",
                retry_after=wait,
            )


class Bucket:
    """A token bucket: filled at a rate, emptied by requests. It starts full."""

    def __init__(self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self.burst = burst
        self._clock = clock
        self._level = float(burst)
        self._filled = clock()

    def take(self) -> float:
        """Take one token and return 0, or take none and return the seconds until there is one."""
        self._fill()
        if self._level >= 1.0:
            self._level -= 1.0
            return 0.0
        return (1.0 - self._level) * 60.0 / self.per_minute

    def resume(self, former: "Bucket") -> None:
        """Go on where `former` was: reading the keys file again gives nobody a full bucket."""
        former._fill()
        self._level = min(former._level, float(self.burst))

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(float(self.burst), self._level + (now - self._filled) * self.per_minute / 60.0)
        self._filled = now


class KeyRing:
    """All keys that open the server: those of `--api-key`, without bounds, and those of the keys file."""

    def __init__(self, api_keys: Sequence[str] = (), path: Path | None = None) -> None:
        """Raises KeysFileError for a file that cannot be read or is malformed."""
        self._unbounded = [Key(_digest(key)) for key in api_keys]
        self._path = path
        self._ladder: Ladder | None = None
        self._from_file = [] if path is None else read_keys(path)

    @property
    def open(self) -> bool:
        """True where no key is asked for."""
        return not self._unbounded and not self._from_file

    def find(self, given: str) -> Key | None:
        """The key that a client sent, None if it is unknown. One that is in the file has the file's bounds."""
        digest = _digest(given)
        # no early end: the time must not tell which one was right
        found = [key for key in (*self._from_file, *self._unbounded) if hmac.compare_digest(digest, key.digest)]
        return found[0] if found else None

    def check_floors(self, ladder: Ladder) -> None:
        """Raise KeysFileError for a floor that the ladder lacks; called once the model is loaded."""
        self._ladder = ladder
        _check_floors(self._from_file, ladder, self._path)

    def reload(self) -> int:
        """Read the file again and return the number of keys in it; requests under way keep what they were given.

        Raises KeysFileError for a broken file: then the keys stay as they were.
        """
        if self._path is None:
            return 0
        keys = read_keys(self._path)
        if self._ladder is not None:
            _check_floors(keys, self._ladder, self._path)
        former = {key.digest: key.bucket for key in self._from_file}
        for key in keys:
            bucket = former.get(key.digest)
            if key.bucket is not None and bucket is not None:
                key.bucket.resume(bucket)
        self._from_file = keys
        return len(keys)


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """One `[[keys]]` table."""

    name: str
    key: str
    min_budget_ms: float | None = None
    max_budget_ms: float | None = None
    floor: str | None = None
    requests_per_minute: float | None = None
    burst: int | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[_Entry]


def read_keys(path: Path) -> list[Key]:
    """The keys of a file. Raises KeysFileError naming line or field; the message never holds a key."""
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise KeysFileError(f"cannot read the keys file {path}: {error.strerror or error}") from error
    except ValueError as error:  # not TOML, which names the line, or not UTF-8
        raise KeysFileError(f"the keys file {path} is no TOML: {error}") from error
    try:
        entries = msgspec.convert(content, _File).keys
    except msgspec.ValidationError as error:
        raise KeysFileError(f"the keys file {path}: {error}") from error
    if not entries:
        raise KeysFileError(f"the keys file {path} has no [[keys]]; without any, everybody could ask")
    keys = [_key(entry, f"the keys file {path}, keys[{place}]") for place, entry in enumerate(entries)]
    for place, key in enumerate(keys):
        for other, earlier in enumerate(keys[:place]):
            if key.name == earlier.name or key.digest == earlier.digest:
                same = "name" if key.name == earlier.name else "key"
                raise KeysFileError(f"the keys file {path}: keys[{other}] and keys[{place}] have the same {same}")
    return keys


def _key(entry: _Entry, place: str) -> Key:
    """A key from its table, checked. Raises KeysFileError."""
    if not _NAME.fullmatch(entry.name):
        raise KeysFileError(f"{place}: name is {entry.name[:80]!r}, must be 1 to 64 of A-Z a-z 0-9 . _ -")
    place = f"{place} ({entry.name})"
    for bound, most in (
        ("min_budget_ms", MAX_BUDGET_MS),
        ("max_budget_ms", MAX_BUDGET_MS),
        ("requests_per_minute", 1e6),
        ("burst", 1e6),
    ):
        value = getattr(entry, bound)
        if value is not None and not 0 < value <= most:
            raise KeysFileError(f"{place}: {bound} is {value:g}, must be over 0 and at most {most:.0f}")
    smallest, largest = entry.min_budget_ms, entry.max_budget_ms
    if smallest is not None and largest is not None and smallest > largest:
        raise KeysFileError(f"{place}: min_budget_ms {smallest:g} is over max_budget_ms {largest:g}")
    bucket = None
    rate = entry.requests_per_minute
    if rate is not None:
        bucket = Bucket(rate, entry.burst or max(1, math.ceil(rate * _BURST_SECONDS / 60.0)))
    elif entry.burst is not None:
        raise KeysFileError(f"{place}: burst is {entry.burst}, but requests_per_minute is not given; give both")
    return Key(_digest_of(entry.key, place), entry.name, Bounds(smallest, largest, entry.floor), bucket)


def can_be_sent(key: str) -> bool:
    """Whether it comes out of a header as it went in, and has to be sent: an empty one would be no key."""
    return bool(key) and key.isascii() and key.isprintable() and key == key.strip()


def _digest_of(written: str, place: str) -> bytes:
    digest = _DIGEST.fullmatch(written)
    if digest is not None:
        return bytes.fromhex(digest[1])
    if written.startswith("sha256:"):
        raise KeysFileError(f"{place}: key begins with sha256: but 64 hexadecimal digits do not follow")
    if not can_be_sent(written) or " " in written:
        raise KeysFileError(f"{place}: key must be printable ASCII without spaces, or sha256:<64 hexadecimal digits>")
    return _digest(written)


def _check_floors(keys: Sequence[Key], ladder: Ladder, path: Path | None) -> None:
    for place, key in enumerate(keys):
        if key.bounds.floor is not None:
            try:
                ladder.place(key.bounds.floor)
            except NotFoundError as error:
                raise KeysFileError(
                    f"the keys file {path}, keys[{place}] ({key.name}): floor: {error.message}"
                ) from error


def _digest(key: str) -> bytes:
    """Of equal length for every key, so that comparing takes equal time."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
