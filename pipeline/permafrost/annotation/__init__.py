"""A teacher pass: the frozen teacher's forward passes, the outputs that it stores, and its fingerprint.

The format on disk is in permafrost/store, and explainers are in permafrost/models/explanations.py.
Read first: pass_identity.py, pass_plan.py and teacher_pass.py, then annotator.py.
"""
