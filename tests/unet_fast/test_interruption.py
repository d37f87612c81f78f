"""Proves that an interrupted prediction, resumed, ends with the bytes of an uninterrupted one, and does nothing twice.

Killed at every call that changes the disk, at random times, from the keyboard; a machine that loses its power; a full
disk; memory that runs out; two runs at one place (`tests.proof.faults` has the means).
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.proof.faults import Forks, Ran, build, cut_power, durable_now
from unet_fast import FastUNet, Normalisation, predict
from unet_fast.errors import BadInput
from unet_fast.files import write_tiff
from unet_fast.journal import FOLDER
from unet_fast.prediction import FileResult, predict_files
from unet_fast.storage import load, save

# seconds each; what the quick tests see of it is in test_prediction.py
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

# of random interruptions; `make soak` asks for more, and tries every call where one in three shows nearly as much
INTERRUPTIONS = int(os.environ.get("UNET_FAST_SOAK", "30"))
STRIDE = 1 if "UNET_FAST_SOAK" in os.environ else 3
OLD = b"an old result, which somebody needs"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = build(tmp_path_factory.mktemp("faults"))
    if isinstance(built, str):
        pytest.skip(built)
    return built


@pytest.fixture(scope="module")
def forks(library: Path) -> Iterator[Forks]:
    with Forks(library) as process:
        yield process


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and images."""
    place = tmp_path_factory.mktemp("given")
    save(_model(), place / "model.safetensors")
    save(_model(seed=1), place / "another.safetensors")
    write_tiff(place / "cells.tif", _grey(24, 31), "YX")
    write_tiff(place / "other.tif", _grey(24, 31, seed=1), "YX")
    write_tiff(place / "middle.tif", _grey(60, 70, seed=2), "YX")
    return place


def _model(seed: int = 0) -> FastUNet:
    torch.manual_seed(seed)
    net = FastUNet(features=(2, 4)).eval()
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.constant_(parameter, 0.3)
    net.normalisation = Normalisation()
    logits = predict(net, _grey(24, 31), output="logits")
    with torch.no_grad():
        # a third of the pixels is cell
        net.head.bias[0] += float(np.quantile(logits[1] - logits[0], 0.67))
    return net


