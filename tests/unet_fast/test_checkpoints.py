"""Proves that a state is whole or not there: killed, without power or with a full disk at every call of a save; bits
flipped anywhere; and that a whole run that is killed at random loses at most what it did since its last state.
"""

import json
import os
import random
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.proof.faults import Forks, build, cut_power, durable_now, state_of
from unet_fast import synthetic
from unet_fast.checkpoints import State, checkpoints, keep, newest, read, sweep
from unet_fast.errors import BadInput
from unet_fast.files import write_tiff
from unet_fast.storage import read_tensors

KILLS = int(os.environ.get("UNET_FAST_SOAK", "30"))
FILES = ("weights.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json")


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    built = build(tmp_path_factory.mktemp("faults"))
    if isinstance(built, str):
        pytest.skip(built)
    with Forks(built) as process:
        yield process


def same(state: State, step: int) -> bool:
    want = state_of(step)
    pairs = ((state.weights, want.weights), (state.optimizer, want.optimizer))
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b) for a, b in pairs) and (
        state.about == want.about
    )


def names(out: Path) -> list[str]:
    return [path.name for path in checkpoints(out)]


def kept(out: Path, *steps: int) -> Path:
    for step in steps:
        keep(out, step, state_of(step))
    return out


# ---- what is there


def test_a_state_is_read_as_it_was_kept(tmp_path: Path) -> None:
    place = keep(tmp_path, 12, state_of(12))
    assert place == tmp_path / "checkpoints" / "00000012"
    assert sorted(p.name for p in place.iterdir()) == sorted(FILES)
    found = newest(tmp_path)
    assert found.place == place
    assert same(found, 12)


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 8):
        keep(tmp_path, step, state_of(step), best_step=min(step, 3))
    assert names(tmp_path) == ["00000003", "00000006", "00000007"]
    # of one step the later ones count, the best one's too
    for _ in range(3):
        keep(tmp_path, 7, state_of(7), best_step=7)
    assert names(tmp_path) == ["00000007-2", "00000007-3"]
    keep(tmp_path, 10, state_of(10), best_step=7)
    keep(tmp_path, 11, state_of(11), best_step=7)
    assert names(tmp_path) == ["00000007-3", "00000010", "00000011"]
    assert same(newest(tmp_path), 11)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]


def test_states_are_in_order_beyond_ten_of_a_step_and_eight_digits(tmp_path: Path) -> None:
    for _ in range(13):
        keep(tmp_path, 99_999_999, state_of(1))
    assert names(tmp_path) == ["99999999-11", "99999999-12"]
    keep(tmp_path, 100_000_000, state_of(1))
    assert names(tmp_path) == ["99999999-12", "100000000"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o027])
