"""Files of this machine and of buckets: paths, atomic writes, checked reads, locks and copies."""
