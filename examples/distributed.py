"""Train the character transformer on many devices in many processes, and lose nothing on the way.

Every device has the weights and computes the gradients of its part of each batch; the 8-bit moments
are split over the devices (ZeRO stage 1). A checkpoint is written every 20 steps while the training
goes on, and the last three are kept. Whatever ends a run, the same command goes on from its last
complete checkpoint, on as many processes and devices as there are then.

  python distributed.py                            one process with the devices of this machine
  python distributed.py --processes 2 --devices 4  two processes with 4 simulated devices each
  srun python distributed.py                       one of several processes: under Slurm, Open MPI
                                                   or Kubernetes and on a TPU pod JAX finds them

Exit codes: 2 with one sentence if a checkpoint cannot be read or written or is of another run; 143
after SIGTERM, with a checkpoint of the last step; 1 after any other error, such as the death of
another process, which is noticed within half a minute.
"""

import argparse
import contextlib
import copy
import fcntl
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import commandline
import drawing
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import transformer
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

import adam_jax
from adam_jax import storage


def optimizer() -> optax.GradientTransformation:
    """AdamW with 8-bit moments; a step whose gradient is not finite is left out."""
    eight = storage.int8()
    rate = optax.warmup_constant_schedule(0.0, 1e-3, 20)
    adamw = adam_jax.adamw(rate, weight_decay=1e-2, mu_storage=eight, nu_storage=eight)
    return optax.apply_if_finite(adamw, max_consecutive_errors=10)


BATCH = 32  # sequences a step, over all devices
EVERY = 20  # steps between two checkpoints
HEARTBEAT = 30  # seconds of silence after which a process counts as dead


class RunError(Exception):
    """What ends a run: one sentence for the user, and the exit code."""

    def __init__(self, sentence: str, code: int = 2):
        super().__init__(sentence)
        self.code = code


# --- Training -------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """What a step changes."""

    weights: nnx.State
    optimizer: Any


class Trainer:
    """The compiled functions of a run on the devices at hand."""

    def __init__(self, devices=None):
        devices = jax.devices() if devices is None else devices
        if BATCH % len(devices):
            raise RunError(f"{len(devices)} devices do not divide a batch of {BATCH} sequences")
        mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
        everywhere = NamedSharding(mesh, PartitionSpec())
        self.split = NamedSharding(mesh, PartitionSpec("data"))
        alphabet, self.text = transformer.language_reference()
        model = partial(transformer.Transformer, alphabet)
        tx = optimizer()

        graph, weights = nnx.split(nnx.eval_shape(lambda: model(nnx.Rngs(0))))
        on = lambda shape, sharding: jax.ShapeDtypeStruct(  # noqa: E731
            shape.shape, shape.dtype, sharding=sharding
        )
        weights = jax.tree.map(lambda shape: on(shape, everywhere), weights)
        moments = adam_jax.state_shardings(tx, weights, zero="data")
        shardings = Trained(jax.tree.map(lambda _: everywhere, weights), moments)
        shapes = Trained(weights, jax.eval_shape(tx.init, weights))
        self.shapes = jax.tree.map(on, shapes, shardings)

        def loss(weights, inputs, targets):
            logits = nnx.merge(graph, weights)(inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        # Each in one compiled function: so all processes start the collectives in one order.
        @partial(jax.jit, out_shardings=shardings)
        def start(key):
            weights = nnx.split(model(nnx.Rngs(key)))[1]
            return Trained(weights, tx.init(weights))

        @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, everywhere))
        def step(trained, inputs, targets):
            value, grads = jax.value_and_grad(loss)(trained.weights, inputs, targets)
            updates, state = tx.update(grads, trained.optimizer, trained.weights)
            return Trained(optax.apply_updates(trained.weights, updates), state), value

        self.start, self.step = start, step

    def batch(self, seed: int, position: int) -> list[jax.Array]:
        """Inputs and targets: a function of seed and position, however many devices there are.

        A process makes only the rows of its own devices.
        """
        last = len(self.text) - transformer.CONTEXT - 1
        starts = np.random.default_rng((seed, position)).integers(0, last, BATCH)

        def placed(part):
            rows = lambda index: transformer.next_characters(self.text, starts[index[0]])[part]  # noqa: E731
            return jax.make_array_from_callback((BATCH, transformer.CONTEXT), self.split, rows)

        return [placed(0), placed(1)]


