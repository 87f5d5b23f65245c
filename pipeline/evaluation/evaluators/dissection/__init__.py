"""Network dissection: units of a network matched with labelled concepts by IoU.

Read first: evaluator.py.
"""
