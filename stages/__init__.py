"""The commands `python -m stages.<verb>`. Stages share state only on disk and contain no logic themselves."""
