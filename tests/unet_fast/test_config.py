"""Settings: every field survives TOML, what is wrong is named in one sentence, flags win over the file."""

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.proof.properties import given, settings, st
from unet_fast import geometry
from unet_fast.config import TrainConfig, read_toml
from unet_fast.errors import BadInput

PLACES = {"images": "a", "labels": "b", "out": "c"}

whole, share = st.integers(1, 10**9), st.floats(0, 1, exclude_max=True)
amount = st.floats(0, 1e300)
# any text, but what no file may be called or no file system can hold
names = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=12)
VALUES: dict[str, Any] = {
    "images": names.map(Path),
    "labels": names.map(Path),
    "out": names.map(Path),
    "label_kind": st.sampled_from(["auto", "binary", "class", "instance"]),
    "ignore": st.none() | st.integers(-10, 2**31),
    "axes": st.none() | names,
    "normalisation": st.sampled_from(["percentile", "range", "none"]),
    "low": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "high": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "features": st.lists(st.integers(1, 2048), min_size=3, max_size=3).map(tuple),
    "classes": st.none() | st.integers(2, 256),
    "up_mode": st.sampled_from(["deconv", "resize"]),
    "border_region": st.sampled_from(["background", "all"]),
    "dropout": share,
    "memory": st.none() | st.sampled_from(["6GB", "500 MB", "1.5GiB"]),
    "recompute": st.sampled_from([None, "none", "level"]),
    "precision": st.sampled_from([None, "float32", "bfloat16", "float16"]),
    "deterministic": st.booleans(),
    "skips": st.booleans(),
    "padding": st.sampled_from(["valid", "same"]),
    "at_once": st.none() | whole,
    "most_skipped": whole,
    "keep_minutes": st.floats(1e-300, 1e300),
    "workers": st.none() | st.integers(0, 64),
    "images_on": st.sampled_from(["auto", "device", "host"]),
    "tensorboard": st.booleans(),
    "accumulate": st.sampled_from(["tile", "image"]),
    "tile": st.none() | st.sampled_from(geometry.legal_sizes(1, 600, 2)),
    "batch": whole,
    "momentum": share,
    "steps": st.none() | whole,
    "epochs": st.none(),
    "lr": st.floats(1e-300, 1e300),
    "warmup": share,
    "clip": amount,
    "weight_decay": amount,
    "border_weight": amount,
    "border_sigma": st.floats(1e-300, 1e300),
    "balance": st.booleans(),
    "elastic": amount,
    "grid": st.integers(2, 100),
    "rotate": st.booleans(),
    "mirror": st.booleans(),
    "grey": st.floats(0, 1),
    "zoom": st.floats(1, 4),
    "foreground": st.floats(0, 1),
    "noise": st.floats(0, 1),
    "validation": share,
    "validate_every": st.none() | whole,
    "log_every": whole,
    "seed": st.integers(0, 2**63 - 1),
    "device": names,
}


def test_every_setting_is_tried() -> None:
    assert set(VALUES) >= {f.name for f in fields(TrainConfig)}


@given(values=st.fixed_dictionaries({f.name: VALUES.get(f.name, st.nothing()) for f in fields(TrainConfig)}))
def test_every_setting_survives_toml_and_json(values: dict[str, Any]) -> None:
    # whole images have no centre to choose
    values |= {"foreground": 0.0, "at_once": None} if values["accumulate"] == "image" else {}
    # tiles of a padded net do not join
    values |= {"memory": None, "accumulate": "tile"} if values["padding"] == "same" else {}
    config = TrainConfig(**values)
    text = config.to_toml()
    # readable whatever the machine's encoding, and one line a setting
    assert text.isascii()
    assert len(text.splitlines()) == len(config.as_dict())
    assert TrainConfig.from_dict(tomllib.loads(text)) == config
    assert TrainConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_epochs_survive_too() -> None:
    config = TrainConfig.from_dict({**PLACES, "epochs": 7})
    assert TrainConfig.from_dict(tomllib.loads(config.to_toml())) == config


@settings(max_examples=20)
@given(name=names)
def test_a_file_name_of_any_letters_survives(name: str) -> None:
    config = TrainConfig(images=Path(f"Zürich 🔬 \x7f {name}"), labels=Path("\\n"), out=Path('"'))
    assert TrainConfig.from_dict(tomllib.loads(config.to_toml())) == config


