"""How a moment is kept between two steps: every low-memory Adam is Adam with another storage.

A `Storage` is a pair of pure functions on one leaf, `save` and `load`. The step uses the moment
before it is saved; what is lost in between is what the storage is made of:

    cast            in another dtype, rounded to nearest
    stochastic      in another dtype, rounded up or down at random
    int8, int4      as codes of 8 or 4 bits in blocks that share a scale
    factored        the row and column means of the second moment (Adafactor)
    block_mean      one second moment per block (Adam-mini)
    on_host         as another storage, in the memory of the host
"""

from adam_jax.storage._casts import cast, stochastic
from adam_jax.storage._codes import Blocks, int4, int8
from adam_jax.storage._host import on_host
from adam_jax.storage._means import Factors, block_mean, factored, transformer_blocks
from adam_jax.storage._protocol import Leaf, Storage, is_large
from adam_jax.storage._report import report

__all__ = [
    "Storage",
    "Leaf",
    "is_large",
    "cast",
    "stochastic",
    "int8",
    "int4",
    "Blocks",
    "factored",
    "Factors",
    "block_mean",
    "transformer_blocks",
    "on_host",
    "report",
]
