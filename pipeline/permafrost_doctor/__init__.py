"""Examination of a machine: its devices, and what a pass and a training would use of them, for reports of bugs.

Read first: doctor.py.
"""
