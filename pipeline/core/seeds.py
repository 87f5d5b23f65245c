"""One seed for each purpose, from the run's one seed."""

import hashlib


def derive_seed(*parts: object) -> int:
    """A 32-bit seed from any parts; torch's CPU generator ignores the bits above 32."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")
