"""A run folder: its files, lock, manifest, journal, and what an interrupted run has finished."""
