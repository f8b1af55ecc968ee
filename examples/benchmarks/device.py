"""One command for the accelerator at hand: bits, kernels, launches, memory, times.

It needs jax, optax and adam_jax, and takes PyTorch and flashoptim-jax along on a GPU where they are
installed. Every row is printed, and written to `--json`, as soon as it is there, so a time limit
loses only the rest; what fails is a row as well, and makes the exit code 1. Compared are a step of
`adam_jax` with optax's, which must have the same bits, and `adam_jax.fused_step` with the plain
chain, both from the same state: integers (codes) may differ in 1 of 100,000, weights by 2 ulp.
Times are of two sides at a time, A B A B: quartiles, and of every round the ratio to optax.adamw.
A CPU runs the same on small trees; its `fused_step` is the plain chain.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adam_jax
from adam_jax import storage

Shapes = tuple[tuple[int, ...], ...]
Row = dict[str, Any]
Job = tuple[str, Callable[[], Row]]  # what the row is of, and what makes the rest of it

# --- Work -----------------------------------------------------------------------------------------


def block(width: int) -> list[tuple[int, ...]]:
    """The 12 leaves of a layer of GPT-2."""
    dense = lambda n, m: [(n, m), (m,)]  # noqa: E731
    norm = [(width,), (width,)]
    attention = [*norm, *dense(width, 3 * width), *dense(width, width)]
    return [*attention, *norm, *dense(width, 4 * width), *dense(4 * width, width)]


def gpt2(layers: int = 12, width: int = 768, words: int = 50257, positions: int = 1024) -> Shapes:
    """GPT-2 small: 124 M parameters in 148 leaves."""
    inner = layers * block(width)
    return ((words, width), (positions, width), *inner, (width,), (width,))


def stacked(layers: int, width: int) -> Shapes:
    """The layers in one leaf of each kind, as `jax.lax.scan` over layers wants them."""
    return tuple((layers, *shape) for shape in block(width))


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


@cache
def trees() -> dict[str, Shapes]:
    mlp = ((784, 256), (256,), (256, 128), (128,), (128, 10), (10,))
    if on_cpu():
        return {"mlp": mlp, "gpt2": gpt2(1, 64, 500, 64), "stacked": stacked(2, 32)}
    # 20 layers of width 2048 are a billion parameters; two sides of 16 bytes each must fit.
    room = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    layers = int(max(1, min(20, 0.85 * room / (34 * 12 * 2048**2))))
    return {"mlp": mlp, "gpt2": gpt2(), "stacked": stacked(layers, 2048)}


def parameters(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))


# --- Sides ----------------------------------------------------------------------------------------


def plain(tx: optax.GradientTransformation) -> tuple[Callable, Callable]:
    """`init`, and `step(params, state, grads) -> (params, state)`."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def fused(tx: optax.GradientTransformation) -> tuple[Callable, Callable]:
    return tx.init, adam_jax.fused_step(tx)


def triad(_: None) -> tuple[Callable, Callable]:
    """Reads four arrays and writes three, as Adam must, and computes next to nothing."""

    def step(params, state, grads):
        p, m, v = params[0], *state
        return [p + 1e-3 * grads[0]], [m + 1e-6, v - 1e-6]

    return lambda params: [jnp.zeros_like(params[0]), jnp.zeros_like(params[0])], step


class AbsentError(Exception):
    """What is compared is not installed, or not for this device."""


def flashoptim(_: None) -> tuple[Callable, Callable]:
    try:
        import flashoptim_jax
    except ImportError as error:
        raise AbsentError("no flashoptim-jax") from error
    if jax.default_backend() != "gpu":
        raise AbsentError("flashoptim-jax has kernels for GPUs only")
    tx = flashoptim_jax.flash_adamw(1e-3)
    return tx.init, tx.step


def coded(optimizer: Callable, how: storage.Storage, rate: float = 1e-3) -> Any:
    return optimizer(rate, mu_storage=how, nu_storage=how)


INT8, INT4 = storage.int8(), storage.int4()


class Side(NamedTuple):
    dtype: str  # of the weights
    tx: Any
    form: Callable[[Any], tuple[Callable, Callable]] = fused


