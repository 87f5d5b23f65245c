"""The payloads of a teacher pass: each turns one forward pass into stored fields, and declares them.

Networks and explainers belong to pipeline/models; the format on disk to pipeline/store.
Read first: payload.py, then logits.py.
"""
