"""The step in the backward pass in plain JAX, Flax NNX, Flax Linen and Equinox: no gradients kept.

The character transformer of `transformer.py`, its layers stacked and scanned. Each layer is stepped
as soon as the backward pass has its gradient. The first steps are also done by `jax.value_and_grad`
and `tx.update`, from the same start, and both losses are printed; then what is kept, in bytes.
(XLA's CPU backend copies what it could write in place: a GPU or a TPU saves the memory, not a CPU.)
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformer
from commandline import hardware, positive
from flax import nnx
from tqdm import tqdm
from transformer import CONTEXT, HEADS, LAYERS, WIDTH

import adam_jax
from adam_jax import backward, storage


def chain(steps: int) -> optax.GradientTransformationExtraArgs:
    """AdamW with moments in 8 bits. All gradients together are never there to be clipped by their
    norm, but their norm of the step before is known."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, max(1, steps // 10), steps)
    eight_bits = storage.int8()
    return optax.chain(
        backward.clip_by_previous_norm(1.0),
        adam_jax.adamw(rate, b2=0.99, mu_storage=eight_bits, nu_storage=eight_bits),
    )


# A model: the parameters outside of the layers, the stacked layers, and the loss of both.
Model = tuple[Any, Any, Callable[..., jax.Array]]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


# --- Plain JAX ------------------------------------------------------------------------------------


def plain_jax(symbols: int, key: jax.Array) -> Model:
    shapes = {
        "query, key, value": (LAYERS, WIDTH, 3 * WIDTH),
        "mixed": (LAYERS, WIDTH, WIDTH),
        "up": (LAYERS, WIDTH, 4 * WIDTH),
        "down": (LAYERS, 4 * WIDTH, WIDTH),
        "characters": (symbols, WIDTH),
        "positions": (CONTEXT, WIDTH),
        "output": (WIDTH, symbols),
    }
    keys = jax.random.split(key, len(shapes))
    params = {
        name: jax.random.normal(key, shape) / shape[-2] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    layers = {name: params.pop(name) for name, shape in shapes.items() if len(shape) == 3}

    def layer(x, weights):
        heads = *x.shape[:-1], HEADS, WIDTH // HEADS
        parts = jnp.split(jax.nn.standardize(x) @ weights["query, key, value"], 3, axis=-1)
        seen = jax.nn.dot_product_attention(*(p.reshape(heads) for p in parts), is_causal=True)
        x = x + seen.reshape(x.shape) @ weights["mixed"]
        hidden = jax.nn.gelu(jax.nn.standardize(x) @ weights["up"])
        return x + hidden @ weights["down"], None

    def loss(params, layers, text, targets):
        x = params["characters"][text] + params["positions"]
        x, _ = backward.scan(jax.checkpoint(layer), x, layers)
        return cross_entropy(jax.nn.standardize(x) @ params["output"], targets)

    return params, layers, loss


# --- Flax NNX -------------------------------------------------------------------------------------


def flax_nnx(symbols: int, key: jax.Array) -> Model:
    model = transformer.Transformer(symbols, nnx.Rngs(key))
    make_block = nnx.vmap(lambda key: transformer.Block(nnx.Rngs(key)))
    block, layers = nnx.split(make_block(jax.random.split(key, LAYERS)), nnx.Param)
    model.blocks = None  # in their place the loss scans the stack
    outside, params = nnx.split(model, nnx.Param)

    @jax.checkpoint
    def layer(x, weights):
        return nnx.merge(block, weights)(x), None

    def loss(params, layers, text, targets):
        model = nnx.merge(outside, params)
        model.blocks = lambda x: backward.scan(layer, x, layers)[0]
        return cross_entropy(model(text), targets)

    return params, layers, loss


# --- Flax Linen -----------------------------------------------------------------------------------


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(HEADS)
        x = x + attention(nn.LayerNorm()(x), mask=nn.make_causal_mask(x[..., 0]))
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))


class LinenTransformer(nn.Module):
    symbols: int

    @nn.compact
    def __call__(self, text, blocks):
        x = nn.Embed(self.symbols, WIDTH)(text)
        x = x + nn.Embed(CONTEXT, WIDTH)(jnp.arange(CONTEXT))
        return nn.Dense(self.symbols)(nn.LayerNorm()(blocks(x)))


def flax_linen(symbols: int, key: jax.Array) -> Model:
    model, block = LinenTransformer(symbols), LinenBlock()
    text, x = jnp.zeros((1, CONTEXT), jnp.int32), jnp.zeros((1, CONTEXT, WIDTH))
    params = model.init(key, text, lambda x: x)
    layers = jax.vmap(partial(block.init, x=x))(jax.random.split(key, LAYERS))

    @jax.checkpoint
    def layer(x, weights):
        return block.apply(weights, x), None

    def loss(params, layers, text, targets):
        logits = model.apply(params, text, lambda x: backward.scan(layer, x, layers)[0])
        return cross_entropy(logits, targets)

    return params, layers, loss


# --- Equinox --------------------------------------------------------------------------------------


