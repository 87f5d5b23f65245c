"""Networks whose logits are a sum over superfeatures (KED), and the partitions that define those.

The search for a partition belongs to pipeline/training/superfeatures.
Read first: network.py, then partition.py.
"""
