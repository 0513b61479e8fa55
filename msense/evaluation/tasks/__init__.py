"""The tasks that models are evaluated on, a module each."""
