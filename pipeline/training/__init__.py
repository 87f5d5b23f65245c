"""Jobs, their training loop, steps, checkpoints and targets, for teachers and students alike.

Losses belong to pipeline/losses; the processes that ranks run in to pipeline/cluster.
Read first: run.py, then step.py and loop.py.
"""
