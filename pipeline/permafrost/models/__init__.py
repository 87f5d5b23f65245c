"""Networks by provider, their weights, explanations and identity.

Training is in permafrost/training, and the outputs that a teacher pass stores are in permafrost/annotation.
Read first: providers.py, then classifier.py.
"""
