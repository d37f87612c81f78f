"""Proves that FastUNet can be put into an ordinary training script as it is.

Each test is what people write around a U-Net: optimisers, autocast, a DataLoader with workers, torch.compile, hooks,
initialisers, export, files, half precision, frozen layers, checkpointing, and the training loops of two well-known
packages with the one line changed that builds the net. Where there is an eager or plain answer, it is the same.
"""

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from tests.unet_fast.plain_unet import PlainUNet
from unet_fast import FastUNet, geometry

# a net whose bottom has more weights than pixels, and one where that never happens
FEATURES = {"narrow": (4, 8, 16), "wide": (4, 96, 96)}
UP_MODES = ("deconv", "resize")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Nets this small lose time on threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def discs(count: int, side: int, seed: int = 0, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Noisy images [count, channels, side, side] of one dark disc each on a bright ground, and where the disc is."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.arange(side)[:, None], torch.arange(side)[None, :]
    centres = torch.randint(side // 4, 3 * side // 4, (count, 2), generator=generator)
    radius = side // 5
    distance = (rows - centres[:, 0, None, None]) ** 2 + (columns - centres[:, 1, None, None]) ** 2
    truth = (distance < radius**2).long()
    noise = 0.2 * torch.randn(count, channels, side, side, generator=generator)
    return 1 - 2 * truth.unsqueeze(1).float() - noise, truth


def centre(labels: Tensor, like: Tensor) -> Tensor:
    margin = (labels.shape[-1] - like.shape[-1]) // 2
    return labels[..., margin : margin + like.shape[-2], margin : margin + like.shape[-1]]


class Discs(Dataset):
    """Images of a legal size and the labels that a valid net can answer for."""

    def __init__(self, count: int, side: int, depth: int) -> None:
        self.images, labels = discs(count, side)
        halo = geometry.halo(depth)
        self.labels = labels[:, halo:-halo, halo:-halo]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "label": self.labels[index]}


def loss_of(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    logits = model(x)
    return F.cross_entropy(logits.float(), centre(labels, logits))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert sorted(actual) == sorted(expected)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def assert_gradients_fit_their_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        own = (parameter.shape, parameter.stride(), parameter.dtype)
        assert (parameter.grad.shape, parameter.grad.stride(), parameter.grad.dtype) == own, name


# optimisers and loaders


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "SGD, nesterov and decay": lambda parameters: torch.optim.SGD(
        parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4
    ),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=5e-3),
    "Adam, foreach": lambda parameters: torch.optim.Adam(parameters, lr=5e-3, foreach=True),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=5e-3, fused=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("up_mode", UP_MODES)
def test_a_training_loop_lowers_the_loss(up_mode: str, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = FastUNet(features=(8, 16), up_mode=up_mode)
    x, labels = discs(4, 40)
    stepper = optimizer(model.parameters())
    losses = []
    for _ in range(25):
        stepper.zero_grad()
        loss = loss_of(model, x, labels)
        loss.backward()
        stepper.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert {p.stride()[1] for p in model.parameters() if p.dim() == 4} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_of_an_optimiser_go_where_the_plain_net_goes(name: str) -> None:
    fast, plain = FastUNet(features=(4, 96, 96)).double(), PlainUNet(features=(4, 96, 96)).double()
    plain.load_state_dict(fast.state_dict())
    x, labels = discs(2, 44)
    for model in (fast, plain):
        stepper = OPTIMIZERS[name](model.parameters())
        for _ in range(10):
            stepper.zero_grad()
            logits = model(x.double())
            F.cross_entropy(logits, centre(labels, logits)).backward()
            stepper.step()
    assert_same(dict(fast.named_parameters()), dict(plain.named_parameters()), rtol=1e-6, atol=1e-8)


def test_a_loader_with_two_workers_feeds_it() -> None:
    model = FastUNet(features=(4, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = DataLoader(Discs(8, 40, model.depth), batch_size=4, num_workers=2)
    epochs = []
    for _ in range(2):
        losses = []
        for batch in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        epochs.append(losses)
    assert [len(losses) for losses in epochs] == [2, 2]
    assert sum(epochs[1]) < sum(epochs[0])


def test_accumulated_halves_of_a_batch_have_the_gradient_of_the_whole() -> None:
    model = FastUNet(features=(4, 96, 96)).double()
    x, labels = discs(4, 44)
    loss_of(model, x.double(), labels).backward()
    whole = gradients(model)
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        (loss_of(model, x[half].double(), labels[half]) / 2).backward()
    # the loss is taken in float32
    assert_same(gradients(model), whole, rtol=1e-4, atol=1e-7)


# autocast


@pytest.mark.slow
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("up_mode", UP_MODES)
def test_under_autocast_the_output_is_low_precision_and_the_gradients_are_float32(
    up_mode: str, padding: str, dtype: torch.dtype, features: tuple[int, ...]
) -> None:
    model = FastUNet(features=features, up_mode=up_mode, padding=padding, up_activation=True)
    x, labels = discs(2, 44)
    with torch.autocast("cpu", dtype):
        logits = model(x)
        loss = F.cross_entropy(logits, centre(labels, logits))
    assert logits.dtype == dtype
    loss.backward()
    assert_gradients_fit_their_parameters(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    exact = model(x)
    assert exact.dtype == torch.float32
    torch.testing.assert_close(logits.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("up_mode", UP_MODES)
def test_under_autocast_every_layer_has_the_dtype_and_strides_on_fake_tensors_that_it_has_on_real_ones(
    up_mode: str, padding: str, dtype: torch.dtype
) -> None:
    def layers() -> dict[str, Any]:
        seen: dict[str, Any] = {}
        model = FastUNet(features=(8, 16, 32), up_mode=up_mode, padding=padding)
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda _module, _args, y, name=name: seen.update({name: (tuple(y.shape), y.stride(), y.dtype)})
            )
        with torch.autocast("cpu", dtype):
            out = model(torch.zeros(1, 1, 44, 48))
        out.float().sum().backward()
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        return seen

    real = layers()
    with FakeTensorMode():
        fake = layers()
    assert real["head"][2] == dtype
    assert fake == real


@pytest.mark.parametrize("up_mode", UP_MODES)
def test_under_autocast_float64_stays_float64_as_in_torch(up_mode: str) -> None:
    model = FastUNet(features=(4, 8), up_mode=up_mode).double()
    x = torch.randn(1, 1, 20, 20, dtype=torch.float64)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("up_mode", UP_MODES)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_a_backward_inside_autocast_has_the_gradients_of_one_outside(features: tuple[int, ...], up_mode: str) -> None:
    model = FastUNet(features=features, up_mode=up_mode)
    x, labels = discs(1, 44)
    loss_of(model, x, labels).backward()
    outside = gradients(model)
    model.zero_grad()
    loss = loss_of(model, x, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert_same(gradients(model), outside)


@pytest.mark.parametrize("up_mode", UP_MODES)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_forward_and_backward_both_inside_autocast_have_the_gradients_of_a_backward_outside(
    padding: str, features: tuple[int, ...], up_mode: str
) -> None:
    model = FastUNet(features=features, up_mode=up_mode, padding=padding)
    x, labels = discs(1, 44)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, x, labels)
    loss.backward()
    outside = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, x, labels).backward()
    assert_same(gradients(model), outside)


# compile and export

COMPILED = {
    "deconv": {},
    "resize": {"up_mode": "resize"},
    "release": {"up_activation": True, "last_up_channels": 8},
    "wide": {"features": (4, 96, 96)},
    "no skips": {"skips": False},
    "same": {"padding": "same"},
}


@pytest.mark.slow
@pytest.mark.parametrize("config", COMPILED.values(), ids=COMPILED.keys())
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_whole_it_equals_eager_forward_and_backward(config: dict[str, Any]) -> None:
    model = FastUNet(**{"features": (4, 8, 16), **config})
    x, labels = discs(2, 44)
    eager = loss_of(model, x, labels)
    eager.backward()
    wanted = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    loss = loss_of(compiled, x, labels)
    torch.testing.assert_close(loss, eager)
    loss.backward()
    assert_same(gradients(model), wanted, rtol=1e-4, atol=1e-6)
    assert_gradients_fit_their_parameters(model)


@pytest.mark.slow
@pytest.mark.parametrize("up_mode", UP_MODES)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_whole_under_autocast_it_equals_eager_under_autocast(up_mode: str) -> None:
    model = FastUNet(features=(4, 8, 16), up_mode=up_mode)
    x, labels = discs(2, 44)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for net in (model, compiled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(x)
            loss = F.cross_entropy(logits, centre(labels, logits))
        loss.backward()
        results.append((logits.detach(), gradients(model)))
    (expected, wanted), (actual, got) = results
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected)
    largest = max(g.abs().max().item() for g in wanted.values())
    assert_same(got, wanted, rtol=2e-2, atol=2e-2 * largest)
    assert_gradients_fit_their_parameters(model)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_in_eval_it_takes_other_sizes_and_refuses_illegal_ones() -> None:
    model = FastUNet(features=(4, 8)).eval()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for rows, columns in ((20, 20), (22, 30), (36, 24)):
            x = torch.randn(1, 1, rows, columns)
            torch.testing.assert_close(compiled(x), model(x))
        with pytest.raises(ValueError, match="rows of x 21 cannot be pooled 1 times; nearest are 20 and 22"):
            compiled(torch.zeros(1, 1, 21, 20))


@pytest.mark.parametrize("config", [{}, {"up_mode": "resize"}, {"padding": "same"}], ids=["deconv", "resize", "same"])
def test_exported_it_equals_eager_for_any_batch(config: dict[str, Any]) -> None:
    model = FastUNet(features=(4, 8, 16), **config).eval()
    x = torch.randn(2, 1, 44, 48)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}, strict=False)
    torch.testing.assert_close(exported.module()(x), model(x))
    more = torch.randn(5, 1, 44, 48)
    torch.testing.assert_close(exported.module()(more), model(more))


def test_exported_with_dynamic_rows_it_equals_eager_at_every_legal_size() -> None:
    model = FastUNet(features=(4, 8)).eval()
    half = torch.export.Dim("half", min=9, max=100)
    x = torch.randn(1, 1, 24, 20)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {2: 2 * half}}, strict=False)
    for rows in geometry.legal_sizes(18, 30, 1):
        image = torch.randn(1, 1, rows, 20)
        torch.testing.assert_close(exported.module()(image), model(image))


