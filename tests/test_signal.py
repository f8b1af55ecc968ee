"""Wrong calls: each says what was wrong and what to do, when the stage is built if it can."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tables
from support import assert_close, refused
from tables import MEMBERS

import adam_jax

PARAMS = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}


def updated(tx, grads, params=PARAMS, pass_params=True):
    return tx.update(grads, tx.init(params), *([params] if pass_params else []))


def without(path):
    grads = {"dense": dict(PARAMS["dense"])}
    del grads["dense"][path]
    return grads


def with_bias(bias):
    return {"dense": {"kernel": jnp.ones((2, 3)), "bias": bias}}


BUILDING = {
    "eps by position": (
        lambda: adam_jax.bias_correct(0.9, 0.999),
        TypeError,
        "bias_correct() positional 2",
    ),
    "eps of normalize by position": (
        lambda: adam_jax.normalize(1e-8),
        TypeError,
        "normalize() positional 1",
    ),
    "b1 of 1": (lambda: adam_jax.scale_by_moments(b1=1.0), ValueError, "b1 1.0"),
    "b2 below 0": (lambda: adam_jax.adam(1e-3, b2=-0.1), ValueError, "b2 -0.1"),
    "b1 not a number": (lambda: adam_jax.scale_by_moments(b1=math.nan), ValueError, "b1 nan"),
    "b1 and b2 in a tuple, as in torch": (
        lambda: adam_jax.adam(1e-3, (0.9, 0.999)),
        TypeError,
        "b1 schedule (0.9,",
    ),
    "eps not a number": (lambda: adam_jax.bias_correct(eps=math.nan), ValueError, "eps nan"),
    "eps infinite": (lambda: adam_jax.adam(1e-3, eps=math.inf), ValueError, "eps inf"),
    "eps_root below 0": (lambda: adam_jax.normalize(eps_root=-1e-8), ValueError, "eps_root -1e-08"),
    "eps a schedule": (lambda: adam_jax.bias_correct(eps=abs), TypeError, "eps abs"),
    "eps missing": (lambda: adam_jax.bias_correct(eps=None), TypeError, "eps None"),
    "learning rate a word": (
        lambda: adam_jax.scale_by_lr("fast"),
        TypeError,
        "learning_rate schedule 'fast'",
    ),
    "learning rate with its own minus": (
        lambda: adam_jax.scale_by_lr(-1e-3),
        ValueError,
        "learning_rate -0.001",
    ),
    "learning rate True": (lambda: adam_jax.adam(True), TypeError, "learning_rate schedule True"),
    "weight decay below 0": (
        lambda: adam_jax.adamw(1e-3, weight_decay=-0.1),
        ValueError,
        "weight_decay -0.1",
    ),
    "learning rate for every leaf": (
        lambda: adam_jax.scale_by_lr(jnp.ones(3)),
        ValueError,
        "learning_rate scalar (3,)",
    ),
    "b1 an array of bool": (
        lambda: adam_jax.scale_by_moments(jnp.asarray(True)),
        TypeError,
        "b1 bool",
    ),
    "b2 in bfloat16": (
        lambda: adam_jax.scale_by_moments(b2=jnp.asarray(0.999, jnp.bfloat16)),
        ValueError,
        "b2 float32 bfloat16 0.999 optax.inject_hyperparams hyperparam_dtype=jnp.float32",
    ),
    "mu_dtype an integer": (
        lambda: adam_jax.adam(1e-3, mu_dtype="int8"),
        TypeError,
        "mu_storage adam_jax.storage.int8() 'int8'",
    ),
    "nu_storage complex": (
        lambda: adam_jax.adam(1e-3, nu_storage="complex64"),
        TypeError,
        "nu_storage adam_jax.storage.int8() 'complex64'",
    ),
    "neither moment": (lambda: adam_jax.scale_by_moments(None, None), ValueError, "b1 b2 None"),
    "initial_nu below 0": (
        lambda: adam_jax.adagrad(0.1, -1.0),
        ValueError,
        "initial_accumulator_value -1.0",
    ),
    "interpolate beyond the average": (lambda: adam_jax.interpolate(1.5), ValueError, "b1 1.5"),
    "a threshold without a root": (
        lambda: adam_jax.rectify(threshold=3),
        ValueError,
        "threshold 4 3.0",
    ),
    "a threshold without a root, an array": (
        lambda: adam_jax.rectify(threshold=jnp.float32(3)),
        ValueError,
        "threshold 4 3.0",
    ),
    "a momentum for the stage nesterov": (
        lambda: adam_jax.nesterov(0.9),
        TypeError,
        "momentum schedule 0.9",
    ),
    "a constant limit": (
        lambda: adam_jax.clip_by_schedule(1.0),
        TypeError,
        "limit schedule 1.0 optax.clip",
    ),
    "epsilon hat of a corrected maximum": (
        lambda: adam_jax.amsgrad(1e-3, eps_hat=True),
        ValueError,
        "eps_hat max_before_correction=True",
    ),
    "Dozat's schedule of a schedule": (
        lambda: adam_jax.nadam(1e-3, b1=abs, momentum_decay=4e-3),
        ValueError,
        "momentum_decay b1 schedule",
    ),
    "a correction that nesterov implies": (
        lambda: adam_jax.amsgrad(1e-3, nesterov=True, bias_correction_mu=False),
        ValueError,
        "eps_hat nesterov correction",
    ),
    "b2 of adopt": (lambda: adam_jax.adopt(1e-3, b2=1.0), ValueError, "b2 1.0"),
    "a mask for no decay": (
        lambda: adam_jax.adam(1e-3, mask=True),
        ValueError,
        "mask weight_decay None",
    ),
    "a look ahead along no momentum": (
        lambda: adam_jax.sgd(0.1, nesterov=True),
        ValueError,
        "nesterov momentum None",
    ),
    "a momentum below 0": (lambda: adam_jax.momentum(0.1, -0.9), ValueError, "momentum -0.9"),
    "the rule called": (
        lambda: adam_jax.scale_by_moments(second_moment=0.999),
        TypeError,
        "second_moment function 0.999",
    ),
}

RUNNING = {
    "no bias_correct": (
        lambda: updated(
            optax.chain(adam_jax.scale_by_moments(), adam_jax.scale_by_lr(1e-3)), PARAMS
        ),
        TypeError,
        "scale_by_lr Moments ['dense']['bias'] adam_jax.bias_correct",
    ),
    "bias_correct first": (
        lambda: updated(optax.chain(adam_jax.bias_correct(), adam_jax.scale_by_lr(1e-3)), PARAMS),
        TypeError,
        "bias_correct Moments ['dense']['bias'] adam_jax.scale_by_moments",
    ),
    "bias_correct twice": (
        lambda: updated(
            optax.chain(
                adam_jax.scale_by_moments(), adam_jax.bias_correct(), adam_jax.bias_correct()
            ),
            PARAMS,
        ),
        TypeError,
        "bias_correct Moments ['dense']['bias'] adam_jax.scale_by_moments",
    ),
    "moments of moments": (
        lambda: updated(
            optax.chain(adam_jax.scale_by_moments(), adam_jax.scale_by_moments()), PARAMS
        ),
        TypeError,
        "scale_by_moments Moments ['dense']['bias'] adam_jax.bias_correct",
    ),
    "debias of a bare array": (
        lambda: updated(adam_jax.debias(), jnp.ones(2), jnp.ones(2)),
        TypeError,
        "debias Moments adam_jax.scale_by_moments",
    ),
    "nothing to divide by": (
        lambda: updated(
            optax.chain(adam_jax.scale_by_moments(0.9, None), adam_jax.bias_correct()), PARAMS
        ),
        TypeError,
        "adam_jax.scale_by_moments b2 adam_jax.first_moment()",
    ),
    "nothing to interpolate": (
        lambda: updated(
            optax.chain(adam_jax.scale_by_moments(None, 0.9), adam_jax.interpolate(0.9)), PARAMS
        ),
        TypeError,
        "adam_jax.scale_by_moments b1",
    ),
    "adamw without params": (
        lambda: updated(adam_jax.adamw(1e-3), PARAMS, pass_params=False),
        ValueError,
        "decay_weights params update()",
    ),
    "integer parameters": (
        lambda: adam_jax.adam(1e-3).init({"step": jnp.asarray(3), "w": jnp.ones(2)}),
        TypeError,
        "scale_by_moments ['step'] int32 optax.masked optax.partition",
    ),
    "complex parameter, real mu_dtype": (
        lambda: adam_jax.adam(1e-3, mu_dtype="bfloat16").init({"w": jnp.ones(2, "complex64")}),
        TypeError,
        "mu 'w' complex64 bfloat16 optax.partition",
    ),
    "a gradient missing": (
        lambda: updated(adam_jax.adam(1e-3), without("bias")),
        ValueError,
        "scale_by_moments ['dense']['bias'] (3,) nothing init()",
    ),
    "a gradient too many": (
        lambda: updated(adam_jax.adam(1e-3), PARAMS | {"head": jnp.ones(1)}),
        ValueError,
        "scale_by_moments ['head'] nothing (1,) init()",
    ),
    "a None gradient": (
        lambda: updated(adam_jax.adam(1e-3), with_bias(None)),
        ValueError,
        "scale_by_moments ['dense']['bias'] (3,) None init()",
    ),
    "a gradient that would broadcast": (
        lambda: updated(adam_jax.adam(1e-3), with_bias(jnp.ones(1))),
        ValueError,
        "scale_by_moments 'dense/bias' float32[3] (1,) init()",
    ),
    "a complex gradient": (
        lambda: updated(adam_jax.adam(1e-3), with_bias(jnp.ones(3, "complex64"))),
        ValueError,
        "scale_by_moments 'dense/bias' float32[3] complex64[3] init()",
    ),
    "a schedule of rates for every leaf": (
        lambda: updated(adam_jax.adam(lambda count: jnp.ones(3)), PARAMS),
        ValueError,
        "learning_rate scalar (3,)",
    ),
    "a schedule in float16": (
        lambda: updated(adam_jax.adam(1e-3, b1=lambda count: np.float16(0.9)), PARAMS),
        ValueError,
        "b1 float32 float16 0.999023 optax.inject_hyperparams hyperparam_dtype=jnp.float32",
    ),
}


@pytest.mark.parametrize("case", [*BUILDING.values(), *RUNNING.values()], ids=[*BUILDING, *RUNNING])
def test_wrong_calls(case):
    call, error, names = case
    with refused(error, names):
        call()


@pytest.mark.parametrize(
    "stage", [adam_jax.running_max(), adam_jax.center(), adam_jax.floor(eps=1.0), adam_jax.atan2()]
)
def test_no_second_moment(stage):
    with refused(TypeError, "second moment b2"):
        updated(optax.chain(adam_jax.scale_by_moments(0.9, None), stage), PARAMS)


def test_center_needs_a_first_moment():
    with refused(TypeError, "first moment b1"):
        updated(optax.chain(adam_jax.scale_by_moments(None, 0.9), adam_jax.center()), PARAMS)


def test_messages_under_jit_are_the_same():
    tx = optax.chain(adam_jax.scale_by_moments(), adam_jax.scale_by_lr(1e-3))
    with refused(TypeError, "scale_by_lr adam_jax.bias_correct"):
        jax.jit(tx.update)(PARAMS, tx.init(PARAMS))


def test_other_containers_are_refused():
    """The leaves agree, the containers do not."""
    tx = adam_jax.adam(1e-3)
    with refused(ValueError, "tree init()"):
        tx.update((jnp.ones(2),), tx.init([jnp.ones(2)]))


def test_integers_are_numbers():
    """From a schedule, or injected, as optax takes them."""
    for tx in (
        adam_jax.adam(lambda count: jnp.asarray(1), b1=lambda count: 0),
        optax.inject_hyperparams(adam_jax.adam)(learning_rate=1, b1=0),
    ):
        updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
        assert updates[0] == pytest.approx(-1, rel=1e-4)


def test_traced_hyperparameters_are_not_checked():
    """Only their shape and dtype are known."""

    @jax.jit
    def first_step(b1):
        tx = adam_jax.adam(1.0, b1=b1)
        return tx.update(jnp.ones(()), tx.init(jnp.ones(())))[0]

    assert first_step(jnp.float32(0.5)) == pytest.approx(-1, rel=1e-4)


def test_numbers_of_every_kind():
    for number in (1, 1.0, np.float32(1), np.float64(1), np.int32(1), jnp.float32(1), np.ones(())):
        if isinstance(number, np.ndarray):
            number = number.astype(np.float32)
        tx = adam_jax.adam(number, eps=number)
        updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
        assert updates.dtype == jnp.float32
        assert updates[0] == pytest.approx(-0.5, rel=1e-4)


# --- The law of the weights -----------------------------------------------------------------------

AVERAGING = tables.stages("moments", "moments")
DIVIDING = tables.stages("moments", "updates")
DECAYS = {
    "numbers": (0.9, 0.999),
    "schedules": (
        lambda count: 1 - 1 / (count.astype(float) + 3) ** 2,
        lambda count: 0.99 - 0.5 / (count.astype(float) + 1),
    ),
    "arrays": (np.asarray(0.9), np.asarray(0.999)),
}
STEPS = 3


def after(stages, decays):
    """What the last of some stages emits at each step, for a gradient that stays 1."""
    tx = optax.chain(adam_jax.scale_by_moments(*decays), *stages)
    state = tx.init(jnp.ones(()))
    for _ in range(STEPS):
        emitted, state = tx.update(jnp.ones(()), state)
        yield emitted


# Stages behind which the average is of ones, whatever came before, or that debias it.
AFRESH = {"center", "interpolate", "interpolate 0"}
DEBIASED = {"debias", "debias mu", "center", "interpolate 0"}


def is_one(stage, before, steady):
    """Whether the debiased average of the constant gradient 1 is 1 behind a stage.

    Two stages change what is averaged. `mix_slow_moment` adds its share. `nesterov` is Dozat's
    formula, whose two weights sum to 1 only for a debiased average, and only if the next rate is
    the same: that of `interpolate` is, of a schedule it is not.
    """
    if stage in AFRESH:
        return True
    if stage == "nesterov":
        return before in DEBIASED and (steady or before == "interpolate 0")
    other = "mix_slow_moment", "nesterov", "nesterov of a schedule"
    return stage not in other and before not in other


@pytest.mark.parametrize("decays", DECAYS.values(), ids=DECAYS)
@pytest.mark.parametrize("first", AVERAGING)
def test_every_stage_before_every_other(first, decays, x64):
    """next_weight = 1 - next_decay (1 - weight), and the average of a constant is that constant.

    In float64, to "algebra": the closed form 1 - b**t differs from the recursion by a few
    roundings of 1, and 1 - b2 is 1e-3.
    """
    steady = decays is not DECAYS["schedules"]
    for second in [name for name in AVERAGING if (first, name) != ("delay", "delay")]:
        for moments in after([AVERAGING[first], AVERAGING[second]], decays):
            for average in (moments.mu, moments.nu):
                law = 1 - average.next_decay * (1 - average.weight)
                assert_close(average.next_weight, law, "algebra")
            if is_one(second, first, steady):
                assert_close(moments.mu.debiased().value, 1.0, "algebra")


@pytest.mark.parametrize("decays", DECAYS.values(), ids=DECAYS)
@pytest.mark.parametrize("first", AVERAGING)
def test_every_stage_before_every_division(first, decays, x64):
    """Every direction is finite, and 1 where both averages of the constant 1 are 1."""
    steady = decays is not DECAYS["schedules"]
    of_ones = is_one(first, None, steady) and first not in ("center", "delay")
    for last in DIVIDING:
        for direction in after([AVERAGING[first], DIVIDING[last]], decays):
            assert jnp.isfinite(direction)
            if of_ones and last in ("bias_correct", "bias_correct eps_hat", "atan2"):
                assert_close(direction, 1.0, "algebra")


def test_what_is_not_one():
    """The exceptions of `is_one`, with b1 = 0.9 and a gradient of 1, as their formulas give them.

    (The stage that is given a schedule has its rates 1/2, 2/3, 3/4 and so its weights 1/2, 5/6.)
    """
    stages, numbers = AVERAGING, DECAYS["numbers"]
    for names, expected in {
        ("nesterov",): 0.9 * 0.1 / 0.19 + 0.1 / 0.1,
        ("nesterov of a schedule",): 2 / 3 * 0.1 / (1 - 1 / 2 * 2 / 3) + 1 / 2 / (1 / 2),
        ("debias", "nesterov of a schedule"): 2 / 3 + 1 / 2,
        ("center", "nesterov of a schedule"): 2 / 3 + 1 / 2,
        ("interpolate", "nesterov"): 0.5 * 0.5 / 0.75 + 0.5 / 0.5,
        ("nesterov", "nesterov"): 0.9 * (0.9 * 0.1 / 0.19 + 1) + 0.1,
        ("mix_slow_moment", "debias"): (0.1 + 2 * 0.25) / 0.1,
        ("debias", "mix_slow_moment"): 1 + 2 * 0.25,
    }.items():
        moments = next(after([stages[name] for name in names], numbers))
        assert float(moments.mu.debiased().value) == pytest.approx(expected, rel=1e-6), names


def test_a_second_delay_is_refused():
    with refused(TypeError, "delay scale_by_moments"):
        next(after([adam_jax.delay(), adam_jax.delay()], (0.9, 0.999)))


# --- What must not stand between two stages -------------------------------------------------------

PAIR = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.arange(1.0, 4.0)}
BETWEEN = {
    # Arithmetic on every array of the signal: told where to go.
    "scale": (optax.scale(0.5), "told"),
    "scale by 1": (optax.scale(1.0), "told"),
    "scale_by_learning_rate": (optax.scale_by_learning_rate(0.1), "told"),
    "clip": (optax.clip(0.01), "told"),
    "normalize_by_update_norm": (optax.normalize_by_update_norm(), "told"),
    "masked scale": (optax.masked(optax.scale(0.5), {"w": True, "b": False}), "told"),
    # These fail by themselves, because the signal has numbers in it or another structure than the
    # parameters.
    "scale_by_schedule": (optax.scale_by_schedule(lambda count: 0.5), "fails"),
    "clip_by_global_norm": (optax.clip_by_global_norm(1.0), "told"),
    "clip_by_block_rms": (optax.clip_by_block_rms(1.0), "fails"),
    "add_noise": (optax.add_noise(0.1, 0.1, 0), "fails"),
    "centralize": (optax.centralize(), "fails"),
    "scale_by_sign": (optax.scale_by_sign(), "fails"),
    "trace": (optax.trace(0.9), "fails"),
    "ema": (optax.ema(0.9), "fails"),
    "apply_every": (optax.apply_every(2), "fails"),
    "scale_by_adam": (optax.scale_by_adam(), "fails"),
    "add_decayed_weights": (optax.add_decayed_weights(0.1), "fails"),
    "scale_by_trust_ratio": (optax.scale_by_trust_ratio(), "fails"),
    # These hand the moments on as they are.
    "identity": (optax.identity(), "harmless"),
    "zero_nans": (optax.zero_nans(), "harmless"),
    "masked identity": (optax.masked(optax.identity(), {"w": True, "b": False}), "harmless"),
    "apply_if_finite": (optax.apply_if_finite(optax.identity(), 3), "harmless"),
    # Stages of ours in the wrappers of optax.
    "masked debias": (optax.masked(adam_jax.debias(), {"w": True, "b": False}), "harmless"),
    "partition": (
        optax.partition(
            {"a": adam_jax.debias(), "b": adam_jax.floor(eps=0.0)}, {"w": "a", "b": "b"}
        ),
        "harmless",
    ),
    "conditionally_mask": (
        optax.conditionally_mask(adam_jax.debias(), lambda step: step >= 0),
        "harmless",
    ),
    "conditionally_transform": (
        optax.conditionally_transform(adam_jax.debias(), lambda step: step < 0),
        "harmless",
    ),
}


# Where to put a stage that does arithmetic.
TOLD = TypeError, "Moments optax.scale optax.clip adam_jax.scale_by_moments adam_jax.bias_correct"


@pytest.mark.parametrize("wrap", [jax.jit, lambda update: update], ids=["jit", "eager"])
@pytest.mark.parametrize("name", BETWEEN)
def test_stages_of_optax_between_the_moments_and_their_division(name, wrap):
    stage, outcome = BETWEEN[name]
    moments, divide = adam_jax.scale_by_moments(), adam_jax.bias_correct()
    tx = optax.chain(moments, stage, divide)
    state = tx.init(PAIR)
    with jax.numpy_dtype_promotion("standard"):
        if outcome == "harmless":
            updates, _ = wrap(tx.update)(PAIR, state, PAIR)
            plain = optax.chain(moments, divide)
            expected, _ = plain.update(PAIR, plain.init(PAIR), PAIR)
            np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)
            np.testing.assert_allclose(updates["b"], expected["b"], rtol=1e-6)
            return
        errors = (TypeError, ValueError, AttributeError), ""
        with refused(*(TOLD if outcome == "told" else errors)):
            wrap(tx.update)(PAIR, state, PAIR)


@pytest.mark.parametrize("stage", [optax.scale(0.5), optax.scale_by_learning_rate(0.1)])
def test_arithmetic_between_two_stages_under_strict_promotion(stage):
    for second in (adam_jax.debias(), adam_jax.running_max(), adam_jax.first_moment()):
        tx = optax.chain(adam_jax.scale_by_moments(), stage, second)
        with refused(*TOLD):
            tx.update(PAIR, tx.init(PAIR))


STORED = {
    "mu": {"mu_storage": jnp.bfloat16},
    "nu": {"nu_storage": adam_jax.storage.int8()},
    "means": {"nu_storage": adam_jax.storage.factored()},
    "float32": {"mu_storage": jnp.float32},
}


@pytest.mark.parametrize("options", STORED.values(), ids=STORED)
@pytest.mark.parametrize("wrap", [jax.jit, jax.vmap, lambda first_step: first_step])
def test_center_after_a_storage(options, wrap):
    """Also with stages between the two, and when the moments have been mapped or traced."""
    for between in ([], [adam_jax.debias(), adam_jax.running_max()]):
        tx = optax.chain(adam_jax.scale_by_moments(**options), *between, adam_jax.center())
        with refused(ValueError, "mu_storage nu_storage"):
            wrap(lambda grads, tx=tx: tx.update(grads, tx.init(grads))[0])(jnp.ones((2, 3)))


# --- Gradients that are none ----------------------------------------------------------------------

NO_GRADIENTS = {
    "int32": jnp.ones(2, int),
    "bool": jnp.ones(2, bool),
    "float0": np.zeros(2, jax.dtypes.float0),
}


@pytest.mark.parametrize("dtype", NO_GRADIENTS)
@pytest.mark.parametrize(
    ("stage", "tx"),
    [
        ("scale_by_moments", adam_jax.adam(0.1)),
        ("scale_by_lr", adam_jax.scale_by_lr(0.1)),
        ("clip_by_schedule", adam_jax.clip_by_schedule(lambda count: 1.0)),
        ("scale_by_lr", adam_jax.sgd(0.1)),
        ("accumulate", adam_jax.momentum(0.1)),
    ],
)
def test_integers_and_booleans_are_no_gradients(stage, tx, dtype):
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    grads = params | {"b": NO_GRADIENTS[dtype]}
    with refused(TypeError, f"{stage} ['b'] {dtype}"):
        tx.update(grads, tx.init(params), params)


# --- Arrays for hyperparameters -------------------------------------------------------------------

OUT_OF_RANGE = {
    "learning_rate": (lambda x: adam_jax.scale_by_lr(x), np.array(-1.0)),
    "b1": (lambda x: adam_jax.scale_by_moments(x), jnp.float32(1.5)),
    "b2": (lambda x: adam_jax.adam(0.1, b2=x), np.array(-1.0)),
    "b3": (lambda x: adam_jax.mix_slow_moment(x), jnp.ones(())),
    "momentum": (lambda x: adam_jax.sgd(0.1, x), jnp.ones(())),
    "eps": (lambda x: adam_jax.bias_correct(eps=x), jnp.float32(np.nan)),
    "eps_root": (lambda x: adam_jax.normalize(eps_root=x), np.array(np.inf)),
    "threshold": (lambda x: adam_jax.rectify(threshold=x), jnp.float32(3)),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_concrete_arrays_are_checked_and_traced_ones_are_not(name):
    build, value = OUT_OF_RANGE[name]
    with refused(ValueError, f"{name} {value}"):
        build(value)
    jax.eval_shape(lambda x: build(x) and x, jnp.asarray(value, jnp.float32))


LOW = {
    "b1": lambda rate: adam_jax.scale_by_moments(rate),
    "learning_rate": lambda rate: adam_jax.scale_by_lr(rate),
    "b3": lambda rate: optax.chain(adam_jax.scale_by_moments(), adam_jax.mix_slow_moment(rate)),
}
WAYS = {
    "eager": lambda f, x: f(x),
    "jit": lambda f, x: jax.jit(f)(x),
    "eval_shape": jax.eval_shape,
    "vmap": lambda f, x: jax.vmap(f)(x[None]),
    "grad": lambda f, x: jax.linearize(f, x),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOW)
def test_low_precision_rates_are_refused_however_they_come(name, way):
    """By the same ValueError, though a traced rate has no value to print."""
    refusal = ValueError, f"{name} float32 bfloat16 0.999 optax.inject_hyperparams"
    rate = jnp.bfloat16(0.9)

    def of_an_array(rate):
        LOW[name](rate)
        return rate

    def of_a_schedule(grads):
        tx = LOW[name](lambda count: rate)
        return tx.update(grads, tx.init(grads))[0]

    with refused(*refusal):
        WAYS[way](of_an_array, rate)
    with refused(*refusal):
        WAYS[way](of_a_schedule, jnp.ones(2))


WITH_EPS_HAT = [n for n, f in MEMBERS.items() if "eps_hat" in inspect.signature(f).parameters]


@pytest.mark.parametrize(
    "build",
    [adam_jax.bias_correct, adam_jax.rectify]
    + [functools.partial(MEMBERS[name], 1e-3) for name in WITH_EPS_HAT],
)
def test_eps_hat_is_no_epsilon(build):
    with refused(TypeError, "eps_hat True False 1e-07"):
        build(eps_hat=1e-7)


@pytest.mark.parametrize("name", MEMBERS)
def test_every_counter_is_called_count(name):
    """So that a warm restart through every field `count` reaches all schedules."""
    rate = lambda count: 0.1  # noqa: E731
    state = MEMBERS[name](rate, weight_decay=rate).init(jnp.ones(2))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            assert path[-1] == jax.tree_util.GetAttrKey("count")


def test_a_chain_that_ends_in_moments_says_so():
    tx, params = adam_jax.scale_by_moments(), {"w": jnp.ones(3)}
    updates, _ = tx.update(params, tx.init(params), params)
    with refused(TypeError, "Moments adam_jax.bias_correct() adam_jax.scale_by_lr"):
        optax.apply_updates(params, updates)
