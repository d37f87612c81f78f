"""Proves that a journal gives back what was put into it or says that it is lost, whatever became of its files."""

import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.proof.properties import given, settings, st
from unet_fast import journal as journals
from unet_fast.errors import BadInput
from unet_fast.journal import FOLDER, Journal, locked
from unet_fast.tiling import Tile

Array = np.ndarray[Any, Any]

ABOUT = {"model": "m", "threshold": None, "sizes": (3, 4)}
UINT8 = np.dtype(np.uint8)


def _open(place: Path, shape: tuple[int, ...], dtype: Any = UINT8, *, resume: bool = True, **other: Any) -> Journal:
    return Journal(place, {**ABOUT, **other}, shape, np.dtype(dtype), resume=resume)


def _cut(depth: int, rows: Sequence[int], columns: Sequence[int]) -> list[Tile]:
    """Tiles whose edges are these."""
    return [
        Tile(z, top, left, bottom - top, right - left)
        for z, (top, bottom), (left, right) in product(range(depth), pairwise(rows), pairwise(columns))
    ]


def _of(image: Array, tile: Tile) -> Array:
    """Pixels of a tile, [planes, rows, columns], or without planes."""
    part = image[tile.z, :, tile.row : tile.row + tile.rows, tile.column : tile.column + tile.columns]
    return np.ascontiguousarray(part[0] if len(part) == 1 else part)


@pytest.fixture(autouse=True)
def nothing_need_be_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    # a disk takes milliseconds for each; `test_interruption.py` sees to the order
    monkeypatch.setattr(os, "fsync", lambda _: None)


# ---- what is put in comes out

DTYPES = ("uint8", "uint16", "float16", "float32", "float64")


@st.composite
def _images(draw: Any) -> tuple[Array, list[Tile]]:
    depth, planes, height, width = (draw(st.integers(1, n)) for n in (2, 3, 200, 40))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    values = np.random.default_rng(draw(st.integers(0, 99)))
    size = (depth, planes, height, width)
    image = values.integers(0, 256, (*size, dtype.itemsize), dtype=np.uint8).view(dtype)[..., 0]
    image = image if draw(st.booleans()) else np.zeros_like(image)
    edges = [sorted({0, n, *draw(st.lists(st.integers(1, n), max_size=4))}) for n in (height, width)]
    return image, draw(st.permutations(_cut(depth, *edges)))