def _grey(*shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.random.default_rng(seed).integers(0, 4000, shape).astype(np.uint16)


@dataclass(frozen=True)
class Work:
    """A run that is repeated: from the same images, to the same place, with the same settings."""

    forks: Forks
    given: Path
    folder: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "out" / self.name

    @property
    def journal(self) -> Path:
        return self.out.parent / FOLDER / self.name / "journal"

    def start(self, **job: Any) -> int:
        job = {"model": self.given / "model.safetensors", **self.settings, **job}
        return self.forks.start(self.given / job.pop("image", "cells.tif"), self.out, **job)

    def run(self, **job: Any) -> Ran:
        return self.forks.wait(self.start(**job))

    def afresh(self, old: bytes | None = None) -> None:
        """Nothing is there but, perhaps, an old result."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir()
        if old is not None:
            self.out.write_bytes(old)

    def uninterrupted(self, **job: Any) -> tuple[Ran, dict[str, str]]:
        self.afresh()
        # the first imports what the others find
        self.run(**job)
        self.afresh()
        ran = self.run(traced=True, **job)
        assert ran.done, ran
        assert _inside(self.out.parent) == [self.out.name]
        return ran, _contents(self.out)

    def kept(self) -> int:
        """Tiles that the journal is certain of, as an outsider reads it."""
        return _kept(self.journal)


def _kept(journal: Path) -> int:
    done: set[tuple[int, ...]] = set()
    for line in journal.read_bytes().splitlines(keepends=True) if journal.exists() else []:
        checksum, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or int(checksum, 16) != zlib.crc32(text[:-1]):
            break
        done |= {tuple(numbers[:5]) for numbers in json.loads(text).get("done", [])}
    return len(done)


def _contents(path: Path) -> dict[str, str]:
    """Checksums of a file, or of all files in a folder by their names."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.exists()}


def _calls(ran: Ran, name: str, path: Path) -> list[int]:
    """The numbers of such calls."""
    return [n for n, call in enumerate(ran.trace, 1) if call == f"{name} {path}"]


def _inside(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


OLD_CONTENTS = {".": hashlib.sha256(OLD).hexdigest()}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "labels": ("labels.tif", {}),
    "instances": ("instances.tif", {"output": "instances", "min_pixels": 3}),
    "probabilities": ("probabilities.tif", {"output": "probabilities"}),
    "float16": ("probabilities.npy", {"output": "probabilities"}),
    "zarr": ("labels.zarr", {}),
}


@pytest.fixture
def work(forks: Forks, given: Path, tmp_path: Path) -> Work:
    return Work(forks, given, tmp_path, "labels.tif", {"tile_in": 28})


def _of_kind(work: Work, kind: str) -> Work:
    if kind == "zarr":
        pytest.importorskip("zarr", reason="writes a Zarr: zarr is not installed")
    name, settings = KINDS[kind]
    return replace(work, name=name, settings={**work.settings, **settings})


# ---- killed


@pytest.mark.parametrize("how", ["before", "half", "after"])
def test_killed_at_any_call_and_resumed_it_ends_with_the_same_bytes(how: str, work: Work) -> None:
    ran, want = work.uninterrupted()
    tiles = len(ran.forwards)
    assert tiles == 6
    lines = _calls(ran, "pwrite64", work.journal)
    # the first two are no tiles, the last one says that it is finished
    assert len(lines) == 2 + tiles + 1
    for n, call in enumerate(ran.trace, 1):
        if how == "half" and not call.startswith(("write", "pwrite")):
            continue
        # after one call is before the next, but for threads
        if how == "after" and n % STRIDE:
            continue
        work.afresh(OLD)
        where = f"{how} call {n}, {call}"
        assert work.run(at=n, how=how).killed, where
        assert _contents(work.out) in (OLD_CONTENTS, want), where
        there = work.journal.exists()
        again = work.run(resume=True)
        assert again.done, f"{where}: {again}"
        assert _contents(work.out) == want, where
        assert _inside(work.out.parent) == [work.out.name], where
        written = sum(line < n or (line == n and how == "after") for line in lines[2:-1]) if there else 0
        # nothing is left to do of a result that is there
        assert len(again.forwards) == tiles - written, where
        finished = there and (lines[-1] < n or (lines[-1] == n and how == "after"))
        assert again.statuses == ["kept" if finished else "done"], where


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "labels"])
def test_killed_while_a_result_is_written_it_is_old_or_new_and_never_half(kind: str, work: Work) -> None:
    work = _of_kind(work, kind)
    ran, want = work.uninterrupted()
    computed = _calls(ran, "pwrite64", work.journal.with_name("tiles"))[-1]
    old = None if kind == "zarr" else OLD
    for n, call in enumerate(ran.trace, 1):
        if n <= computed:
            continue
        for how in ("before", "half") if call.startswith(("write", "pwrite")) else ("before",):
            work.afresh(old)
            where = f"{how} call {n}, {call}"
            killed = work.run(at=n, how=how)
            # a library that writes in threads may need a call less
            assert killed.killed or (kind == "zarr" and killed.done), where
            assert _contents(work.out) in ({} if old is None else OLD_CONTENTS, want), where
            again = work.run(resume=True)
            assert again.done, f"{where}: {again}"
            assert _contents(work.out) == want, where
            assert _inside(work.out.parent) == [work.out.name], where


@pytest.mark.parametrize("kind", ["labels", "probabilities", "zarr"])
def test_a_power_cut_at_any_call_costs_no_more_than_what_was_not_on_the_disk(kind: str, work: Work) -> None:
    work = _of_kind(work, kind)
    ran, want = work.uninterrupted()
    old = None if kind == "zarr" else OLD
    lines = _calls(ran, "pwrite64", work.journal)
    first = 0 if kind == "labels" else _calls(ran, "pwrite64", work.journal.with_name("tiles"))[-1]
    for n, call in list(enumerate(ran.trace, 1))[first :: STRIDE if kind == "zarr" else 1]:
        work.afresh(old)
        where = f"call {n}, {call}"
        copies = durable_now(work.out.parent, work.folder / "durable")
        work.run(at=n, how="before", durable=copies)
        cut_power(work.out.parent, copies, zeros=n % 2 == 0)
        assert _contents(work.out) in ({} if old is None else OLD_CONTENTS, want), where
        kept = work.kept()
        if n <= lines[-1]:
            # all but the last one, which may be on its way
            assert kept >= sum(line < n for line in lines[2:]) - 1, where
        again = work.run(resume=True)
        assert again.done, f"{where}: {again}"
        assert _contents(work.out) == want, where
        assert len(again.forwards) == len(ran.forwards) - kept, where


