"""An estimate of a store before it is made: its bytes, the hours of work, and the students from which it pays.

A sample of the records goes through the code that packs, annotates and trains, in a temporary folder.
Read first: measurement.py, then sample.py.
"""
