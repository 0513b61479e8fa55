"""Evaluation of teachers, dictionaries and students: quality on tasks, and cost.

`run.py` drives an evaluation. `spec.py` parses models and tasks, `models.py` loads models, one module per task scores them,
`result.py` compares two models, and `report.py` writes tables, JSON and plots.
"""