def test_an_old_zarr_outlives_two_interruptions_of_the_run_that_replaces_it(work: Work) -> None:
    work = _of_kind(work, "zarr")
    _, want = work.uninterrupted()
    assert work.run(model=work.given / "another.safetensors").done
    old = _contents(work.out)
    assert old != want
    saved = shutil.copytree(work.out.parent, work.folder / "saved")

    def again(**job: Any) -> Ran:
        shutil.rmtree(work.out.parent)
        shutil.copytree(saved, work.out.parent)
        return work.run(**job)

    trace = again(traced=True).trace
    [away] = [n for n, call in enumerate(trace, 1) if call.startswith("rename") and call.endswith("old.zarr")]
    # between two renames nothing is under the name, as a folder cannot take another's place
    assert again(at=away + 1, how="before").killed
    between = shutil.copytree(work.out.parent, work.folder / "between")
    calls = work.run(traced=True, resume=True).calls
    for resume in (True, False):
        for n in range(1, calls + 1, STRIDE):
            shutil.rmtree(work.out.parent)
            shutil.copytree(between, work.out.parent)
            work.run(at=n, how="before", resume=resume)
            whole = [_contents(path) for path in work.out.parent.rglob("*.zarr")]
            assert old in whole or _contents(work.out) == want, f"call {n}, resume {resume}"
            assert work.run(resume=True).done
            assert _contents(work.out) == want, f"call {n}, resume {resume}"


def test_interrupted_at_random_times_again_and_again_it_ends_with_the_same_bytes(work: Work) -> None:
    chance = random.Random(20150518)
    wanted = []
    for each in (_of_kind(work, kind) for kind in ("labels", "float16", "instances")):
        ran, want = each.uninterrupted(image="middle.tif")
        # others may have held it up
        wanted.append((each, want, min(ran.seconds, *(each.run(image="middle.tif").seconds for _ in range(3)))))
    count = interrupted = 0
    while count < INTERRUPTIONS:
        each, want, seconds = chance.choice(wanted)
        old = chance.choice([None, OLD])
        each.afresh(old)
        for number in range(chance.randint(1, 4)):
            # an impatient user presses the keys more than once
            signals = chance.choice([[signal.SIGKILL], [signal.SIGKILL], [signal.SIGINT], [signal.SIGINT] * 2])
            job = {"every_s": chance.choice([0.0, 0.02, 1.0]), "signals": signals, "resume": bool(number)}
            ran = each.run(image="middle.tif", after_s=chance.uniform(0, seconds), **job)
            assert ran.killed or ran.done or ran.error == "KeyboardInterrupt", ran
            assert _contents(each.out) in ({} if old is None else OLD_CONTENTS, want)
            count, interrupted = count + 1, interrupted + (not ran.done)
        kept = each.kept()
        again = each.run(image="middle.tif", resume=True)
        assert again.done, again
        assert _contents(each.out) == want
        assert len(again.forwards) == 30 - kept
        assert _inside(each.out.parent) == [each.out.name]
    assert interrupted > INTERRUPTIONS / 4


