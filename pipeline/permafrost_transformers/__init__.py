"""Networks of transformers (`teacher=transformers`, `student=transformers`).

Read first: classifiers.py.
"""
