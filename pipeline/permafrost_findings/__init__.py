"""Findings about folders, labels, splits and pictures of data that are about to be packed, or appended to a store.

Read first: options.py, then label_rules.py.
"""
