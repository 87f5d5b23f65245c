"""Format on disk: image shards with an index, and a folder of fields for each teacher pass.

Sources and networks belong to other packages. Files are written atomically, and a manifest, written last, makes a
store valid.
Read first: manifest.py, then reader.py. docs/reference/store-format.md describes the format for other readers.
"""
