"""Networks by provider, their weights, explainers and identity.

Training is in permafrost/training, and the payloads that a teacher pass stores are in permafrost/annotation.
Read first: providers.py, then classifier.py.
"""
