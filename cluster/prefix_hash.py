"""What a full KV block is called: a name for its tokens and all tokens before them, which nobody can forge.

A block's keys and values depend on the tokens up to its last one, and on nothing else (they are exact), so two
sequences that agree so far may read the same block. The name is a chain: each block's hash covers its parent's, its own
token ids and, from the root on, a salt. BLAKE2b with 256 bits: a collision, which would show one request another's
prompt, cannot be found. Sequences with different salts never share, so a tenant cannot learn from its own latency what
others have asked.

A name is valid within one process, whose model and block size never change; so neither is part of it. Who holds which
block is `cluster.block_allocator`'s knowledge.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

BlockKey = bytes
"""32 bytes."""

MAX_SALT_BYTES = 256
_DIGEST_BYTES = 32
_ROOT = b"octavo kv root"
_BLOCK = b"octavo kv block"


def root_key(tenant: str, salt: bytes) -> BlockKey:
    """Where the chains of one tenant's requests with one salt begin. No two pairs have the same root."""
    name = tenant.encode()
    return blake2b(len(name).to_bytes(8, "little") + name + salt, digest_size=_DIGEST_BYTES, person=_ROOT).digest()


def block_key(parent: BlockKey, token_ids: Sequence[int]) -> BlockKey:
    """The name of a block of these tokens, after `parent`: the block before it, or the root."""
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=_DIGEST_BYTES, person=_BLOCK).digest()


COMMON_ROOT = root_key("", b"")
"""Of requests without a tenant and without a salt."""
