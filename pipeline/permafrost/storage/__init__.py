"""Files of this machine and of buckets: paths, atomic writes, checked reads, locks and copies.

No other package knows which of the two kinds a path is. What the files contain is not known here.
Read first: rooted_paths.py, then files.py.
"""
