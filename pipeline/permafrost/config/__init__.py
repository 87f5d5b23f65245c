"""Every option as a frozen dataclass, its composition from YAML, and a run's folder and identity.

The code that acts on an option is in the package that does the work.
Read first: options.py, then distillation.py.
"""
