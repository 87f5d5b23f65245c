"""Numbers about a frozen network: the shared forward pass, metrics, records and results.

One evaluator a module or folder belongs to evaluation/evaluators; pages and figures to pipeline/report.
Read first: run.py, then forward.py.
"""