SMALL_WEIGHTS = optax.chain(coded(adam_jax.adamw, INT8), adam_jax.compensate("int8"))
FIRST = "optax.adamw"
SIDES = {
    FIRST: Side("float32", optax.adamw(1e-3), plain),
    "adamw": Side("float32", adam_jax.adamw(1e-3), plain),
    "adamw, fused": Side("float32", adam_jax.adamw(1e-3)),
    "8-bit, fused": Side("float32", coded(adam_jax.adamw, INT8)),
    "4-bit, fused": Side("float32", coded(adam_jax.adamw, INT4)),
    "bf16 + int8, 8-bit, fused": Side("bfloat16", SMALL_WEIGHTS),
    "8-bit, plain": Side("float32", coded(adam_jax.adamw, INT8), plain),
    "flashoptim-jax": Side("bfloat16", None, flashoptim),
}


@cache  # a tree's times need what its launches have compiled
def compiled(side: Side, shapes: Shapes) -> tuple[Any, Callable]:
    """The step, with parameters and state donated, and what makes the state."""
    init, step = side.form(side.tx)
    params = [jax.ShapeDtypeStruct(shape, side.dtype) for shape in shapes]
    state = jax.eval_shape(init, params)
    step = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    return step, jax.jit(init)


# --- A compiled module ----------------------------------------------------------------------------

FREE = [
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done",
    "async-done",
]  # fmt: skip
NESTED = ["call", "while", "conditional", "async-start"]  # GPUs' command buffers are calls


def operations(module: Any) -> list[str]:
    """The operations that do work in the optimised module, those within a call too."""
    computations: dict[str, list[tuple[str, str]]] = {}
    entry = here = ""
    for line in re.sub(r"/\*.*?\*/", "", module.as_text()).splitlines():
        if head := re.match(r"(ENTRY )?%?(\S+) \(.*\{$", line):
            here = head[2]
            entry = here if head[1] else entry
        elif match := re.match(r"  (?:ROOT )?\S+ = (?:\([^=]*\)|\S+) ([a-z\-]+)\((.*)", line):
            computations.setdefault(here, []).append((match[1], match[2]))

    def work(name: str) -> Iterator[str]:
        for operation, rest in computations.get(name, []):
            inner = re.findall(r"(?:to_apply|body|calls|branch_computations)=\{?%?([\w.\-]+)", rest)
            if operation in NESTED and inner:
                yield from work(inner[0])
            elif operation not in FREE:
                yield operation

    return list(work(entry))


def pallas(module: Any) -> int:
    """The kernels that were not made by XLA."""
    targets = re.findall(r'custom_call_target="([^"]*)"', module.as_text())
    return sum(bool(re.search("triton|mosaic|tpu_custom_call", target)) for target in targets)


def launches(side: Side, shapes: Shapes) -> Row:
    """Kernels of a step, copies among them, and its memory: all arguments, results, temporaries."""
    module, _ = compiled(side, shapes)
    work = operations(module)
    memory = module.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return {
        "kernels": len(work),
        "of them copies": sum(operation.startswith("copy") for operation in work),
        "of them Pallas's": pallas(module),
        "peak, bytes/param": (peak - memory.alias_size_in_bytes) / parameters(shapes),
        "temporaries": memory.temp_size_in_bytes / parameters(shapes),
    }


def launch_jobs() -> Iterator[Job]:
    for tree in ("mlp", "gpt2"):
        for name, side in SIDES.items():
            yield f"{tree}: {name}", partial(launches, side, trees()[tree])


# --- Bits and kernels -----------------------------------------------------------------------------

BITS = ("adam", "adamw", "nadam", "nadamw")
BIT_SHAPES = {"matrix": (300, 260), "vector": (5000,)}
ADAMW = adam_jax.adamw(1e-2)
CASES: dict[str, tuple[str, Any]] = {
    "adam": ("float32", adam_jax.adam(1e-2)),
    "adamw": ("float32", ADAMW),
    "nadam": ("float32", adam_jax.nadam(1e-2)),
    "amsgrad": ("float32", adam_jax.amsgrad(1e-2)),
    "v in bfloat16, at random": ("float32", adam_jax.adam(1e-2, nu_storage=storage.stochastic())),
    "8-bit": ("float32", coded(adam_jax.adamw, INT8, 1e-2)),
    "8-bit, blocks of 64": ("float32", coded(adam_jax.adamw, storage.int8(block=64), 1e-2)),
    "4-bit": ("float32", coded(adam_jax.adamw, INT4, 1e-2)),
    "lion, 8-bit": ("float32", adam_jax.lion(1e-3, mu_storage=INT8)),
    "bfloat16, at random": ("bfloat16", optax.chain(ADAMW, adam_jax.round_stochastically())),
    "bfloat16 + bfloat16": ("bfloat16", optax.chain(ADAMW, adam_jax.compensate("bfloat16"))),
    "bfloat16 + int8, 8-bit": ("bfloat16", SMALL_WEIGHTS),
}