# copies, files, dtypes


def test_a_deep_copy_trains_alone() -> None:
    model = FastUNet(features=(4, 8, 16))
    twin = copy.deepcopy(model)
    x, labels = discs(1, 44)
    loss_of(twin, x, labels).backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert all(p.grad is None for p in model.parameters())
    assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize("up_mode", UP_MODES)
def test_a_state_dict_goes_through_a_file_that_is_read_with_weights_only(up_mode: str) -> None:
    model, other = FastUNet(features=(4, 8, 16), up_mode=up_mode), FastUNet(features=(4, 8, 16), up_mode=up_mode)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(1, 1, 44, 44)
    assert torch.equal(other(x), model(x))


def test_model_and_optimiser_resume_from_files_bit_for_bit() -> None:
    x, labels = discs(2, 44)

    def run(steps: int, files: dict[str, io.BytesIO] | None) -> tuple[FastUNet, dict[str, io.BytesIO]]:
        torch.manual_seed(7)
        model = FastUNet(features=(4, 8, 16))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for part, target in {"model": model, "optimizer": optimizer}.items() if files else ():
            files[part].seek(0)
            target.load_state_dict(torch.load(files[part], weights_only=True))
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model, x, labels).backward()
            optimizer.step()
        saved = {"model": io.BytesIO(), "optimizer": io.BytesIO()}
        torch.save(model.state_dict(), saved["model"])
        torch.save(optimizer.state_dict(), saved["optimizer"])
        return model, saved

    straight, _ = run(4, None)
    _, halfway = run(2, None)
    resumed, _ = run(2, halfway)
    assert_same(dict(resumed.named_parameters()), dict(straight.named_parameters()), rtol=0, atol=0)


