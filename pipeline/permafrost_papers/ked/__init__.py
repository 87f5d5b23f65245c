"""KED: additive networks that explain by superfeatures, the search for superfeatures, and distillation of both.

A plug-in that enters by the registry: options.py registers its networks, method, teaching, explainer, output,
evaluator and pictures.
Read first: options.py, then additive_network.py and losses.py.
"""