@settings(max_examples=150)
@given(
    made=_images(),
    bands=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    groups=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    synced=st.booleans(),
    reopened=st.booleans(),
)
def test_rows_are_those_of_the_tiles(
    made: tuple[Array, list[Tile]], bands: list[int], groups: list[int], synced: bool, reopened: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    image, tiles = made
    depth, planes, height, width = image.shape
    place = tmp_path_factory.mktemp("journal") / "j"
    shape = (height, width) if planes == 1 else (planes, height, width)
    journal = _open(place, shape, image.dtype)
    journal.plan(tile_in=[20, 20], batch=1)
    left = list(tiles)
    for size in groups * (len(tiles) + 1):
        group, left = left[:size], left[size:]
        journal.add(group, [_of(image, tile) for tile in group])
        if synced:
            journal.sync()
    journal.sync()
    if reopened:
        journal.close()
        journal = _open(place, shape, image.dtype)
    assert set(journal.done) == set(tiles)
    assert not journal.lost
    for z, plane in product(range(depth), range(planes)):
        first = 0
        for band in bands * height:
            stop = min(height, first + band)
            found = journal.rows(z, plane, first, stop, width)
            assert found.dtype == image.dtype
            # bit by bit: NaN is not equal to itself
            assert found.tobytes() == image[z, plane, first:stop].tobytes()
            first = stop
            if first == height:
                break
    journal.close()
    shutil.rmtree(place.parent)


# ---- whatever became of its files


class Made:
    """A journal with two plans and five tiles, and what is in it."""

    def __init__(self, place: Path) -> None:
        self.place, self.shape = place, (2, 70, 12)
        self.image = np.random.default_rng(0).integers(0, 9, (1, *self.shape)).astype(np.uint16)
        self.tiles = [*_cut(1, (0, 66, 70), (0, 5)), *_cut(1, (0, 66, 68, 70), (5, 12))]
        journal = self.open()
        journal.plan(tile_in=[90, 40], batch=2)
        for number in (0, 2):
            group = self.tiles[number : number + 2]
            journal.add(group, [_of(self.image, tile) for tile in group])
            journal.sync()
        journal.plan(tile_in=[30, 30], batch=1)
        journal.add(self.tiles[4:], [_of(self.image, tile) for tile in self.tiles[4:]])
        journal.sync()
        journal.close()
        self.files = {name: (place / name).read_bytes() for name in ("journal", "tiles")}

    def open(self) -> Journal:
        return _open(self.place, self.shape, np.uint16)

    def spoil(self, name: str, contents: bytes) -> None:
        for other, whole in self.files.items():
            (self.place / other).write_bytes(contents if other == name else whole)

    def check(self, where: str) -> set[Tile]:
        """What is left, which must be as it was, and grow to all there was."""
        journal = self.open()
        left = set(journal.done)
        try:
            assert left <= set(self.tiles), where
            for tile in left:
                assert self._parts(journal, tile) == _of(self.image, tile).tobytes(), where
            for number, (plan, finished) in enumerate(journal.plans):
                assert plan == [{"tile_in": [90, 40], "batch": 2}, {"tile_in": [30, 30], "batch": 1}][number], where
                assert finished == set(self.tiles[: 4 * number]), where
            missing = [tile for tile in self.tiles if tile not in left]
            journal.add(missing, [_of(self.image, tile) for tile in missing])
            journal.sync()
        finally:
            journal.close()
        journal = self.open()
        try:
            assert set(journal.done) == set(self.tiles), where
            for plane in range(2):
                rows = journal.rows(0, plane, 0, 70, 12)
                assert rows.tobytes() == self.image[0, plane].tobytes(), where
        finally:
            journal.close()
        return left

    def _parts(self, journal: Journal, tile: Tile) -> bytes:
        return b"".join(journal._part(tile, plane, 0, tile.rows).tobytes() for plane in range(2))


@pytest.fixture
def made(tmp_path: Path) -> Made:
    made = Made(tmp_path / "j")
    assert made.check("as it was") == set(made.tiles)
    return made


@pytest.mark.parametrize("name", ["journal", "tiles"])
def test_no_byte_can_be_changed_unnoticed(name: str, made: Made) -> None:
    whole = made.files[name]
    chance = np.random.default_rng(0)
    lost = 0
    for at in range(0, len(whole), 1 if name == "journal" else 7):
        for other in {whole[at] ^ 1, whole[at] ^ 0x20, 10, int(chance.integers(256))}:
            if other == whole[at]:
                continue
            made.spoil(name, whole[:at] + bytes([other]) + whole[at + 1 :])
            left = made.check(f"{name}, byte {at}: {other}")
            lost += len(left) < 5
            if name == "tiles":
                # only the one whose byte it is
                assert len(left) == 4
    assert lost > (len(whole) if name == "journal" else len(whole) // 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["journal", "tiles"])
@pytest.mark.parametrize("end", [b"", b"\0" * 40, b"\n", b"00000000 \n"], ids=repr)
def test_files_may_end_anywhere(name: str, end: bytes, made: Made) -> None:
    whole = made.files[name]
    found = []
    for length in [*range(0, len(whole), 1 if name == "journal" else 13), len(whole)]:
        made.spoil(name, whole[:length] + end)
        found.append(len(made.check(f"{name}, {length} bytes and {end!r}")))
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == 5


def test_what_lies_between_two_whole_lines_hides_those_that_follow(made: Made) -> None:
    lines = made.files["journal"].splitlines(keepends=True)
    assert len(lines) == 6
    for number, damage in product(range(7), (b"\n", b"\0\n", b"x", lines[2][:-20] + b"\n", b"00000000 \n", b"[]\n")):
        made.spoil("journal", b"".join([*lines[:number], damage, *lines[number:]]))
        left = made.check(f"{damage!r} before line {number}")
        assert len(left) == [0, 0, 0, 2, 4, 4, 5][number]


def test_lines_and_tiles_that_were_exchanged_are_found_out(made: Made) -> None:
    lines, tiles = made.files["journal"].splitlines(keepends=True), made.files["tiles"]
    made.spoil("tiles", tiles[200:] + tiles[:200])
    assert not made.check("tiles turned round")
    made.spoil("tiles", b"")
    assert not made.check("no tiles")
    # twice is once
    made.spoil("journal", b"".join([*lines[:3], lines[2], *lines[3:]]))
    assert len(made.check("a line twice")) == 5


@pytest.mark.parametrize("name", ["journal", "tiles"])
def test_a_file_that_is_gone_is_made_anew(name: str, made: Made) -> None:
    made.spoil("", b"")
    (made.place / name).unlink()
    assert not made.check(f"no {name}")


def test_what_was_damaged_and_finished_by_an_earlier_plan_is_named(made: Made) -> None:
    tile = made.tiles[1]
    journal = made.open()
    place, strips, _ = journal.done[tile]
    journal.close()
    tiles = bytearray(made.files["tiles"])
    tiles[place + strips[0] // 2] ^= 4
    made.spoil("tiles", bytes(tiles))
    journal = made.open()
    assert journal.lost == {tile}
    assert tile not in journal.done
    assert tile in journal.plans[1][1]
    journal.close()


# ---- whose it is


def test_begun_anew_nothing_is_left_even_where_nothing_can_be_removed(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    for remove in (shutil.rmtree, lambda *_, **__: None):
        made.spoil("", b"")
        monkeypatch.setattr(journals.shutil, "rmtree", remove)
        journal = _open(made.place, made.shape, np.uint16, resume=False, model="another")
        assert (journal.done, journal.plans, journal.finished) == ({}, [], None)
        journal.close()
        assert len((made.place / "journal").read_bytes().splitlines()) == 1
        assert not (made.place / "tiles").read_bytes()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"model": "another"}, "model"),
        ({"threshold": 0.5}, "threshold"),
        ({"sizes": [4, 3], "new": 1}, "sizes and new"),
    ],
)
def test_another_results_journal_is_refused_and_stays(other: dict[str, Any], named: str, made: Made) -> None:
    with pytest.raises(BadInput, match=f"^j was begun with another {named}; begin anew without --resume, or go on"):
        _open(made.place, made.shape, np.uint16, **other)
    assert {name: (made.place / name).read_bytes() for name in made.files}["tiles"] == made.files["tiles"]
    assert len(made.check("refused")) == 5