class EquinoxBlock(eqx.Module):
    before_attention: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    before_mlp: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key):
        of_attention, of_mlp = jax.random.split(key)
        self.before_attention, self.before_mlp = (eqx.nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=of_attention)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, jax.nn.gelu, key=of_mlp)

    def __call__(self, x):
        normed = jax.vmap(self.before_attention)(x)
        x = x + self.attention(normed, normed, normed, mask=jnp.tri(CONTEXT, dtype=bool))
        return x + jax.vmap(self.mlp)(jax.vmap(self.before_mlp)(x))


class EquinoxTransformer(eqx.Module):
    characters: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    output: eqx.nn.Linear

    def __init__(self, symbols, key):
        keys = jax.random.split(key, 3)
        self.characters = eqx.nn.Embedding(symbols, WIDTH, key=keys[0])
        self.positions = eqx.nn.Embedding(CONTEXT, WIDTH, key=keys[1])
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.output = eqx.nn.Linear(WIDTH, symbols, key=keys[2])

    def embed(self, text):
        return jax.vmap(self.characters)(text) + self.positions.weight

    def logits(self, x):
        return jax.vmap(self.output)(jax.vmap(self.norm)(x))


def equinox(symbols: int, key: jax.Array) -> Model:
    blocks = eqx.filter_vmap(EquinoxBlock)(jax.random.split(key, LAYERS))
    layers, rest_of_block = eqx.partition(blocks, eqx.is_inexact_array)
    model = EquinoxTransformer(symbols, key)
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    @jax.checkpoint
    def layer(x, weights):
        return jax.vmap(eqx.combine(weights, rest_of_block))(x), None

    def loss(params, layers, text, targets):
        model = eqx.combine(params, rest)
        x, _ = backward.scan(layer, jax.vmap(model.embed)(text), layers)
        return cross_entropy(jax.vmap(model.logits)(x), targets)

    return params, layers, loss


# --- Training -------------------------------------------------------------------------------------

FRAMEWORKS = {"jax": plain_jax, "nnx": flax_nnx, "linen": flax_linen, "equinox": equinox}
BATCH, BESIDE = 16, 5  # the first steps are done in both ways


def plain_step(loss: Callable, tx: optax.GradientTransformationExtraArgs) -> Callable:
    """All gradients first, and the same chain on them: what the step in the backward pass is."""
    layers_tx = adam_jax.stacked(tx)

    def step(params, layers, state, *batch):
        value, grads = jax.value_and_grad(loss, (0, 1))(params, layers, *batch)
        known = {"value": value, "grad_norm": state.grad_norm}
        updates, params_state = tx.update(grads[0], state.params, params, **known)
        layer_updates, layers_state = layers_tx.update(grads[1], state.layers, layers, **known)
        params = optax.apply_updates(params, updates)
        layers = optax.apply_updates(layers, layer_updates)
        state = backward.BackwardState(optax.tree.norm(grads), params_state, layers_state)
        return value, params, layers, state

    return step


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def train(model: Model, steps: int, seed: int, text: np.ndarray) -> tuple[Any, Any, Any]:
    """Parameters, layers and state after the steps."""
    params, layers, loss = model
    tx = chain(steps)
    state = jax.jit(partial(backward.init, tx))(params, layers)
    step = jax.jit(backward.value_and_step(loss, tx), donate_argnums=(0, 1, 2))
    beside = jax.tree.map(jnp.copy, (params, layers, state))
    plain = jax.jit(plain_step(loss, tx))
    shuffle = np.random.default_rng(seed)
    with tqdm(range(steps), unit="step") as bar:
        for number in bar:
            starts = shuffle.integers(0, len(text) - CONTEXT - 1, BATCH)
            batch = transformer.next_characters(text, starts)
            value, params, layers, state = step(params, layers, state, *batch)
            if number < BESIDE:
                due, *beside = plain(*beside, *batch)
                tqdm.write(f"| {number + 1} | {float(value):.5f} | {float(due):.5f} |")
            if number % 10 == 0:
                bar.set_postfix_str(f"loss {float(value):.3f}")
    return params, layers, state


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--framework", choices=FRAMEWORKS, default="jax")
    parser.add_argument("--steps", type=positive, default=100, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    symbols, text = transformer.language_reference()
    split = len(text) * 9 // 10  # the last tenth is held out
    fixed = np.random.default_rng(0).integers(split, len(text) - CONTEXT - 1, 64)
    held_out = transformer.next_characters(text, fixed)
    model = FRAMEWORKS[options.framework](symbols, jax.random.key(options.seed))
    *start, loss = model
    evaluate = jax.jit(loss)  # outside of the step `backward.scan` is `jax.lax.scan`
    before = float(evaluate(*start, *held_out))
    print(f"{options.framework}, {options.steps} steps, seed {options.seed}; ", end="")
    print(f"{hardware('flax', 'equinox')}\n")
    print("| step | loss, in the backward pass | loss, all gradients first |\n|---|---|---|")
    params, layers, state = train(model, options.steps, options.seed, text[:split])
    after = float(evaluate(params, layers, *held_out))
    print(f"\nheld-out loss {before:.3f} before, {after:.3f} after")
    print(f"{nbytes((params, layers)):,} bytes of weights, {nbytes(state):,} of state")
    print(f"0 bytes of gradients kept of the layers, not {nbytes(layers):,}")


if __name__ == "__main__":
    main()
