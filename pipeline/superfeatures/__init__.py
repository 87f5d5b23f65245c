"""Superfeatures (KED): groups of input features that a network may be asked about one by one."""
