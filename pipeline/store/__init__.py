"""The format on disk: image shards with an index, and a folder of fields for each teacher pass.

Sources and networks belong to their own rooms. A file is whole or absent; a manifest, written last, makes a store.
Read first: manifest.py, then reader.py; docs/store-format.md describes the format for other readers.
"""
