"""The benchmarks of `jobs/bench.py`, one module per subject."""
