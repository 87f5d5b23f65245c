"""Foundation of all other packages: records, errors, seeds, digests, and the protocols of tasks.

A module belongs here only if at least three packages use it. Definitions of stores, networks and options do not.
Read first: records.py, then errors.py.
"""
