"""The verbs a user types: `python -m stages.<verb>`. Stages meet only on disk and hold no logic of their own."""
