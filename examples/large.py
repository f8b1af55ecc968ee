"""Where the bytes of a training step go: Llama-like models compiled for a GPU or a TPU.

No device is needed, and nothing runs there: XLA compiles the whole step, forward, backward and
optimizer, and tells how much memory it needs. Beside optax.adamw, with all gradients at once, is
this package's chain below, stepped in the backward pass. `--run` trains a small model of the same
code on this machine.

The compilers (1.9 GB): .venv/bin/pip install -e '.[examples,accelerators]'
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from commandline import hardware, new_file, positive
from drawing import plt, save
from tqdm import tqdm
from transformer import language_reference

import adam_jax
from adam_jax import backward, storage

sys.path.append(str(Path(__file__).parent / "benchmarks"))  # where the devices are described
import accelerators

# 2 bytes of weight, 1 of what bfloat16 rounds off, and two moments of 1.06: 5.13 a parameter.
EIGHT_BITS = optax.chain(
    adam_jax.adamw(3e-4, b2=0.95, mu_storage=storage.int8(), nu_storage=storage.int8()),
    adam_jax.compensate("int8"),
)


# --- The model ------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Of a decoder as in Llama: the lengths of its matrices."""

    layers: int
    width: int
    hidden: int  # of the gated MLP
    heads: int
    kv_heads: int  # of keys and values
    vocabulary: int = 32_000


SHAPES = {  # (1) Zhang et al., TinyLlama, arXiv 2401.02385; (2) Touvron et al., arXiv 2302.13971
    "1b": Shape(22, 2048, 5632, 32, 4),  # (1)
    "7b": Shape(32, 4096, 11008, 32, 32),  # (2)
    "13b": Shape(40, 5120, 13824, 40, 40),  # (2)
    "small": Shape(4, 128, 352, 4, 4, 128),  # for --run
}


def parameters(shape: Shape, dtype: str) -> tuple[dict, dict]:
    """Shapes and dtypes of what is trained: outside of the layers, and the layers, stacked."""
    layers, width, hidden, heads, kv_heads, vocabulary = shape
    key_width = width // heads * kv_heads
    matrices = {
        "query": (width, width), "key": (width, key_width), "value": (width, key_width),
        "out": (width, width), "gate": (width, hidden), "up": (width, hidden),
        "down": (hidden, width), "attention_norm": (width,), "mlp_norm": (width,),
    }  # fmt: skip
    stacked = {k: jax.ShapeDtypeStruct((layers, *s), dtype) for k, s in matrices.items()}
    outside = {"embedding": (vocabulary, width), "head": (width, vocabulary), "norm": (width,)}
    return {k: jax.ShapeDtypeStruct(s, dtype) for k, s in outside.items()}, stacked


def rms_norm(x, scale):
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * scale


def rotated(x):
    """Positions as rotations of pairs. x: (batch, length, heads, features)."""
    half = x.shape[-1] // 2
    turns = jnp.arange(x.shape[1])[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    turns = turns.astype(jnp.float32)[None, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(turns), jnp.sin(turns)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def in_chunks(f: Callable, length: int, *arrays: jax.Array) -> jax.Array:
    """`f` of one piece of a sequence after the other, with nothing kept for the way back."""
    split = [x.reshape(x.shape[0], -1, length, *x.shape[2:]).swapaxes(0, 1) for x in arrays]
    return jax.lax.map(jax.checkpoint(lambda xs: f(*xs)), tuple(split))


def attention(q, k, v):
    """Causal, one piece of 256 queries after the other. (batch, length, heads, features)."""
    batch, length, heads, features = q.shape
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))

    def of_some(q, positions):
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        sees = positions[0][:, None] >= jnp.arange(length)
        weights = jax.nn.softmax(jnp.where(sees, scores / features**0.5, -jnp.inf))
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)

    chunk = min(256, length)
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return in_chunks(of_some, chunk, q, positions).swapaxes(0, 1).reshape(batch, length, -1)


