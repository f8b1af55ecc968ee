"""What PyTorch computes, recorded: the tests need a small file, not several GB.

python tests/torch_references.py          # record; needs the extras [test] and [torch]
python tests/torch_references.py --check  # record again, and compare with the file
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FILE = Path(__file__).with_suffix(".npz")
STEPS = (1, 2, 3, 10, 30, 100, 200, 300, 400, 500)

# Of a number x recorded again, the error in units of 1 + |x|: another processor rounds sums and
# products elsewhere, and the gradients of a network feed that back.
TOLERANCES = {"float64": 1e-12, "float32": 1e-6}

# --- What is compared -----------------------------------------------------------------------------


class Given(NamedTuple):
    """A problem whose gradients are given, whatever the parameters are."""

    name: str
    params: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]  # an array of all steps for every parameter

    def gradient(self, params, t):
        return {name: gradients[t] for name, gradients in self.gradients.items()}


class Run(NamedTuple):
    """An optimizer of PyTorch on a problem, which has a name, params and gradient(params, t)."""

    problem: Any
    optimizer: str  # in torch.optim
    options: dict[str, Any]
    steps: Sequence[int] = STEPS  # after these the parameters are recorded
    with_state: bool = False  # and after the first of these the state of the optimizer

    def __str__(self):
        """The name in the file: numbers that were recorded with other options are not found."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.problem.name}: {self.optimizer}({options})"

    @property
    def rows(self):
        """Where the recorded steps are in a trajectory of all steps."""
        return np.asarray(self.steps) - 1


@functools.cache
def kept():
    """All arrays of the file."""
    with np.load(FILE) as arrays:
        return dict(arrays)


def recorded(run, part="params"):
    """The parameters after each step of a run; or its state/0, that of the first parameter, …"""
    start = f"{run}/{part}/"
    found = {name.removeprefix(start): x for name, x in kept().items() if name.startswith(start)}
    if not found:
        raise KeyError(f"{start} is not recorded. To record it: python tests/{Path(__file__).name}")
    return found


# --- Recording ------------------------------------------------------------------------------------


def record(run):
    """The arrays of a run by their names in the file."""
    import torch

    tensors = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in run.problem.params.items()}
    optimizer = getattr(torch.optim, run.optimizer)(tensors.values(), **run.options)

    def params():
        return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}

    arrays, trajectory = {}, [params()]
    for t in range(run.steps[-1]):
        for name, gradient in run.problem.gradient(trajectory[t], t).items():
            tensors[name].grad = torch.tensor(np.asarray(gradient))
            if run.optimizer == "SparseAdam":
                tensors[name].grad = tensors[name].grad.to_sparse(1)
        optimizer.step()
        trajectory.append(params())
        if run.with_state and t + 1 == run.steps[0]:
            for number, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    arrays[f"{run}/state/{number}/{name}"] = value.numpy().copy()
    for name in tensors:
        arrays[f"{run}/params/{name}"] = np.stack([trajectory[step][name] for step in run.steps])
    return arrays


def differences(arrays):
    """What is not as it is in the file, a line for each."""
    for name in sorted(arrays.keys() | kept().keys()):
        new, old = arrays.get(name), kept().get(name)
        if new is None or old is None:
            yield f"{name}: " + ("not recorded" if old is None else "recorded for no test")
        elif (new.shape, new.dtype) != (old.shape, old.dtype):
            yield f"{name}: {new.dtype}{new.shape}, but recorded {old.dtype}{old.shape}"
        else:
            error = np.max(np.abs(new - old) / (1 + np.abs(old)))
            if not error <= TOLERANCES[new.dtype.name]:
                yield f"{name}: differs by {error:.1e}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check = parser.parse_args().check

    import jax  # and the tests only here, for they import this file
    import test_equivalence_torch
    import test_family
    import test_from_optax
    import test_lazy

    jax.config.update("jax_enable_x64", True)
    arrays = {}
    for module in (test_equivalence_torch, test_family, test_from_optax, test_lazy):
        for run in module.RUNS:
            arrays |= record(run)
    if check:
        found = list(differences(arrays))
        print(*found, f"{len(arrays)} arrays, {len(found)} differ from {FILE.name}", sep="\n")
        raise SystemExit(bool(found))
    np.savez_compressed(FILE, **arrays)
    print(f"{len(arrays)} arrays, {FILE.stat().st_size:,} bytes: {FILE}")


if __name__ == "__main__":
    main()
