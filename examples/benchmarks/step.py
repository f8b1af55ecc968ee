"""Time one optimizer step: adam_jax beside optax and torch, and beside the limit of the memory.

All sides run in one process and in turn, A B A B, after a warm-up, each result awaited, half of the
rounds with the sides built in the opposite order; what is printed are medians, and of every round
the ratio to the first side. The limit moves the 28 bytes per parameter that float32 Adam must at
least move (read g, m, v, p; write m, v, p) and computes next to nothing, in the same rounds. A step
is update and apply, jitted, with donated buffers or without.
"""

import argparse
import importlib.util
import json
import math
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import optax
from device import Shapes, gpt2
from tqdm import tqdm

import adam_jax
from adam_jax import storage

sys.path.append(str(Path(__file__).parent.parent))  # the other examples
from commandline import hardware, new_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# --- Work -----------------------------------------------------------------------------------------


def resnet50() -> Shapes:
    """ResNet-50: 25.6 M parameters in 161 leaves."""
    shapes: list[tuple[int, ...]] = [(7, 7, 3, 64), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for kernel in (
                (1, 1, inputs, width),
                (3, 3, width, width),
                (1, 1, width, 4 * width),
                *([(1, 1, inputs, 4 * width)] if block == 0 else []),
            ):
                shapes += [kernel, (kernel[-1],), (kernel[-1],)]
            inputs = 4 * width
    return (*shapes, (2048, 1000), (1000,))


WORK: dict[str, Callable[[], Shapes]] = {
    "gpt2": gpt2,
    "resnet50": resnet50,
    "1000-leaves": lambda: ((8, 8),) * 1000,
    "3000-leaves": lambda: ((8, 8),) * 3000,
    "one-leaf": lambda: ((100_000_000,),),
}

# --- Sides ----------------------------------------------------------------------------------------


def three_stages(wrap=lambda stage: stage) -> optax.GradientTransformation:
    return optax.chain(
        wrap(adam_jax.scale_by_moments()),
        adam_jax.bias_correct(),
        adam_jax.scale_by_lr(1e-3),
    )


def recompute(stage: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A stage that computes what it emits apart from what it keeps; the numbers stay the same.

    A parameter then does not wait for its moments to be written, and XLA's CPU backend, with
    ``XLA_FLAGS=--xla_backend_extra_options=xla_cpu_use_multi_output_fusion``, makes one kernel of a
    leaf. Without that flag it copies the old moments first and is three times slower.
    """
    inner: Any = optax.with_extra_args_support(stage)

    def update_fn(updates, state, params=None, **extra_args):
        _, kept = inner.update(updates, state, params, **extra_args)
        # XLA would merge what is computed twice if it knew that no count is negative.
        inputs = jax.tree.map(
            lambda x: jnp.where(state.count >= 0, x, jnp.zeros_like(x)), (updates, state)
        )
        emitted, _ = inner.update(*inputs, params, **extra_args)
        return emitted, kept

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def eight_bit() -> optax.GradientTransformation:
    return adam_jax.adam(1e-3, mu_storage=storage.int8(), nu_storage=storage.int8())


JAX_SIDES = {
    "optax.adam": lambda: optax.adam(1e-3),
    "stages": three_stages,
    "adam": lambda: adam_jax.adam(1e-3),
    "optax.adamw": lambda: optax.adamw(1e-3),
    "adamw": lambda: adam_jax.adamw(1e-3),
    "8-bit adam": eight_bit,
    "recompute": lambda: three_stages(recompute),
}
TORCH_SIDES = {
    "torch fused": {"fused": True},
    "torch foreach": {"foreach": True},
    "torch plain": {"foreach": False, "fused": False},
}
HAS_TORCH = importlib.util.find_spec("torch") is not None  # by the extra [torch]
SIDES = [*JAX_SIDES, *(TORCH_SIDES if HAS_TORCH else ()), "limit"]


class Side(NamedTuple):
    """Something that can be stepped, and what is known of it without a clock."""

    name: str
    step: Callable[[], Any]  # one step, awaited
    facts: dict[str, float]


def kernels(compiled) -> int:
    """The instructions of the compiled module that do work."""
    entry = compiled.as_text().split("ENTRY")[1]
    instructions = re.findall(r"= (?:\([^=]*\)|\S+) ([a-z\-]+)\(", entry)
    free = {"parameter", "tuple", "bitcast", "constant", "get-tuple-element"}
    return sum(name not in free for name in instructions)


def equations(jaxpr) -> int:
    """What there was to trace: the equations, those of a shared function once."""
    seen, waiting = {}, [jaxpr]
    while waiting:
        jaxpr = waiting.pop()
        seen[id(jaxpr)] = jaxpr
        inner = [value for equation in jaxpr.eqns for value in equation.params.values()]
        inner = [getattr(value, "jaxpr", value) for value in inner]
        waiting += [value for value in inner if hasattr(value, "eqns") and id(value) not in seen]
    return sum(len(jaxpr.eqns) for jaxpr in seen.values())


def jax_side(name: str, shapes, dtype: str, donate: bool) -> Side:
    tx = JAX_SIDES[name]()

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = [jnp.ones(shape, dtype) for shape in shapes]
    grads = [jnp.full(shape, 1e-3, dtype) for shape in shapes]
    state = jax.jit(tx.init)(params)
    times = [time.perf_counter()]
    traced = jax.jit(step, donate_argnums=(0, 1) if donate else ()).trace(params, state, grads)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    count = sum(param.size for param in params)
    facts = {
        "trace, s": times[1] - times[0],
        "lower, s": times[2] - times[1],
        "compile, s": times[3] - times[2],
        "equations per leaf": equations(traced.jaxpr.jaxpr) / len(shapes),
        "kernels": kernels(compiled),
        "bytes": compiled.cost_analysis()["bytes accessed"] / count,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes / count,
    }
    carry = [params, state]

    def run():
        carry[:] = jax.block_until_ready(compiled(*carry, grads))

    return Side(name, run, facts)


def torch_side(name: str, shapes, dtype: str) -> Side:
    import torch

    gpu = jax.default_backend() == "gpu"
    options = {"dtype": getattr(torch, dtype), "device": "cuda" if gpu else "cpu"}
    params = [torch.ones(shape, **options, requires_grad=True) for shape in shapes]
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    optimizer = torch.optim.Adam(params, lr=1e-3, **TORCH_SIDES[name])

    def run():
        optimizer.step()
        if gpu:
            torch.cuda.synchronize()

    return Side(name, run, {})


def limit_side(shapes, dtype: str) -> Side:
    """Reads four arrays and writes three of them: nothing but memory."""
    count = sum(math.prod(shape) for shape in shapes)
    arrays = [jnp.ones(count, dtype), *(jnp.ones(count, "float32") for _ in range(2))]
    grad = jnp.ones(count, dtype)

    def triad(arrays, grad):
        p, m, v = arrays
        return [p + 1e-3 * grad, m * 0.9, v * 0.999]  # 4 + 3 arrays, as Adam reads and writes

    compiled = jax.jit(triad, donate_argnums=0).lower(arrays, grad).compile()
    carry = [arrays]

    def run():
        carry[0] = jax.block_until_ready(compiled(carry[0], grad))

    return Side("limit", run, {"kernels": kernels(compiled)})


# --- Measuring ------------------------------------------------------------------------------------


class Row(NamedTuple):
    work: str
    dtype: str
    donated: bool
    side: str
    seconds: list[float]
    ratios: list[float]  # to the first side, round by round
    facts: dict[str, float]


def build(work: str, name: str, dtype: str, donate: bool) -> Side:
    shapes = WORK[work]()
    if name == "limit":
        return limit_side(shapes, dtype)
    if name in TORCH_SIDES:
        return torch_side(name, shapes, dtype)
    return jax_side(name, shapes, dtype, donate)


def measure(work: str, names: list[str], dtype: str, donate: bool, rounds: int) -> list[Row]:
    """Half of the rounds with the sides built in this order, half in the opposite.

    With many leaves the side that is built first, whichever it is, finds the best memory and wins
    by a tenth: one more is built before it that is not timed.
    """
    facts: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for order in (names, names[::-1]):
        built = [names[0], *order]
        sides = [
            build(work, name, dtype, donate)
            for name in tqdm(built, f"{work}: compiling", leave=False)
        ][1:]
        for turn in tqdm(range(rounds // 2 + 2), f"{work}: timing", leave=False):
            for side in sides:
                start = time.perf_counter()
                side.step()
                if turn > 1:  # two rounds of warm-up
                    seconds[side.name].append(time.perf_counter() - start)
        facts.update((side.name, side.facts) for side in sides)
        del side, sides  # their arrays, before the next are built
    first = seconds[names[0]]
    return [
        Row(
            work, dtype, donate, name, seconds[name],
            [ours / theirs for ours, theirs in zip(seconds[name], first, strict=True)],
            facts[name],
        )
        for name in names
    ]  # fmt: skip


def apart(sides: list[list[str]], processes: int) -> list[dict[str, float]]:
    """What each side takes in processes of its own: its peak memory, and the time to compile.

    One after the other in one process, the later sides would find the memory full of the earlier
    ones. Medians of so many processes a side, in turn.
    """
    found: list[list[dict[str, float]]] = [[] for _ in sides]
    for _ in tqdm(range(processes), "each side in a process of its own", leave=False):
        for facts, arguments in zip(found, sides, strict=True):
            command = [sys.executable, __file__, *arguments, "--report"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            facts.append(json.loads(done.stdout.splitlines()[-1]))
    return [
        {name: statistics.median(facts[name] for facts in side) for name in side[0]}
        for side in found
    ]


def report(side: Side) -> None:
    """The line that `apart` reads."""
    for _ in range(3):
        side.step()
    kilobyte = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 1e9
    times = {fact: side.facts[fact] for fact in FACTS[:3] if fact in side.facts}
    print(json.dumps({**times, "peak, GB": peak}))


FACTS = [
    "trace, s", "lower, s", "compile, s", "equations per leaf", "kernels", "bytes",
    "temporaries", "peak, GB",
]  # fmt: skip


def table(rows: list[Row]) -> str:
    """One line a side; a fact that a side does not have is left blank."""
    lines = [
        f"| work | side | step, ms | ratio to {rows[0].side} | of the limit | "
        + " | ".join(FACTS) + " |",
        "|---|---|---|---|---|" + "---|" * len(FACTS),
    ]  # fmt: skip
    limits = {row.work: statistics.median(row.seconds) for row in rows if row.side == "limit"}
    for row in rows:
        low, high = (statistics.quantiles(row.ratios, n=4)[i] for i in (0, 2))
        work = f"{row.work}, {row.dtype}, {'donated' if row.donated else 'kept'}"
        facts = [f"{row.facts[fact]:.4g}" if fact in row.facts else "" for fact in FACTS]
        share = limits.get(row.work, math.nan) / statistics.median(row.seconds)
        facts.insert(0, "" if math.isnan(share) else f"{share:.0%}")
        lines.append(
            f"| {work} | {row.side} | {1e3 * statistics.median(row.seconds):.2f} "
            f"| {statistics.median(row.ratios):.2f} ({low:.2f}–{high:.2f}) | "
            + " | ".join(facts) + " |"
        )  # fmt: skip
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    works = list(dict.fromkeys((row.work, row.dtype, row.donated) for row in rows))
    figure, axes = plt.subplots(
        len(works), 1, figsize=(9, 1.2 + 2.6 * len(works)), layout="constrained", squeeze=False
    )
    for (work, dtype, donated), axis in zip(works, axes[:, 0], strict=True):
        here = [row for row in rows if (row.work, row.dtype, row.donated) == (work, dtype, donated)]
        color = {True: "tab:blue", False: "tab:gray"}
        ours = [row.side in ("stages", "adam", "adamw", "8-bit adam", "recompute") for row in here]
        axis.barh(
            [row.side for row in here],
            [1e3 * statistics.median(row.seconds) for row in here],
            color=[color[mine] for mine in ours],
        )
        axis.invert_yaxis()
        kept = "donated" if donated else "not donated"
        axis.set(title=f"{work}, {dtype}, {kept}", xlabel="one step, ms")
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def even(text: str) -> int:
    number = int(text)
    if number < 2 or number % 2:
        raise argparse.ArgumentTypeError(f"must be an even number of at least 2, got {number}")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", nargs="+", choices=WORK, default=["resnet50", "1000-leaves"],
        help="the parameters (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=[s for s in SIDES if s != "recompute"],
        help="what to time; ratios are to the first (default: all but recompute, which is for "
        "XLA_FLAGS=--xla_backend_extra_options=xla_cpu_use_multi_output_fusion)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32",
        help="of parameters and gradients (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="do not donate parameters and state")
    parser.add_argument(
        "--apart", type=int, default=0, metavar="N",
        help="also N processes a side, for its peak memory and its time to compile (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=even, default=20, help="timed rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--json", type=new_file, help="where to write every figure (default: nowhere)"
    )
    parser.add_argument(
        "--plot", type=new_file, help="where to draw the step times (default: nowhere)"
    )
    parser.add_argument("--report", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report:
        report(build(options.work[0], options.sides[0], options.dtype, not options.keep))
        return
    # First, because a process starts with the peak of the one that started it.
    sides = [
        ["--work", work, "--sides", side, "--dtype", options.dtype] + ["--keep"] * options.keep
        for work in options.work
        for side in options.sides
    ]
    facts = apart(sides, options.apart) if options.apart else [{} for _ in sides]
    rows = []
    for work in options.work:
        rows += measure(work, options.sides, options.dtype, not options.keep, options.rounds)
    for row, more in zip(rows, facts, strict=True):
        row.facts.update(more)
    print(hardware("torch"))
    print("ratio: median and quartiles of the rounds; bytes and temporaries: per parameter\n")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1))
    if options.plot:
        draw(rows, options.plot)
        print(f"\nstep times: {options.plot}")


if __name__ == "__main__":
    main()
