"""The native libraries: found where they are, refused when they are not ours, and their absence said in a sentence."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import unet_kernels as uk
from unet_kernels import _native

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def forget_what_was_loaded() -> Iterator[None]:
    for door in (_native.native, _native.cuda):
        door.cache_clear()
    yield
    for door in (_native.native, _native.cuda):
        door.cache_clear()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, no_compiler: str) -> Path:
    """A folder with libunet_native, compiled here; CUDA is the business of `make native`."""
    if no_compiler:
        pytest.skip(no_compiler)
    if shutil.which("cmake") is None:
        pytest.skip("no cmake on the path")
    place = tmp_path_factory.mktemp("native")
    for step in (["-S", str(ROOT), "-B", str(place), "-DUNET_CUDA=OFF", "-DUNET_STRICT=ON"], ["--build", str(place)]):
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
    monkeypatch.setattr(_native, "ABI_VERSION", 99)
    with pytest.raises(uk.NativeLibraryMissing, match="has ABI 1, this package needs 99"):
        _native.native()


def test_the_environment_variable_may_name_the_file(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [library] = built.glob("libunet_native.*")
    monkeypatch.setenv("UNET_NATIVE_LIBRARY", str(library))
    assert isinstance(_native.native(), ctypes.CDLL)
