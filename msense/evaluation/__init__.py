"""Tasks that tell what a dictionary and a student keep of their teacher, and what they cost.

`spec.py` reads what is asked for, `models.py` makes the models, a module a task measures them, `result.py` compares, `report.py`
writes. `run.py` is the order of it all.
"""
