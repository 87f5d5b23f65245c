"""The HTML page of a sweep: results read from disk, tables, figures and pictures.

Numbers are computed in pipeline/evaluation; the report computes none but their spread.
Read first: results.py, then page.py.
"""