def test_flags_win_over_the_file_and_none_is_no_flag(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('images = "a"\nlabels = "b"\nout = "c"\nsteps = 5\nbatch = 3\nbalance = false\n')
    config = TrainConfig.read(path, steps=9, batch=None, out="d", rotate=False)
    assert (config.steps, config.batch, config.out, config.rotate) == (9, 3, Path("d"), False)
    assert not config.balance
    # the file's own values are left as they are
    assert TrainConfig.read(path).steps == 5


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("stpes", "steps"), ("learning_rate", None), ("Lr", "lr"), ("feature", "features"), ("image", "images")],
)
def test_an_unknown_key_names_the_nearest(wrong: str, near: str | None) -> None:
    with pytest.raises(BadInput) as caught:
        TrainConfig.from_dict({**PLACES, wrong: 1})
    assert f"config has the unknown key {wrong!r}" in str(caught.value)
    if near:
        assert str(caught.value).endswith(f"; did you mean {near!r}?")


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("steps", 1.5, "a whole number or nothing"),
        ("steps", "10", "a whole number or nothing"),
        ("batch", True, "a whole number"),
        ("batch", 2.0, "a whole number"),
        ("lr", "0.1", "a number"),
        ("lr", False, "a number"),
        ("balance", 1, "true or false"),
        ("features", 64, "a list of whole numbers"),
        ("features", [64, 1.5], "a list of whole numbers"),
        ("features", [64, True], "a list of whole numbers"),
        ("images", 3, "a path"),
        ("device", 0, "text"),
        ("axes", ["ZYX"], "text or nothing"),
        ("batch", None, "a whole number"),
    ],
)
def test_a_value_of_another_type_is_named(key: str, value: Any, wanted: str) -> None:
    with pytest.raises(BadInput) as caught:
        TrainConfig.from_dict({**PLACES, key: value})
    assert str(caught.value) == f"config key {key} must be {wanted}, got {value!r}"


def test_a_whole_number_is_a_number() -> None:
    lr = TrainConfig.from_dict({**PLACES, "lr": 1}).lr
    assert isinstance(lr, float)
    assert lr == 1


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("features", [], "features must be one positive number per level, got none"),
        ("features", [16, 0], "features must be one positive number per level, got 16,0"),
        ("tile", 573, "tile 573 cannot be pooled 4 times; nearest are 572 and 588"),
        ("tile", 10, "tile 10 is too small to be pooled 4 times; the smallest is 188"),
        *((key, 0, f"{key} must be 1 or more, got 0") for key in ("steps", "epochs", "batch", "log_every")),
        ("validate_every", -1, "validate_every must be 1 or more, got -1"),
        *(("lr", bad, f"lr must be above 0, got {bad}") for bad in (0.0, -1.0, NAN, INF)),
        *((key, 1.0, f"{key} must be at least 0 and below 1, got 1.0") for key in ("momentum", "dropout", "warmup")),
        *(("validation", bad, f"validation must be at least 0 and below 1, got {bad}") for bad in (-0.1, 1.0, NAN)),
        *((key, -1.0, f"{key} must be 0 or more, got -1.0") for key in ("border_weight", "elastic", "clip")),
        *(("weight_decay", bad, f"weight_decay must be 0 or more, got {bad}") for bad in (-1.0, NAN, INF)),
        ("border_sigma", 0.0, "border_sigma must be above 0, got 0.0"),
        ("grey", 1.5, "grey must lie between 0 and 1, got 1.5"),
        ("grey", NAN, "grey must lie between 0 and 1, got nan"),
        *(("foreground", bad, f"foreground must lie between 0 and 1, got {bad}") for bad in (-0.1, 1.1, NAN)),
        ("grid", 1, "grid must be 2 or more, got 1"),
        ("classes", 1, "classes must be 2 to 256, background included, got 1"),
        ("classes", 257, "classes must be 2 to 256, background included, got 257"),
        ("seed", -1, "seed must be 0 or more and fit 64 bits, got -1"),
        ("seed", 2**63, f"seed must be 0 or more and fit 64 bits, got {2**63}"),
        ("low", INF, "low must be finite, got inf"),
        ("high", NAN, "high must be finite, got nan"),
        ("label_kind", "semantic", "label_kind must be one of auto, binary, class, instance, got 'semantic'"),
        ("up_mode", "bilinear", "up_mode must be one of deconv, resize, got 'bilinear'"),
    ],
)
def test_a_value_out_of_range_is_one_sentence(key: str, value: Any, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        TrainConfig.from_dict({**PLACES, key: value})
    assert str(caught.value) == said


def test_whole_images_have_no_centre_to_choose() -> None:
    with pytest.raises(BadInput, match=r"foreground must be 0 where whole images are drawn, got 0\.5"):
        TrainConfig.from_dict({**PLACES, "accumulate": "image", "foreground": 0.5})


def test_steps_and_epochs_exclude_each_other() -> None:
    with pytest.raises(BadInput, match="steps and epochs cannot both be given, got 5 and 2"):
        TrainConfig.from_dict({**PLACES, "steps": 5, "epochs": 2})


@pytest.mark.parametrize(("given_", "said"), [({}, "images and labels and out"), ({"images": "a"}, "labels and out")])
def test_what_must_be_given_is_named(given_: dict[str, str], said: str) -> None:
    with pytest.raises(BadInput, match=f"^{said} must be given, on the command line or in the config file$"):
        TrainConfig.from_dict(given_)


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    with pytest.raises(BadInput, match=re.escape(f"{path} does not exist; expected a TOML file of settings")):
        read_toml(path)
    for content in (b"steps = \n", b"steps: 5\n", b"\xff\xfe", b"steps = 5\nsteps = 6\n"):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=re.escape(f"{path} cannot be read as TOML: ")) as caught:
            read_toml(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=r"cannot be read as TOML: .*Is a directory"):
        read_toml(tmp_path)


def test_a_copy_is_checked_as_the_first_was() -> None:
    config = TrainConfig.from_dict(PLACES)
    assert config.with_(steps=3).steps == 3
    assert config.depth == 4
    with pytest.raises(BadInput, match="steps must be 1 or more"):
        config.with_(steps=0)