def test_a_finished_one_says_so_until_it_is_begun_anew(made: Made) -> None:
    journal = made.open()
    journal.finish(result={"bytes": 3}, output="labels")
    journal.close()
    assert not (made.place / "tiles").read_bytes()
    for _ in range(2):
        journal = made.open()
        assert journal.finished == {"result": {"bytes": 3}, "output": "labels"}
        journal.close()
        # no hole in the place of what is gone
        assert not (made.place / "tiles").read_bytes()
    journal = made.open()
    journal.restart()
    journal.close()
    journal = made.open()
    assert (journal.finished, journal.done, journal.lost) == (None, {}, set())
    journal.close()


def test_what_is_added_to_a_closed_one_goes_into_no_other_file(made: Made, tmp_path: Path) -> None:
    journal = made.open()
    journal.close()
    others = [os.open(tmp_path / f"{number}", os.O_RDWR | os.O_CREAT) for number in range(4)]
    for late in (lambda: journal.add(made.tiles[:1], [_of(made.image, made.tiles[0])]), journal.finish):
        with pytest.raises(OSError, match="Bad file descriptor"):
            late()
    assert not any(os.fstat(other).st_size for other in others)
    for other in others:
        os.close(other)
    assert len(made.check("closed")) == 5


# ---- a full disk


class Disk:
    """Takes so many bytes more, in small pieces."""

    def __init__(self, left: int, pwrite: Callable[..., int] = os.pwrite) -> None:
        self.left, self.pwrite = left, pwrite

    def __call__(self, file: int, data: bytes, place: int) -> int:
        if not self.left:
            raise OSError(28, "No space left on device")
        taken = min(self.left, len(data), 50)
        self.left -= taken
        return self.pwrite(file, data[:taken], place)


def test_after_a_full_disk_has_room_again_all_that_was_told_finished_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(0).integers(0, 9, (1, 1, 8, 40)).astype(np.uint8)
    tiles = _cut(1, (0, 8), range(0, 41, 5))
    monkeypatch.setattr(journals, "_SECONDS_BETWEEN_SYNCS", 0)
    failed = 0
    for room in range(0, 1000, 3):
        journal = _open(tmp_path / "j", (8, 40), resume=False)
        monkeypatch.setattr(os, "pwrite", Disk(room))
        left = list(tiles)
        try:
            journal.plan(tile_in=[20, 20], batch=1)
            while left:
                journal.add(left[:1], [_of(image, left[0])])
                del left[0]
        except OSError:
            failed += 1
        monkeypatch.undo()
        monkeypatch.setattr(os, "fsync", lambda _: None)
        # some files were removed; what was added and could not be told is told now
        journal.sync()
        told = set(journal.done)
        journal.close()
        journal = _open(tmp_path / "j", (8, 40))
        assert set(journal.done) == told, f"room for {room} bytes"
        for tile in told:
            assert journal._part(tile, 0, 0, 8).tobytes() == _of(image, tile).tobytes()
        journal.close()
        monkeypatch.setattr(journals, "_SECONDS_BETWEEN_SYNCS", 0)
    assert 100 < failed < 333


