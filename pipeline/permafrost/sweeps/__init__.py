"""The students of a sweep: planning, running and selecting them.

The command itself is permafrost/verbs/sweep.py.
Read first: plan.py.
"""
