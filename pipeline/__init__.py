"""The nouns permafrost is made of. What a user types lives in `stages`; this package never imports it."""

__version__ = "0.1.0"
