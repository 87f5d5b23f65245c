"""The nouns permafrost is made of. What a user types lives in `stages`; this package never imports it."""
