"""Where records come from: one module for each kind of data, all behind the protocol core.records.Source.

How records are packed belongs to pipeline/store; a table's columns and features to sources/tables.
Read first: build.py, then image_folder.py.
"""