def train(options: argparse.Namespace, devices=None) -> None:
    first = jax.process_index() == 0
    say = partial(print, flush=True) if first else lambda _: None
    trainer = Trainer(devices)
    count = len(trainer.split.device_set)
    with opened(options.checkpoints) as manager:
        position = manager.latest_step() or 0
        if position:
            say(f"restoring step {position} of {options.checkpoints}")
            trained, history = restored(manager, position, trainer.shapes, options.seed)
        else:
            trained = trainer.start(jax.random.key(options.seed))
            history = {"losses": [], "starts": []}
        history["starts"].append(position)
        say(
            f"step {position} of {options.steps}: {count} devices ({jax.devices()[0].device_kind}) "
            f"in {jax.process_count()} processes"
        )
        began = time.perf_counter()
        steps = range(position, options.steps)
        bar = tqdm(steps, initial=position, total=options.steps, unit="step", disable=not first)
        for position in bar:
            trained, loss = trainer.step(trained, *trainer.batch(options.seed, position))
            history["losses"].append(loss)
            done = position + 1
            told_to_end = manager.reached_preemption(done)  # by SIGTERM, all at the same step
            if done % EVERY == 0 or done == options.steps or told_to_end:
                history["losses"] = [float(loss) for loss in history["losses"]]
                bar.set_postfix(loss=np.mean(history["losses"][-EVERY:]))
                save(manager, done, trained, options.seed, history)
            if told_to_end:
                with explained(f"{manager.directory} cannot be written"):
                    manager.wait_until_finished()
                sentence = f"SIGTERM came; the same command goes on from step {done}"
                raise RunError(sentence, code=128 + signal.SIGTERM)
        with explained(f"{manager.directory} cannot be written"):
            manager.wait_until_finished()
    seconds = time.perf_counter() - began
    skipped = int(trained.optimizer.total_notfinite)
    if first:
        draw(history, options.plot)
    say(
        f"{len(steps)} steps in {seconds:.0f} s; {skipped} left out, their gradients were not "
        f"finite; loss {np.mean(history['losses'][-EVERY:]):.4f}: {options.plot}"
    )


# --- Checkpoints ----------------------------------------------------------------------------------


@contextlib.contextmanager
def explained(what: str):
    """An error of what is done inside, in one sentence; that of a peer which died stays."""
    # After an error, what orbax had begun to read ends in more of them, which nobody can catch.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    except (RunError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason, *_ = re.split(r"\n| \[", str(cause).strip())  # the rest is TensorStore's settings
        raise RunError(f"{what}: {reason or type(cause).__name__}") from error
    sys.unraisablehook = hook


