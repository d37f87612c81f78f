"""Proves that the net fits where code expects outputs of the input's size, or MONAI's sliding windows, exactly."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.proof.properties import given, settings, st
from tests.unet_fast.one_piece import one_piece, picture, tiny
from unet_fast import FastUNet, SameSize, geometry, predict, sliding_window_inference
from unet_fast.errors import BadInput

few = settings(derandomize=True, database=None, deadline=None, max_examples=25)
some = settings(derandomize=True, database=None, deadline=None, max_examples=50)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(picture(*shape, seed=seed))


def wanted(model: nn.Module, x: Tensor) -> Tensor:
    return torch.from_numpy(np.stack([one_piece(model, each) for each in x.numpy()]))


def assert_exact(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-9 * want.std(correction=0) + 1e-13


# ---- SameSize


@pytest.mark.slow
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 70), st.integers(1, 70)),
    depth=st.integers(0, 3),
    up_mode=st.sampled_from(["deconv", "resize"]),
    padding=st.sampled_from(["valid", "same"]),
)
@some
def test_same_size_says_what_prediction_says_in_one_piece(
    shape: tuple[int, int, int, int], depth: int, up_mode: str, padding: str
) -> None:
    model = tiny(depth, shape[1], 3, up_mode=up_mode, padding=padding)
    x = images(*shape)
    got = SameSize(model)(x)
    assert got.shape == (shape[0], 3, *shape[2:])
    assert_exact(got, wanted(model, x))
    for each, image in zip(got, x, strict=True):
        said = predict(model, image, axes="CYX", output="logits")
        torch.testing.assert_close(each.detach(), said, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("up_mode", "padding"), [("deconv", "valid"), ("resize", "valid"), ("deconv", "same")])
def test_gradients_are_those_of_torch(up_mode: str, padding: str) -> None:
    model = tiny(1, up_mode=up_mode, padding=padding)
    same, names = SameSize(model), [name for name, _ in model.named_parameters()]

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        named = {f"model.{name}": each for name, each in zip(names, parameters, strict=True)}
        return torch.func.functional_call(same, named, (x,))

    parameters = [each.detach().clone().requires_grad_() for each in model.parameters()]
    x = images(1, 1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (20, 30)], ids=str)
@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
def test_gradients_are_those_of_an_image_padded_beforehand(shape: tuple[int, int], up_mode: str) -> None:
    model, x = tiny(2, 2, up_mode=up_mode), images(2, 2, *shape)
    target = torch.randint(0, 2, (2, *shape))
    halo, more = geometry.halo(2), 3 * (up_mode == "resize")
    margins = []
    for n in shape:
        side = next(side for side in range(n + 2 * halo + more, 999) if (side + 4) % 4 == 0)
        margins.append((halo, side - n - halo))
    padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), *margins), mode="reflect"))
    nn.functional.cross_entropy(model(padded)[..., : shape[0], : shape[1]], target).backward()
    want = [each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    nn.functional.cross_entropy(SameSize(model)(x), target).backward()
    for parameter, gradient in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


def test_a_net_of_the_same_size_learns() -> None:
    torch.manual_seed(0)
    model = SameSize(FastUNet(features=(4, 8)))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x = torch.rand(4, 1, 15, 17)
    target = (x[:, 0] > 0.5).long()
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    # and what it learned is what prediction says
    labels = predict(model.model, x[0, 0])
    assert torch.equal(labels.long(), model.eval()(x[:1]).argmax(1)[0])


def test_a_net_of_the_same_size_is_a_module_like_any_other() -> None:
    inner = tiny(2, dropout=0.5)
    model, x = SameSize(inner), images(1, 1, 9, 9)
    assert model.training
    model.eval()
    assert not any(module.training for module in inner.modules())
    want = model(x)
    assert torch.equal(want, model(x))
    model.train()
    assert all(module.training for module in inner.modules())
    assert not torch.equal(model(x), model(x))
    # weights go out and come back
    other = SameSize(FastUNet(**inner.settings).double()).eval()
    assert set(model.state_dict()) == {f"model.{name}" for name in inner.state_dict()}
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), want)
    narrow = SameSize(tiny(2).float())
    assert narrow(x.float()).dtype == torch.float32
    # sizes may change from call to call, and strides are nobody's affair
    for shape in ((1, 1), (5, 30), (30, 5)):
        other_x = images(2, 1, *shape[::-1]).transpose(2, 3)
        assert_exact(other(other_x), wanted(tiny_like(inner), other_x.contiguous()))


def tiny_like(model: FastUNet) -> FastUNet:
    """Its copy."""
    copy = FastUNet(**model.settings).eval().to(next(model.parameters()).dtype)
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((3, 3), "x must be [N, C, H, W] with at least one row and one column, got [3, 3]"),
        ((1, 1, 0, 3), "x must be [N, C, H, W] with at least one row and one column, got [1, 1, 0, 3]"),
        ((1, 1, 1, 3, 3), "x must be [N, C, H, W] with at least one row and one column, got [1, 1, 1, 3, 3]"),
        ((1, 2, 3, 3), "x must have shape [N, 1, H, W], got [1, 2, 20, 20]"),
    ],
    ids=str,
)
def test_what_is_no_image_is_refused_in_a_sentence(shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        SameSize(tiny(1))(torch.zeros(shape, dtype=torch.float64))
    assert str(caught.value) == sentence


def test_a_net_of_another_size_is_refused_in_a_sentence() -> None:
    sentence = "model gives 20 x 20 pixels for 20 x 20, not the 4 x 4 of a U-Net of depth 1"
    with pytest.raises(BadInput) as caught:
        SameSize(type("Deep", (nn.Identity,), {"depth": 1})())(torch.zeros(1, 1, 3, 3))
    assert str(caught.value) == sentence


# ---- sliding windows

MONAIS = (
    "inputs", "roi_size", "sw_batch_size", "predictor", "overlap", "mode", "sigma_scale", "padding_mode", "cval",
    "sw_device", "device", "progress", "roi_weight_map", "process_fn", "buffer_steps", "buffer_dim", "with_coord",
    "args", "kwargs",
)  # fmt: skip


def monais() -> Any:
    """MONAI's own function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("monai.inferers").sliding_window_inference


