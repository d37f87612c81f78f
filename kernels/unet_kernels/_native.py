"""ctypes doors to the native libraries, C++ and CUDA. Both are optional; what is missing says so and how to get it."""

import ctypes
import os
import sys
import warnings
from functools import cache
from pathlib import Path

import torch

__all__ = ["ABI_VERSION", "NativeLibraryMissing", "cuda", "describe", "missing", "native", "why_not", "why_not_cuda"]

# UNET_ABI_VERSION of kernels/native/include/unet_native.h
ABI_VERSION = 5

_SUFFIX = {"win32": "dll", "darwin": "dylib"}.get(sys.platform, "so")


class NativeLibraryMissing(RuntimeError):
    """A native library is not there, or is not the one this package was made with."""


@cache
def native() -> ctypes.CDLL:
    """libunet_native (C++, OpenMP).

    Raises:
        NativeLibraryMissing: it was not built, cannot be loaded, or has another ABI.
    """
    library = _load("unet_native", "unet_abi_version")
    library.unet_build_info.restype = ctypes.c_char_p
    library.unet_processor.restype = ctypes.c_char_p
    sizes, pointers = (ctypes.c_int64,) * 3, (ctypes.c_void_p,) * 2
    library.unet_two_nearest_cells_cpu.argtypes = (ctypes.c_void_p, *sizes, ctypes.c_double, *pointers)
    library.unet_elastic_warp_cpu.argtypes = (ctypes.c_void_p,) * 3
    library.unet_elastic_warp_backward_cpu.argtypes = (ctypes.c_void_p,) * 5
    library.unet_border_sum_cpu.argtypes = (
        *(ctypes.c_void_p, *sizes, ctypes.c_float),
        *(ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p),
    )
    images, thresholds = (ctypes.c_void_p, ctypes.c_void_p, *sizes), (ctypes.c_void_p, ctypes.c_int64)
    library.unet_connected_components_cpu.argtypes = (ctypes.c_void_p, *sizes, ctypes.c_int32, ctypes.c_void_p)
    library.unet_watershed_cells_cpu.argtypes = (ctypes.c_void_p, *sizes, ctypes.c_void_p)
    library.unet_homotopic_warp_cpu.argtypes = (ctypes.c_void_p, *images, *thresholds, ctypes.c_int64, *pointers)
    library.unet_rand_sums_cpu.argtypes = (*images, *thresholds, ctypes.c_int32, *pointers)
    return library


@cache
def why_not(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Why the C++ library cannot serve a device, in a few words; empty where it can."""
    if device.type != "cpu":
        return f"the C++ library is for the CPU, not {device.type}"
    try:
        native()
    except NativeLibraryMissing as missing:
        return f"the native library is missing: {missing}"
    return ""


@cache
def why_not_cuda(device: torch.device) -> str:
    """Why the CUDA library cannot serve a device, in a few words; empty where it can."""
    if device.type != "cuda":
        return f"the CUDA library is for GPUs, not {device.type}"
    try:
        cuda()
    except NativeLibraryMissing as missing:
        return f"the native library is missing: {missing}"
    return ""


@cache
def missing(what: str) -> bool:
    """Whether `what` must be computed by its specification for want of the C++ library; says so once."""
    reason = why_not(torch.device("cpu"))
    if reason:
        warnings.warn(f"{what} runs in plain Python, which is slow: {reason}", RuntimeWarning, stacklevel=4)
    return bool(reason)


@cache
def cuda() -> ctypes.CDLL:
    """libunet_native_cuda.

    Raises:
        NativeLibraryMissing: it was not built, cannot be loaded, or has another ABI.
    """
    library = _load("unet_native_cuda", "unet_cuda_abi_version")
    library.unet_cuda_build_info.restype = ctypes.c_char_p
    library.unet_cuda_error_text.restype = ctypes.c_char_p
    stack = (ctypes.c_void_p, *(ctypes.c_int64,) * 3)
    library.unet_connected_components_cuda.argtypes = (*stack, ctypes.c_int32, *(ctypes.c_void_p,) * 2)
    return library


def describe() -> dict[str, str]:
    """What there is of the two libraries, in words: {"native": ..., "native_cuda": ...}."""
    found = {}
    try:
        library = native()
        parts = library.unet_build_info().decode(), library.unet_processor().decode()
        found["native"] = f"{', '.join(parts)}, {library.unet_thread_count()} threads"
    except NativeLibraryMissing as missing:
        found["native"] = f"missing: {missing}"
    try:
        count = ctypes.c_int32()
        status = cuda().unet_cuda_device_count(ctypes.byref(count))
        devices = f"{count.value} devices" if status == 0 else cuda().unet_cuda_error_text(status).decode()
        found["native_cuda"] = f"{cuda().unet_cuda_build_info().decode()}, {devices}"
    except NativeLibraryMissing as missing:
        found["native_cuda"] = f"missing: {missing}"
    return found


def _load(name: str, version: str) -> ctypes.CDLL:
    path = _find(name)
    try:
        library = ctypes.CDLL(str(path))
        found = getattr(library, version)()
    except (OSError, AttributeError) as error:
        raise NativeLibraryMissing(f"{path} cannot be used ({error}); `make native` builds it anew") from error
    if found != ABI_VERSION:
        raise NativeLibraryMissing(
            f"{path} has ABI {found}, this package needs {ABI_VERSION}; `make native` builds it anew"
        )
    return library


def _find(name: str) -> Path:
    # an editable install spreads the package over the source tree and site-packages: look in all of __path__
    places = [Path(p) for p in sys.modules[__package__].__path__]
    pointed = os.environ.get("UNET_NATIVE_LIBRARY")
    if pointed:
        places.insert(0, Path(pointed) if Path(pointed).is_dir() else Path(pointed).parent)
    for place in places:
        for file in (place / f"lib{name}.{_SUFFIX}", place / f"{name}.{_SUFFIX}"):
            if file.exists():
                return file
    raise NativeLibraryMissing(
        f"lib{name} was not built (no compiler when this was installed?); install again with one, or run `make native` "
        "and set UNET_NATIVE_LIBRARY to its folder"
    )
