"""Sources of records: one module for each kind of data, all implementing the protocol core.records.Source.

Packing of records belongs to permafrost/store.
Read first: source.py, then image_folder.py.
"""
