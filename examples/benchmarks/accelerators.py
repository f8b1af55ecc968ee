"""What XLA makes of one step for a CPU, a GPU and TPUs: compiled for them, without having them.

Nothing runs here, and no time but the compiler's is taken. The compiled module tells the kernels of
a step, the bytes that they read and write in the memory of the device, and the memory they need
besides. The limit reads parameters, gradients and state once, and writes once what of these
changes. A step is update and apply, with parameters and state donated.

The compilers (1.9 GB), and flashoptim-jax, which is shown beside the others if it is there:

    .venv/bin/pip install -e '.[examples,accelerators]'
    .venv/bin/pip install --no-deps flashoptim-jax==0.1.0
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
import optax
from jax.experimental import topologies
from step import gpt2, hardware
from tqdm import tqdm

import adam_jax
from adam_jax import storage

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# --- Targets --------------------------------------------------------------------------------------

# An H100 SXM5, as a text of XLA's GpuTargetConfigProto. The sources are NVIDIA's: (1) CUDA C++
# Programming Guide, table "Technical Specifications per Compute Capability", column 9.0; (2) the
# white paper "NVIDIA H100 Tensor Core GPU Architecture"; (3) the data sheet "NVIDIA H100 Tensor
# Core GPU".
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }  # (1)
  threads_per_warp: 32                           # (1)
  threads_per_block_limit: 1024                  # (1)
  threads_per_core_limit: 2048                   # (1) resident threads per SM
  block_dim_limit_x: 2147483647                  # (1) of a grid, in blocks
  block_dim_limit_y: 65535                       # (1)
  block_dim_limit_z: 65535                       # (1)
  registers_per_core_limit: 65536                # (1) 64 K registers of 32 bits per SM
  registers_per_block_limit: 65536               # (1)
  shared_memory_per_core: 233472                 # (1) 228 KB per SM
  shared_memory_per_block_optin: 232448          # (1) 227 KB per block
  shared_memory_per_block: 49152                 # (1) 48 KB per block without opting in
  core_count: 132                                # (2) SMs
  fpus_per_core: 128                             # (2) float32 cores per SM
  clock_rate_ghz: 1.98                           # (2) 66.9 TFLOPS / (132 SMs * 128 cores * 2)
  l2_cache_size: 52428800                        # (2) 50 MB
  device_memory_size: 85899345920                # (3) 80 GB
  memory_bandwidth: 3350000000000                # (3) 3.35 TB/s
}
"""

TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TARGETS = ["cpu", "h100", *TPUS]

# What libtpu must know where there is no TPU.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # else it asks the network for the machine that it runs on
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # the answers
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else two processes fight for /tmp/libtpu_lockfile
}


def missing() -> str:
    """Why other devices cannot be compiled for, and what to do; nothing if they can."""
    for module in ("jax_plugins", "jax_plugins.xla_cuda13", "libtpu"):
        if importlib.util.find_spec(module) is None:
            return f"there is no {module}: .venv/bin/pip install -e '.[test,accelerators]'"
    if jax.config.jax_platforms != "cpu":
        return "without a GPU, JAX loads its CUDA compiler only with JAX_PLATFORMS=cpu: set that"
    return ""


@cache
def device(target: str) -> Any:
    """A device to compile for; the CPU is this machine's."""
    if target == "cpu":
        return jax.devices("cpu")[0]
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if target == "h100":
        gpus = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1")
        return gpus.devices[0]
    return topologies.get_topology_desc(TPUS[target], "tpu").devices[0]


def four(target: str) -> list[Any]:
    """Four devices that lie beside one another."""
    device(target)  # which sets what libtpu must know
    if target == "h100":
        gpus = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x4x1")
        return gpus.devices
    return topologies.get_topology_desc(TPUS[target], "tpu").devices[:4]


def compiled_for(target: str, init: Callable, step: Callable, params: Any) -> Any:
    """`step(params, state, grads) -> (params, state)`, with the first two donated."""
    there = jax.sharding.SingleDeviceSharding(device(target))
    state = jax.eval_shape(init, params)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), (params, state, params)
    )
    # Pallas asks the mesh which TPU a kernel is for.
    mesh = jax.sharding.Mesh(np.array([device(target)]), "one").abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()


