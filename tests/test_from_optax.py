"""States that are taken over: those of optax, of PyTorch, of adam_jax 0.1.0, of other storages."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import assert_close, mesh_of, refused
from tables import STORAGES, keeping
from torch_references import Given, Run, recorded

import adam_jax
from adam_jax import storage

RNG = np.random.default_rng(0)
PARAMS = {
    "kernel": jnp.asarray(RNG.normal(size=(64, 64)), "float32"),
    "bias": jnp.asarray(RNG.normal(size=3), "float32"),
}


def gradients(steps):
    return {
        name: RNG.normal(size=(steps, *x.shape)).astype("float32") for name, x in PARAMS.items()
    }


# --- From optax -----------------------------------------------------------------------------------

SCHEDULE = optax.cosine_decay_schedule(1e-2, 30)
TAKEN = {
    "radam": (optax.radam(1e-2), adam_jax.radam(1e-2)),
    "adabelief": (optax.adabelief(1e-2), adam_jax.adabelief(1e-2)),
    "yogi": (optax.yogi(1e-2), adam_jax.yogi(1e-2)),
    "amsgrad": (optax.amsgrad(1e-2), adam_jax.amsgrad(1e-2)),
    "lion": (optax.lion(1e-2), adam_jax.lion(1e-2)),
    "ademamix": (optax.contrib.ademamix(1e-2), adam_jax.ademamix(1e-2)),
    "in a chain": tuple(
        optax.chain(optax.clip_by_global_norm(1.0), library.adam(1e-2))
        for library in (optax, adam_jax)
    ),
    "masked": tuple(
        optax.masked(library.adamw(SCHEDULE), lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
        for library in (optax, adam_jax)
    ),
    "partition": tuple(
        optax.partition(
            {"slow": library.adamw(1e-3), "fast": library.adamw(SCHEDULE)},
            {"kernel": "slow", "bias": "fast"},
        )
        for library in (optax, adam_jax)
    ),
    "inject_hyperparams": tuple(
        optax.inject_hyperparams(library.adamw, hyperparam_dtype=jnp.float32)(1e-2)
        for library in (optax, adam_jax)
    ),
}


@functools.partial(jax.jit, static_argnums=0)
def updates_of(side, params, states, grads):
    with jax.numpy_dtype_promotion("standard"):
        both = {name: tx[side].update(grads, states[name], params) for name, tx in TAKEN.items()}
    return tuple({name: each[i] for name, each in both.items()} for i in (0, 1))


def steps_of(side, params, states, grads):
    """The updates of one side of every pair, and its last states."""
    emitted = []
    for i in range(len(grads["bias"])):
        grad = jax.tree.map(lambda g, i=i: g[i], grads)
        updates, states = updates_of(side, params, states, grad)
        emitted.append(updates)
    return emitted, states


def test_from_optax():
    """Seven steps of optax, then seven of this package: those of optax, bit for bit.

    The state is the one that this package would have had by itself.
    """
    first, second = gradients(7), gradients(7)
    old, own = (
        steps_of(side, PARAMS, {name: tx[side].init(PARAMS) for name, tx in TAKEN.items()}, first)[
            1
        ]
        for side in (0, 1)
    )
    with jax.numpy_dtype_promotion("standard"):
        taken = {k: adam_jax.from_optax(tx, PARAMS, old[k]) for k, (_, tx) in TAKEN.items()}
    chex.assert_trees_all_equal(taken, own, strict=True)
    expected, _ = steps_of(0, PARAMS, old, second)
    actual, _ = steps_of(1, PARAMS, taken, second)
    for updates in (*actual, *expected):  # where optax rounds b1 and b2 to float32 first
        del updates["inject_hyperparams"]
    chex.assert_trees_all_equal(actual, expected)


def state_of(**changed):
    """A state of optax after a million steps."""
    moments = {"mu": PARAMS, "nu": jax.tree.map(jnp.square, PARAMS)}
    return optax.ScaleByAdamState(**{"count": jnp.int32(1_000_000), **moments, **changed})


KEPT = {"dtype": keeping("bfloat16"), **{name: keeping(name) for name in STORAGES}}


@pytest.mark.parametrize("name", KEPT)
def test_moments_are_taken_over_into_a_storage(name):
    tx = adam_jax.adamw(1e-2, **KEPT[name])
    old = state_of()
    state = adam_jax.from_optax(tx, PARAMS, old)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(PARAMS))
    for moment, own in (("mu", state[0].mu), ("nu", state[0].nu)):
        how, full = KEPT[name].get(f"{moment}_storage"), getattr(old, moment)
        if how is None:
            chex.assert_trees_all_equal(own, full)
            continue
        how = storage.cast(how) if isinstance(how, str) else how
        leaf = storage.Leaf(moment, "kernel", (64, 64), jnp.dtype("float32"), 1)
        parts = own if isinstance(own, tuple) else (own,)
        stored = [part["kernel"] for part in parts if part["kernel"].dtype != bool]
        due = jax.tree.leaves(how.save(full["kernel"], leaf))
        assert_close(stored, due, "float32 mean")
        if name not in ("dtype", "cast"):
            chex.assert_trees_all_equal(parts[-1]["bias"], full["bias"])


def test_rates_that_moved():
    """The weights are those of all rates so far, which 1 - b**t would not be: 1 - the product."""
    rate = lambda count: 1 - (count.astype(float) + 2) ** -0.8  # noqa: E731
    tx = adam_jax.scale_by_moments(b2=rate)
    state = adam_jax.from_optax(tx, PARAMS, state_of(count=jnp.int32(100)))
    weight = 1 - np.prod([1 - (count + 2.0) ** -0.8 for count in range(100)])
    assert_close(state.weights[0, 1], weight, "moving")


def test_a_run_in_float32_goes_on_in_8_bits():
    """A state of this package is one that has count, mu, nu and nu_max, too."""
    old = adam_jax.amsgrad(1e-2)
    _, state = old.update(PARAMS, old.init(PARAMS), PARAMS)
    new = adam_jax.amsgrad(1e-2, **keeping("int8"))
    taken = adam_jax.from_optax(new, PARAMS, state)
    chex.assert_trees_all_equal(taken[0].weights, state[0].weights)
    for was, now in ((state[0].nu, taken[0].nu), (state[2].nu_max, taken[2].nu_max)):
        due = storage.int8().save(
            was["kernel"], storage.Leaf("nu", "kernel", (64, 64), jnp.dtype("float32"), 1)
        )
        chex.assert_trees_all_equal((now.codes["kernel"], now.scales["kernel"]), due[:2])
        chex.assert_trees_all_equal(now.whole["bias"], was["bias"])


def test_taken_over_on_many_devices():
    """Compiled, with the shardings of the new state."""
    mesh = mesh_of(data=8)
    params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
    tx = adam_jax.adamw(1e-2, **keeping("int8"))
    shardings = adam_jax.state_shardings(tx, params, zero="data")
    take_over = jax.jit(functools.partial(adam_jax.from_optax, tx), out_shardings=shardings)
    state = take_over(params, state_of())
    assert state[0].mu.codes["kernel"].addressable_shards[0].data.shape == (64, 8)
    chex.assert_trees_all_equal(state, adam_jax.from_optax(tx, PARAMS, state_of()))


def test_an_init_that_is_compiled_elsewhere_stays_as_it_was():
    """As for a state that is made in parts, on many devices."""
    tx = adam_jax.scale_by_moments(**keeping("int8"))
    compiled = optax.GradientTransformationExtraArgs(jax.jit(tx.init), tx.update)
    taken = adam_jax.from_optax(compiled, PARAMS, state_of())
    chex.assert_trees_all_equal(taken, adam_jax.from_optax(tx, PARAMS, state_of()))
    chex.assert_trees_all_equal(compiled.init(PARAMS), tx.init(PARAMS))
    chex.assert_trees_all_equal(taken, adam_jax.from_optax(compiled, PARAMS, state_of()))


@pytest.mark.parametrize(
    ("tx", "state", "error", "names"),
    [
        (adam_jax.adam(1e-2), optax.sgd(1e-2, 0.9).init(PARAMS), TypeError, "count mu nu"),
        (adam_jax.adam(1e-2), state_of(mu={"bias": PARAMS["bias"]}), ValueError,
         "scale_by_moments mu 'kernel' start_missing"),
        (adam_jax.adam(1e-2), state_of(nu={**PARAMS, "bias": jnp.ones(4)}), ValueError,
         "nu (3,) 'bias' (4,)"),
        (adam_jax.adam(1e-2), state_of(mu={**PARAMS, "head": jnp.ones(4)}), ValueError,
         "mu scale_by_moments 'head' tx"),
        (adam_jax.lion(1e-2), state_of(), ValueError, "nu 'bias', 'kernel'"),
        (optax.adam(1e-2), state_of(), ValueError, "mu 'bias', 'kernel'"),
        (adam_jax.adam(1e-2), (state_of(), state_of(count=jnp.int32(7))), ValueError,
         "counts 1000000, 7"),
        (optax.MultiSteps(adam_jax.adam(1e-2), 4), state_of(count=jnp.int32(8)), ValueError,
         "counts 8, 2"),
    ],
)  # fmt: skip
def test_wrong_use(tx, state, error, names):
    with jax.numpy_dtype_promotion("standard"), refused(error, names):
        adam_jax.from_optax(tx, PARAMS, state)


def test_an_optimizer_after_a_failed_take_over_starts_at_zero():
    """What the moments of one state start from is forgotten with it."""
    with refused(ValueError, "nu start_missing"):
        adam_jax.from_optax(adam_jax.adam(1e-2), PARAMS, state_of(nu={}))
    assert not jnp.any(adam_jax.adam(1e-2).init(PARAMS)[0].mu["kernel"])


# --- What else a state of optax has ---------------------------------------------------------------


def stepped(tx, state, steps, seed=0):
    """The last update and state after some steps."""
    rng, update = np.random.default_rng(seed), jax.jit(tx.update)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)
            updates, state = update(grads, state, PARAMS)
    return updates, state


def goes_on(theirs, ours, **said):
    """Five steps of optax, then five of both."""
    _, old = stepped(theirs, theirs.init(PARAMS), 5)
    taken = adam_jax.from_optax(ours, PARAMS, old, **said)
    return stepped(theirs, old, 5, seed=1)[0], stepped(ours, taken, 5, seed=1)[0]


def injected(library, rate, **others):
    return optax.inject_hyperparams(library.adam, hyperparam_dtype=jnp.float32)(rate, **others)


@pytest.mark.parametrize("restored", [False, True])
def test_an_injected_rate_stays(restored):
    _, old = stepped(tx := injected(optax, 1e-3), injected(optax, 1e-3).init(PARAMS), 3)
    old.hyperparams["learning_rate"] = jnp.float32(1e-4)
    old.hyperparams["eps"] = jnp.float32(1e-6)
    taken = adam_jax.from_optax(
        injected(adam_jax, 1e-2), PARAMS, as_restored(old) if restored else old
    )
    assert taken.hyperparams["learning_rate"] == jnp.float32(1e-4)
    assert taken.hyperparams["eps"] == jnp.float32(1e-6)
    expected, actual = stepped(tx, old, 1)[0], stepped(injected(adam_jax, 1e-2), taken, 1)[0]
    assert_close(actual, expected, "contracted")


def test_an_injected_schedule_is_that_of_the_new_optimizer():
    """At the step that the old state has come to."""
    _, old = stepped(injected(optax, 1e-3), injected(optax, 1e-3).init(PARAMS), 3)
    with jax.numpy_dtype_promotion("standard"):
        taken = adam_jax.from_optax(tx := injected(adam_jax, SCHEDULE), PARAMS, old)
        due = jax.jit(SCHEDULE)(jnp.int32(3))
    assert_close(stepped(tx, taken, 1)[1].hyperparams["learning_rate"], due, "contracted")


def test_an_injected_rate_that_would_be_lost_is_refused():
    _, old = stepped(injected(optax, 1e-3), injected(optax, 1e-3).init(PARAMS), 3)
    with refused(ValueError, "learning_rate optax.inject_hyperparams inner_state"):
        adam_jax.from_optax(adam_jax.adam(1e-2), PARAMS, old)
    only_rate = optax.inject_hyperparams(lambda learning_rate: adam_jax.adam(learning_rate))(1e-2)
    with refused(ValueError, "b1, b2, eps, eps_root optax.inject_hyperparams"):
        adam_jax.from_optax(only_rate, PARAMS, old)
    assert adam_jax.from_optax(adam_jax.adam(1e-2), PARAMS, old.inner_state)[0].count == 3


def test_reduce_on_plateau():
    """What it has learnt of the losses stays, and the weights are those of the schedule."""

    def made(library, **rates):
        plateau = optax.contrib.reduce_on_plateau(patience=1)
        return optax.chain(library.adam(1e-2, **rates), plateau)

    theirs, state = made(optax), made(optax).init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(5):
            _, state = theirs.update(PARAMS, state, PARAMS, value=1.0)
        assert state[1].scale < 0.1
        taken = adam_jax.from_optax(made(adam_jax), PARAMS, state)
        chex.assert_trees_all_equal(taken[1], state[1])
        expected, _ = jax.jit(theirs.update)(PARAMS, state, PARAMS, value=1.0)
        actual, _ = jax.jit(made(adam_jax).update)(PARAMS, taken, PARAMS, value=1.0)
        chex.assert_trees_all_equal(actual, expected)

        new = made(adam_jax, b1=lambda count: 1 - (count.astype(float) + 2) ** -0.8)
        taken = adam_jax.from_optax(new, PARAMS, state[0])
    weight = 1 - np.prod([1 - (count + 2.0) ** -0.8 for count in range(5)])
    assert_close(taken[0][0].weights[0, 0], weight, "moving")
    assert taken[1].scale == 1  # which the old state did not have


def test_a_sum_of_gradients():
    """A state without moments has a count all the same, that of its schedule."""
    with jax.numpy_dtype_promotion("standard"):  # of the schedule
        expected, actual = goes_on(optax.sgd(SCHEDULE, 0.9), adam_jax.sgd(SCHEDULE, 0.9))
    assert_close(actual, expected, "contracted")


def test_into_another_basis():
    """There the first step makes the basis, and the moments do not count it."""
    tx = adam_jax.in_basis(adam_jax.basis.eigenvectors(), adam_jax.adam(1e-2))
    _, old = stepped(optax.adam(1e-2), optax.adam(1e-2).init(PARAMS), 3)
    taken = adam_jax.from_optax(tx, PARAMS, old)
    assert taken.count == taken.inner[0].count + 1 == 4
    chex.assert_trees_all_equal(taken.inner[0].nu, old[0].nu)


@pytest.mark.parametrize("name", ["adamax", "adamaxw"])
def test_adamax(name):
    """optax keeps the norm u, here u**2 is kept. The state does not tell, so it must be said."""
    theirs, ours = getattr(optax, name)(1e-2), getattr(adam_jax, name)(1e-2)
    expected, actual = goes_on(theirs, ours, of="adamax")
    assert_close(actual, expected, "contracted")
    with refused(ValueError, "tx keeps of='adamax'"):
        goes_on(theirs, ours)
    with refused(ValueError, "tx not keep of='adamax'"):
        goes_on(theirs, adam_jax.adam(1e-2), of="adamax")
    _, own = stepped(ours, ours.init(PARAMS), 3)
    chex.assert_trees_all_equal(adam_jax.from_optax(ours, PARAMS, own), own)


def test_adopt():
    """Its first moment averages normalized gradients, in optax and here."""
    expected, actual = goes_on(optax.contrib.adopt(1e-2), adam_jax.adopt(1e-2), of="adopt")
    assert_close(actual, expected, "contracted")
    with refused(ValueError, "mu normalized 'bias', 'kernel'"):
        goes_on(optax.contrib.adopt(1e-2), adam_jax.adam(1e-2), of="adopt")


@pytest.mark.parametrize("member", [adam_jax.adopt, adam_jax.laprop])
def test_an_adam_is_no_average_of_normalized_gradients(member):
    with refused(ValueError, "mu normalized of='adopt' tx.init"):
        goes_on(optax.adam(1e-2), member(1e-2))
    own = adam_jax.adam(1e-2)
    with refused(ValueError, "mu normalized"):
        adam_jax.from_optax(member(1e-2), PARAMS, own.init(PARAMS))
    with refused(ValueError, "mu normalized"):
        adam_jax.from_optax(own, PARAMS, member(1e-2).init(PARAMS))


@pytest.mark.parametrize("how", [keeping(), keeping("int8")], ids=["whole", "int8"])
def test_a_model_that_grew(how):
    tx, grown = adam_jax.adamw(1e-2, **how), {**PARAMS, "layer": jnp.ones((64, 65))}
    grown["neck"] = jnp.ones(2)
    _, old = stepped(optax.adamw(1e-2), optax.adamw(1e-2).init(PARAMS), 3)
    with refused(ValueError, "'layer', 'neck' start_missing=True"):
        adam_jax.from_optax(tx, grown, old)
    taken = adam_jax.from_optax(tx, grown, old, start_missing=True)
    fresh, without = tx.init(grown), adam_jax.from_optax(tx, PARAMS, old)
    for name, due in (("layer", fresh), ("neck", fresh), ("kernel", without), ("bias", without)):
        pick = functools.partial(jax.tree.map, lambda tree, name=name: tree[name])
        is_dict = lambda node: isinstance(node, dict)  # noqa: E731
        chex.assert_trees_all_equal(
            *(pick(state[0][1:3], is_leaf=is_dict) for state in (taken, due))
        )
    chex.assert_trees_all_equal(taken[0].weights, without[0].weights)


# --- From adam_jax 0.1.0 --------------------------------------------------------------------------


def as_restored(state):
    """Of dicts and lists, as a checkpoint restores it without a target."""
    if hasattr(state, "_asdict"):
        state = state._asdict() or None
    if isinstance(state, dict):
        return {name: as_restored(value) for name, value in state.items()}
    if isinstance(state, (tuple, list)):
        return list(map(as_restored, state))
    return None if state is None else np.asarray(state)


def as_first_version(state):
    """A restored state with the fields that adam_jax 0.1.0 had."""
    if isinstance(state, list):
        return list(map(as_first_version, state))
    if not isinstance(state, dict):
        return None if state is not None and state.dtype == bool else state
    state = dict(state)
    moments = [name for name in ("mu", "nu") if state.get(name) is not None]
    if "weights" in state:
        rows = "value", "ahead", "error", "age", "decay"
        columns = [dict(zip(rows, column, strict=True)) for column in state.pop("weights").T]
        state |= {"mu_weight": None, "nu_weight": None}
        state |= {f"{m}_weight": column for m, column in zip(moments, columns, strict=True)}
    elif "count" in state and not state.keys() & {"hyperparams", "inner_state"}:
        state["step"] = state.pop("count")
    return {name: as_first_version(value) for name, value in state.items()}


SLOWER = lambda count: 0.9 - 0.3 / (count.astype(float) + 1)  # noqa: E731
FIRST_VERSION = {
    "adam": adam_jax.adam(1e-2),
    "schedules": adam_jax.adamw(SCHEDULE, b1=SLOWER),
    "amsgrad": adam_jax.amsgrad(1e-2, **keeping("int8")),
    "adamax": adam_jax.adamax(1e-2),
    "laprop": adam_jax.laprop(1e-2, **keeping("int4")),
    "factored": adam_jax.adopt(1e-2, nu_storage=storage.factored()),
    "ademamix": adam_jax.ademamix(1e-2),
    "momentum": adam_jax.momentum(1e-2, 0.9),
    "SOAP": adam_jax.in_basis(adam_jax.basis.eigenvectors(every=2), adam_jax.adam(1e-2)),
    "GaLore": adam_jax.in_basis(adam_jax.basis.singular_vectors(4), adam_jax.adam(1e-2)),
    "partition": TAKEN["partition"][1],
    "inject_hyperparams": injected(adam_jax, 1e-2),
}


@pytest.mark.parametrize("name", FIRST_VERSION)
def test_from_the_first_version(name):
    """A state of adam_jax 0.1.0, restored without a target, goes on bit for bit."""
    tx = FIRST_VERSION[name]
    _, state = stepped(tx, tx.init(PARAMS), 3)
    old = as_first_version(as_restored(state))
    assert "weights" not in str(old)
    with jax.numpy_dtype_promotion("standard"):
        taken = adam_jax.from_optax(tx, PARAMS, old)
    chex.assert_trees_all_equal_structs(taken, state)
    chex.assert_trees_all_equal(taken, state, strict=True)
    chex.assert_trees_all_equal(stepped(tx, taken, 2)[0], stepped(tx, state, 2)[0])


def test_a_checkpoint_without_a_target(tmp_path):
    tx = adam_jax.adamw(1e-2, **keeping("int8"))
    _, state = stepped(tx, tx.init(PARAMS), 3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        old = checkpointer.restore(tmp_path / "state")
    chex.assert_trees_all_equal(adam_jax.from_optax(tx, PARAMS, old), state, strict=True)
    with refused(ValueError, "nu 'codes/kernel' storage"):
        adam_jax.from_optax(adam_jax.adamw(1e-2, mu_storage=storage.int8()), PARAMS, old)


# --- From PyTorch ---------------------------------------------------------------------------------


# The parameters of a torch.nn.Linear(5, 3), in the order of its `named_parameters`.
LINEAR = {"weight": (3, 5), "bias": (3,)}


def linear_problem():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape) for name, shape in LINEAR.items()}
    grads = {name: rng.normal(size=(40, *shape)) for name, shape in LINEAR.items()}
    return Given("linear", params, grads)


RUNS = [
    Run(
        linear_problem(),
        "AdamW",
        {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": amsgrad},
        steps=range(20, 41),
        with_state=True,
    )
    for amsgrad in (False, True)
]


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.usefixtures("x64")
def test_from_pytorch(run):
    """Twenty steps there, then twenty here: those of PyTorch."""
    # The names here, those there, and whether the array is transposed between the two.
    names = {"kernel": ("weight", True), "bias": ("bias", False)}

    def brought(arrays):
        """A tree of this model from arrays by the names of PyTorch."""
        return {
            ours: jnp.asarray(arrays[theirs].T if transposed else arrays[theirs])
            for ours, (theirs, transposed) in names.items()
        }

    # PyTorch numbers the parameters in the order of `named_parameters`.
    kept = {name: recorded(run, f"state/{number}") for number, name in enumerate(LINEAR)}

    def moment(name):
        return brought({theirs: kept[theirs][name] for theirs in LINEAR})

    state = [
        optax.ScaleByAdamState(
            jnp.int32(kept["weight"]["step"]), moment("exp_avg"), moment("exp_avg_sq")
        )
    ]
    tx = adam_jax.adamw(1e-2, weight_decay=0.1)
    if run.options["amsgrad"]:
        state = [optax.ScaleByAmsgradState(*state[0], moment("max_exp_avg_sq"))]
        tx = adam_jax.amsgrad(1e-2, weight_decay=0.1, max_before_correction=True)

    first, *rest = (
        brought({name: path[i] for name, path in recorded(run).items()})
        for i in range(len(run.steps))
    )
    params, state = first, adam_jax.from_optax(tx, first, state)
    update = jax.jit(tx.update)
    for t, expected in zip(run.steps, rest, strict=False):
        updates, state = update(brought(run.problem.gradient(params, t)), state, params)
        params = optax.apply_updates(params, updates)
        assert_close(params, expected, "torch")
