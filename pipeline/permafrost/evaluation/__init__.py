"""Metrics of a frozen network: the shared forward pass, metrics, records and results.

The evaluators are in evaluation/evaluators, pages and figures in permafrost/report.
Read first: run.py, then forward.py.
"""