def test_arguments_are_monais_in_monais_order() -> None:
    ours = inspect.signature(sliding_window_inference).parameters
    assert tuple(ours) == MONAIS


def test_monai_agrees_about_its_arguments() -> None:
    ours, theirs = (inspect.signature(each).parameters for each in (sliding_window_inference, monais()))
    assert list(ours) == list(theirs) == list(MONAIS)
    for name, each in theirs.items():
        assert ours[name].kind == each.kind
        # its enumerations are strings
        assert ours[name].default == getattr(each.default, "value", each.default), name


@pytest.mark.slow
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 60), st.integers(1, 60)),
    depth=st.integers(0, 3),
    up_mode=st.sampled_from(["deconv", "resize"]),
    padding=st.sampled_from(["valid", "same"]),
    roi=st.one_of(st.integers(-3, 200), st.tuples(st.integers(-3, 200), st.integers(-3, 200))),
    sw_batch_size=st.integers(1, 5),
    hidden=st.booleans(),
)
@some
def test_windows_join_to_one_pass_over_the_whole_image(
    shape: tuple[int, int, int, int], depth: int, up_mode: str, padding: str, roi: Any, sw_batch_size: int, hidden: bool
) -> None:
    model, x = tiny(depth, shape[1], 3, up_mode=up_mode, padding=padding), images(*shape)
    # what keeps the size says nothing of itself in a callable
    predictor = (lambda windows: model(windows)) if hidden and padding == "valid" else model
    with torch.no_grad():
        got = sliding_window_inference(x, roi, sw_batch_size, predictor)
    assert_exact(got, wanted(model, x))