def test_the_whole_model_can_be_pickled() -> None:
    model = FastUNet(features=(4, 8, 16))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    x = torch.randn(1, 1, 44, 44)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("up_mode", UP_MODES)
def test_half_bfloat16_and_double_compute_and_train_in_their_dtype(
    up_mode: str, padding: str, dtype: torch.dtype
) -> None:
    model = FastUNet(features=(4, 8, 16), up_mode=up_mode, padding=padding)
    x, _ = discs(1, 44)
    expected = model(x)
    convert = {torch.float16: model.half, torch.bfloat16: model.bfloat16, torch.float64: model.double}[dtype]
    out = convert()(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
    out.float().pow(2).mean().backward()
    assert_gradients_fit_their_parameters(model)


# modules as people use them


def test_forward_hooks_on_every_submodule_see_its_inputs_and_outputs() -> None:
    model = FastUNet(features=(4, 8, 16))
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _module, _args, _y, name=name: called.append(name))
    model(torch.zeros(1, 1, 44, 44))
    containers = {"down", "up"}  # ModuleLists are not called
    assert sorted(called) == sorted({name for name, _ in model.named_modules()} - containers)
    assert called[0] == "down.0.conv1"
    assert called[-2:] == ["head", ""]


def test_a_forward_hook_can_replace_an_output() -> None:
    model = FastUNet(features=(4, 8, 16))
    x = torch.randn(1, 1, 44, 44)
    before = model(x)
    with_zeros = model.down[2].register_forward_hook(lambda _module, _args, y: torch.zeros_like(y))
    replaced = model(x)
    with_zeros.remove()
    assert not torch.equal(replaced, before)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("up_mode", UP_MODES)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_full_backward_hooks_on_every_submodule_are_called_and_change_no_gradient(
    features: tuple[int, ...], up_mode: str
) -> None:
    model = FastUNet(features=features, up_mode=up_mode)
    x, labels = discs(1, 44)
    x.requires_grad_()
    loss_of(model, x, labels).backward()
    wanted = gradients(model)
    model.zero_grad()
    seen: dict[str, tuple[Any, ...]] = {}
    for name, module in model.named_modules():
        module.register_full_backward_pre_hook(lambda _module, _grads: None)
        module.register_full_backward_hook(lambda _module, _dx, dy, name=name: seen.update({name: dy}))
    loss_of(model, x, labels).backward()
    assert set(seen) == {name for name, _ in model.named_modules()} - {"down", "up"}
    assert seen[""][0].shape == model(x).shape
    assert_same(gradients(model), wanted)


