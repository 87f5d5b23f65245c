"""What every other room stands on: records, errors, files, seeds, and the protocols of tasks.

A module belongs here only if at least three rooms use it; what a store, a network or an option is does not.
Read first: records.py, then files.py.
"""
