"""What is finished of a prediction, tile by tile, on disk: it survives kill -9, and nothing is done twice.

Beside each result lies, until it is whole, a folder with two files that only grow: `tiles`, the compressed results, and
`journal`, a line for what is certain of them: its place and checksum. A line is written after its tiles have reached
the disk, and begins with a checksum of its own, so that whatever moment a process is killed at, what the journal says
is there, and the rest is done again.
"""

import json
import os
import shutil
import socket
import time
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from .errors import BadInput
from .files import sync_folder
from .tiling import Tile

try:
    import fcntl
except ImportError:  # a system without it has no locks of this kind
    fcntl = None  # type: ignore[assignment]

__all__ = ["FOLDER", "Journal", "locked"]

Array = np.ndarray[Any, Any]

# in the folder of the results
FOLDER = ".unet_fast"

# rows of a tile that are compressed together: a result is read back in bands of rows
_STRIP = 64
# so much work may be lost
_SECONDS_BETWEEN_SYNCS = 1.0
# who leaves holds a lock alone for a moment, to remove it
_SECONDS_TO_LEAVE = 0.5
# of zlib: fast; labels shrink a hundredfold all the same
_LEVEL = 1


class Journal:
    """The finished tiles of one result.

    Args:
        place: its folder; made if it is not there.
        about: what the result is made of and how; a journal that says otherwise belongs to another result.
        shape, dtype: of one slice's result, [rows, columns] or [K, rows, columns].
        resume: keep what is there, where it is of the same result; otherwise begin anew.

    Raises:
        BadInput: `resume`, and the journal is of another result; says what differs.
    """

    def __init__(
        self, place: Path, about: dict[str, Any], shape: tuple[int, ...], dtype: np.dtype[Any], *, resume: bool
    ) -> None:
        self.place, self.about, self.dtype = place, about, dtype
        self.planes = 1 if len(shape) == 2 else shape[0]
        self._forget()
        if not resume:
            shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        self._tiles = os.open(place / "tiles", os.O_RDWR | os.O_CREAT, 0o666)
        self._lines = os.open(place / "journal", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not resume or not self._read():
                self.restart()
        except BaseException:
            self.close()
            raise

    def _forget(self) -> None:
        self.done: dict[Tile, tuple[int, list[int], int]] = {}
        # each plan, and what had been finished when it was made
        self.plans: list[tuple[dict[str, Any], set[Tile]]] = []
        # finished once, and damaged since
        self.lost: set[Tile] = set()
        self.finished: dict[str, Any] | None = None
        self._waiting: list[tuple[Tile, int, list[int], int]] = []
        self._by_slice: dict[int, list[Tile]] = {}
        # where the next tile and the next line go
        self._size, self._end = 0, 0
        self._indexed, self._synced = -1, time.monotonic()

    def restart(self) -> None:
        """Nothing is finished."""
        self._forget()
        for file in (self._tiles, self._lines):
            os.ftruncate(file, 0)
        self._write({"about": self.about})
        sync_folder(self.place)

    def close(self) -> None:
        for file in (self._tiles, self._lines):
            os.close(file)
        # a thread that has not heard of it writes into no other file that gets these numbers
        self._tiles = self._lines = -1

    # ---- writing

    def plan(self, **plan: Any) -> None:
        """From here on tiles are cut so."""
        self.sync()
        self._write({"plan": plan})
        self.plans.append((plan, set(self.done)))

    def add(self, tiles: Sequence[Tile], results: Sequence[Array]) -> None:
        """Tiles that went through the net together are finished together."""
        for tile, result in zip(tiles, results, strict=True):
            planes = result.reshape(self.planes, tile.rows, tile.columns)
            strips = [
                zlib.compress(plane[first : first + _STRIP].tobytes(), _LEVEL)
                for plane in planes
                for first in range(0, tile.rows, _STRIP)
            ]
            encoded = b"".join(strips)
            _write_all(self._tiles, encoded, self._size)
            self._waiting.append((tile, self._size, [len(strip) for strip in strips], zlib.crc32(encoded)))
            self._size += len(encoded)
        if time.monotonic() - self._synced >= _SECONDS_BETWEEN_SYNCS:
            self.sync()

    def sync(self) -> None:
        """Be sure that all that was added outlives the process, and the machine."""
        if self._waiting:
            os.fsync(self._tiles)
            lines = [[*_numbers(tile), place, strips, crc] for tile, place, strips, crc in self._waiting]
            self._write({"done": lines})
            self.done.update({tile: (place, strips, crc) for tile, place, strips, crc in self._waiting})
            self._waiting.clear()
        self._synced = time.monotonic()

    def forget(self, tiles: Iterable[Tile]) -> None:
        """They are done again."""
        for tile in tiles:
            self.done.pop(tile, None)

    def finish(self, **about: Any) -> None:
        """The result is whole, and in its place; its tiles are not needed any more."""
        self._write({"finished": about})
        self.finished = about
        os.ftruncate(self._tiles, 0)

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line, separators=(",", ":"), ensure_ascii=True).encode()
        whole = b"%08x %s\n" % (zlib.crc32(text), text)
        # in the place of one that a full disk cut off: nothing after that would be read
        _write_all(self._lines, whole, self._end)
        self._end += len(whole)
        os.fsync(self._lines)

    # ---- reading

    def rows(self, z: int, plane: int, first: int, stop: int, width: int) -> Array:
        """Rows of the result of a slice, [stop - first, width]; all its tiles must be finished."""
        out = np.empty((stop - first, width), self.dtype)
        tiles = self._index().get(z, [])
        # sorted by row: none that begins further above reaches down to here
        highest = max((tile.rows for tile in tiles), default=0)
        begin = bisect_left(tiles, first - highest + 1, key=lambda tile: tile.row)
        for tile in tiles[begin : bisect_left(tiles, stop, key=lambda tile: tile.row)]:
            top, bottom = max(first, tile.row), min(stop, tile.row + tile.rows)
            if top < bottom:
                out[top - first : bottom - first, tile.column : tile.column + tile.columns] = self._part(
                    tile, plane, top - tile.row, bottom - tile.row
                )
        return out

    def _index(self) -> dict[int, list[Tile]]:
        """Tiles by slice."""
        if self._indexed != len(self.done):
            self._by_slice, self._indexed = {}, len(self.done)
            for tile in sorted(self.done):
                self._by_slice.setdefault(tile.z, []).append(tile)
        return self._by_slice

    def _part(self, tile: Tile, plane: int, top: int, bottom: int) -> Array:
        place, strips, _ = self.done[tile]
        each = -(-tile.rows // _STRIP)
        parts = []
        for number in range(top // _STRIP, -(-bottom // _STRIP)):
            start = place + sum(strips[: plane * each + number])
            encoded = os.pread(self._tiles, strips[plane * each + number], start)
            pixels = np.frombuffer(zlib.decompress(encoded), self.dtype).reshape(-1, tile.columns)
            begin = number * _STRIP
            parts.append(pixels[max(top - begin, 0) : bottom - begin])
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _read(self) -> bool:
        """What the journal is certain of, if it is one; from the first line on that is not whole, nothing."""
        with os.fdopen(os.dup(self._lines), "rb") as file:
            file.seek(0)
            for line in file:
                found = _checked(line)
                if found is None:
                    break
                self._understand(found)
                self._end += len(line)
        os.ftruncate(self._lines, self._end)
        if self.finished is None:
            self._verify()
            self._size = max((place + sum(strips) for place, strips, _ in self.done.values()), default=0)
            os.ftruncate(self._tiles, self._size)
        return self._end > 0

    def _understand(self, line: dict[str, Any]) -> None:
        if "about" in line:
            _refuse_another(self.place, line["about"], self.about)
        elif "plan" in line:
            self.plans.append((line["plan"], set(self.done)))
        elif "done" in line:
            for *numbers, place, strips, crc in line["done"]:
                self.done[Tile(*numbers)] = place, strips, crc
        elif "finished" in line:
            self.finished = line["finished"]

    def _verify(self) -> None:
        for tile, (place, strips, crc) in list(self.done.items()):
            if zlib.crc32(os.pread(self._tiles, sum(strips), place)) != crc:
                del self.done[tile]
                self.lost.add(tile)


def _numbers(tile: Tile) -> tuple[int, ...]:
    return tile.z, tile.row, tile.column, tile.rows, tile.columns


def _checked(line: bytes) -> dict[str, Any] | None:
    """A line's contents; None where it is not whole."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError:
        # of no text at all the checksum is 0
        return None
    return found


def _refuse_another(place: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    differ = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if differ:
        raise BadInput(
            f"{place.name} was begun with another {' and '.join(differ)}; begin anew without --resume, or go on with "
            f"what it was begun with"
        )


def _write_all(file: int, data: bytes, place: int) -> None:
    """All of it: a system may take less at a time."""
    left = memoryview(data)
    while left:
        count = os.pwrite(file, left, place)
        left, place = left[count:], place + count


@contextmanager
def locked(file: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock, alone or with others that share it; it ends with the process, however that ends.

    The file, and its folder if it is empty then, are removed by the last who held it.

    Raises:
        BadInput: another process holds it; it is named.
    """
    handle = _hold(file, shared)
    try:
        yield
    finally:
        if _flock(handle, alone=True):
            file.unlink(missing_ok=True)
            with suppress(OSError):
                file.parent.rmdir()
        elif _named(handle) == _myself():
            # others stay
            _name(handle, "")
        os.close(handle)


def _hold(file: Path, shared: bool) -> int:
    until = time.monotonic() + _SECONDS_TO_LEAVE
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileExistsError, FileNotFoundError):
            # its folder went away in between, unless something else is in its place
            if time.monotonic() > until:
                raise
            continue
        # of those who share it the first is named, and not who was killed
        first = _flock(handle, alone=True)
        if first:
            _name(handle, _myself())
        held = _flock(handle, alone=False) if shared else first
        if held and _is_there(file, handle):
            return handle
        who = _named(handle) or "another process"
        os.close(handle)
        if not held:
            if time.monotonic() > until:
                raise BadInput(f"{file.parent.parent} is being written to by {who}; wait for it, or stop it")
            time.sleep(0.01)


def _myself() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _name(handle: int, who: str) -> None:
    # a full disk leaves it nameless
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, who.encode(), 0)


def _named(handle: int) -> str:
    return os.pread(handle, 200, 0).decode(errors="replace").strip()


def _is_there(file: Path, handle: int) -> bool:
    """Whether the file is still this one: whoever held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _flock(handle: int, *, alone: bool) -> bool:
    """Whether the lock is ours now; yes where there are no locks, on a system or file system without."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