# --- Reading a compiled module --------------------------------------------------------------------


class Instruction(NamedTuple):
    """One line of an HLO module, like `%sum = f32[8]{0} add(%x, %y), metadata={...}`."""

    name: str
    shape: str
    operation: str
    operands: str
    attributes: str
    is_root: bool  # what its computation returns


def computations(text: str) -> dict[str, list[Instruction]]:
    """The computations of an HLO module by name, that of the whole module also as "ENTRY"."""
    found: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?(%\S+) \(.*\{$", line):
            here = found[head[2]] = []
            if head[1]:
                found["ENTRY"] = here
        elif match := re.match(r"  (ROOT )?(%\S+) = (.*)", line):
            root, name, rest = match.groups()
            shape = _bracketed(rest) if rest.startswith("(") else rest.split(" ", 1)[0]
            operation, _, rest = rest[len(shape) + 1 :].partition("(")
            operands = _bracketed("(" + rest)[1:-1]
            attributes = rest[len(operands) + 1 :].lstrip(", ")
            here.append(Instruction(name, shape, operation, operands, attributes, bool(root)))
    return found


def _bracketed(text: str) -> str:
    """Up to the bracket that closes the first one: a shape may have brackets within."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: i + 1]
    raise ValueError(f"A bracket is not closed: {text}")


ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\](\{[^}]*\})?")


def size(array: tuple[str, str, str, str]) -> int:
    """The number of elements of a match of ARRAY."""
    _, _, lengths, _ = array
    return math.prod(int(length) for length in lengths.split(",") if length)


def nbytes(shape: str) -> int:
    """Bytes in the device's memory of an array or a tuple of them.

    What is marked S(1) and so on lies in a memory of the chip itself.
    """
    total = 0
    for array in ARRAY.findall(shape):
        kind, bits, _, layout = array
        if "S(" not in layout:
            total += size(array) * (8 if kind == "pred" else int(bits)) // 8
    return total


SCALARS = 16  # elements: a stage keeps its scalars in one small array
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done"}
NESTED = {"call", "while", "conditional", "async-start"}  # not what a step is made of


def work(compiled: Any) -> tuple[int, int]:
    """The kernels of a module, and the bytes that they read and write: all operands and results.

    What makes nothing larger than a stage's scalars is no kernel here, but its bytes count.
    """
    entry = computations(compiled.as_text())["ENTRY"]
    shapes = {instruction.name: instruction.shape for instruction in entry}
    kernels = moved = 0
    for _, shape, operation, operands, attributes, _ in entry:
        if operation in NESTED:
            raise ValueError(f"The kernels inside a {operation} would not be counted.")
        if operation in FREE or "ConcatBitcast" in attributes:
            continue
        kernels += max(map(size, ARRAY.findall(shape)), default=0) > SCALARS
        if operation in ("copy-start", "slice-start"):  # its shape: (to, from, …), ((from), to, …)
            to = [match[0] for match in ARRAY.finditer(shape)][operation == "slice-start"]
            moved += nbytes(to) + nbytes(re.sub(r"S\(\d+\)", "", to))
        else:
            moved += nbytes(shape)
            moved += sum(nbytes(shapes[name]) for name in re.findall(r"%[\w.\-]+", operands))
    return kernels, moved


def launches(compiled: Any) -> tuple[int, int]:
    """All operations of a module, those on scalars too: kernels, and copies."""
    entry = computations(compiled.as_text())["ENTRY"]
    found = [line for line in entry if line.operation not in FREE]
    if any(line.operation in NESTED for line in found):
        raise ValueError("What a step calls would not be counted.")
    copies = sum(line.operation in ("copy", "copy-start", "slice-start") for line in found)
    joined = sum("ConcatBitcast" in line.attributes for line in found)  # a view of what was copied
    return len(found) - copies - joined, copies


# --- Work -----------------------------------------------------------------------------------------


def stacked() -> list[tuple[int, ...]]:
    """GPT-2 with its 12 layers in one leaf, as `jax.lax.scan` over layers wants them."""
    first, second, *blocks, scale, bias = gpt2()
    block = blocks[: len(blocks) // 12]
    return [first, second, *((12, *shape) for shape in block), scale, bias]


def mlp() -> list[tuple[int, ...]]:
    return [(784, 128), (128,), (128, 64), (64,), (64, 10), (10,)]


TREES = {"gpt2": gpt2, "stacked": stacked, "one-leaf": lambda: [(4096, 4096)], "mlp": mlp}


def plain(tx: optax.GradientTransformation) -> tuple[Callable, Callable]:
    """`init`, and `step(params, state, grads) -> (params, state)`."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def fused(tx: optax.GradientTransformation) -> tuple[Callable, Callable]:
    return tx.init, adam_jax.fused_step(tx)


def apart(tx: optax.GradientTransformation) -> tuple[Callable, Callable]:
    return plain(adam_jax.fuse(tx))


class Choice(NamedTuple):
    weights: str  # their dtype
    optimizer: Callable[[], Any]
    form: Callable[[Any], tuple[Callable, Callable]] = plain  # to `init` and `step`


def in_codes(how: storage.Storage) -> optax.GradientTransformation:
    return adam_jax.adamw(1e-3, mu_storage=how, nu_storage=how)


def flashoptim() -> Any:
    import flashoptim_jax

    return flashoptim_jax.flash_adamw(1e-3)


FLASHOPTIM = "flashoptim-jax adamw"
CHOICES = {
    "optax.adam": Choice("float32", lambda: optax.adam(1e-3)),
    "optax.adamw": Choice("float32", lambda: optax.adamw(1e-3)),
    "adam": Choice("float32", lambda: adam_jax.adam(1e-3)),
    "adamw": Choice("float32", lambda: adam_jax.adamw(1e-3)),
    "amsgrad": Choice("float32", lambda: adam_jax.amsgrad(1e-3)),
    "lion": Choice("float32", lambda: adam_jax.lion(1e-3)),
    "8-bit adamw": Choice("float32", lambda: in_codes(storage.int8())),
    "4-bit adamw": Choice("float32", lambda: in_codes(storage.int4())),
    "adamw, round_stochastically": Choice(
        "bfloat16", lambda: optax.chain(adam_jax.adamw(1e-3), adam_jax.round_stochastically())
    ),
    "8-bit adamw, compensate int8": Choice(
        "bfloat16", lambda: optax.chain(in_codes(storage.int8()), adam_jax.compensate("int8"))
    ),
    "adam, fused": Choice("float32", lambda: adam_jax.adam(1e-3), fused),
    "adamw, fused": Choice("float32", lambda: adam_jax.adamw(1e-3), fused),
    "8-bit adamw, fused": Choice("float32", lambda: in_codes(storage.int8()), fused),
    "4-bit adamw, fused": Choice("float32", lambda: in_codes(storage.int4()), fused),
    "8-bit adamw, compensate int8, fused": Choice(
        "bfloat16",
        lambda: optax.chain(in_codes(storage.int8()), adam_jax.compensate("int8")),
        fused,
    ),
    "adamw, updates apart": Choice("float32", lambda: adam_jax.adamw(1e-3), apart),
    "8-bit adamw, updates apart": Choice("float32", lambda: in_codes(storage.int8()), apart),
    FLASHOPTIM: Choice("bfloat16", flashoptim, lambda tx: (tx.init, tx.step)),
}
if importlib.util.find_spec("flashoptim_jax") is None:
    del CHOICES[FLASHOPTIM]


# --- Measuring ------------------------------------------------------------------------------------


class Row(NamedTuple):
    tree: str
    choice: str
    target: str
    limit: float  # bytes per parameter
    leaves: int
    kernels: int
    bytes: float  # per parameter
    temporaries: float  # bytes per parameter
    seconds: float  # of all threads, to trace, lower and compile
    launches: int  # kernels, those on scalars too
    copies: int


def limit(init: Callable, params: Any) -> float:
    """Read parameters, gradients and state; write parameters and state: bytes per parameter."""
    # But for placeholders, which a step neither reads nor writes.
    arrays = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype != bool]  # noqa: E731
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in arrays(tree))  # noqa: E731
    count = sum(param.size for param in params)
    return (3 * size(params) + 2 * size(jax.eval_shape(init, params))) / count


