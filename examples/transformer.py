"""A character transformer of a million parameters, and its text: the reference inside Python."""

import pydoc_data.topics
from functools import cache

import jax.numpy as jnp
import numpy as np
from flax import nnx

CONTEXT, WIDTH, HEADS, LAYERS = 64, 128, 2, 5


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int | None = None):
        width = width or WIDTH
        self.before_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, width, decode=False, rngs=rngs)
        self.before_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.before_attention(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.before_mlp(x))))


class Transformer(nnx.Module):
    """A character model: token and position embeddings, blocks, a linear read-out."""

    def __init__(
        self, vocabulary: int, rngs: nnx.Rngs, width: int | None = None, layers: int | None = None
    ):
        width, layers = width or WIDTH, layers or LAYERS
        self.token_embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position_embedding = nnx.Embed(CONTEXT, width, rngs=rngs)
        self.blocks = nnx.Sequential(*(Block(rngs, width) for _ in range(layers)))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.output = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        x = self.token_embedding(tokens) + self.position_embedding(jnp.arange(CONTEXT))[None]
        return self.output(self.norm(self.blocks(x)))


def next_characters(text: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    windows = text[starts[:, None] + np.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


@cache
def language_reference() -> tuple[int, np.ndarray]:
    """How many different characters it has, and all of them as their numbers."""
    text = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    alphabet, codes = np.unique(np.array(list(text)), return_inverse=True)
    return len(alphabet), codes.astype(np.int32)
