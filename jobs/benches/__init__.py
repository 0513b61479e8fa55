"""The benchmarks of `jobs/bench.py`, a module a subject."""