def measure(tree: str, choice: str, target: str) -> Row:
    weights, optimizer, form = CHOICES[choice]
    params = [jax.ShapeDtypeStruct(shape, weights) for shape in TREES[tree]()]
    init, step = form(optimizer())
    start = time.process_time()
    compiled = compiled_for(target, init, step, params)
    seconds = time.process_time() - start
    kernels, moved = work(compiled)
    count = sum(param.size for param in params)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    least = limit(init, params)
    return Row(
        tree, choice, target, least, len(params), kernels, moved / count, temporaries / count,
        seconds, *launches(compiled),
    )  # fmt: skip


def table(rows: list[Row], targets: list[str]) -> str:
    """One line a choice, one column a target."""
    lines = [
        "| tree | choice | limit | " + " | ".join(targets) + " |",
        "|---" * (3 + len(targets)) + "|",
    ]
    cells: dict[tuple, dict[str, str]] = {}
    for row in rows:
        cell = (
            f"{row.kernels / row.leaves:.1f}; {row.bytes:.1f}; {row.temporaries:.2f}; "
            f"{row.seconds:.1f} s; {row.launches} + {row.copies}"
        )
        cells.setdefault((row.tree, row.choice, f"{row.limit:.2f}"), {})[row.target] = cell
    for line, cell in cells.items():
        lines.append("| " + " | ".join([*line, *(cell.get(t, "") for t in targets)]) + " |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """The bytes of every choice on every target, and its limit as a line."""
    trees = list(dict.fromkeys(row.tree for row in rows))
    targets = list(dict.fromkeys(row.target for row in rows))
    figure, axes = plt.subplots(
        len(trees), 1, figsize=(11, 4 * len(trees)), layout="constrained", squeeze=False
    )
    for tree, axis in zip(trees, axes[:, 0], strict=True):
        here = [row for row in rows if row.tree == tree]
        choices = list(dict.fromkeys(row.choice for row in here))
        width = 0.8 / len(targets)
        for i, target in enumerate(targets):
            of = {row.choice: row.bytes for row in here if row.target == target}
            at = [choices.index(choice) - 0.4 + (i + 0.5) * width for choice in of]
            axis.bar(at, list(of.values()), width, label=target)
        least = {row.choice: row.limit for row in here}
        for at, choice in enumerate(choices):
            line = axis.hlines(least[choice], at - 0.45, at + 0.45, color="black")
        line.set_label("limit")
        labels = [c.replace(", ", ",\n").replace("round_", "round_\n") for c in choices]
        axis.set_xticks(range(len(choices)), labels, fontsize=8)
        axis.set(title=tree, ylabel="bytes moved a parameter")
        axis.legend(ncols=len(targets) + 1)
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=["cpu", "h100", "v5e"],
        help="the devices to compile for (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--trees", nargs="+", choices=TREES, default=list(TREES),
        help="the parameters (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--choices", nargs="+", choices=CHOICES, default=list(CHOICES),
        help="the optimizers (default: all)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="where to write every figure (default: nowhere)")
    parser.add_argument("--plot", type=Path, help="where to draw the bytes (default: nowhere)")
    options = parser.parse_args()
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"--{name}: there is no directory {path.absolute().parent}")
    jax.config.update("jax_platforms", "cpu")
    if set(options.targets) - {"cpu"} and (reason := missing()):
        parser.error(reason)
    todo = [
        (tree, choice, target)
        for tree in options.trees
        for choice in options.choices
        for target in options.targets
        if choice != FLASHOPTIM or target == "h100"  # it has kernels for GPUs only
    ]
    rows = [measure(*each) for each in tqdm(todo, "compiling", leave=False)]
    print(hardware("jax-cuda13-pjrt", "nvidia-cuda-nvcc", "libtpu", "flashoptim-jax"))
    print(
        "each target: kernels a leaf; bytes, and bytes of temporaries, per parameter; CPU time; "
        "launches, those on scalars too, + copies\n"
    )
    print(table(rows, options.targets))
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1))
    if options.plot:
        draw(rows, options.plot)
        print(f"\nbytes against the limit: {options.plot}")


if __name__ == "__main__":
    main()
