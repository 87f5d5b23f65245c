"""Metrics of a frozen network: the shared forward pass, metrics, records and results.

The evaluators are in evaluation/evaluators, pages and figures in pipeline/report.
Read first: run.py, then forward.py.
"""