def case_shapes() -> dict[str, tuple[int, ...]]:
    """Partial tiles and blocks, a vector, a stack, a convolution: none too small for a kernel."""
    if on_cpu():
        return {"stack": (2, 67, 64)}
    return BIT_SHAPES | {"stack": (3, 256, 384), "conv": (3, 3, 64, 128)}


def random_params(shapes: dict, dtype: str, rng: np.random.Generator) -> dict[str, jax.Array]:
    """Of 0.5 to 1.5 in size: an ulp of a weight near 0 would say nothing."""
    draw = lambda shape: rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)  # noqa: E731
    return {name: jnp.asarray(draw(shape), dtype) for name, shape in shapes.items()}


def random_grads(params: dict[str, jax.Array], rng: np.random.Generator) -> dict[str, jax.Array]:
    """Of a size that changes from step to step, some of them 0."""
    size = 10 ** rng.uniform(-4, 2)
    draw = lambda shape: rng.normal(size=shape) * size * (rng.random(shape) > 0.1)  # noqa: E731
    return {name: jnp.asarray(draw(p.shape), p.dtype) for name, p in params.items()}


def ulps(found: Any, due: Any, least: Any) -> np.ndarray:
    """How far apart, in units of the last digit of what is due, or of `least` where that is more.

    A sum that cancels is as exact as what it was made of.
    """
    info = jnp.finfo(due.dtype)
    found, due, least = (np.asarray(x, np.float64) for x in (found, due, least))
    size = np.maximum(np.maximum(np.abs(due), np.abs(least)), float(info.tiny))
    apart = np.abs(found - due) / np.ldexp(float(info.eps), np.frexp(size)[1] - 1)
    same = (found == due) | (np.isnan(found) & np.isnan(due))
    return np.where(same, 0.0, np.nan_to_num(apart, nan=1e9, posinf=1e9))


def apart(found: Any, due: Any, before: Any, is_weight: bool) -> tuple[str, np.ndarray]:
    """The kind of a leaf, and how far apart its elements are."""
    if not jnp.issubdtype(due.dtype, jnp.inexact):
        steps = np.abs(found.astype(np.int64) - due.astype(np.int64))
        return ("codes", steps) if due.size > 1 else ("scalars", np.where(steps, np.inf, 0))
    if is_weight:
        return "weights", ulps(found, due, before)
    if due.size == 1:  # a step's scalar, of the order of 1
        return "scalars", ulps(found, due, 1.0)
    usual = np.abs(due.astype(np.float64)).mean()
    return "moments", ulps(found, due, np.maximum(np.abs(before.astype(np.float64)), usual))


# How far apart an element may be, and which share of them may be further.
LIMITS = {"weights": (2, 0.0), "scalars": (2, 0.0), "codes": (0, 1e-5), "moments": (2, 1e-5)}


def compare(steps: Iterable[tuple[Any, Any, Any]]) -> Row:
    """Pairs (params, state): what was found, what is due, and the pair before the step."""
    count, beyond, most, differ = Counter(), Counter(), Counter(), 0
    for trees in steps:
        weights = len(jax.tree.leaves(trees[0][0]))
        leaves = zip(*map(jax.tree.leaves, jax.device_get(trees)), strict=True)
        for i, (found, due, before) in enumerate(leaves):
            found, due, before = map(np.asarray, (found, due, before))
            bits = f"u{due.itemsize}"
            differ += int((found.view(bits) != due.view(bits)).sum())
            kind, far = apart(found, due, before, i < weights)
            count[kind] += far.size
            beyond[kind] += int((far > LIMITS[kind][0]).sum())
            most[kind] = max(most[kind], float(far.max()))
    share = {kind: beyond[kind] / max(count[kind], 1) for kind in LIMITS}
    wrong = [kind for kind, (_, allowed) in LIMITS.items() if share[kind] > allowed]
    return {
        "bits differ": differ / count.total(),
        "weights, ulp": most["weights"],
        "codes differ": share["codes"],
        "at most by": most["codes"],
        "moments > 2 ulp": share["moments"],
        "FAILED": f"too far apart: {', '.join(wrong)}" if wrong else "",
    }


