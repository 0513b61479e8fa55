"""Evaluation of teachers, dictionaries and students: quality on tasks, and cost; `run.py` drives it."""
