"""The example of many processes: killed at any moment, on other devices, on broken checkpoints.

`PYTHONPATH=examples:tests python tests/examples/test_distributed.py --kills 20` kills at twenty
random moments and prints a table.
"""

import argparse
import contextlib
import functools
import gc
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import distributed
import jax
import numpy as np
import optax
import pytest
import transformer
from support import assert_close

import adam_jax

# Where orbax cannot read a leaf, the others it had begun with fail later, in other threads.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PROCESSES, DEVICES = 2, 4
SMALL = {
    transformer: {"WIDTH": 64, "LAYERS": 0, "CONTEXT": 16},  # compiles fast; one leaf has 8 bits
    distributed: {"BATCH": 16, "EVERY": 4},
}

if __name__ in ("__main__", "__mp_main__"):  # the example itself, small: what `Job` starts
    for module, values in SMALL.items():
        vars(module).update(values)


# --- Jobs and kills -------------------------------------------------------------------------------


class Job:
    """The example in two processes, started by itself or as Slurm starts them."""

    def __init__(self, checkpoints: Path, steps: int, alone: bool, seed: int = 0):
        self.checkpoints, self.alone = checkpoints, alone
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONWARNINGS": "ignore",
            "JAX_COMPILATION_CACHE_DIR": str(checkpoints.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        slurm = {
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(PROCESSES),
            "JAX_COORDINATOR_PORT": port,
        }
        command = [sys.executable, __file__, "run", f"--steps={steps}", f"--devices={DEVICES}"]
        command += [f"--seed={seed}", f"--checkpoints={checkpoints}"]
        command += [f"--plot={checkpoints.parent / 'loss.png'}"]
        count = 1 if alone else PROCESSES
        self.outputs = [tempfile.TemporaryFile() for _ in range(count)]  # noqa: SIM115
        if alone:
            starts = [([*command, f"--processes={PROCESSES}"], environment)]
        else:
            ranks = [{"SLURM_PROCID": f"{i}", "SLURM_LOCALID": f"{i}"} for i in range(PROCESSES)]
            starts = [(command, environment | slurm | rank) for rank in ranks]
        self.started = [
            subprocess.Popen(arguments, env=env, stdout=output, stderr=output)
            for (arguments, env), output in zip(starts, self.outputs, strict=True)
        ]

    def output(self, rank: int = 0) -> str:
        return os.pread(self.outputs[rank].fileno(), 1 << 20, 0).decode()

    def wait_for(self, event) -> None:
        while not event():
            assert all(process.poll() is None for process in self.started), self.output()
            time.sleep(0.01)

    def complete(self) -> list[int]:
        """The steps whose checkpoints are complete."""
        names = [path.name for path in self.checkpoints.glob("*")]
        return sorted(int(name) for name in names if name.isdigit())

    def writing(self) -> bool:
        return any(self.checkpoints.glob("*tmp*"))

    def pids(self) -> list[int]:
        """Of the processes that train."""
        if self.alone:
            return [int(pid) for pid in re.findall(r"process \d: (\d+)", self.output())]
        return [process.pid for process in self.started]

    def send(self, what: int, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)

    def stopped_when(self, moment: str, rng: random.Random) -> None:
        """Let it run into such a moment, and hold all its processes there."""
        self.wait_for(lambda: "devices" in self.output() or "restoring" in self.output())
        delay = {"stepping": 0.1, "writing": 0.05, "restoring": 0.3}[moment]
        first = self.complete()
        while True:
            if moment == "stepping":
                self.wait_for(lambda: self.complete()[-1:] > first[-1:])
            elif moment == "writing":
                self.wait_for(self.writing)
            time.sleep(rng.uniform(0, delay))
            self.send(signal.SIGSTOP, self.pids())
            if (
                moment == "stepping"
                or (moment == "writing" and self.writing())
                or (moment == "restoring" and "devices" not in self.output())
            ):
                return
            self.send(signal.SIGCONT, self.pids())
            delay = 0  # it was too long for this machine
            if moment == "restoring":  # over already: any later moment will do
                moment = "stepping"

    def kill(self, victims: list[int]) -> float:
        """Kill -9 some of the processes, held as they are; the seconds until the others ended."""
        pids = self.pids()
        self.send(signal.SIGKILL, [pids[rank] for rank in victims])
        self.send(signal.SIGCONT, pids)
        start = time.perf_counter()
        for process in self.started:
            process.wait(timeout=240)
        return time.perf_counter() - start

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for output in self.outputs:
            output.close()


def finished(checkpoints: Path, steps: int, alone: bool) -> None:
    with contextlib.closing(Job(checkpoints, steps, alone)) as job:
        codes = [process.wait(timeout=240) for process in job.started]
        assert not any(codes), job.output()


def killed(checkpoints: Path, steps: int, alone: bool, moment: str, victims, rng) -> list[str]:
    """Start it, kill some of its processes, and check how the others end; a row of the table."""
    with contextlib.closing(Job(checkpoints, steps, alone)) as job:
        job.stopped_when(moment, rng)
        done, writing = job.complete(), job.writing()
        seconds = job.kill(victims)
        codes = [process.returncode for process in job.started]
        assert all(codes), (codes, job.output())
        if alone:
            assert codes == [1]
            assert f"process {victims[0]} ended with SIGKILL, so all were ended" in job.output(), (
                job.output()
            )
            for pid in job.pids():
                with pytest.raises(ProcessLookupError):
                    os.kill(pid, 0)
        # What is complete stays. Who was not killed may still complete what was being written, and
        # then remove the oldest of four.
        assert set(done[-2:]) <= set(job.complete())
        who = "all" if len(victims) == PROCESSES else f"process {victims[0]}"
        how = "loopback" if alone else "Slurm"
        last = str(done[-1]) if done else "none"
        row = [how, moment, who, "yes" if writing else "no", last, f"{seconds:.1f} s", f"{codes}"]
        ends = [job.output(rank) for rank in range(len(job.started)) if rank not in victims]
        if os.environ.get("SHOW"):
            print(*ends, sep="\n=====\n")
        return row


def kept(checkpoints: Path, step: int, devices: int = 1) -> dict[str, np.ndarray]:
    """Everything in a checkpoint, by its place, restored on so many devices."""
    trainer = distributed.Trainer(jax.devices()[:devices])
    with distributed.ocp.CheckpointManager(checkpoints) as manager:
        trained, history = distributed.restored(manager, step, trainer.shapes, seed=0)
    leaves = jax.tree_util.tree_leaves_with_path(trained)
    found = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return found | {"losses": np.asarray(history["losses"])}


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x.dtype, x.shape, x.tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes())


