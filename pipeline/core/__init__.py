"""Foundation of all other rooms: records, errors, files, seeds, and the protocols of tasks.

A module belongs here only if at least three rooms use it; definitions of stores, networks and options do not.
Read first: records.py, then files.py.
"""
