"""Networks whose logits are a sum over superfeatures (KED), and the partitions that define the superfeatures.

The search for a partition is in permafrost/training/superfeatures.
Read first: network.py, then base.py and partition.py.
"""
