"""The work of `evaluate`, metrics of a frozen network: the shared forward pass, records and results.

Pages and figures are made in permafrost_report.
Read first: evaluate.py, then results.py, forward.py and evaluator.py.
"""
