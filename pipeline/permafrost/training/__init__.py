"""Training jobs, the training loop, steps, checkpoints and targets, for both teachers and students.

Losses are in permafrost/losses, and the processes that ranks run in are in permafrost/cluster.
Read first: spec.py, then loop.py and step.py.
"""
