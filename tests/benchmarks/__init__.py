"""What `make bench` runs: each figure a ratio of two sides that are measured in turn, in one run."""
