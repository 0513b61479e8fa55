"""What `jobs/bench.py` measures: a module a subject, and the run that they share."""
