"""Runs: their folders, configs, identities and costs, the passes that they read, copies in buckets, trackers.

What a training or an evaluation writes into a run belongs to its own package.
Read first: folder.py.
"""