def test_apply_reaches_every_layer_with_the_usual_initialiser() -> None:
    model = FastUNet(3, 2, (4, 8, 16))
    touched = []

    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.constant_(module.bias, 0.25)
            touched.append(module)

    before = copy.deepcopy(model.state_dict())
    model.apply(init)
    assert len(touched) == 6 + 2 * 3 + 1
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {p.stride()[1] for p in model.parameters() if p.dim() == 4} == {1}
    plain = PlainUNet(3, 2, (4, 8, 16))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 44, 44)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_a_frozen_contracting_path_gets_no_gradient_and_the_rest_gets_its_own(features: tuple[int, ...]) -> None:
    model = FastUNet(features=features)
    x, labels = discs(1, 44)
    loss_of(model, x, labels).backward()
    wanted = {name: g for name, g in gradients(model).items() if not name.startswith("down.")}
    model.zero_grad()
    model.down.requires_grad_(False)
    before = copy.deepcopy(model.down.state_dict())
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    loss_of(model, x, labels).backward()
    assert_same(gradients(model), wanted)
    optimizer.step()
    assert_same(model.down.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize("up_mode", UP_MODES)
def test_frozen_weights_or_biases_leave_the_other_gradients_as_they_were(
    up_mode: str, features: tuple[int, ...], kind: str
) -> None:
    model = FastUNet(features=features, up_mode=up_mode)
    x, labels = discs(1, 44)
    x.requires_grad_()
    loss_of(model, x, labels).backward()
    wanted = {name: g for name, g in gradients(model).items() if not name.endswith(kind)}
    wanted_x, x.grad = x.grad, None
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(kind))
    loss_of(model, x, labels).backward()
    assert_same(gradients(model), wanted)
    torch.testing.assert_close(x.grad, wanted_x)


def test_a_wholly_frozen_net_gives_the_input_its_gradient() -> None:
    model = FastUNet(features=(4, 96, 96)).requires_grad_(False)
    plain = PlainUNet(features=(4, 96, 96)).requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    slopes, image = [], torch.randn(1, 1, 44, 44)
    for net in (model, plain):
        x = image.clone().requires_grad_()
        net(x).sum().backward()
        slopes.append(x.grad)
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4 * slopes[1].abs().max().item())


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensor hooks", "reentrant"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_checkpointed_it_has_the_same_gradients_dropout_included(
    features: tuple[int, ...], use_reentrant: bool
) -> None:
    model = FastUNet(features=features, dropout=0.5)
    x, labels = discs(1, 44)
    x.requires_grad_()
    torch.manual_seed(1)
    loss_of(model, x, labels).backward()
    wanted = gradients(model)
    model.zero_grad()
    torch.manual_seed(1)
    logits = checkpoint(model, x, use_reentrant=use_reentrant)
    F.cross_entropy(logits, centre(labels, logits)).backward()
    assert_same(gradients(model), wanted)