def same_bits(name: str, steps: int = 100) -> Row:
    """The weights of adam_jax beside optax's, after each of many steps."""
    rng = np.random.default_rng(0)
    params = random_params(BIT_SHAPES, "float32", rng)
    txs = [getattr(library, name)(1e-2) for library in (adam_jax, optax)]
    step = [jax.jit(plain(tx)[1]) for tx in txs]

    def pairs() -> Iterator[tuple[Any, Any, Any]]:
        now = [(params, tx.init(params)) for tx in txs]
        for _ in range(steps):
            grads, before = random_grads(params, rng), now
            now = [one(*carry, grads) for one, carry in zip(step, now, strict=True)]
            yield (now[0][0], ()), (now[1][0], ()), (before[1][0], ())

    row = compare(pairs())
    kept = {name: row[name] for name in ("bits differ", "weights, ulp")}
    return kept | {"FAILED": "not the bits of optax" if row["bits differ"] else ""}


def has_kernels() -> bool:
    """`fused_step` must make kernels here."""
    version = jax.devices()[0].client.platform_version.lower()
    return jax.default_backend() == "tpu" or "cuda" in version


def same_step(dtype: str, tx: Any, steps: int = 20) -> Row:
    """Every step of the fused form beside the plain one's, from the state of the plain one."""
    rng = np.random.default_rng(0)
    params = random_params(case_shapes(), dtype, rng)
    start = params, tx.init(params)
    due_step = jax.jit(plain(tx)[1])
    step = jax.jit(adam_jax.fused_step(tx), donate_argnums=(0, 1)).lower(*start, params).compile()

    def pairs() -> Iterator[tuple[Any, Any, Any]]:
        now = start
        for _ in range(steps):
            grads = random_grads(params, rng)
            due = due_step(*now, grads)
            yield step(*jax.tree.map(jnp.copy, now), grads), due, now
            now = due

    row = {"kernels": pallas(step), **compare(pairs())}
    if has_kernels() and not row["kernels"]:
        row["FAILED"] = "fused_step made no kernel"
    return row


def bit_jobs() -> Iterator[Job]:
    for name in BITS:
        yield name, partial(same_bits, name)


def kernel_jobs() -> Iterator[Job]:
    for name, (dtype, tx) in CASES.items():
        yield name, partial(same_step, dtype, tx)


# --- Times ----------------------------------------------------------------------------------------

Timed = Callable[[int], tuple[float, float]]  # seconds of so many steps; of them to launch them


def clocked(step: Callable[[], Any], wait: Callable[[], Any]) -> Timed:
    def run(steps: int) -> tuple[float, float]:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        launched = time.perf_counter()
        wait()
        return time.perf_counter() - start, launched - start

    return run


def in_jax(side: Side, shapes: Shapes) -> tuple[Timed, int]:
    """A side with arrays of its own, and the bytes that it must at least move in a step."""
    module, init = compiled(side, shapes)
    params, grads = ([jnp.full(x, fill, side.dtype) for x in shapes] for fill in (1.0, 1e-3))
    carry = [params, init(params)]
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    least = 3 * size(params) + 2 * size(carry[1])  # reads them and grads, writes them but grads

    def step() -> None:
        carry[:] = module(*carry, grads)

    return clocked(step, lambda: jax.block_until_ready(carry)), least


def in_torch(shapes: Shapes) -> tuple[Timed, int]:
    try:
        import torch
    except ImportError as error:
        raise AbsentError("no PyTorch") from error
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        raise AbsentError("no PyTorch with a GPU")
    torch.cuda.empty_cache()
    params = [torch.ones(shape, device="cuda", requires_grad=True) for shape in shapes]
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
    return clocked(optimizer.step, torch.cuda.synchronize), 28 * parameters(shapes)


BANDWIDTH: dict[str, float] = {}  # bytes a second, of the limit


def times(tree: str, make: Callable[[], tuple[Timed, int]], is_limit: bool = False) -> Row:
    """A side beside the first one, A B A B: milliseconds a step, and the ratio of every round."""
    rounds, steps = (4, 2) if on_cpu() else (15, 10 if tree == "gpt2" else 3)
    (side, least), (first, _) = make(), in_jax(SIDES[FIRST], trees()[tree])
    pairs = [(first(steps), side(steps)) for _ in range(rounds + 2)][2:]  # after a warm-up
    seconds = [b[0] / steps for _, b in pairs]
    rate = least / statistics.median(seconds)
    quartiles = lambda values: statistics.quantiles(values, n=4)  # noqa: E731
    if is_limit:
        BANDWIDTH[tree] = rate
    return {
        "ms a step": quartiles([1e3 * each for each in seconds]),
        "ratio": quartiles([b[0] / a[0] for a, b in pairs]),
        "ms to launch": 1e3 * statistics.median(b[1] for _, b in pairs) / steps,
        "bytes/param": least / parameters(trees()[tree]),
        "GB/s": rate / 1e9,
        "of the limit": rate / BANDWIDTH[tree] if tree in BANDWIDTH else "",
        "rounds": {"steps": steps, "first and side, s": [(a[0], b[0]) for a, b in pairs]},
    }