# ---- locks


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "results" / FOLDER / "lock"
    file.parent.parent.mkdir()
    yield file
    assert not file.parent.exists()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "_SECONDS_TO_LEAVE", 0.02)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("first", "second"), [(False, False), (False, True), (True, False)])
def test_a_lock_is_refused_by_name(first: bool, second: bool, lock: Path) -> None:
    with locked(lock, shared=first):
        for _ in range(2):
            with (
                pytest.raises(BadInput, match=f"results is being written to by process {os.getpid()} on .*; wait for"),
                locked(lock, shared=second),
            ):
                pass
    with locked(lock, shared=second):
        pass


@pytest.mark.usefixtures("impatient")
def test_who_shared_a_lock_and_left_is_not_named(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stay = locked(lock, shared=True)
    monkeypatch.setattr(journals, "_myself", lambda: "process 1 on here")
    leave = locked(lock, shared=True)
    leave.__enter__()
    monkeypatch.setattr(journals, "_myself", lambda: "process 2 on here")
    stay.__enter__()
    with pytest.raises(BadInput, match="by process 1 on here"), locked(lock):
        pass
    monkeypatch.setattr(journals, "_myself", lambda: "process 1 on here")
    leave.__exit__(None, None, None)
    with pytest.raises(BadInput, match="by another process; wait for it"), locked(lock):
        pass
    stay.__exit__(None, None, None)


def test_who_was_killed_is_not_named(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "_SECONDS_TO_LEAVE", 0.02)
    for shared in (False, True):
        lock.parent.mkdir()
        lock.write_text("process 1234567 on another machine with a long name")
        with (
            locked(lock, shared=shared),
            pytest.raises(BadInput, match=rf"by process {os.getpid()} on \S+; wait for it"),
            locked(lock),
        ):
            pass


def test_those_who_share_a_lock_never_refuse_each_other_as_they_come_and_go(lock: Path) -> None:
    refused: list[BaseException] = []

    def come_and_go(number: int) -> None:
        try:
            for _ in range(150):
                with locked(lock, shared=True), locked(lock.with_name(f"{number}.lock")):
                    pass
        except BaseException as error:
            refused.append(error)

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not refused


def test_who_leaves_a_lock_for_a_moment_alone_refuses_nobody(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, inside, leave = journals._flock, threading.Event(), threading.Event()

    def slow(handle: int, *, alone: bool) -> bool:
        held = flock(handle, alone=alone)
        if held and inside.is_set() and threading.current_thread() is first:
            # alone with it, and about to remove it
            leave.set()
            journals.time.sleep(0.1)
        return held

    def work() -> None:
        with locked(lock, shared=True):
            inside.set()

    first = threading.Thread(target=work)
    monkeypatch.setattr(journals, "_flock", slow)
    first.start()
    leave.wait()
    with locked(lock, shared=True):
        pass
    first.join()


def test_a_full_disk_leaves_a_lock_nameless_and_no_less_a_lock(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "_SECONDS_TO_LEAVE", 0.02)
    monkeypatch.setattr(os, "pwrite", Disk(0))
    with locked(lock), pytest.raises(BadInput, match="by another process"), locked(lock, shared=True):
        pass


def test_something_else_in_the_place_of_the_locks_folder_is_an_error_and_no_wait_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "_SECONDS_TO_LEAVE", 0.02)
    for make in (Path.touch, lambda path: path.symlink_to("nowhere")):
        make(tmp_path / FOLDER)
        with pytest.raises(OSError, match="exists"), locked(tmp_path / FOLDER / "lock"):
            pass
        (tmp_path / FOLDER).unlink()


# ---- the form of a line


def test_a_line_is_a_checksum_and_json(made: Made) -> None:
    for line in made.files["journal"].splitlines():
        checksum, _, text = line.partition(b" ")
        assert int(checksum, 16) == zlib.crc32(text)
        assert len(json.loads(text)) == 1
