"""Runs: their folders, configs, identities and costs, the passes that they read, and their copies in buckets.

What a training or an evaluation writes into a run belongs to its own package.
Read first: folder.py.
"""
