"""The payloads of a teacher pass, each of which converts a forward pass to stored fields and declares these fields.

Networks and explainers are in permafrost/models, and the format on disk is in permafrost/store.
Read first: payload.py, then logits.py.
"""
