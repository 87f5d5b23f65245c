"""A teacher pass: the frozen teacher's forward passes, the payloads that it stores, and its fingerprint.

The format on disk belongs to pipeline/store; explainers to pipeline/models/explainers.
Read first: teacher_pass.py, then annotator.py.
"""
