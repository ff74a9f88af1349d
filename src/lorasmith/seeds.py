"""Seeds for every random draw in the project.

No generator lives longer than one draw: each is made new from (seed, purpose, numbers), so a draw depends on nothing
that happened before it. That is what makes a run resumable at any step with the same bytes.
"""

import hashlib


def derive(seed: int, purpose: str, *numbers: int) -> int:
    """Return a 63-bit seed that is a pure function of its arguments (BLAKE2b, RFC 7693).

    63 bits, so that it fits `torch.Generator.manual_seed` on every platform.
    """
    text = "/".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
