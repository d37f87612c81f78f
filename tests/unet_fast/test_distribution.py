"""Proves that two processes train the very net that one does, resumed or not, and that they fail as one.

Two gloo processes run a list of trainings; the same trainings are run here by one process that adds up the gradients of
the same tiles. Dropout, augmentation, ignored pixels, scaled losses and a step that is skipped are in them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unet_fast import TrainConfig, checkpoints, synthetic, train, training
from unet_fast.distribution import Ranks
from unet_fast.errors import BadInput
from unet_fast.files import write_tiff
from unet_fast.storage import MODEL, read_tensors

# launching processes takes seconds
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

# one process of a few: trains case after case, and may be interrupted, or meet a NaN, at a step
WORKER = """
import json, math, os, sys

import torch

from unet_fast import TrainConfig, train
from unet_fast import run as running

torch.set_num_threads(1)
# it takes longer to draw than these runs
running.write_report = lambda place: None
whole = running.Run.gradient
for port, settings, resume, stop, poison in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)

    def gradient(run, drawn, tiles=None, stop=stop, poison=poison):
        if run.step == stop:
            raise KeyboardInterrupt
        if run.step == poison and run.share.stop == run.config.batch:
            # in the last tile of all
            drawn[-1][0].fill_(math.nan)
        return whole(run, drawn, tiles)

    running.Run.gradient = gradient
    try:
        train(TrainConfig.from_dict(settings), resume=resume, progress=False)
    except KeyboardInterrupt:
        pass
