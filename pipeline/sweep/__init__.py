"""The students of a sweep: planning, running and choosing them.

The command itself is stages/sweep.py.
Read first: plan.py.
"""
