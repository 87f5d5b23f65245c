"""All code that imports Ray, and the serial executors that import none of it.

What a task does belongs to the room that defines it.
Read first: executors.py, then session.py.
"""
