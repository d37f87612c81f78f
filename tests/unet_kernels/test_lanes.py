"""Which implementation an op takes, and that it says why."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import unet_kernels as uk
from unet_kernels import _native, _triton

NATIVE = ("two_nearest_cells", "border_weight", "elastic_warp", "connected_components")
NATIVE_CUDA = ("connected_components",)


@pytest.mark.parametrize("op", [op for op in uk.OPS if op not in NATIVE])
def test_every_op_has_a_lane_and_a_reason_on_the_cpu(op: str) -> None:
    lane, reason = uk.lane(op, torch.device("cpu"))
    assert lane == "torch"
    assert "ATen" in reason
    assert uk.lane(op, "cpu") == (lane, reason)


@pytest.fixture(autouse=True)
def forget_what_was_found() -> Iterator[None]:
    doors = (_native.why_not, _native.why_not_cuda)
    for door in doors:
        door.cache_clear()
    yield
    for door in doors:
        door.cache_clear()


@pytest.mark.parametrize("op", NATIVE)
def test_on_a_cpu_the_lane_is_whether_the_library_is_there(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "native", lambda: None)
    assert uk.lane(op, "cpu") == uk.lane(op, torch.device("cpu")) == ("native", "our C++ kernel")
    assert uk.lane("elastic_warp", "cpu", torch.float64) == ("torch", "float64 is left to torch")
    # a GPU's tensors are not its business
    if op not in NATIVE_CUDA:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert uk.lane(op, "cuda") == ("triton", "our kernel")
    assert _native.why_not(torch.device("cuda")) == "the C++ library is for the CPU, not cuda"

    def missing() -> None:
        raise uk.NativeLibraryMissing("libunet_native was not built")

    _native.why_not.cache_clear()
    monkeypatch.setattr(_native, "native", missing)
    assert uk.lane(op, "cpu") == ("torch", "the native library is missing: libunet_native was not built")


@pytest.mark.parametrize("op", NATIVE_CUDA)
def test_on_a_gpu_the_lane_is_whether_the_cuda_library_is_there(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise uk.NativeLibraryMissing("libunet_native_cuda was not built")

    # the C++ library is another one: it neither helps here nor harms
    monkeypatch.setattr(_native, "native", missing)
    monkeypatch.setattr(_native, "cuda", lambda: None)
    assert uk.lane(op, "cuda") == uk.lane(op, torch.device("cuda", 0)) == ("native", "our CUDA kernel")
    assert _native.why_not_cuda(torch.device("cpu")) == "the CUDA library is for GPUs, not cpu"
    _native.why_not_cuda.cache_clear()
    monkeypatch.setattr(_native, "native", lambda: None)
    monkeypatch.setattr(_native, "cuda", missing)
    assert uk.lane(op, "cuda") == ("torch", "the native library is missing: libunet_native_cuda was not built")
    # and no other accelerator is either's
    assert uk.lane(op, "xpu") == ("torch", "ATen, the reference; xpu has no kernel of ours yet")


def test_on_a_gpu_the_lane_is_what_the_op_itself_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert uk.lane("crop_concat", device, torch.float16) == ("triton", "our kernel")
    assert uk.lane("crop_concat", device, torch.float64) == ("torch", "float64 is left to torch")
    for op in ("conv3x3_relu", "conv3x3_relu_cat", "conv3x3_relu_pool", "up_conv", "conv1x1", "max_pool2x2"):
        assert uk.lane(op, device) == ("measured", "ours or ATen's, whichever is faster for the shape")
    for op in ("weighted_cross_entropy", "head_cross_entropy", "elastic_warp", "cut_gap", "border_weight"):
        assert uk.lane(op, device) == ("triton", "our kernel")
    # ids are no floats: the dtype of a net does not matter to them
    assert uk.lane("border_weight", device, torch.float64) == ("triton", "our kernel")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert uk.lane("weighted_cross_entropy", device) == ("triton", "our kernel")
    for op in ("head_cross_entropy", "conv3x3_relu"):
        assert uk.lane(op, device) == ("torch", "the device is older than sm_80")
    assert uk.lane("max_pool2x2", device)[0] == "measured"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert uk.lane("crop_concat", device) == ("torch", "the device is older than sm_75")
    monkeypatch.setattr(_triton, "MISSING", "triton cannot be imported (No module named 'triton')")
    assert uk.lane("crop_concat", device)[1].startswith("triton cannot be imported")


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(ValueError, match=r"op must be one of conv3x3_relu, .*, got 'conv5x5'"):
        uk.lane("conv5x5", torch.device("cpu"))


@pytest.mark.slow
def test_without_triton_everything_still_works() -> None:
    program = """
import sys
sys.modules["triton"] = None  # as where no wheel of it exists
import torch, unet_kernels as uk
from unet_kernels import _triton
assert _triton.MISSING, "triton was found"
y = uk.crop_concat(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 5, 5))
assert y.shape == (1, 4, 3, 3)
print(_triton.why_not(torch.device("cuda")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triton cannot be imported" in done.stdout


def test_only_public_names_are_exported() -> None:
    assert set(uk.OPS) <= set(uk.__all__)
    assert all(hasattr(uk, name) for name in uk.__all__)
