"""Every option as a frozen dataclass, its composition from YAML, and a run's folder and identity.

What an option does belongs to the room that does it.
Read first: options.py, then distilling.py.
"""
