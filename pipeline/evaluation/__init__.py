"""Judges: how right a student is, how close to its teacher, and whether it looks at the right place."""
