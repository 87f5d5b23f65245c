"""One evaluator a module or folder: each looks at one split of a frozen network and gives its numbers.

The forward pass that several share belongs to evaluation/forward.py.
Read first: build.py, then class_similarity.py.
"""
