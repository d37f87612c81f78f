"""The command line: its frame is light, its data is data, its mistakes are sentences."""

import inspect
import json
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from unet_fast import TrainConfig, cli
from unet_fast.cli import app

ROOT = Path(__file__).parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "unet_fast", *arguments], capture_output=True, text=True)


def test_help_is_quick() -> None:
    def spent() -> float:
        # of the processor: what else a machine does is no fault of ours
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    seconds = []
    for _ in range(3):
        before = spent()
        done = _run("--help")
        seconds.append(spent() - before)
        assert done.returncode == 0
        assert "doctor" in done.stdout
    # the first run may compile bytecode
    assert min(seconds) < 0.4


@pytest.mark.parametrize("heavy", ["torch", "triton", "matplotlib", "numpy"])
def test_the_frame_imports_nothing_heavy(heavy: str) -> None:
    program = f"import sys, unet_fast.cli; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_version_is_the_packages() -> None:
    import unet_fast

    done = _run("--version")
    assert done.stdout == f"unet-fast {unet_fast.__version__}\n"
    assert f'version = "{unet_fast.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("arguments", [["docter"], ["doctor", "--jsn"]], ids=["verb", "option"])
def test_a_wrong_word_is_a_usage_error(arguments: list[str]) -> None:
    done = _run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert arguments[-1] in done.stderr


@pytest.mark.slow
def test_doctor_prints_data_and_nothing_else() -> None:
    from unet_kernels import OPS

    done = _run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["ops"]) == set(OPS)
    assert all(lanes["cpu"][0] in ("torch", "native") and lanes["cpu"][1] for lanes in found["ops"].values())
    assert found["libraries"]["torch"] != "not installed"


@pytest.mark.slow
def test_doctor_tells_a_reader_what_runs_where() -> None:
    done = _run("doctor")
    assert done.returncode == 0, done.stderr
    for line in ("what each op runs on cpu", "native libraries", "crop_concat", "python"):
        assert line in done.stdout
    assert not done.stderr


def test_doctor_tells_what_each_layer_would_run_on_a_chip_that_is_not_here() -> None:
    done = CliRunner().invoke(
        app, ["doctor", "--layers", "--features", "16,32", "--chip", "sm_90", "--tile", "60", "--json"]
    )
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["layer"] for row in found["layers"]][:2] == ["down.0.conv1", "down.0.conv2"]
    assert found["device"] == "sm_90"
    done = CliRunner().invoke(app, ["doctor", "--layers", "--features", "16,32", "--chip", "sm_90", "--tile", "61"])
    assert done.exit_code == 3
    assert "tile 61 cannot be pooled" in done.stderr


@pytest.mark.slow
def test_the_package_itself_is_light() -> None:
    program = (
        "import sys, unet_fast; assert 'torch' not in sys.modules; unet_fast.FastUNet; assert 'torch' in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    import unet_fast

    assert set(unet_fast.__all__) <= set(dir(unet_fast))
    with pytest.raises(AttributeError, match="no attribute 'FastNet'"):
        unet_fast.FastNet


def test_every_setting_of_a_training_has_an_option_and_every_option_a_setting() -> None:
    options = set(inspect.signature(cli.train).parameters)
    settings = {f.name for f in fields(TrainConfig)}
    assert options - settings == set(cli._NO_SETTINGS) - {"features"}
    assert settings <= options
    said = CliRunner().invoke(cli.app, ["train", "--help"], env={"COLUMNS": "200"}).stdout
    assert all(f"--{name.replace('_', '-')}" in said for name in settings)
