"""The native libraries: found where they are, refused when they are not ours, and their absence said in a sentence."""

import ctypes
import fcntl
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import unet_kernels as uk
from unet_kernels import _native, reference
from unet_kernels.border_weight import launch_two_nearest_cells_cpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def forget_what_was_loaded() -> Iterator[None]:
    doors = (_native.native, _native.cuda, _native.why_not, _native.why_not_cuda, _native.missing)
    for door in doors:
        door.cache_clear()
    yield
    for door in doors:
        door.cache_clear()


@pytest.fixture(scope="module")
def built(no_compiler: str) -> Path:
    """A folder with libunet_native, compiled here; CUDA is the business of `make native`."""
    if no_compiler:
        pytest.skip(no_compiler)
    if shutil.which("cmake") is None:
        pytest.skip("no cmake on the path")
    # half a minute, once for all of a run's processes and all lanes: whoever comes first builds, the others wait
    place = ROOT / "build" / "native-for-tests"
    place.mkdir(parents=True, exist_ok=True)
    settings = ["-DCMAKE_BUILD_TYPE=Release", "-DUNET_CUDA=OFF", "-DUNET_STRICT=ON"]
    configure, build = (
        ["-S", str(ROOT), "-B", str(place), *settings],
        ["--build", str(place), "--target", "unet_native"],
    )
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for step in (configure, build):
            done = subprocess.run(["cmake", *step], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return place / "kernels" / "native"


def test_without_a_compiler_nothing_is_built_and_nothing_fails(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake on the path")
    environment = os.environ | {"CC": "/bin/false", "CXX": "/bin/false"}
    for step in (["-S", str(ROOT), "-B", str(tmp_path), "-G", "Unix Makefiles"], ["--build", str(tmp_path)]):
        if shutil.which("make") is None:
            pytest.skip("no make on the path")
        done = subprocess.run(["cmake", *step], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert step[0] != "-S" or "No working C++ compiler" in done.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_the_library_is_found_and_answers(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNET_NATIVE_LIBRARY", str(built))
    library = _native.native()
    assert library.unet_thread_count() >= 1
    assert uk.native_libraries()["native"].endswith("threads")


def test_the_header_and_python_agree_on_the_abi() -> None:
    header = (ROOT / "kernels/native/include/unet_native.h").read_text()
    assert f"#define UNET_ABI_VERSION {_native.ABI_VERSION}\n" in header


def test_nothing_but_its_own_names_is_exported(built: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm on the path")
    [library] = built.glob("libunet_native.*")
    listed = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert {n for n in names if not n.startswith(("unet_", "_init", "_fini"))} == set()


def test_no_product_and_sum_are_one_instruction(built: Path) -> None:
    # the warp's code for each processor has the same bits, also that for processors which these tests do not run on
    if shutil.which("objdump") is None:
        pytest.skip("no objdump on the path")
    [library] = built.glob("libunet_native.*")
    code = subprocess.run(["objdump", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "mulps" in code or platform.machine() not in ("x86_64", "AMD64")
    assert not re.search(r"\bv?fn?m(add|sub|la|ls)", code)


def test_a_missing_library_names_itself_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uk, "__path__", [str(tmp_path)])
    monkeypatch.delenv("UNET_NATIVE_LIBRARY", raising=False)
    with pytest.raises(uk.NativeLibraryMissing, match=r"libunet_native was not built .*`make native`"):
        _native.native()
    assert uk.native_libraries()["native_cuda"].startswith("missing: libunet_native_cuda was not built")


def test_a_file_that_is_no_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libunet_native.so").write_text("not a library")
    monkeypatch.setenv("UNET_NATIVE_LIBRARY", str(tmp_path))
    with pytest.raises(uk.NativeLibraryMissing, match=r"libunet_native\.so cannot be used"):
        _native.native()


def test_another_abi_is_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNET_NATIVE_LIBRARY", str(built))
    ours = _native.ABI_VERSION
    monkeypatch.setattr(_native, "ABI_VERSION", 99)
    with pytest.raises(uk.NativeLibraryMissing, match=f"has ABI {ours}, this package needs 99"):
        _native.native()


def test_the_environment_variable_may_name_the_file(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [library] = built.glob("libunet_native.*")
    monkeypatch.setenv("UNET_NATIVE_LIBRARY", str(library))
    assert isinstance(_native.native(), ctypes.CDLL)


# ---- two_nearest_cells


def _maps() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)

    def ids(*shape: int, below: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, below, shape, generator=draw, dtype=torch.int32)

    sparse = ids(1, 150, 131, below=10**6) * (ids(1, 150, 131, below=400) == 0)
    return {
        "noise": ids(3, 37, 65, below=5, low=-2),
        "many ids": ids(1, 64, 64, below=2**31 - 1),
        "few pixels": sparse,
        "blocks": ids(2, 9, 13, below=4).repeat_interleave(11, 1).repeat_interleave(7, 2),
        "one row": ids(2, 1, 200, below=30) * (ids(2, 1, 200, below=9) == 0),
        "one column": ids(2, 200, 1, below=30) * (ids(2, 200, 1, below=9) == 0),
        "one pixel": torch.ones(1, 1, 1, dtype=torch.int32),
        "one cell": torch.ones(1, 20, 130, dtype=torch.int32),
        "no cell": torch.zeros(1, 20, 130, dtype=torch.int32),
        "all ignored": torch.full((1, 5, 5), -1, dtype=torch.int32),
        "no images": torch.zeros(0, 5, 5, dtype=torch.int32),
        "no rows": torch.zeros(2, 0, 5, dtype=torch.int32),
        "no columns": torch.zeros(2, 5, 0, dtype=torch.int32),
        "transposed": ids(2, 30, 40, below=3).transpose(1, 2),
        "a window": ids(2, 40, 40, below=3)[:, 3:33:2, 5:],
    }


@pytest.mark.parametrize("radius", [None, 0.0, 1.0, 2**0.5, 31.0], ids=str)
@pytest.mark.parametrize("case", _maps())
def test_the_cpp_kernel_has_the_bits_of_the_reference(
    case: str, radius: float | None, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNET_NATIVE_LIBRARY", str(built))
    instances = _maps()[case]
    got, want = launch_two_nearest_cells_cpu(instances, radius), reference.two_nearest_cells(instances, radius)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.float32
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs)
    # and from the front door, which finds the same library
    assert uk.lane("two_nearest_cells", "cpu") == ("native", "our C++ kernel")
    assert all(torch.equal(a, b) for a, b in zip(uk.two_nearest_cells(instances, max_radius=radius), want, strict=True))


def test_the_weight_map_is_the_same_with_the_library_and_without(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances = _maps()["blocks"]
    monkeypatch.setenv("UNET_NATIVE_LIBRARY", str(built))
    with_it = uk.border_weight(instances)
    assert uk.lane("border_weight", "cpu")[0] == "native"
    _native.native.cache_clear()
    _native.why_not.cache_clear()
    monkeypatch.delenv("UNET_NATIVE_LIBRARY")
    monkeypatch.setattr(uk, "__path__", [str(tmp_path)])
    lane, reason = uk.lane("border_weight", "cpu")
    assert lane == "torch"
    assert reason.startswith("the native library is missing: libunet_native was not built")
    assert torch.equal(uk.border_weight(instances), with_it)


# ---- the kernels behind the metrics, in the library that was built here


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("case", _maps())
def test_the_cpp_components_are_those_of_the_reference(
    case: str, connectivity: int, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNET_NATIVE_LIBRARY", str(built))
    mask = _maps()[case]
    want = torch.where(mask < 0, -1, reference.connected_components(mask > 0, connectivity))
    assert uk.lane("connected_components", "cpu") == ("native", "our C++ kernel")
    assert torch.equal(uk.connected_components(mask, connectivity=connectivity), want)


def test_the_door_takes_the_library_where_there_is_one(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what has no lane to ask about shows it by its silence: warnings are errors here
    monkeypatch.setenv("UNET_NATIVE_LIBRARY", str(built))
    assert not any(_native.missing(what) for what in ("homotopic_warp", "rand_sums", "watershed_cells"))
    truth = _maps()["blocks"]
    prediction = truth.float() / 3
    counts, _ = uk.homotopic_warp(prediction, truth, [0.5])
    squares, _ = uk.rand_sums(prediction, truth, [0.5])
    assert counts.sum() > 0
    assert squares.sum() > 0
    assert uk.watershed_cells(truth).min() == 0


WORKERS = """
import sys

import torch
from torch.utils.data import DataLoader, Dataset

import unet_kernels as uk


class Weights(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        ids = torch.randint(0, 5, (1, 150, 150), generator=torch.Generator().manual_seed(i))
        return uk.border_weight(ids)


if __name__ == "__main__":
    assert uk.lane("border_weight", "cpu")[0] == "native"
    # the parent's threads are at work before its children are made
    here = [Weights()[i] for i in range(4)]
    there = list(DataLoader(Weights(), num_workers=2, batch_size=None, multiprocessing_context=sys.argv[1]))
    assert all(torch.equal(a, b) for a, b in zip(here, there))
"""

FORKED = """
import os

import torch

import unet_kernels as uk

ids = torch.randint(0, 5, (1, 150, 150), dtype=torch.int32)
assert uk.lane("two_nearest_cells", "cpu")[0] == "native"
want = [d.numpy().tobytes() for d in uk.two_nearest_cells(ids)]
child = os.fork()
if child == 0:
    # torch's own operators may hang here, ours must not
    os._exit(0 if [d.numpy().tobytes() for d in uk.two_nearest_cells(ids)] == want else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def _run_with_two_threads(program: str, *arguments: str, built: Path, place: Path) -> None:
    script = place / "script.py"
    script.write_text(program)
    environment = os.environ | {"UNET_NATIVE_LIBRARY": str(built), "OMP_NUM_THREADS": "2"}
    # Python warns of threads and forks
    command = [sys.executable, "-W", "ignore", str(script), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True) as child:
        try:
            _, said = child.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    assert child.returncode == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_data_loaders_workers_get_their_weights(how: str, built: Path, tmp_path: Path) -> None:
    if how not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {how} here")
    _run_with_two_threads(WORKERS, how, built=built, place=tmp_path)


@pytest.mark.slow
def test_a_forked_child_does_not_wait_for_threads_it_has_lost(built: Path, tmp_path: Path) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    _run_with_two_threads(FORKED, built=built, place=tmp_path)