def test_checkpointed_under_autocast_it_has_the_gradients_of_autocast() -> None:
    model = FastUNet(features=(4, 96, 96))
    x, labels = discs(1, 44)
    results = []
    for call in (model, lambda image: checkpoint(model, image, use_reentrant=False)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = call(x)
            loss = F.cross_entropy(logits, centre(labels, logits))
        loss.backward()
        results.append(gradients(model))
    assert_same(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_without_gradients_it_keeps_no_graph_and_gives_the_same_values(mode: str) -> None:
    model = FastUNet(features=(4, 96, 96))
    x = torch.randn(1, 1, 44, 44)
    expected = model(x)
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]():
        out = model(x)
    assert not out.requires_grad
    assert torch.equal(out, expected)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize("up_mode", UP_MODES)
def test_torch_func_takes_its_gradient(up_mode: str, features: tuple[int, ...]) -> None:
    model = FastUNet(features=features, up_mode=up_mode)
    x, labels = discs(1, 44)
    loss_of(model, x, labels).backward()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(model, values, (x,))
        return F.cross_entropy(logits, centre(labels, logits))

    assert_same(torch.func.grad(loss)(parameters), gradients(model))


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_it_sits_in_a_sequential_and_in_another_module(padding: str) -> None:
    class Lesion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = FastUNet(1, 4, (4, 8), padding=padding)
            self.second = nn.Sequential(nn.BatchNorm2d(4), FastUNet(4, 2, (4, 8), padding=padding), nn.Softmax(dim=1))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = Lesion()
    out = model(torch.randn(2, 1, 44, 44))
    torch.testing.assert_close(out.sum(1), torch.ones_like(out[:, 0]))
    out[:, 0].mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_weight_norm_and_spectral_norm_can_be_put_on_its_layers() -> None:
    model = FastUNet(features=(4, 8))
    x = torch.randn(1, 1, 20, 20)
    before = model(x)
    nn.utils.parametrizations.weight_norm(model.down[1].conv1)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    model(x).sum().backward()


# the loop of milesial/Pytorch-UNet, its shape and its calls; one line differs


def dice_coeff(prediction: Tensor, target: Tensor, reduce_batch_first: bool = False, epsilon: float = 1e-6) -> Tensor:
    assert prediction.size() == target.size()
    axes = (-1, -2, -3) if reduce_batch_first else (-1, -2)
    intersection = 2 * (prediction * target).sum(dim=axes)
    sets = prediction.sum(dim=axes) + target.sum(dim=axes)
    sets = torch.where(sets == 0, intersection, sets)
    return ((intersection + epsilon) / (sets + epsilon)).mean()


def dice_loss(prediction: Tensor, target: Tensor) -> Tensor:
    return 1 - dice_coeff(prediction.flatten(0, 1), target.flatten(0, 1), reduce_batch_first=True)


@torch.inference_mode()
def evaluate(net: nn.Module, loader: DataLoader, device: torch.device, amp: bool) -> float:
    net.eval()
    score = 0.0
    with torch.autocast(device.type, enabled=amp):
        for batch in loader:
            image = batch["image"].to(device=device, dtype=torch.float32, memory_format=torch.channels_last)
            mask_true = F.one_hot(batch["mask"].long(), net.n_classes).permute(0, 3, 1, 2).float()
            mask_pred = F.one_hot(net(image).argmax(dim=1), net.n_classes).permute(0, 3, 1, 2).float()
            score += dice_coeff(mask_pred[:, 1:].flatten(0, 1), mask_true[:, 1:].flatten(0, 1)).item()
    net.train()
    return score / len(loader)


class OddImages(Dataset):
    def __init__(self, count: int) -> None:
        self.images, self.masks = discs(count, 61, channels=3)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index, :, :, :53], "mask": self.masks[index, :, :53]}


