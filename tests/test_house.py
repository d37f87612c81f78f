"""The house rules that no linter knows."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("unet_fast/**/*.py"), *ROOT.glob("kernels/unet_kernels/**/*.py")])
OPS = [p for p in SOURCES if p.parent.name == "unet_kernels" and not p.name.startswith("_")]


def test_kernels_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("op", OPS, ids=lambda p: p.stem)
def test_an_op_and_its_test_share_a_stem(op: Path) -> None:
    assert (ROOT / "tests" / "unet_kernels" / f"test_{op.name}").exists()


@pytest.mark.parametrize("module", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_says_what_it_is_and_what_it_exports(module: Path) -> None:
    tree = ast.parse(module.read_text())
    assert ast.get_docstring(tree), "no docstring"
    if not module.name.startswith("__main__"):
        assert any(
            isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets)
            for node in tree.body
        ), "no __all__"


@pytest.mark.parametrize(
    "banned", [r"make_block_ptr|tl\.advance", r"libdevice", r"triton\.autotune", r"\bbreakpoint\("]
)
def test_what_is_banned_is_nowhere(banned: str) -> None:
    found = [str(p.relative_to(ROOT)) for p in SOURCES if re.search(banned, p.read_text())]
    assert not found


def test_no_pickle_is_read_or_written() -> None:
    banned = re.compile(r"import pickle|torch\.load\(|torch\.save\(|weights_only=False|extractall|yaml\.load")
    found = [str(p.relative_to(ROOT)) for p in SOURCES if banned.search(p.read_text())]
    assert not found


def test_no_room_without_a_name() -> None:
    assert not [p for p in SOURCES if p.stem in {"utils", "helpers", "common", "misc"}]


def test_real_data_is_not_in_the_repository() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    names = listed.stdout.splitlines()
    assert not [n for n in names if n.endswith((".tif", ".tiff", ".so"))]
    assert not [n for n in names if (ROOT / n).is_file() and (ROOT / n).stat().st_size > 500_000]
