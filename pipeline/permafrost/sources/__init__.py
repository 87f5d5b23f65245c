"""Sources of records: one module for each kind of data, all implementing the protocol core.records.Source.

Packing of records belongs to permafrost/store, and the columns and features of tables to sources/tables.
Read first: build.py, then image_folder.py.
"""
