"""Networks by provider, their weights, explainers and identity.

Training belongs to pipeline/training; what a teacher pass stores of a network to pipeline/annotation.
Read first: providers.py, then classifier.py.
"""
