"""A GPU that is not there: CUDA's code paths on a machine without one, with the values of a CPU."""