def test_tiles_that_go_through_the_net_together_do_so_again(work: Work) -> None:
    work = _of_kind(replace(work, settings={**work.settings, "batch": 3, "image": "middle.tif"}), "float16")
    ran, want = work.uninterrupted()
    assert ran.forwards == [3] * 10
    for n in range(8, _calls(ran, "pwrite64", work.journal.with_name("tiles"))[-1] + 3, 4):
        work.afresh()
        assert work.run(at=n, how="before").killed
        kept = work.kept()
        assert kept % 3 == 0
        again = work.run(resume=True)
        assert again.forwards == [3] * (10 - kept // 3), f"call {n}"
        assert _contents(work.out) == want, f"call {n}"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("refuse", [{}, {4: "cuda"}], ids=["one plan", "smaller tiles"])
def test_finished_tiles_that_a_disk_has_damaged_are_done_again(batch: int, refuse: dict[int, str], work: Work) -> None:
    work = replace(work, settings={"tile_in": 32, "image": "middle.tif", "batch": batch})
    ran, want = work.uninterrupted(refuse=refuse)
    last = _calls(ran, "pwrite64", work.journal)[-4]
    work.afresh()
    assert work.run(at=last, how="before", refuse=refuse).killed
    saved = shutil.copytree(work.out.parent, work.folder / "saved")
    kept, tiles = work.kept(), work.journal.with_name("tiles")
    assert kept > 8
    for place in range(0, tiles.stat().st_size, 50 * STRIDE):
        shutil.rmtree(work.out.parent)
        shutil.copytree(saved, work.out.parent)
        spoiled = bytearray(tiles.read_bytes())
        spoiled[place] ^= 0xFF
        tiles.write_bytes(spoiled)
        # what was done again is not lost a second time
        assert work.run(resume=True, at=18, how="before").killed
        again = work.run(resume=True)
        assert again.done, f"byte {place}: {again}"
        assert _contents(work.out) == want, f"byte {place}"
        assert len(again.forwards) < len(ran.forwards) / 2, f"byte {place}"


# ---- interrupted from the keyboard, or by a cluster


# the command, but each pass takes a tenth of a second longer, and is committed at once
SLOW = """
import signal
import time
from unet_fast import cli, journal, model

# whoever runs in the background is born deaf to it
signal.signal(signal.SIGINT, signal.default_int_handler)

def slow(self, x, forward=model.FastUNet.forward):
    time.sleep(0.1)
    return forward(self, x)

model.FastUNet.forward, journal._SECONDS_BETWEEN_SYNCS = slow, 0
cli.main()
"""


def _command(*python: str, work: Work) -> subprocess.Popen[str]:
    arguments = ["-m", work.given / "model.safetensors", "-i", work.given / "middle.tif", "-o", work.out, "--tile", 28]
    return subprocess.Popen(
        [sys.executable, *python, "predict", "--quiet", "--device", "cpu", "--resume", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_interrupted_command_says_what_is_kept_and_resume_goes_on_with_it(work: Work) -> None:
    ran, want = replace(work, settings={"tile_in": 28, "image": "middle.tif"}).uninterrupted()
    work.afresh(OLD)
    kept = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = _command("-c", SLOW, work=work)
        until = time.monotonic() + 60
        while work.kept() < kept + 3 and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(number)
        stdout, stderr = process.communicate()
        before, kept = kept, work.kept()
        assert process.returncode == 130, stderr
        assert before < kept < len(ran.forwards)
        said = f"{kept} finished tiles of labels.tif are kept; --resume goes on with them\nerror: interrupted\n"
        assert (stdout, stderr) == ("", said)
        assert _contents(work.out) == OLD_CONTENTS
    process = _command("-m", "unet_fast", work=work)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert _contents(work.out) == want
    assert _inside(work.out.parent) == [work.out.name]


# ---- a full disk


@pytest.mark.parametrize("kind", ["labels", "probabilities", "float16", "zarr"])
def test_a_full_disk_is_one_sentence_and_costs_nothing_that_was_finished(kind: str, work: Work) -> None:
    work = _of_kind(work, kind)
    ran, want = work.uninterrupted()
    computed = _calls(ran, "pwrite64", work.journal.with_name("tiles"))[-1]
    old = None if kind == "zarr" else OLD
    grows = ("write", "pwrite", "fsync", "ftruncate", "posix_fallocate", "rename")
    for n, call in enumerate(ran.trace, 1):
        if not call.startswith(grows) or (kind != "labels" and n <= computed) or (kind != "float16" and n % STRIDE):
            continue
        work.afresh(old)
        full = work.run(at=n, how="full")
        where = f"from call {n} on, {call}: {full}"
        _check_full(work, full, where, old, want)
        kept = work.kept()
        again = work.run(resume=True)
        assert again.done, f"{where}: {again}"
        assert _contents(work.out) == want, where
        assert len(again.forwards) == len(ran.forwards) - kept, where


def _check_full(work: Work, full: Ran, where: str, old: bytes | None, want: dict[str, str]) -> None:
    assert full.error in ("BadInput", None), where
    assert full.done or "cannot be written: " in full.said, where
    assert "\n" not in full.said, where
    if full.said.endswith("; what is finished is kept; free some and go on with --resume"):
        assert work.journal.exists(), where
    # a result may be there already when the journal cannot say so any more
    assert _contents(work.out) in ({} if old is None else OLD_CONTENTS, want), where
    assert not full.done or _contents(work.out) == want, where


@pytest.mark.parametrize("kind", ["labels", "float16"])
def test_a_file_that_may_grow_no_further_is_one_sentence(kind: str, work: Work) -> None:
    work = _of_kind(work, kind)
    _, want = work.uninterrupted()
    refused = 0
    for limit in range(1, 3501, 175):
        work.afresh(OLD)
        full = work.run(limit=limit)
        where = f"{limit} bytes: {full}"
        _check_full(work, full, where, OLD, want)
        refused += not full.done
        assert work.run(resume=True).done, where
        assert _contents(work.out) == want, where
    assert 3 < refused < 20


# ---- what is there already


@pytest.mark.parametrize("resume", [False, True])
def test_a_result_without_a_journal_is_never_taken_for_finished(resume: bool, work: Work) -> None:
    _, want = work.uninterrupted()
    wrong = work.out.parent / "wrong.tif"
    write_tiff(wrong, np.zeros((24, 31), np.uint8), "YX")
    for old in (OLD, wrong.read_bytes(), b"", work.out.read_bytes()):
        work.afresh(old)
        ran = work.run(resume=resume)
        assert (ran.statuses, len(ran.forwards)) == (["done"], 6)
        assert _contents(work.out) == want


@dataclass(frozen=True)
class Two:
    """Images of which one is finished, and the other cannot be read, so that journals are left."""

    given: Path
    images: Path
    results: Path

    @property
    def result(self) -> Path:
        return self.results / "cells.tif"

    def predict(self, model: str = "model", **settings: Any) -> FileResult:
        """What became of the first."""
        net = load(self.given / f"{model}.safetensors")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", StringIO())
            [first, second] = predict_files(net, self.images, self.results, **{"tile_in": 28, **settings}).files
        assert (second.status, second.image.name) == ("failed", "damaged.tif")
        return first


@pytest.fixture
def two(given: Path, tmp_path: Path) -> Two:
    two = Two(given, tmp_path / "images", tmp_path / "results")
    two.images.mkdir()
    shutil.copy(given / "cells.tif", two.images / "cells.tif")
    (two.images / "damaged.tif").write_bytes(b"II*\0oh")
    assert two.predict(output="instances", min_pixels=2).status == "done"
    return two


def test_a_finished_result_is_kept_while_another_image_is_mended(two: Two) -> None:
    before, when = two.result.read_bytes(), two.result.stat().st_mtime_ns
    for _ in range(2):
        kept = two.predict(output="instances", min_pixels=2, resume=True)
        assert (kept.status, kept.computed) == ("kept", 0)
        assert (two.result.read_bytes(), two.result.stat().st_mtime_ns) == (before, when)
    shutil.copy(two.given / "other.tif", two.images / "damaged.tif")
    net = load(two.given / "model.safetensors")
    files = predict_files(net, two.images, two.results, output="instances", min_pixels=2, tile_in=28, resume=True).files
    assert [file.status for file in files] == ["kept", "done"]
    assert two.result.stat().st_mtime_ns == when
    assert _inside(two.results) == ["cells.tif", "damaged.tif"]


def test_without_resume_a_finished_result_is_done_again(two: Two) -> None:
    before, when = two.result.read_bytes(), two.result.stat().st_mtime_ns
    assert two.predict(output="instances", min_pixels=2).status == "done"
    assert two.result.read_bytes() == before
    assert two.result.stat().st_mtime_ns > when


SPOILED: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "another byte": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"?" + path.read_bytes()[-8:]),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_finished_result_that_is_not_as_it_was_is_done_again(how: str, two: Two) -> None:
    before = two.result.read_bytes()
    SPOILED[how](two.result)
    assert not two.result.exists() or two.result.read_bytes() != before
    assert two.predict(output="instances", min_pixels=2, resume=True).status == "done"
    assert two.result.read_bytes() == before
    assert two.predict(output="instances", min_pixels=2, resume=True).status == "kept"


@pytest.mark.parametrize("other", [{"output": "labels"}, {"output": "instances", "min_pixels": 20}], ids=str)
def test_what_else_is_asked_of_the_same_labels_is_done_and_not_taken_from_before(
    other: dict[str, Any], two: Two, tmp_path: Path
) -> None:
    net = load(two.given / "model.safetensors")
    predict_files(net, two.images / "cells.tif", tmp_path / "fresh" / "cells.tif", tile_in=28, **other)
    want = (tmp_path / "fresh" / "cells.tif").read_bytes()
    assert want != two.result.read_bytes()
    assert two.predict(resume=True, **other).status == "done"
    assert two.result.read_bytes() == want


DIFFERENT: dict[str, dict[str, Any]] = {
    "image": {},
    "model": {"model": "another"},
    "output": {"output": "probabilities"},
    "axes": {"axes": "YX"},
    "tta": {"tta": "d4", "tile_in": None},
    "nan": {"nan": "fill"},
    "threshold": {"threshold": 0.4},
    "model and tta and nan": {"model": "another", "tta": "rot7", "nan": "fill", "tile_in": None},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_resume_refuses_what_was_begun_otherwise_and_says_what_differs(what: str, two: Two) -> None:
    if what == "image":
        shutil.copy(two.given / "other.tif", two.images / "cells.tif")
    before = two.result.read_bytes()
    found = two.predict(resume=True, **DIFFERENT[what])
    said = f"cells.tif was begun with another {what}; begin anew without --resume, or go on with what it was begun with"
    assert (found.status, found.error) == ("failed", said)
    assert two.result.read_bytes() == before
    # neither is anything lost
    if what != "image":
        assert two.predict(output="instances", min_pixels=2, resume=True).status == "kept"
    assert two.predict(**DIFFERENT[what]).status == "done"
    assert two.result.read_bytes() != before


def test_an_unfinished_result_is_refused_likewise_and_goes_on_with_what_is_the_same(work: Work) -> None:
    settings = {"output": "instances", "min_pixels": 2}
    _, want = work.uninterrupted(**settings)
    work.afresh(OLD)
    assert work.run(at=25, how="before").killed
    kept = work.kept()
    assert 0 < kept < 6
    for what, other in (("threshold", {"threshold": 0.4}), ("image", {"image": "other.tif"})):
        ran = work.run(resume=True, **other)
        assert (ran.error, ran.forwards) == ("BadInput", [])
        assert f"labels.tif was begun with another {what}; " in ran.said
    # cells are found in labels; they are not another output of the net
    ran = work.run(resume=True, **settings)
    assert (ran.statuses, len(ran.forwards)) == (["done"], 6 - kept)
    assert _contents(work.out) == want


def test_tiles_asked_for_anew_are_no_larger_than_those_it_was_begun_with(work: Work) -> None:
    _, want = work.uninterrupted()
    for tile in (None, 20, 28, 40):
        for batch in (None, 1, 2):
            work.afresh()
            assert work.run(at=25, how="before").killed
            ran = work.run(resume=True, tile_in=tile, batch=batch)
            assert ran.done, ran
            assert max(ran.forwards) == 1
            assert _contents(work.out) == want


# ---- two at a time


def test_a_second_run_at_one_place_is_refused_and_the_first_ends_well(work: Work) -> None:
    _, want = work.uninterrupted()
    work.afresh(OLD)
    first = work.start(sleep_s=0.5)
    net = load(work.given / "model.safetensors")
    for resume in (False, True):
        with pytest.raises(BadInput) as refused:
            predict_files(net, work.given / "cells.tif", work.out, tile_in=28, resume=resume)
        assert str(refused.value).startswith(f"{work.out.parent} is being written to by process {first} on ")
        assert "\n" not in str(refused.value)
    # a folder of results is one place
    with pytest.raises(BadInput, match=f"is being written to by process {first} on "):
        predict_files(net, [work.given / "cells.tif", work.given / "other.tif"], work.out.parent)
    ran = work.forks.wait(first)
    assert (ran.statuses, len(ran.forwards)) == (["done"], 6)
    assert _contents(work.out) == want
    assert _inside(work.out.parent) == [work.out.name]


def test_two_runs_write_two_results_into_one_folder(work: Work) -> None:
    _, want = work.uninterrupted()
    other = replace(work, name="other.tif")
    _, other_want = other.uninterrupted(image="other.tif")
    assert want != other_want
    work.afresh()
    for slow, quick in ((0.05, 0.0), (0.0, 0.05), (0.02, 0.02)):
        first, second = work.start(sleep_s=slow), other.start(image="other.tif", sleep_s=quick)
        for number in (first, second):
            ran = work.forks.wait(number)
            assert ran.statuses == ["done"], ran
        assert (_contents(work.out), _contents(other.out)) == (want, other_want)
        assert _inside(work.out.parent) == ["labels.tif", "other.tif"]
        work.afresh()


def test_the_lock_of_a_process_that_was_killed_holds_nobody_up(work: Work) -> None:
    _, want = work.uninterrupted()
    for resume in (False, True):
        work.afresh()
        assert work.run(at=25, how="before").killed
        assert {"lock", "labels.tif.lock"} < set(_inside(work.out.parent / FOLDER))
        kept = work.kept()
        assert kept
        ran = work.run(resume=resume)
        assert (ran.statuses, len(ran.forwards)) == (["done"], 6 - kept * resume)
        assert ("was begun before; begun anew" in ran.stderr) is not resume
        assert _contents(work.out) == want
        assert _inside(work.out.parent) == [work.out.name]


# ---- out of memory


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_where_memory_runs_out_the_result_is_the_same(kind: str, work: Work) -> None:
    work = replace(work, settings={"tile_in": 44, "image": "middle.tif"})
    ran, want = work.uninterrupted()
    passes = len(ran.forwards)
    assert passes == 9
    for k in range(1, passes + 1):
        for refused in ({k: kind}, {k: kind, k + 1: kind}):
            work.afresh()
            smaller = work.run(refuse=refused)
            assert smaller.done, f"pass {k}: {smaller}"
            assert smaller.stderr.count("goes on with tiles of") == 1, smaller.stderr
            assert smaller.stderr.count("\n") == 1, smaller.stderr
            assert _contents(work.out) == want, f"pass {k}"
            assert _inside(work.out.parent) == [work.out.name]


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_where_nothing_smaller_is_possible_it_is_a_memory_error_and_what_is_finished_is_kept(
    kind: str, work: Work
) -> None:
    work = replace(work, settings={"tile_in": 44, "image": "middle.tif"})
    _, want = work.uninterrupted()
    for k in (1, 4):
        work.afresh(OLD)
        ran = work.run(refuse=dict.fromkeys(range(k, 50), kind))
        assert ran.error == "MemoryError", ran
        assert ran.said.endswith("are the smallest there are")
        assert ran.stderr.count("goes on with tiles of") == 1
        assert _contents(work.out) == OLD_CONTENTS
        assert work.kept() == k - 1
        assert work.run(resume=True).done
        assert _contents(work.out) == want


@pytest.mark.parametrize("batch", [1, 3])
def test_killed_after_tiles_became_smaller_it_goes_on_with_the_smaller_ones(batch: int, work: Work) -> None:
    settings = {"output": "probabilities", "tile_in": 44, "image": "middle.tif", "batch": batch}
    work = replace(work, name="probabilities.npy", settings=settings)
    refused = {2: "cuda"} if batch > 1 else {3: "cuda"}
    ran, want = work.uninterrupted(refuse=refused)
    lines = _calls(ran, "pwrite64", work.journal)
    # about, plan, what was finished before, the second plan
    changed = lines[2 + max(refused) - 1]
    last = _calls(ran, "pwrite64", work.journal.with_name("tiles"))[-1]
    for n in [*range(changed + 1, changed + 12), *range(changed + 12, last, 9), last + 1]:
        work.afresh()
        assert work.run(at=n, how="before", refuse=refused).killed
        groups = sum(line < n for line in lines[2:]) - 1
        again = work.run(resume=True)
        assert again.done, f"call {n}: {again}"
        assert _contents(work.out) == want, f"call {n}"
        # the one that was refused is not done again as it was
        assert again.forwards == ran.forwards[groups + 1 :], f"call {n}"
        assert not again.stderr