class Calls:
    """A callable that notes what comes in."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.shapes = model, list[tuple[int, ...]]()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return self.model(x, *args, **kwargs)


def sides_of(model: nn.Module, x: Tensor, roi: Any) -> tuple[int, int]:
    """Of the windows that reach the net."""
    seen: list[tuple[int, int]] = []
    with torch.no_grad(), model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:]))):
        assert sliding_window_inference(x, roi, 1, model).shape[2:] == x.shape[2:]
    assert len(set(seen)) == 1
    return seen[0]


@pytest.mark.parametrize(
    ("roi", "sides"),
    [
        (72, (72, 72)),
        # the largest legal one up to it: 44 + 4 j
        (75, (72, 72)),
        ((75, 60), (72, 60)),
        ([61, 100], (60, 100)),
        (torch.Size([61, 100]), (60, 100)),
        (np.int64(75), (72, 72)),
        (np.array([61, 100]), (60, 100)),
        # the smallest that keeps a step
        (5, (44, 44)),
        # no more than the image needs: 100 + 40
        (300, (140, 120)),
        (10**6, (140, 120)),
        # MONAI's way to say "all of it"
        (0, (140, 120)),
        (-1, (140, 120)),
        (None, (140, 120)),
        ((-1, 60), (140, 60)),
        ((60, None), (60, 120)),
    ],
    ids=repr,
)
def test_a_roi_becomes_the_window_that_is_legal(roi: Any, sides: tuple[int, int]) -> None:
    assert sides_of(tiny(2), images(1, 1, 100, 80), roi) == sides


def test_windows_go_through_together_and_none_twice() -> None:
    model, x = tiny(1), images(3, 1, 20, 25)
    for together in range(1, 6):
        calls = Calls(model)
        calls.depth = model.depth
        sliding_window_inference(x, 26, together, calls)
        # 10 are kept: 2 x 3 windows of each of 3 images
        sizes = [shape[0] for shape in calls.shapes]
        assert sum(sizes) == 18
        assert sizes[:-1] == [together] * (len(sizes) - 1)


@pytest.mark.slow
def test_what_is_callable_is_called_with_what_it_is_given() -> None:
    class Weighted(nn.Module):
        def __init__(self, model: FastUNet) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, scale: float, *, add: float = 0.0) -> Tensor:
            return self.inner(x) * scale + add

    for up_mode in ("deconv", "resize"):
        model, x = tiny(2, up_mode=up_mode), images(2, 1, 30, 40)
        weighted, want = Weighted(model), 2 * wanted(model, x) + 3
        found: list[Callable[..., Tensor]] = [
            lambda windows, m=model: 2 * m(windows) + 3,
            functools.partial(weighted, scale=2, add=3),
            nn.Sequential(SameShape(model, 2, 3)),
        ]
        with torch.no_grad():
            for predictor in found:
                assert_exact(sliding_window_inference(x, 60, 2, predictor), want)
            # behind all of MONAI's own
            everything = (
                x, (60, 60), 2, weighted, 0.5, "gaussian", 0.125, "reflect", 0.0, None, None, False, None, None, None,
                -1, False, 2.0,
            )  # fmt: skip
            assert_exact(sliding_window_inference(*everything, add=3.0), want)
            got = sliding_window_inference(x, 60, 2, weighted, scale=2.0, add=3.0)
            assert_exact(got, want)
            # nothing is blended, whatever is said
            for more in ({"overlap": 0.9}, {"mode": "gaussian"}, {"buffer_steps": 4, "buffer_dim": 0}, {"cval": 7.0}):
                assert torch.equal(sliding_window_inference(x, 60, 2, weighted, scale=2.0, add=3.0, **more), got)


class SameShape(nn.Module):
    def __init__(self, model: FastUNet, scale: float, add: float) -> None:
        super().__init__()
        self.model, self.scale, self.add = model, scale, add

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.scale + self.add


@pytest.mark.parametrize("depth", range(6))
@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
def test_a_callables_depth_is_found_by_one_small_window(depth: int, up_mode: str) -> None:
    calls = Calls(tiny(depth, 2, up_mode=up_mode))
    x = images(1, 2, 9, 14)
    with torch.no_grad():
        got = sliding_window_inference(x, 100, 1, calls)
    assert_exact(got, wanted(calls.model, x))
    # and the windows' own sizes are those that resize needs, who knows
    assert calls.shapes[0] == (1, 2, 380, 380)
    assert len(calls.shapes) > 1


def test_results_are_of_the_predictors_dtype_and_where_they_were_asked_for() -> None:
    model, x = tiny(1).float(), images(2, 1, 30, 40).float()
    want = sliding_window_inference(x, 36, 2, model)
    assert want.dtype == torch.float32
    for device in ("cpu", torch.device("cpu"), None):
        assert torch.equal(sliding_window_inference(x, 36, 2, model, sw_device=device, device=device), want)
    half = sliding_window_inference(x, 36, 2, lambda windows: model(windows).to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    # where nobody looks: no data, but a device
    thin = tiny(1).to("meta").float()
    nowhere = sliding_window_inference(x, 36, 2, thin, sw_device="meta", device="meta")
    assert (nowhere.device.type, nowhere.shape) == ("meta", want.shape)


@pytest.mark.gpu
@pytest.mark.parametrize("tensor_on", ["cpu", "cuda"])
def test_windows_on_a_gpu_of_an_image_elsewhere(device: torch.device, tensor_on: str) -> None:
    model, x = tiny(1).float(), images(2, 1, 60, 70).float()
    want = sliding_window_inference(x, 36, 2, model)
    got = sliding_window_inference(x.to(tensor_on), 36, 2, model.to(device), sw_device=device, device="cpu")
    assert got.device.type == "cpu"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_windows() -> None:
    model, x = tiny(1), images(1, 1, 20, 20).requires_grad_()
    sliding_window_inference(x, 26, 2, model).square().sum().backward()
    tiled = [x.grad.clone(), *(each.grad.clone() for each in model.parameters())]
    model.zero_grad()
    x.grad = None
    SameSize(model)(x).square().sum().backward()
    for got, want in zip(tiled, [x.grad, *(each.grad for each in model.parameters())], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_progress_is_shown_where_it_is_wanted(capfd: pytest.CaptureFixture[str]) -> None:
    sliding_window_inference(images(1, 1, 20, 20), 26, 1, tiny(1))
    assert capfd.readouterr() == ("", "")
    sliding_window_inference(images(1, 1, 20, 20), 26, 1, tiny(1), progress=True)
    assert "predict" in capfd.readouterr().err


NO_UNET = (
    "predictor gives {} pixels for 380 x 380, which no U-Net of unpadded convolutions does; for nets that keep the "
    "size, MONAI's own sliding_window_inference is the right one"
)

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "three axes": ({"inputs": torch.zeros(1, 20, 20)}, "inputs must be [N, C, H, W], got [1, 20, 20]"),
    "volumes": ({"inputs": torch.zeros(1, 1, 9, 20, 20)}, "inputs must be [N, C, H, W], got [1, 1, 9, 20, 20]"),
    "nothing": ({"inputs": torch.zeros(1, 1, 0, 20)}, "inputs must be [N, C, H, W], got [1, 1, 0, 20]"),
    "weights of windows": (
        {"roi_weight_map": torch.ones(20, 20)},
        "roi_weight_map, process_fn and with_coord cannot be kept: nothing is blended here",
    ),
    "a function of windows": (
        {"process_fn": lambda *a: a},
        "roi_weight_map, process_fn and with_coord cannot be kept: nothing is blended here",
    ),
    "coordinates": (
        {"with_coord": True},
        "roi_weight_map, process_fn and with_coord cannot be kept: nothing is blended here",
    ),
    "no window at a time": ({"sw_batch_size": 0}, "sw_batch_size must be 1 or more, got 0"),
    "three sides": ({"roi_size": (36, 36, 36)}, "roi_size must be one side or rows and columns, got (36, 36, 36)"),
    "one side of two": ({"roi_size": [36]}, "roi_size must be one side or rows and columns, got [36]"),
    "half a pixel": ({"roi_size": 36.5}, "roi_size must be one side or rows and columns, got 36.5"),
    "words": ({"roi_size": "36"}, "roi_size must be one side or rows and columns, got '36'"),
    "a net that keeps the size": ({"predictor": nn.Conv2d(1, 2, 3, padding=1)}, NO_UNET.format("380 x 380")),
    "a callable that keeps the size": ({"predictor": lambda x: x}, NO_UNET.format("380 x 380")),
    "one of ours that keeps it, hidden": (
        {"predictor": SameSize(FastUNet(features=(2, 2)))},
        NO_UNET.format("380 x 380"),
    ),
    "three columns less": ({"predictor": lambda x: x[..., 3:]}, NO_UNET.format("380 x 377")),
    "a halo off rows alone": ({"predictor": lambda x: x[..., 4:, :]}, NO_UNET.format("376 x 380")),
    "another depth than it says": (
        {"predictor": type("Deep", (nn.Identity,), {"depth": 3})()},
        "predictor gives 100 x 100 pixels for 100 x 100, not the 12 x 12 of a U-Net of depth 3",
    ),
    "several maps": (
        {"predictor": lambda x: (x, x)},
        "predictor must give one tensor [B, K, h, w], got tuple",
    ),
    "several maps, of known depth": (
        {"predictor": type("Two", (nn.Module,), {"depth": 1, "forward": lambda self, x: {"out": x}})()},
        "predictor must give one tensor [B, K, h, w], got dict",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused_in_a_sentence(case: str) -> None:
    arguments: dict[str, Any] = {
        "inputs": torch.zeros(1, 1, 20, 20), "roi_size": 36, "sw_batch_size": 1, "predictor": FastUNet(features=(2, 2)),
    }  # fmt: skip
    changed, sentence = REFUSED[case]
    with pytest.raises(BadInput) as caught:
        sliding_window_inference(**{**arguments, **changed})
    assert str(caught.value) == sentence


def test_monai_itself_returns_an_image_of_another_size() -> None:
    theirs = monais()
    model, x = tiny(1), images(1, 1, 45, 45)
    # as 572 to 388 at the paper's depth: 16 pixels less
    assert model(images(1, 1, 36, 36)).shape[2:] == (20, 20)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        found = theirs(x, (36, 36), 1, model)
        assert found.shape[2:] != x.shape[2:]
        ours = sliding_window_inference(x, (36, 36), 1, model)
        assert_exact(ours, wanted(model, x))
        # of nets that keep the size both say the same, where windows are the image
        padded = tiny(1, padding="same")
        for each in (theirs, sliding_window_inference):
            assert each(x, (45, 45), 1, padded).shape[2:] == x.shape[2:]
