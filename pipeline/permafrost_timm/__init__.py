"""Networks of timm (`teacher=timm`, `student=timm`).

Read first: classifiers.py.
"""