# --- The tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def small():
    """The small model, compiled fast and once for each number of devices; Flax needs promotion."""
    with pytest.MonkeyPatch.context() as patch:
        for module, values in SMALL.items():
            for name, value in values.items():
                patch.setattr(module, name, value)
        once, silent = functools.cache(distributed.Trainer), distributed.tqdm
        patch.setattr(distributed, "Trainer", lambda devices: once(tuple(devices)))
        patch.setattr(distributed, "tqdm", lambda steps, **_: silent(steps, disable=True))
        jax.config.update("jax_disable_most_optimizations", True)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoints 4, 8 and 12 of two processes with four devices each, which nobody killed."""
    checkpoints = tmp_path_factory.mktemp("distributed") / "whole"
    finished(checkpoints, steps=12, alone=True)
    return checkpoints


@pytest.fixture
def fourth(whole, tmp_path):
    """A copy of the first of them."""
    shutil.copytree(whole / "4", tmp_path / "checkpoints" / "4")
    return tmp_path / "checkpoints"


def options(checkpoints, **others):
    given = {"steps": 12, "seed": 0, "plot": checkpoints.parent / "loss.png"} | others
    return argparse.Namespace(checkpoints=checkpoints, processes=None, devices=None, **given)


def test_killed(whole):
    """While writing a checkpoint: the bits are those of the whole run.

    `.ci/run` kills at more moments, with the command above.
    """
    rng, checkpoints = random.Random(0), whole.parent / "killed"
    killed(checkpoints, 12, True, "writing", [1], rng)
    finished(checkpoints, steps=12, alone=False)
    same_bits(kept(checkpoints, 12), kept(whole, 12))


@pytest.mark.parametrize("devices", [8, 1])
def test_elastic(whole, fourth, devices):
    """From 8 devices of 2 processes to others: bit for bit restored; sums are then reordered."""
    same_bits(kept(fourth, 4, devices), kept(whole, 4))
    distributed.train(options(fourth), jax.devices()[:devices])
    found, expected = kept(fourth, 12), kept(whole, 12)
    for name in found:
        if name == "losses" or name.startswith(".weights"):
            assert_close(found[name], expected[name], "reordered")


def test_the_batch_does_not_depend_on_the_devices():
    batches = [distributed.Trainer(jax.devices()[:n]).batch(0, 5) for n in (1, 8)]
    np.testing.assert_equal(*[[np.asarray(x) for x in batch] for batch in batches])
    other = distributed.Trainer(jax.devices()[:1]).batch(0, 6)
    assert not np.array_equal(other[0], batches[0][0])


# --- Faults ---------------------------------------------------------------------------------------


def stopped(monkeypatch, capfd, given, devices=1):
    """The exit code of the example in this process, and what it says."""
    monkeypatch.setattr(jax.distributed, "initialize", no_launcher)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which the example changes
    train = functools.partial(distributed.train, devices=jax.devices()[:devices])
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "train", train)
        patch.setattr(os, "_exit", sys.exit)
        with pytest.raises(SystemExit) as caught:
            distributed.run(given)
    code = caught.value.code
    del caught  # with what orbax had begun to read, which ends now and not in another test
    gc.collect()
    return code, capfd.readouterr().err


def no_launcher(**_):
    raise ValueError("coordinator_address should be defined.")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def largest(folder: Path) -> Path:
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


BROKEN = {
    "data": lambda at: largest(at / "trained"),
    "manifest": lambda at: at / "trained/manifest.ocdbt",
    "metadata": lambda at: at / "trained/_METADATA",
    "history": lambda at: at / "run/metadata",
}


@pytest.mark.parametrize("part", BROKEN)
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_a_broken_checkpoint(fourth, part, how, monkeypatch, capfd):
    path = BROKEN[part](fourth / "4")
    if how == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    before = contents(fourth / "4")
    code, error = stopped(monkeypatch, capfd, options(fourth))
    assert code == 2
    item = path.relative_to(fourth / "4").parts[0]
    assert error.startswith(
        f"distributed.py: {fourth}/4/{item} cannot be read; remove {fourth}/4 to go on"
    )
    assert error.count("\n") == 1
    assert contents(fourth / "4") == before


FOREIGN = {
    "seed": "is of a run with --seed 0, not 1",
    "optimizer": r"of another model or optimizer: .optimizer\S+ is no such leaf, not ",
    "model": r"optimizer: .weights\S+ is float32\[64\], not float32\[16\]",
    "devices": "7 devices do not divide a batch of 16",
    "in use": "another run writes to",
    "a file": "cannot hold checkpoints: .*File exists",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_another_checkpoint(fourth, what, monkeypatch, capfd):
    given, devices = options(fourth), 7 if what == "devices" else 1
    stack = contextlib.ExitStack()
    match what:
        case "seed":
            given.seed = 1
        case "optimizer":
            monkeypatch.setattr(distributed, "optimizer", lambda: adam_jax.amsgrad(1e-3))
            monkeypatch.setattr(
                distributed, "Trainer", type(distributed.Trainer(jax.devices()[:1]))
            )
        case "model":
            monkeypatch.setattr(transformer, "WIDTH", 16)
            monkeypatch.setattr(
                distributed, "Trainer", type(distributed.Trainer(jax.devices()[:1]))
            )
        case "in use":
            stack.enter_context(distributed.opened(fourth))
        case "a file":
            given.checkpoints = fourth.parent / "file"
            given.checkpoints.write_text("")
    before = contents(fourth / "4")
    with stack:
        code, error = stopped(monkeypatch, capfd, given, devices)
    assert code == 2
    assert re.search(FOREIGN[what], error), error
    assert error.count("\n") == 1
    assert contents(fourth / "4") == before


def test_sigterm(fourth, whole, monkeypatch, capfd):
    """A checkpoint of the last step, and from there on the bits are those of the whole run."""
    reached = distributed.ocp.CheckpointManager.reached_preemption
    monkeypatch.setattr(
        distributed.ocp.CheckpointManager, "reached_preemption", lambda self, step: step == 6
    )
    code, error = stopped(monkeypatch, capfd, options(fourth))
    assert code == 128 + signal.SIGTERM
    assert error == "distributed.py: SIGTERM came; the same command goes on from step 6\n"
    monkeypatch.setattr(distributed.ocp.CheckpointManager, "reached_preemption", reached)
    distributed.train(options(fourth), jax.devices()[:1])
    assert kept(fourth, 12)["losses"].shape == (12,)


def test_a_full_disk(fourth, monkeypatch, capfd):
    """Files end at 10,000 bytes: the sentence names the checkpoint, and the one before is whole."""
    before, limits = contents(fourth / "4"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        code, error = stopped(monkeypatch, capfd, options(fourth))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert error.startswith(f"distributed.py: {fourth} cannot be written: "), error
    assert f"{fourth}/8" in error
    assert error.count("\n") == 1
    assert contents(fourth / "4") == before
    distributed.train(options(fourth), jax.devices()[:1])
    assert {path.name for path in fourth.glob("*")} == {"4", "8", "12", "lock"}


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_gradients_that_are_not_finite_are_left_out(name):
    """At random steps, in the example's way: the bits are those of a run that never met them."""
    how = adam_jax.storage.int8() if name == "int8" else None
    adamw = adam_jax.adamw(1e-2, mu_storage=how, nu_storage=how)
    tx = optax.apply_if_finite(adamw, max_consecutive_errors=10)
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(40, 64, 64)).astype("float32")
    bad = rng.choice(40, 12, replace=False)
    kept = np.delete(grads, bad, axis=0)
    grads[bad, rng.integers(64, size=12), 5] = rng.choice([np.nan, np.inf, -np.inf], 12)

    @jax.jit
    def end(grads):
        params = jax.numpy.ones((64, 64))

        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

    (params, state), (expected, never) = end(grads), end(kept)
    assert (state.total_notfinite, never.total_notfinite) == (12, 0)
    found = jax.tree.leaves((params, state.inner_state))
    for a, b in zip(found, jax.tree.leaves((expected, never.inner_state)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_processes_on_another_checkpoint(whole):
    """The same through two real processes."""
    job = Job(whole, 12, alone=True, seed=1)
    with contextlib.closing(job):
        assert job.started[0].wait(timeout=240) == 2
        assert job.output().count("is of a run with --seed 0, not 1") == 1


def table(folder: Path, kills: int, seed: int) -> None:
    """Kill at so many random moments, and compare the end with that of a run nobody killed."""
    rng = random.Random(seed)
    steps = distributed.EVERY * (kills + 2)
    finished(folder / "whole", steps, alone=True)
    print(
        "| kill | started by | while | who | writing | complete | others ended after | exit codes |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for number in range(1, kills + 1):
        moment = rng.choice(["stepping", "writing", "restoring"] if number > 1 else ["stepping"])
        victims = rng.choice([[0], [1], [0, 1]])
        row = killed(folder / "killed", steps, rng.random() < 0.5, moment, victims, rng)
        print(f"| {number} | " + " | ".join(row) + " |", flush=True)
    finished(folder / "killed", steps, alone=False)
    same_bits(kept(folder / "killed", steps), kept(folder / "whole", steps))
    print(f"\n{steps} steps: the same bits as without kills")


if __name__ == "__main__":
    if sys.argv[1] == "run":
        import faulthandler

        faulthandler.dump_traceback_later(240, exit=True)
        del sys.argv[1]
        distributed.main()
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("--kills", type=int, default=20)
        parser.add_argument("--seed", type=int, default=0)
        options = parser.parse_args()
        with tempfile.TemporaryDirectory() as name:
            table(Path(name), options.kills, options.seed)
