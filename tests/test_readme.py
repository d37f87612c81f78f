"""What the README shows can be run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.slow
def test_the_readmes_python_runs(tmp_path: Path) -> None:
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    # the paper's net at its own tile: seconds of arithmetic, and the numbers in the comments
    check = (
        "\nassert geometry.legal_sizes(180, 240) == [188, 204, 220, 236]\nassert loss.isfinite()\n"
        "assert labels.shape == (300, 200) and labels.dtype == torch.uint8\n"
    )
    done = subprocess.run([sys.executable, "-c", block + check], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_readmes_commands_are_the_makefiles() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    shown = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert shown == {"demo", "test"}
    assert all(re.search(rf"^{verb}:", makefile, re.MULTILINE) for verb in shown)


def test_the_readmes_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not link.startswith("http") and not (root / link).exists()] == []
