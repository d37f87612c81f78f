"""What the README shows can be run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_readmes_python_runs(tmp_path: Path) -> None:
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    # the paper's net with few channels, at its own tile: half a minute less of arithmetic, and the same sizes
    narrow = (
        "import unet_fast\npaper = unet_fast.FastUNet.paper()\n"
        "unet_fast.FastUNet.paper = lambda: unet_fast.FastUNet(features=(4, 4, 4, 4, 4))\n"
    )
    check = (
        "\nassert geometry.legal_sizes(180, 240) == [188, 204, 220, 236]\nassert loss.isfinite()\n"
        "assert net(image).shape == (1, 2, 388, 388)\nassert (paper.depth, paper.out_channels) == (net.depth, 2)\n"
        "assert labels.shape == (300, 200) and labels.dtype == torch.uint8\n"
    )
    program = narrow + block + check
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_readmes_commands_are_the_makefiles() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    shown = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert shown == {"demo", "test"}
    assert all(re.search(rf"^{verb}:", makefile, re.MULTILINE) for verb in shown)


PAGES = sorted(p for place in (".", "docs", "docs/results", "docs/findings") for p in (ROOT / place).glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere_and_nothing_waits_to_be_filled_in(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not link.startswith("http") and not (page.parent / link).exists()] == []
    assert not re.search(r"@[A-Z]+@", text)
