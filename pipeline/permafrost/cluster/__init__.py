"""All code that imports Ray, and the choice between it and one process.

Tasks are defined in the packages that use these executors.
Read first: executors.py, then ray_executor.py and session.py.
"""
