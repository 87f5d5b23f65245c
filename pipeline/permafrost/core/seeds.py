"""Derivation of a separate seed for each purpose from the seed of the run."""

import hashlib


def derive_seed(*parts: object) -> int:
    """Return a 32-bit seed derived from any parts. The CPU generator of torch ignores the bits above 32."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")
