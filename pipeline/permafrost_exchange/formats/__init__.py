"""Readers of the files of other tools, one module each, and what several of them share.

Read first: fkd.py.
"""