@contextlib.contextmanager
def opened(directory: Path):
    """The checkpoints in a directory, for this run alone."""
    directory = directory.absolute()
    with contextlib.ExitStack() as stack:
        with explained(f"{directory} cannot hold checkpoints"):
            if jax.process_index() == 0:
                directory.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((directory / "lock").open("w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RunError(
                        f"another run writes to {directory}; if that is this job's, JAX did not "
                        f"recognize what started it (see jax.distributed.initialize)"
                    ) from None
            options = ocp.CheckpointManagerOptions(max_to_keep=3, cleanup_tmp_directories=True)
            manager = ocp.CheckpointManager(directory, options=options)
        yield manager
        manager.close()


def described(tree) -> dict[str, str]:
    """What stands where in a tree, like {".weights['norm']['bias']": "float32[128]"}."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def save(manager, position: int, trained: Trained, seed: int, history: dict) -> None:
    """Start to write a checkpoint, once the one before is complete."""
    run = {
        "position": position,
        "seed": seed,
        "leaves": described(trained),
        **copy.deepcopy(history),  # it is written while the training goes on
    }
    with explained(f"{manager.directory} cannot be written"):
        args = ocp.args.Composite(
            trained=ocp.args.StandardSave(trained), run=ocp.args.JsonSave(run)
        )
        manager.save(position, args=args, force=True)


def restored(manager, position: int, shapes: Trained, seed: int) -> tuple[Trained, dict]:
    """A checkpoint, and the history of its run, laid out for the devices at hand."""
    place = manager.directory / str(position)
    unread = f"cannot be read; remove {place} to go on from the checkpoint before"
    with explained(f"{place}/run {unread}"):
        run = manager.restore(position, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        kept, needed = run["leaves"], described(shapes)
        history = {name: run[name] for name in ("losses", "starts")}
        kept_seed = run["seed"]
    for leaf in {**needed, **kept}:
        here, there = needed.get(leaf, "no such leaf"), kept.get(leaf, "no such leaf")
        if here != there:
            raise RunError(
                f"{place} is of another model or optimizer: {leaf} is {there}, not {here}"
            )
    if kept_seed != seed:
        raise RunError(f"{place} is of a run with --seed {kept_seed}, not {seed}")
    with explained(f"{place}/trained {unread}"):
        args = ocp.args.Composite(trained=ocp.args.StandardRestore(shapes))
        return manager.restore(position, args=args)["trained"], history


# --- Processes ------------------------------------------------------------------------------------


def run(options: argparse.Namespace, rank: int | None = None, address: str = "") -> None:
    """Join the other processes and train; after an error, end at once.

    JAX's own goodbye would wait for the other processes, which wait for this one.
    """
    try:
        if options.processes or options.devices:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", options.devices or 1)
        if rank is not None:
            jax.distributed.initialize(
                address, options.processes, rank,
                cluster_detection_method="deactivate", heartbeat_timeout_seconds=HEARTBEAT,
            )  # fmt: skip
        else:
            try:
                jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
            except ValueError as error:
                if "coordinator_address" not in str(error):  # which no launcher has told
                    raise
        train(options)
    except RunError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        code = error.code
    except BaseException:
        traceback.print_exc()
        if rank is None:
            print(
                f"{Path(__file__).name}: ended by the error above, of this process or another one; "
                f"the same command goes on from the last checkpoint in {options.checkpoints}",
                file=sys.stderr,
            )
        code = 1
    else:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def one_of_several(options: argparse.Namespace, rank: int, address: str, log: str) -> None:
    """A process of `several`: it ends with the one that started it, and only the first is heard."""
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a kill would leave behind
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    if rank:
        with open(log, "w") as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
    run(options, rank, address)


def several(options: argparse.Namespace) -> None:
    """Start the processes on this machine; if one fails, end the others and say which it was."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        logs = [f"{folder}/{rank}" for rank in range(options.processes)]
        processes = [
            context.Process(target=one_of_several, args=(options, rank, address, log))
            for rank, log in enumerate(logs)
        ]
        try:
            for process in processes:
                process.start()
            print(*(f"process {i}: {p.pid}" for i, p in enumerate(processes)), sep=", ", flush=True)
            running = {process.sentinel: process for process in processes}

            def wait(seconds):
                for sentinel in multiprocessing.connection.wait(list(running), seconds):
                    running.pop(sentinel).join()

            while running and not any(process.exitcode for process in processes):
                wait(None)
            if running:
                wait(5)  # for another one: it may have failed first, or be about to say why
            failed = [rank for rank, process in enumerate(processes) if process.exitcode]
            # First what does not follow from the end of another process.
            failed.sort(key=lambda rank: processes[rank].exitcode in (1, -signal.SIGABRT))
        finally:
            for process in processes:
                process.kill()
                process.join()
        if not failed:
            return
        rank = failed[0]
        code = processes[rank].exitcode
        if rank and processes[0].exitcode != code:
            print(Path(logs[rank]).read_text(), end="", file=sys.stderr)
        if code == 2:
            sys.exit(2)
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        print(
            f"\n{Path(__file__).name}: process {rank} ended with {how}, so all were ended; "
            f"the same command goes on from the last checkpoint in {options.checkpoints}",
            file=sys.stderr,
        )
        sys.exit(1)


# --- Picture and command line ---------------------------------------------------------------------


def draw(history: dict, path: Path) -> None:
    losses = np.asarray(history["losses"])
    window = min(len(losses), 10)
    figure, axes = drawing.plt.subplots(figsize=(8, 4), layout="constrained")
    axes.plot(np.arange(1, len(losses) + 1), losses, color="tab:blue", alpha=0.3, label="a batch")
    axes.plot(*drawing.last_means(losses, window), label=f"mean of {window}")
    for i, start in enumerate(start for start in history["starts"] if 0 < start < len(losses)):
        label = None if i else "restored from a checkpoint"
        axes.axvline(start, color="tab:red", linewidth=0.8, linestyle="--", label=label)
    axes.set(title="Character transformer, data parallel", xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    drawing.save(figure, path)


def main() -> None:
    parser = commandline.parser(__doc__, steps=200, seed=0, plot="distributed.png")
    parser.add_argument(
        "--processes",
        type=commandline.positive,
        help="start so many on this machine, with simulated devices",
    )
    parser.add_argument(
        "--devices",
        type=commandline.positive,
        help="simulated devices a process (default: the real ones)",
    )
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("checkpoints"), metavar="DIR",
        help="where they are kept (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args()
    several(options) if options.processes else run(options)


if __name__ == "__main__":
    main()
