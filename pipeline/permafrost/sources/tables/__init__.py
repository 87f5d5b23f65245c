"""Columns, features and rows, shared by the two sources of tables.

The sources themselves are sources/table.py and sources/sklearn_table.py.
Read first: features.py.
"""
