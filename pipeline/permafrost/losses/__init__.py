"""Losses: modules from a student's output, a teacher's targets and labels to named terms.

The training step that calls them is in permafrost/training.
Read first: base.py, then kd.py and e2kd.py.
"""
