"""Version of the project, for manifests, reports and packages."""

__version__ = "0.1.0"
"""Version of the package."""
