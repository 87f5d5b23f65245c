"""A student as programs that run without this project, with a card, in a folder or a repository of the hub.

Read first: export.py.
"""