def test_permissions_are_those_of_any_new_file(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        place = keep(tmp_path, 1, state_of(1))
        (tmp_path / "plain").touch()
        (tmp_path / "folder").mkdir()
    finally:
        os.umask(before)
    want = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {stat.S_IMODE((place / name).stat().st_mode) for name in FILES} == {want}
    assert place.stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_leftovers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    kept(tmp_path, 1, 2)
    for name in (".writing-00000003", ".removing-00000001", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "weights.safetensors").write_bytes(b"half")
    assert names(tmp_path) == ["00000001", "00000002"]
    sweep(tmp_path)
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == ["00000001", "00000002", "notes"]


# ---- damaged


def spots(size: int, rng: random.Random, count: int) -> list[int]:
    """Of a file: its ends, and anywhere."""
    return sorted({0, size // 2, size - 1, *(rng.randrange(size) for _ in range(count))})


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found_and_named(name: str, tmp_path: Path) -> None:
    place = keep(tmp_path, 5, state_of(5))
    whole, rng = (place / name).read_bytes(), random.Random(name)
    for spot in spots(len(whole), rng, 100):
        flipped = bytearray(whole)
        flipped[spot] ^= 1 << rng.randrange(8)
        (place / name).write_bytes(flipped)
        with pytest.raises(BadInput, match=r"00000005/[\w.]+ is damaged: .+") as refused:
            read(place)
        assert "\n" not in str(refused.value)
        assert name in str(refused.value)
    (place / name).write_bytes(whole)
    assert same(read(place), 5)


@pytest.mark.parametrize("name", FILES)
def test_what_is_cut_longer_or_gone_is_refused(name: str, tmp_path: Path) -> None:
    place = keep(tmp_path, 5, state_of(5))
    whole = (place / name).read_bytes()
    for left in (b"", whole[:-1], whole[: len(whole) // 2], whole + b"\0", b"[" * 100_000):
        (place / name).write_bytes(left)
        with pytest.raises(BadInput, match=f"{name} is damaged: "):
            read(place)
    (place / name).unlink()
    with pytest.raises(BadInput, match=f"{name} is damaged: No such file or directory"):
        read(place)


def test_a_damaged_state_is_named_and_the_one_before_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "00000002" / "optimizer.safetensors").write_bytes(b"?")
    assert same(newest(tmp_path), 1)
    said = capsys.readouterr().err
    assert said.startswith(f"note: {tmp_path}/checkpoints/00000002/optimizer.safetensors is damaged: it has 1 bytes, ")
    assert said.endswith("; taking the one before\n")
    (tmp_path / "checkpoints" / "00000001" / "MANIFEST.json").write_bytes(b"{}")
    with pytest.raises(BadInput, match="has no checkpoint that is whole"):
        newest(tmp_path)
    with pytest.raises(BadInput, match="has no checkpoint to resume from"):
        newest(tmp_path / "elsewhere")


def test_a_manifest_names_nothing_outside_and_no_later_format(tmp_path: Path) -> None:
    from unet_fast.checkpoints import _sealed

    place = keep(tmp_path, 5, state_of(5))
    manifest = json.loads((place / "MANIFEST.json").read_text())
    del manifest["sha256"]
    files = manifest["files"]
    outside = {**files, "../../etc/passwd": files["state.json"]}
    for contents, said in (
        ({**manifest, "files": outside}, "must name weights.safetensors, optimizer.safetensors, state.json"),
        ({**manifest, "format": 2}, "has format 2; this version reads 1"),
        ({**manifest, "files": []}, "must name"),
    ):
        (place / "MANIFEST.json").write_text(_sealed(contents))
        with pytest.raises(BadInput, match=said):
            read(place)


# ---- interrupted at every call


def traced(forks: Forks, out: Path) -> list[str]:
    forks.keep(kept(out, 1, 2), 3)
    shutil.rmtree(out)
    ran = forks.keep(kept(out, 1, 2), 3, traced=True)
    assert ran.statuses == ["00000003"], ran
    return ran.trace


@pytest.mark.slow
@pytest.mark.parametrize("how", ["before", "half", "after"])
def test_killed_at_any_call_of_a_save_an_old_state_or_the_new_one_is_whole(
    how: str, forks: Forks, tmp_path: Path
) -> None:
    calls = traced(forks, tmp_path / "first")
    # each of four files is synced; the folder takes its place, and the oldest goes (folders are synced unseen)
    assert sum(call.startswith("fsync") for call in calls) == 4
    assert sum(call.startswith("rename") for call in calls) >= 2
    for n, call in enumerate(calls, 1):
        if how == "half" and not call.startswith(("write", "pwrite")):
            continue
        out = kept(tmp_path / f"{how}{n}", 1, 2)
        assert forks.keep(out, 3, at=n, how=how).killed, call
        for place in checkpoints(out):
            assert same(read(place), int(place.name)), call
        assert newest(out).about["step"] in (2, 3), call
        sweep(out)
        assert all(not p.name.startswith(".") for p in (out / "checkpoints").iterdir())
        # and the same save succeeds
        keep(out, 3, state_of(3))
        assert same(newest(out), 3)
        assert len(checkpoints(out)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("zeros", [False, True])
def test_a_power_cut_at_any_call_of_a_save_leaves_a_whole_state(zeros: bool, forks: Forks, tmp_path: Path) -> None:
    calls = traced(forks, tmp_path / "first")
    for n, call in enumerate(calls, 1):
        out = kept(tmp_path / f"cut{n}", 1, 2)
        copies = durable_now(out, tmp_path / "durable")
        forks.keep(out, 3, at=n, how="before", durable=copies)
        cut_power(out, copies, zeros=zeros)
        assert newest(out).about["step"] in (2, 3), call
        for place in checkpoints(out):
            assert same(read(place), int(place.name)), call


@pytest.mark.slow
def test_on_a_full_disk_a_save_is_one_sentence_and_damages_nothing(forks: Forks, tmp_path: Path) -> None:
    calls = traced(forks, tmp_path / "first")
    refused = 0
    for n, call in enumerate(calls, 1):
        if not call.startswith(("write", "pwrite", "fsync", "ftruncate", "posix_fallocate", "rename", "mkdir")):
            continue
        out = kept(tmp_path / f"full{n}", 1, 2)
        ran = forks.keep(out, 3, at=n, how="full")
        for place in checkpoints(out):
            assert same(read(place), int(place.name)), call
        assert newest(out).about["step"] in (2, 3), call
        if not ran.done:
            refused += 1
            assert ran.error == "BadInput", f"{call}: {ran}"
            assert "checkpoints/00000003 cannot be written: " in ran.said
            assert "; a state takes " in ran.said
            assert "\n" not in ran.said
            assert not list((out / "checkpoints").glob(".writing-*")), call
    assert refused >= 8


@pytest.mark.slow
def test_files_that_may_grow_no_further_damage_no_old_state(forks: Forks, tmp_path: Path) -> None:
    largest = max((keep(tmp_path / "size", 3, state_of(3)) / name).stat().st_size for name in FILES)
    refused = 0
    for number in range(20):
        out = kept(tmp_path / str(number), 1, 2)
        ran = forks.keep(out, 3, limit=1 + number * largest // 18)
        refused += not ran.done
        for place in checkpoints(out):
            assert same(read(place), int(place.name))
        assert len(checkpoints(out)) == 2
        assert ran.done or "cannot be written" in ran.said, ran
    assert 15 <= refused < 20


# ---- a whole run


def settings(place: Path, out: Path) -> dict[str, Any]:
    return {
        "images": str(place / "images"), "labels": str(place / "labels"), "out": str(out), "label_kind": "instance",
        "features": [2, 3], "steps": 60, "validate_every": 5, "log_every": 5, "validation": 0.25, "device": "cpu",
        "tile": 36,
    }  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("drawn")
    for kind in ("images", "labels"):
        (place / kind).mkdir()
    for seed in range(4):
        image, instances = synthetic.cells(48, seed=seed, radius_px=(7.0, 9.0))
        write_tiff(place / "images" / f"{seed}.tif", image, "YX")
        write_tiff(place / "labels" / f"{seed}.tif", instances.astype(np.uint16), "YX")
    return place


@pytest.mark.slow
def test_killed_at_random_a_run_loses_at_most_one_interval_and_ends_with_the_same_bits(
    forks: Forks, drawn: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    ran = forks.wait(forks.train(settings(drawn, whole)))
    assert ran.done, ran
    want, best = newest(whole), read_tensors(whole / "model.safetensors")[0]
    rng, out = random.Random(2012), tmp_path / "run"
    killed, before, stuck = 0, 0, 0
    while killed < KILLS:
        resume = bool(checkpoints(out))
        # where the machine has become slower than it was, it gets longer to come to anything
        after_s = rng.uniform(0.1, 0.7) * ran.seconds * (1 + stuck / 10)
        number = forks.train({**settings(drawn, out), "resume": resume}, after_s=after_s)
        found = forks.wait(number)
        killed += found.killed
        if found.killed and not checkpoints(out):
            # nothing to go on from: it begins again, over what lies there
            shutil.rmtree(out, ignore_errors=True)
            continue
        # none that cannot be read, and none that is behind what was there
        for place in checkpoints(out):
            read(place)
        at = newest(out).about["step"]
        log = [line.split(",")[0] for line in (out / "log.csv").read_text().splitlines()[1:]]
        assert at >= before
        # the log is written before the state of its last row: that one interval may be lost, and not two
        assert not log or int(log[-1]) - at <= 5
        stuck = stuck + 1 if at == before else 0
        assert stuck < 60
        before = at
        if found.done:
            found_best, _ = read_tensors(out / "model.safetensors")
            assert all(torch.equal(found_best[k], best[k]) for k in best)
            last = newest(out)
            assert all(torch.equal(last.weights[k], want.weights[k]) for k in want.weights)
            assert all(torch.equal(last.optimizer[k], want.optimizer[k]) for k in want.optimizer)
            shutil.rmtree(out)
            before = 0
    assert not list((out / "checkpoints").glob(".removing-*/weights.safetensors")) or checkpoints(out)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [200, 1500, 3000])
def test_a_run_on_a_full_disk_is_one_sentence_and_goes_on_when_there_is_room(
    limit: int, forks: Forks, drawn: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = settings(drawn, out)
    first = forks.wait(forks.train(given, after_s=0.5))
    if not checkpoints(out):
        shutil.rmtree(out, ignore_errors=True)
        given["resume"] = False
    full = forks.wait(forks.train({**given, "resume": bool(checkpoints(out))}, limit=limit))
    if not first.done:
        assert full.error == "BadInput", full
        assert " cannot be written: " in full.said
        assert "\n" not in full.said
    for place in checkpoints(out):
        read(place)
    done = forks.wait(forks.train({**given, "resume": bool(checkpoints(out))}))
    assert done.done, done
