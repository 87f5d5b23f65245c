"""Network dissection: units of a network matched with labeled concepts by IoU.

Read first: evaluator.py.
"""
