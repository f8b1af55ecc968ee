"""The examples, run as a user runs them: in a process of their own, but for what ends early."""

import functools
import gzip
import json
import math
import os
import re
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import basis
import jax
import jax.numpy as jnp
import memory
import mnist
import numpy as np
import optax
import pytest
import step
import transformer
from support import assert_close, random_params

import adam_jax

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(example, *arguments, cwd):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / example), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def stopped(example, monkeypatch, *arguments):
    """The exit code of an example that is stopped before its work, in this process."""
    main = runpy.run_path(str(EXAMPLES / example))["main"]
    monkeypatch.setattr(sys, "argv", [example, *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def digits(tmp_path):
    """A small full set: four IDX files, two of them gzipped."""
    rng = np.random.default_rng(0)
    directory = tmp_path / "digits"
    directory.mkdir()
    for part, count in (("train", 128), ("t10k", 64)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        (directory / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (directory / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return directory


@pytest.mark.parametrize("program", ["minimal.py", "minimal_equinox.py"])
def test_minimal(tmp_path, program):
    done = run(program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert float(re.search(r"step 600: loss [\d.]+, accuracy ([\d.]+)%", last)[1]) > 94


def test_pipeline(tmp_path):
    """Its last signal is Adam's tenth update, and gradients of any size have the same."""
    done = run("pipeline.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tx = adam_jax.adam(1e-3)
    state = tx.init(jnp.zeros(2))
    for noise in jax.random.normal(jax.random.key(1), (10,)):
        gradient = jnp.array([1 + noise, (1 + noise) * 1e-3])
        updates, state = tx.update(gradient, state)
    assert done.stdout.splitlines()[-1] == str(updates)
    assert float(updates[0]) == pytest.approx(float(updates[1]), rel=1e-4)
    assert {path.name for path in tmp_path.glob("*.svg")} == {"pipeline.svg", "pipeline-dark.svg"}


@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
def test_mnist_on_the_shipped_digits(tmp_path, loss):
    """Both optimizers learn, and agree to the last bit."""
    done = run("mnist.py", "--epochs", 3, "--loss", loss, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[0].isdigit()]
    epochs, totals = rows[:3], done.stdout.splitlines()[-2]
    assert [row[0] for row in epochs] == ["1", "2", "3"]
    assert float(epochs[2][1]) < float(epochs[0][1])
    assert float(epochs[2][2].rstrip("%")) > 88
    assert all(row[4] == "0" for row in epochs)
    assert "186 steps" in totals
    assert totals.endswith("largest difference of a weight 0")
    assert (tmp_path / "mnist.png").stat().st_size > 10_000
    assert "epoch 3" in done.stderr  # the progress bar


def test_the_mse_of_mnist_is_the_article_s():
    """Between softmax and one-hot labels: equal outputs are a tenth each, whatever they are."""
    outputs, labels = jnp.full((2, 10), 7.0), jnp.array([0, 9])
    expected = (0.9**2 + 9 * 0.1**2) / 10
    assert mnist.mean_squared_error(outputs, labels) == pytest.approx(expected)


def test_mnist_on_idx_files(tmp_path, digits):
    done = run("mnist.py", "--data-dir", digits, "--epochs", 1, "--plot", "one.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "128 digits to train, 64 to test" in done.stdout
    assert (tmp_path / "one.png").exists()


def broken(digits, problem):
    """Break one file, and say what must be complained of."""
    images = digits / "train-images-idx3-ubyte"
    labels = digits / "t10k-labels-idx1-ubyte.gz"
    match problem:
        case "no directory":
            return digits / "elsewhere", "There is no directory"
        case "missing":
            images.unlink()
            return digits, "has neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz."
        case "truncated":
            images.write_bytes(images.read_bytes()[:-1])
            return digits, "train-images-idx3-ubyte is truncated: 100367 bytes, its header says"
        case "empty":
            images.write_bytes(b"")
            return digits, "train-images-idx3-ubyte is truncated: 0 bytes, its header has 16."
        case "too long":
            images.write_bytes(images.read_bytes() + b"x")
            return digits, "train-images-idx3-ubyte is too long: 100369 bytes"
        case "wrong magic number":
            images.write_bytes(b"\0\0\x08\x01" + images.read_bytes()[4:])
            return digits, "train-images-idx3-ubyte starts with the magic number 2049"
        case "truncated gzip":
            labels.write_bytes(labels.read_bytes()[:-9])
            return digits, "t10k-labels-idx1-ubyte.gz is not a whole gzip file"
        case "not gzip":
            labels.write_bytes(b"not gzip")
            return digits, "t10k-labels-idx1-ubyte.gz is not a whole gzip file"
        case "counts":
            labels.write_bytes(gzip.compress(idx(np.zeros(63, np.uint8))))
            return digits, "has 64 t10k images but 63 t10k labels."
        case "label":
            labels.write_bytes(gzip.compress(idx(np.full(64, 10, np.uint8))))
            return digits, "has a t10k label 10, not a digit."


@pytest.mark.parametrize(
    "problem",
    [
        "no directory",
        "missing",
        "truncated",
        "empty",
        "too long",
        "wrong magic number",
        "truncated gzip",
        "not gzip",
        "counts",
        "label",
    ],
)
def test_mnist_says_what_is_wrong_with_the_data(digits, problem, monkeypatch, capsys):
    """One clear sentence and exit code 2, before anything else is printed."""
    directory, complaint = broken(digits, problem)
    assert stopped("mnist.py", monkeypatch, "--data-dir", directory) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.err.startswith("mnist.py: ")
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_mnist_help(monkeypatch, capsys):
    assert stopped("mnist.py", monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    for option in ("--data-dir", "--loss", "--epochs", "--plot", "article"):
        assert option in printed


def test_compare(tmp_path):
    """Two pictures, and the story they tell: Adam ends at the wrong end, AMSGrad at the minimum."""
    done = run("compare.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ends = dict(re.findall(r"(Adam|AMSGrad) +ends at ([+-][\d.]+)", done.stdout))
    assert float(ends["Adam"]) > 0.99
    assert float(ends["AMSGrad"]) < -0.99
    assert len(re.findall(r"rate [\d.e-]+ +loss [\d.e-]+", done.stdout)) == 14
    for picture in ("surfaces.png", "counterexample.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


def test_compare_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    assert stopped("compare.py", monkeypatch, "--directory", tmp_path / "nowhere") == 2
    assert "there is no directory" in capsys.readouterr().err


def test_memory(tmp_path, monkeypatch, capsys):
    """The first choice and the one with every part, two steps each on small networks."""
    monkeypatch.setattr(memory, "CHOICES", [memory.CHOICES[0], memory.CHOICES[10]])
    for name, value in {"LAYERS": 1, "WIDTH": 32, "CONTEXT": 16}.items():
        monkeypatch.setattr(transformer, name, value)
    monkeypatch.setattr(memory, "TIMED", {"width": 32, "vocabulary": 64, "context": 64})
    monkeypatch.setattr(memory, "gpt2", functools.partial(memory.gpt2, layers=1))
    monkeypatch.chdir(tmp_path)
    short = ["memory.py", "--seeds=1", "--steps=2", "--repeats=1", "--json=rows.json"]
    monkeypatch.setattr(sys, "argv", short)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        memory.main()
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in rows] == [choice.name for choice in memory.CHOICES]
    for row in rows:
        assert f"| {row['name']} | {row['weights']} | {row['state']:.2f} |" in printed
        assert all(0 < loss < 10 for losses in row["losses"].values() for loss in losses)
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_memory_refuses_a_missing_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert stopped("memory.py", monkeypatch, "--json", "no/where.json") == 2
    assert "there is no directory" in capsys.readouterr().err


def test_basis(tmp_path, monkeypatch, capsys):
    """Three bases, two steps each on a small network: the table, the bytes and the picture."""
    for name, value in {"LAYERS": 1, "WIDTH": 64, "CONTEXT": 16}.items():
        monkeypatch.setattr(transformer, name, value)
    monkeypatch.setattr(basis, "gpt2", functools.partial(memory.gpt2, layers=1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["basis.py", "--seeds=1", "--steps=2"])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        basis.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " | " in line]
    losses, kept = ({row[0]: row[i] for row in rows[1:]} for i in (1, 3))
    assert [name.strip("| ") for name in losses] == ["AdamW", "SOAP", "GaLore"]
    assert all(0 < float(loss.split()[0]) < 10 for loss in losses.values())
    adam, soap, galore = (float(size.strip("| ")) for size in kept.values())
    assert galore < adam / 2 < adam < soap
    assert (tmp_path / "basis.png").read_bytes().startswith(b"\x89PNG")


def test_benchmark(tmp_path, monkeypatch, capsys):
    """Every side on a small tree: the table, the figures and the picture."""
    monkeypatch.setitem(step.WORK, "1000-leaves", lambda: [(64, 64), (64,)])
    monkeypatch.chdir(tmp_path)
    short = ["step.py", "--work=1000-leaves", "--rounds=4", "--json=rows.json", "--plot=step.png"]
    monkeypatch.setattr(sys, "argv", [*short, "--sides", *step.SIDES])
    with jax.numpy_dtype_promotion("standard"):
        step.main()
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["side"] for row in rows] == step.SIDES
    for row in rows:
        assert f"| 1000-leaves, float32, donated | {row['side']} |" in printed
        assert len(row["seconds"]) == len(row["ratios"]) == 4
    assert set(rows[0]["ratios"]) == {1.0}
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_the_work_of_the_benchmark():
    count = lambda work: sum(math.prod(shape) for shape in step.WORK[work]())  # noqa: E731
    assert (count("gpt2"), len(step.gpt2())) == (124_439_808, 148)
    assert (count("resnet50"), len(step.resnet50())) == (25_557_032, 161)


RULES = [adam_jax.squared, adam_jax.belief, adam_jax.rules.yogi]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("b1", [0.9, None, lambda count: 0.9], ids=["number", "none", "schedule"])
def test_recomputed_moments_are_the_same(rule, b1, x64):
    grads = jax.tree.map(lambda x: x.astype(jnp.float64), random_params())
    moments = adam_jax.scale_by_moments(b1, second_moment=rule)
    results = []
    for stage in (moments, step.recompute(moments)):
        tx = optax.chain(stage, adam_jax.bias_correct(), adam_jax.scale_by_lr(1e-2))
        update, state = jax.jit(tx.update), tx.init(grads)
        for _ in range(3):
            updates, state = update(grads, state)
        results.append((updates, state))
    assert_close(*results, "fused")


ONE_KERNEL = """
import step
facts = step.jax_side("recompute", [(512, 300), (300, 4)], "float32", donate=True).facts
print(facts["kernels"], facts["bytes"], facts["temporaries"])
"""


def test_recompute_and_its_flag_make_one_kernel_of_a_leaf():
    flag = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
    done = subprocess.run(
        [sys.executable, "-c", ONE_KERNEL],
        env={**os.environ, "XLA_FLAGS": flag, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    kernels, moved, temporaries = map(float, done.stdout.split())
    assert kernels <= 2 + 14  # one of each leaf; jax 0.10.2 makes 11 for the scalars
    assert moved < 28.01  # bytes: reads g, m, v, p and writes m, v, p, and few scalars
    assert temporaries < 0.01
