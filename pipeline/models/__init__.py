"""Networks by provider, their weights, explainers and identity.

Training is in pipeline/training, and the payloads that a teacher pass stores are in pipeline/annotation.
Read first: providers.py, then classifier.py.
"""
