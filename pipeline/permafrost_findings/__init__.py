"""Findings about labels, splits and pictures of data that are about to be packed.

Read first: options.py, then label_rules.py.
"""
