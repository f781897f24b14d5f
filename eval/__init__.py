"""Evaluation: benchmarks of a model folder, and reports of runs. Nothing here imports the training program."""
