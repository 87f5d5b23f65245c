"""Checks of the pages' words and numbers, which `make lint` runs with `python -m docs.prose`."""
