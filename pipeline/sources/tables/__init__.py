"""What the two sources of tables share: columns, features and rows.

The sources themselves are sources/table.py and sources/sklearn_table.py.
Read first: features.py.
"""
