"""What tests and benchmarks share: where they run, and whether a compiler is there."""

import os
import subprocess
from collections import Counter

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the tests run")
    parser.addoption("--one-in", default=1, type=int, help="of the cases of each test, take one in so many")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every, seen = config.getoption("--one-in"), Counter[str]()
    kept, left_out = [], []
    for item in items:
        name = item.nodeid.partition("[")[0]
        (left_out if seen[name] % every else kept).append(item)
        seen[name] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.fixture(scope="session")
def no_compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """ "" if a C++ compiler works here, else why the test that needs one is skipped."""
    source = tmp_path_factory.mktemp("compiler") / "nothing.cpp"
    source.write_text("int main() { return 0; }\n")
    compiler = os.environ.get("CXX", "g++")
    try:
        done = subprocess.run([compiler, str(source), "-o", str(source.with_suffix(""))], capture_output=True)
    except OSError as error:
        return f"no C++ compiler: {error}"
    return "" if done.returncode == 0 else f"{compiler} does not work: exit code {done.returncode}"
