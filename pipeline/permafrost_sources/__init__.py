"""Data sets of other packages as sources: those of Hugging Face (`datasets`) and of torchvision, with their downloads.

Read first: torchvision_sets.py.
"""
