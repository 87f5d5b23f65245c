"""All code that imports Ray, and serial executors that do not.

Tasks are defined in the packages that use these executors.
Read first: executors.py, then session.py.
"""
