"""The functions of the verbs that pack, annotate, train, verify and sweep, and the commands that they suggest next.

Their docstrings are the help of the command line. `permafrost.config.verbs` says which function a verb has; those of
distill and evaluate are in training/distill.py and evaluation/evaluate.py.
Read first: precompute.py.
"""
