"""How fast, beside what: `pytest benchmarks --benchmark-only`, and `python -m benchmarks.gpu_report` on a GPU."""
