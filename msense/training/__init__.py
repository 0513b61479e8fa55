"""Training loops of students and classifiers; they run with or without Ray."""