def time_jobs(tree: str) -> Iterator[Job]:
    """First the limit, on as many parameters in one leaf; then the first side beside itself."""
    shapes = trees()[tree]
    flat = partial(in_jax, Side("float32", None, triad), ((parameters(shapes),),))
    yield "limit", partial(times, tree, flat, is_limit=True)
    for name, side in SIDES.items():
        yield name, partial(times, tree, partial(in_jax, side, shapes))


def torch_jobs() -> Iterator[Job]:
    for tree in ("gpt2", "stacked"):
        yield f"{tree}: AdamW, fused", partial(times, tree, partial(in_torch, trees()[tree]))


# --- Printing and writing -------------------------------------------------------------------------

SECTIONS: dict[str, tuple[str, Callable[[], Iterator[Job]]]] = {
    "bits": ("adam_jax beside optax, float32, 100 steps", bit_jobs),
    "kernels": ("fused_step beside the plain chain, 20 steps", kernel_jobs),
    "launches": ("kernels of a compiled step, and its memory", launch_jobs),
    "gpt2": ("times, GPT-2", partial(time_jobs, "gpt2")),
    "stacked": ("times, stacked layers", partial(time_jobs, "stacked")),
    "torch": ("times, PyTorch beside optax.adamw", torch_jobs),  # last: it may end the process
}

DRIVER = "nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null"


def machine() -> Row:
    device = jax.devices()[0]
    there = {str(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}
    wanted = re.compile(r"(jax|jaxlib|jax-.*|libtpu|optax|numpy|torch|flashoptim.*)$")
    return {
        "device": f"{device.device_kind} ({device.platform})",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "runtime": " ".join(device.client.platform_version.split()),
        "driver": subprocess.getoutput(DRIVER),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "adam_jax": adam_jax.__version__,
        **{name: there[name] for name in sorted(there) if wanted.match(name)},
        "parameters": {name: parameters(shapes) for name, shapes in trees().items()},
    }


def guarded(job: Callable[[], Row]) -> Row:
    """What a job finds; an error of any kind is a finding, so that the other jobs are done."""
    try:
        return job()
    except AbsentError as error:
        return {"skipped": str(error)}
    except Exception as error:
        first, *_ = [*str(error).splitlines(), ""]
        return {"FAILED": f"{type(error).__name__}: {first}"}


def cell(value: Any) -> str:
    if isinstance(value, list):
        low, middle, high = value
        return f"{middle:.3g} ({low:.3g}-{high:.3g})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run(jobs: Iterator[Job], keep: Callable[[str, Row], None]) -> None:
    columns: list[str] = []
    for label, job in jobs:
        row = guarded(job)
        keep(label, row)
        words = {"FAILED", "skipped", "rounds"}
        if not columns and set(row) - words:
            columns = [name for name in row if name not in words]
            print(" " * 30 + "".join(f"{name:>23}" for name in columns))
        cells = "".join(f"{cell(row.get(name, '')):>23}" for name in columns)
        notes = [f"  {word}: {row[word]}" for word in ("FAILED", "skipped") if row.get(word)]
        print(f"{label:<30}" + (cells if set(row) - words else "") + "".join(notes), flush=True)
        gc.collect()  # the arrays of this job, before the next makes its own


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write every figure (default: nowhere)")
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS),
        help="what to do (default: all)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.absolute().parent}")
    report: Row = {"machine": machine(), "sections": {}}
    print("\n".join(f"{name}: {value}" for name, value in report["machine"].items()))
    if not has_kernels():
        print("Here fused_step is the plain chain: that the two agree says nothing of kernels.")
    failed = []

    def keep(name: str, label: str, row: Row) -> None:
        report["sections"][name].append({"of": label, **row})
        if row.get("FAILED"):
            failed.append(f"{name}: {label}")
        if options.json:
            options.json.write_text(json.dumps(report | {"failed": failed}, indent=1))

    for name in options.sections:
        (title, jobs), start = SECTIONS[name], time.perf_counter()
        report["sections"][name] = []
        print(f"\n{name}: {title}", flush=True)
        run(jobs(), partial(keep, name))
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    print(f"\nFAILED: {', '.join(failed)}" if failed else "\nno check failed")
    return bool(failed)


if __name__ == "__main__":
    # JAX takes three quarters of a GPU's memory, and PyTorch would not find 16 bytes a parameter.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the old name, never beside the new
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.6")
    sys.exit(main())