def layer(shape: Shape, x, w):
    batch, length, _ = x.shape
    heads = lambda y: y.reshape(batch, length, -1, shape.width // shape.heads)  # noqa: E731
    y = rms_norm(x, w["attention_norm"])
    q, k, v = (heads(y @ w[name]) for name in ("query", "key", "value"))
    x = x + attention(rotated(q), rotated(k), v) @ w["out"]
    y = rms_norm(x, w["mlp_norm"])
    return x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"], None


def loss(shape: Shape, params, layers, tokens):
    """The mean cross entropy of the next token; `tokens` is (batch, length + 1)."""
    x = params["embedding"][tokens[:, :-1]]
    x, _ = backward.scan(jax.checkpoint(partial(layer, shape)), x, layers)
    x = rms_norm(x, params["norm"])

    def of_some(x, targets):
        logits = (x @ params["head"]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    return jnp.mean(in_chunks(of_some, min(256, x.shape[1]), x, tokens[:, 1:]))


# --- The steps ------------------------------------------------------------------------------------


def plain_step(shape: Shape, tx: optax.GradientTransformation):
    """All gradients first, then the optimizer."""

    def step(params, layers, state, tokens):
        value, grads = jax.value_and_grad(partial(loss, shape), (0, 1))(params, layers, tokens)
        updates, state = tx.update(grads, state, (params, layers))
        return value, *optax.apply_updates((params, layers), updates), state

    return step, lambda params, layers: tx.init((params, layers))


def our_step(shape: Shape, tx: optax.GradientTransformation):
    """Every layer is stepped in the backward pass."""
    return backward.value_and_step(partial(loss, shape), tx), partial(backward.init, tx)


CHOICES = {  # the dtype of the weights, and the step
    "optax.adamw, float32": ("float32", partial(plain_step, tx=optax.adamw(3e-4, b2=0.95))),
    "optax.adamw, bfloat16": ("bfloat16", partial(plain_step, tx=optax.adamw(3e-4, b2=0.95))),
    "adam_jax, 8 bits, in the backward pass": ("bfloat16", partial(our_step, tx=EIGHT_BITS)),
}
OURS = list(CHOICES)[-1]


# --- Its bytes ------------------------------------------------------------------------------------


class Row(NamedTuple):
    model: str
    choice: str
    parameters: int
    weights: int  # bytes
    state: int
    others: int  # gradients, activations and all else that lives during a step

    @property
    def total(self) -> int:
        return self.weights + self.state + self.others


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measured(model: str, choice: str, device: str, batch: int, length: int) -> Row:
    """What the compiled step needs; its weights and state are written in place."""
    dtype, make = CHOICES[choice]
    step, init = make(SHAPES[model])
    trained = parameters(SHAPES[model], dtype)
    state = jax.eval_shape(init, *trained)
    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    there = jax.sharding.SingleDeviceSharding(accelerators.device(device))
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), (*trained, state, tokens)
    )
    lowered = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*arguments)
    memory = lowered.compile().memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    all_in = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new
    weights, kept = nbytes(trained), nbytes(state)
    count = sum(x.size for x in jax.tree.leaves(trained))
    return Row(model, choice, count, weights, kept, all_in - weights - kept)


def table(rows: list[Row]) -> str:
    lines = [
        "| model | optimizer | weights | state | gradients, activations, … | in all | a parameter |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        sizes = (row.weights, row.state, row.others, row.total)
        cells = " | ".join(f"{size / 1e9:.1f} GB" for size in sizes)
        of_one = row.total / row.parameters
        lines.append(f"| {row.model} | {row.choice} | {cells} | {of_one:.2f} bytes |")
    return "\n".join(lines)


def draw(rows: list[Row], device: str, limit: float, path: Path) -> None:
    """A bar for each step, and a line where the memory of the device ends."""
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.42 * len(rows)), layout="constrained")
    names = [f"{row.model}: {row.choice}" for row in rows]
    left = np.zeros(len(rows))
    parts = {"weights": "#0072b2", "state": "#e69f00", "others": "#999999"}
    labels = {"others": "gradients, activations and the rest"}
    for part, color in parts.items():
        sizes = np.array([getattr(row, part) for row in rows]) / 1e9
        axes.barh(names, sizes, left=left, color=color, label=labels.get(part, part))
        left += sizes
    for place, total in enumerate(left):
        near = total < limit < 1.25 * total  # where the line would cross the text
        at, side = (total - 1, "right") if near else (total + 1, "left")
        axes.text(at, place, f"{total:.0f} GB", va="center", ha=side, fontsize=9)
    axes.axvline(limit, color="black", lw=1.2, ls="--", label=f"{limit:.0f} GB, one {device}")
    axes.set(xlabel="GB that a training step needs", xlim=(0, 1.12 * left.max()))
    axes.invert_yaxis()
    axes.legend(loc="upper right", fontsize=9)
    save(figure, path)


