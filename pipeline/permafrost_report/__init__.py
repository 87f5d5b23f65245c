"""The HTML page of a sweep: results read from disk, tables, figures and pictures.

Metrics are computed in permafrost/evaluation. The report computes only their mean and standard deviation.
Read first: student_results.py, then page.py.
"""
