"""The work of `distill`, and jobs, the training loop, steps, checkpoints and targets of teachers and students.

Losses are in permafrost/losses, and the processes that ranks run in are in permafrost/cluster.
Read first: distill.py, then job.py, loop.py and step.py.
"""
