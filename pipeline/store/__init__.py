"""A store: image shards with an index, and one folder of columns for each teacher pass.

A file is either whole or absent (files.py). A shard exists when its receipt does; a store or a pass
exists when its manifest does, which is written last. Nothing is ever unpickled.
"""