# --- A small one, for real ------------------------------------------------------------------------


def start(shape: Shape, dtype: str, key: jax.Array) -> tuple[dict, dict]:
    """Matrices of one over the root of their rows, and norms of one."""
    like = parameters(shape, dtype)
    keys = jax.tree.unflatten(
        jax.tree.structure(like), jax.random.split(key, len(jax.tree.leaves(like)))
    )

    def weight(path, x, key):
        if "norm" in path[-1].key:
            return jnp.ones(x.shape, x.dtype)
        return (jax.random.normal(key, x.shape) * x.shape[-2] ** -0.5).astype(x.dtype)

    return jax.tree.map_with_path(weight, like, keys)


def run(steps: int, batch: int, length: int, seed: int = 0) -> dict[str, list[float]]:
    """Train the small model here, with optax.adamw in float32 and in 8 bits; their losses."""
    shape = SHAPES["small"]
    _, text = language_reference()
    rng = np.random.default_rng(seed)
    batches = [text[rng.integers(0, len(text) - length, batch)[:, None] + np.arange(length + 1)]
               for _ in range(steps)]  # fmt: skip
    losses = {}
    for choice in (next(iter(CHOICES)), OURS):
        dtype, make = CHOICES[choice]
        step, init = make(shape)
        params, layers = start(shape, dtype, jax.random.key(seed))
        state = init(params, layers)
        count = sum(x.size for x in jax.tree.leaves((params, layers)))
        kept = nbytes((params, layers, state))
        print(f"{choice}: {kept / count:.2f} bytes a parameter of weights and state")
        train = jax.jit(step, donate_argnums=(0, 1, 2))
        losses[choice] = []
        with tqdm(batches, desc=choice, unit="step") as progress:
            for tokens in progress:
                value, params, layers, state = train(params, layers, state, tokens)
                losses[choice].append(float(value))
                progress.set_postfix(loss=f"{losses[choice][-1]:.3f}")
        last = np.mean(losses[choice][-10:])
        print(f"{choice}: loss {losses[choice][0]:.3f} at first, {last:.3f} in the last ten steps")
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = [name for name in SHAPES if name != "small"]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--device", choices=["h100", "v5e"], default="h100")
    parser.add_argument("--batch", type=positive, default=1, help="sequences (default: 1)")
    parser.add_argument("--length", type=positive, default=2048,
                        help="tokens of a sequence, a multiple of 256 (default: 2048)")  # fmt: skip
    parser.add_argument("--plot", type=new_file, help="where to draw the bytes (default: nowhere)")
    parser.add_argument("--run", action="store_true", help="train a small one on this machine")
    parser.add_argument("--steps", type=positive, default=100, help="of --run (default: 100)")
    options = parser.parse_args()
    if options.run:
        run(options.steps, batch=16, length=64)
        print(hardware())
        return
    if options.length > 256 and options.length % 256:
        parser.error(f"--length must be a multiple of 256, got {options.length}")
    jax.config.update("jax_platforms", "cpu")
    if why := accelerators.missing():
        sys.exit(f"large.py: {why}")
    rows = []
    for model in options.models:
        for choice in CHOICES:
            print(f"compiling {model}, {choice} …", file=sys.stderr)
            try:
                rows.append(measured(model, choice, options.device, options.batch, options.length))
            except jax.errors.JaxRuntimeError as error:  # XLA for a TPU stops where it is too much
                print(f"{model}, {choice}: {str(error).splitlines()[0]}")
    limit = {"h100": 80.0, "v5e": 16.0}[options.device]
    print(f"\n{options.batch} × {options.length} tokens; one {options.device} has {limit:.0f} GB\n")
    print(table(rows))
    print(f"\n{hardware()}")
    if options.plot:
        draw(rows, {"h100": "H100", "v5e": "v5e"}[options.device], limit, options.plot)
        print(f"drawn: {options.plot}")


if __name__ == "__main__":
    main()
