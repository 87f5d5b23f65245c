"""KED: agreement of student and teacher superfeature by superfeature.

A plug-in of the evaluation: options.py registers its evaluator.
Read first: options.py.
"""