@pytest.mark.slow
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
@pytest.mark.parametrize("up_mode", UP_MODES)
def test_a_milesial_training_script_works_with_one_line_changed(up_mode: str, amp: bool) -> None:
    device = torch.device("cpu")
    model = FastUNet(3, 2, (16, 32), padding="same", up_mode=up_mode)  # was UNet(n_channels=3, n_classes=2)
    model = model.to(memory_format=torch.channels_last)
    model.to(device=device)
    train_loader = DataLoader(OddImages(8), batch_size=4, shuffle=True)
    val_loader = DataLoader(OddImages(2), batch_size=1, drop_last=True)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-4, weight_decay=1e-8, momentum=0.9, foreach=True)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=5)
    grad_scaler = torch.amp.GradScaler("cpu", enabled=False)
    criterion = nn.CrossEntropyLoss() if model.n_classes > 1 else nn.BCEWithLogitsLoss()
    losses = []
    before = evaluate(model, val_loader, device, amp)
    for _ in range(6):
        model.train()
        for batch in train_loader:
            images, true_masks = batch["image"], batch["mask"]
            assert images.shape[1] == model.n_channels
            images = images.to(device=device, dtype=torch.float32, memory_format=torch.channels_last)
            true_masks = true_masks.to(device=device, dtype=torch.long)
            with torch.autocast(device.type, enabled=amp):
                masks_pred = model(images)
                loss = criterion(masks_pred, true_masks)
                loss += dice_loss(
                    F.softmax(masks_pred, dim=1).float(),
                    F.one_hot(true_masks, model.n_classes).permute(0, 3, 1, 2).float(),
                )
            optimizer.zero_grad(set_to_none=True)
            grad_scaler.scale(loss).backward()
            grad_scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            grad_scaler.step(optimizer)
            grad_scaler.update()
            losses.append(loss.item())
        scheduler.step(evaluate(model, val_loader, device, amp))
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2])
    assert evaluate(model, val_loader, device, amp) > max(before, 0.7)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name


# the loop of MONAI's tutorials; one line differs


class SoftDice(nn.Module):
    """What DiceLoss(to_onehot_y=True, softmax=True) computes: labels [N, 1, H, W]."""

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        assert outputs.shape[2:] == labels.shape[2:]
        probabilities = outputs.float().softmax(dim=1)
        truth = F.one_hot(labels[:, 0].long(), outputs.shape[1]).movedim(-1, 1).to(probabilities.dtype)
        overlap = (probabilities * truth).sum(dim=(2, 3))
        return (1 - (2 * overlap + 1e-5) / (probabilities.sum(dim=(2, 3)) + truth.sum(dim=(2, 3)) + 1e-5)).mean()


class Volumes(Dataset):
    def __init__(self, count: int) -> None:
        self.images, self.labels = discs(count, 50)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "label": self.labels[index].unsqueeze(0).float()}


def test_a_monai_training_loop_works_with_one_line_changed() -> None:
    device = torch.device("cpu")
    train_loader = DataLoader(Volumes(8), batch_size=4, shuffle=True)
    val_loader = DataLoader(Volumes(3), batch_size=1)
    model = FastUNet(1, 2, (16, 32), padding="same").to(device)  # was UNet(spatial_dims=2, in_channels=1, ...)
    loss_function = SoftDice()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    best_metric, best_state, epoch_losses = -1.0, None, []
    for _ in range(8):
        model.train()
        epoch_loss = 0.0
        for batch_data in train_loader:
            inputs, labels = batch_data["image"].to(device), batch_data["label"].to(device)
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = loss_function(outputs, labels)
            loss.backward()
            optimizer.step()
            epoch_loss += loss.item()
        epoch_losses.append(epoch_loss / len(train_loader))
        model.eval()
        with torch.no_grad():
            agreement = []
            for val_data in val_loader:
                val_outputs = model(val_data["image"].to(device)).argmax(dim=1, keepdim=True)
                cell, truth = val_outputs == 1, val_data["label"] == 1
                agreement.append((2 * (cell & truth).sum() / (cell.sum() + truth.sum())).item())
        metric = sum(agreement) / len(agreement)
        best_state = copy.deepcopy(model.state_dict()) if metric > best_metric else best_state
        best_metric = max(metric, best_metric)
    assert epoch_losses[-1] < 0.6 * epoch_losses[0]
    assert best_metric > 0.8
    model.load_state_dict(best_state)


def test_a_valid_net_in_the_same_loop_needs_its_labels_cropped_and_then_learns() -> None:
    model = FastUNet(1, 2, (16, 32))
    loss_function = SoftDice()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for batch_data in itertools.chain.from_iterable(DataLoader(Volumes(8), batch_size=4) for _ in range(8)):
        optimizer.zero_grad()
        outputs = model(batch_data["image"])
        loss = loss_function(outputs, centre(batch_data["label"], outputs))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