"""


Jobs = list[tuple[TrainConfig, bool, int | None, int | None]]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def in_processes(count: int, cases: Jobs) -> None:
    """Run trainings (settings, resume, step at which all are interrupted, step with a NaN) in that many processes."""
    told = json.dumps([(free_port(), case[0].as_dict(), *case[1:]) for case in cases])
    for process in start(count, told):
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said


def start(count: int, told: str) -> list[subprocess.Popen[str]]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, told],
            env={
                **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("drawn")
    for kind in ("images", "labels"):
        (place / kind).mkdir()
    for seed in range(5):
        image, instances = synthetic.cells(64, seed=seed, radius_px=(7.0, 9.0))
        ids = instances.astype(np.uint16)
        # tiles do not count alike
        ids[: 20 * (seed % 3)] = 999
        write_tiff(place / "images" / f"{seed}.tif", image, "YX")
        write_tiff(place / "labels" / f"{seed}.tif", ids, "YX")
    return place


def config(place: Path, out: Path, **more: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "label_kind": "instance", "ignore": 999, "features": (2, 3), "steps": 7, "validate_every": 3, "log_every": 2,
        "validation": 0.4, "device": "cpu", "tile": 36, "batch": 2, "at_once": 1,
    }  # fmt: skip
    return TrainConfig(images=place / "images", labels=place / "labels", out=out, **{**usual, **more})


CASES: dict[str, dict[str, Any]] = {
    "tiles": {},
    "drawn ahead, float16": {"workers": 2, "precision": "float16"},
    "whole images": {"accumulate": "image", "at_once": None, "tile": 80},
    "resize, bfloat16": {"up_mode": "resize", "precision": "bfloat16", "recompute": "level"},
}
# gradients of more than two are added in another order
NEARLY: dict[str, dict[str, Any]] = {
    "four tiles, two at once": {"batch": 4, "at_once": 2},
    # dropout is drawn for those that go through the net together
    "four at once": {"batch": 4, "at_once": None, "dropout": 0.0},
    "whole images in pieces": {"accumulate": "image", "at_once": None, "tile": 40},
}


def outcome(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], dict[str, torch.Tensor]]:
    clocks = {"seconds": 0, "busy": 0}
    log = [{**row, **clocks} for row in training.read_log(run / "log.csv")]
    state = checkpoints.newest(run)
    last = {**state.weights, **{f"momentum.{name}": tensor for name, tensor in state.optimizer.items()}}
    return read_tensors(run / MODEL)[0], log, last


def same(a: Path, b: Path) -> bool:
    (best, log, last), (best_b, log_b, last_b) = outcome(a), outcome(b)
    pairs = ((best, best_b), (last, last_b))
    return str(log) == str(log_b) and all(all(torch.equal(x[k], y[k]) for k in y) for x, y in pairs)


def test_two_processes_train_the_net_of_one_bit_for_bit(drawn: Path, tmp_path: Path, blank_page: None) -> None:
    """One test of many cases: what is expensive is to launch processes."""
    one, two = tmp_path / "one", tmp_path / "two"

    def jobs(place: Path) -> Jobs:
        cases = [(config(drawn, place / name, **more), False, None, None) for name, more in (CASES | NEARLY).items()]
        return [*cases, (config(drawn, place / "poisoned"), False, None, 2)]

    stopped, later = config(drawn, two / "stopped"), config(drawn, two / "later by one")
    accumulated, whole = (config(drawn, two / name, batch=4, at_once=1) for name in ("accumulated", "not stopped"))
    in_processes(
        2,
        [
            *jobs(two), (stopped, False, 4, None), (stopped, True, None, None), (later, False, 5, None),
            (accumulated, False, 4, None), (accumulated, True, None, None), (whole, False, None, None),
        ],
    )  # fmt: skip
    in_processes(1, jobs(one))
    for case in CASES:
        assert same(one / case, two / case), case
        assert json.loads((two / case / "run.json").read_text())["processes"] == 2
    # sums in another order are the same to rounding
    for case in NEARLY:
        (best, log, _), (best_b, log_b, _) = outcome(one / case), outcome(two / case)
        assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in log_b], rel=1e-4), case
        for name in best:
            torch.testing.assert_close(best[name], best_b[name], rtol=1e-3, atol=1e-5)
    # two that were interrupted go on; and what two began, one may end
    assert same(stopped.out, one / "tiles")
    assert same(accumulated.out, whole.out)
    assert checkpoints.newest(later.out).about["step"] == 5
    train(later, resume=True, progress=False)
    assert same(later.out, one / "tiles")
    # a NaN in one process skips the step in both
    assert same(two / "poisoned", one / "poisoned")
    assert [row["skipped"] for row in training.read_log(two / "poisoned" / "log.csv")] == [0, 1, 0, 0, 0]
    assert not same(one / "poisoned", one / "tiles")


# ---- as it is started


def torchrun(count: int, *words: str, place: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m",
            "unet_fast", *words,
        ],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, cwd=place, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def test_by_torchrun_one_speaks_and_one_writes(drawn: Path, tmp_path: Path) -> None:
    given = config(drawn, Path("run"))
    (tmp_path / "run.toml").write_text(given.to_toml())
    done = torchrun(2, "train", "--config", "run.toml", place=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("best model (step ") == 1
    assert done.stderr.count("7 steps in float32 on cpu, 2 processes") == 1
    train(config(drawn, tmp_path / "one"), progress=False)
    assert same(tmp_path / "run", tmp_path / "one")
    # what cannot be shared is a sentence and an exit code
    done = torchrun(2, "train", "--config", "run.toml", "--out", "other", "--batch", "3", place=tmp_path)
    assert done.returncode != 0
    assert "error: batch must be a multiple of the 2 processes, got 3; use 4" in done.stderr
    assert not (tmp_path / "other").exists()


def test_a_signal_ends_all_after_the_same_step(drawn: Path, tmp_path: Path) -> None:
    given = config(drawn, tmp_path / "run", steps=100_000, validate_every=50_000)
    told = json.dumps([(free_port(), given.as_dict(), False, None, None)])
    processes = start(2, told)
    until = time.monotonic() + 120
    while not (given.out / "log.csv").exists() or len((given.out / "log.csv").read_text().splitlines()) < 4:
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert checkpoints.newest(given.out).about["step"] % 8 == 0


def test_alone_nothing_is_sent() -> None:
    ranks = Ranks()
    x = torch.ones(3)
    assert ranks.add_up(x) is x
    assert ranks.from_main(lambda: 5) == 5
    assert ranks.gathered([1, 2]) == [1, 2]
    assert list(ranks.share(3)) == [0, 1, 2]
    assert ranks.device("auto") == "auto"
    with pytest.raises(BadInput, match="device must be cuda where 2 processes take a GPU each, got cuda:0"):
        Ranks(0, 2).device("cuda:0")
    with pytest.raises(BadInput, match="batch must be a multiple of the 3 processes, got 4; use 6"):
        Ranks(0, 3).share(4)
    shares = [Ranks(rank, 3).share(6) for rank in range(3)]
    assert [i for share in shares for i in share] == list(range(6))
