"""hypothesis, or its absence: property tests are left out, with the reason, where it is not installed.

The GPU lane runs from the bare tree on machines that have it not; the other tests of a file must run there.
"""

import inspect
from typing import Any

import pytest

__all__ = ["given", "settings", "st"]

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Nothing:
        """Answers every strategy with itself."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self

    st: Any = _Nothing()

    def given(*strategies: Any, **named: Any) -> Any:
        def left_out(test: Any) -> Any:
            @pytest.mark.skip(reason="a property test: hypothesis is not installed")
            def skipped(**arguments: Any) -> None:
                pass

            # what else the test takes, pytest still wants to hand over
            rest = [p for p in inspect.signature(test).parameters.values() if p.name not in named]
            skipped.__signature__ = inspect.Signature(rest)  # type: ignore[attr-defined]
            skipped.__name__, skipped.__doc__ = test.__name__, test.__doc__
            return skipped

        return left_out

    def settings(**named: Any) -> Any:
        return lambda test: test
else:
    # the first call of an op takes a second, and cores are shared: a deadline would be about that. Derandomized: what
    # fails here fails on another machine
    settings.register_profile("unet", deadline=None, derandomize=True, max_examples=60)
    settings.load_profile("unet")
