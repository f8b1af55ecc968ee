"""Each optimizer is its row in the table; its options, weight decay, momentum, and their errors."""

import inspect
import itertools
import math
import typing

import chains
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import matrices_only, random_grads, random_params, refused

import adam_jax
from adam_jax import storage
from adam_jax.updates import Mask

MEMBERS = chains.members()
each_member = pytest.mark.parametrize("name", MEMBERS)
DECAYED = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3, jnp.float32)}


def described(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def arguments(name):
    return inspect.signature(MEMBERS[name]).parameters


# --- The rows of the table ------------------------------------------------------------------------

ROWS = {call: (name, options, text) for name, options, call, text in chains.rows()}


def test_rows_tell_members_apart():
    texts = [text for call, (_, _, text) in ROWS.items() if call != "sgd(momentum=0.9)"]
    assert len(set(texts)) == len(texts)
    assert ROWS["sgd(momentum=0.9)"][2] == ROWS["momentum"][2]


@pytest.mark.parametrize("call", ROWS)
@pytest.mark.parametrize("width", ["bfloat16", "float32", "float64"])
def test_a_member_is_its_row(call, width, x64):
    """Built from the text with public names only, it gives the same numbers, bit for bit."""
    name, options, text = ROWS[call]
    rate = 1e-2
    params = {leaf: p for leaf, p in random_params(width).items() if leaf in ("kernel", "scale")}
    rng = np.random.default_rng(0)
    carry = [(tx, params, tx.init(params)) for tx in (MEMBERS[name](rate, **options),
                                                      chains.built(text, rate))]  # fmt: skip
    chex.assert_trees_all_equal(carry[0][2], carry[1][2])
    step = jax.jit(lambda tx, *args: tx.update(*args), static_argnums=0)
    for _ in range(3):
        grads = random_grads(params, rng)
        with jax.numpy_dtype_promotion("standard"):
            (ours, our_state), (rows, state) = (step(tx, grads, state, p) for tx, p, state in carry)
            chex.assert_trees_all_equal((ours, our_state), (rows, state))
            assert all(leaf.dtype == width for leaf in jax.tree.leaves(ours))
            params = optax.apply_updates(params, ours)
        carry = [(tx, params, state) for tx, *_ in carry]


# --- The signatures -------------------------------------------------------------------------------

WITH_MU_DTYPE = ["adam", "adamw", "nadam", "nadamw", "amsgrad", "adopt", "ademamix", "lion"]


def of_optax(name):
    return getattr(optax, name, None) or getattr(optax.contrib, name, None)


@each_member
def test_positional_arguments_are_those_of_optax(name):
    """So that a call that is right for optax is right here; what is ours is given by name."""
    theirs = of_optax({"momentum": "sgd", "nesterov_momentum": "sgd"}.get(name, name))
    positional = lambda f: [  # noqa: E731
        (p.name, p.default)
        for p in inspect.signature(f).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    ours = positional(MEMBERS[name])
    if name in ("momentum", "nesterov_momentum"):
        assert ours == [("learning_rate", inspect.Parameter.empty), ("momentum", 0.9)]
    elif theirs is not None:
        assert ours == positional(theirs)
    else:
        assert name in ("adam_atan2", "laprop", "cautious_adamw")
    assert arguments(name)["learning_rate"].annotation == optax.ScalarOrSchedule


@each_member
def test_how_moments_are_kept_is_one_option(name):
    accepted = arguments(name)
    assert "nu_dtype" not in accepted
    assert ("mu_dtype" in accepted) == (name in WITH_MU_DTYPE)
    for option in {"mu_storage", "nu_storage"} & set(accepted):
        assert accepted[option].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", WITH_MU_DTYPE)
def test_mu_dtype_is_a_dtype_for_mu_storage(name):
    params = jnp.ones(3)
    by_dtype, by_storage = (
        MEMBERS[name](0.1, **{option: jnp.bfloat16}) for option in ("mu_dtype", "mu_storage")
    )
    states = by_dtype.init(params), by_storage.init(params)
    assert jnp.dtype("bfloat16") in {leaf.dtype for leaf in jax.tree.leaves(states[0])}
    chex.assert_trees_all_equal_shapes_and_dtypes(*states)
    with refused(ValueError, "mu_dtype mu_storage"):
        MEMBERS[name](0.1, mu_dtype="bfloat16", mu_storage=storage.int8())


@each_member
def test_a_dtype_is_a_storage(name):
    options = {"mu_storage", "nu_storage"} & set(arguments(name))
    for option in options:
        state = MEMBERS[name](0.1, **{option: "bfloat16"}).init(jnp.ones(3))
        assert jnp.dtype("bfloat16") in {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert options or name in ("sgd", "momentum", "nesterov_momentum")


def test_nesterov_is_the_stage_and_nesterov_momentum_the_optimizer():
    assert adam_jax.nesterov_momentum is MEMBERS["nesterov_momentum"]
    assert "nesterov" not in MEMBERS
    state = adam_jax.nesterov_momentum(0.1).init(jnp.ones(3))
    assert isinstance(state[0], adam_jax.AccumulateState)


@each_member
def test_signatures_are_short(name):
    """`learning_rate` is annotated with optax's object, which prints at length; the others not."""
    text = str(inspect.signature(MEMBERS[name]))
    assert len(text.replace(inspect.formatannotation(optax.ScalarOrSchedule), "")) < 600
    assert all(len(inspect.formatannotation(a.annotation)) < 60 for a in arguments(name).values()
               if a.name != "learning_rate")  # fmt: skip
    assert typing.get_type_hints(MEMBERS[name])["mask"] == Mask


NAMED = {
    "lion's b2": (lambda: adam_jax.lion(0.1, b2=1.5), "b2 1.5"),
    "rmsprop's decay": (lambda: adam_jax.rmsprop(0.1, decay=1.0), "decay 1.0"),
    "adagrad's start": (lambda: adam_jax.adagrad(0.1, -1.0), "initial_accumulator_value -1.0"),
    "rmsprop's start": (lambda: adam_jax.rmsprop(0.1, initial_scale=-1), "initial_scale -1"),
    "the decay": (lambda: adam_jax.adam(0.1, weight_decay=-1.0), "weight_decay -1.0"),
    "a momentum": (lambda: adam_jax.momentum(0.1, 1.0), "momentum 1.0"),
    "a schedule of momentum": (lambda: adam_jax.sgd(0.1, abs), "momentum number abs"),
    "a decay that is text": (lambda: adam_jax.adamw(0.1, weight_decay="w"), "weight_decay 'w'"),
    "a mask": (lambda: adam_jax.adamw(0.1, mask="w"), "mask booleans 'w'"),
    "momentum_decay": (
        lambda: adam_jax.nadam(0.1, momentum_decay=0.1, nesterov=False),
        "momentum_decay nesterov=True",
    ),
}


@pytest.mark.parametrize(("build", "names"), NAMED.values(), ids=NAMED.keys())
def test_errors_name_the_argument_of_the_member(build, names):
    """And not that of the stage which gets it."""
    with refused((ValueError, TypeError), names):
        build()


@each_member
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_number_out_of_its_range_is_refused_by_its_name(name, value):
    defaults = {k: p.default for k, p in inspect.signature(MEMBERS[name]).parameters.items()}
    numbers = [k for k, v in defaults.items() if isinstance(v, float) or k == "weight_decay"]
    for argument in ["learning_rate", *numbers]:
        with refused(ValueError, argument):
            MEMBERS[name](**{"learning_rate": 0.1, argument: value})


@each_member
def test_errors_of_a_call_are_those_of_python(name):
    with refused(TypeError, f"{name}() missing 1"):
        MEMBERS[name]()
    with refused(TypeError, f"{name}() 'lr'"):
        MEMBERS[name](lr=0.1)


# --- The documentation ----------------------------------------------------------------------------


@each_member
def test_documented_arguments(name):
    """Each optimizer's help names every one of its arguments, so that it suffices alone."""
    doc = inspect.getdoc(MEMBERS[name])
    for argument in arguments(name):
        assert f"  {argument}: " in doc, argument


# --- Weight decay ---------------------------------------------------------------------------------


def only_bfloat16(params):
    return jax.tree.map(lambda p: p.dtype == jnp.bfloat16, params)


@each_member
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_mask_function_sees_the_parameters(name, dtype):
    """Not the updates, whatever the dtype of the gradients."""
    seen = []

    def mask(params):
        seen.append(described(params))
        return only_bfloat16(params)

    masked, whole, plain = (
        MEMBERS[name](0.1, weight_decay=decay, mask=function)
        for decay, function in ((0.5, mask), (0.5, None), (None, None))
    )
    grads = {leaf: jnp.full(p.shape, 0.25, dtype) for leaf, p in DECAYED.items()}
    updates = []
    for tx in (masked, whole, plain):
        updates.append(tx.update(grads, tx.init(DECAYED), DECAYED)[0])
    assert seen
    assert all(tree == described(DECAYED) for tree in seen)
    np.testing.assert_array_equal(updates[0]["w"], updates[1]["w"])
    np.testing.assert_array_equal(updates[0]["b"], updates[2]["b"])
    if name not in ("lamb", "adopt"):  # a trust ratio rescales; adopt's first direction is 0
        assert np.any(updates[1]["b"] != updates[2]["b"])


@each_member
@pytest.mark.parametrize("mask", [None, matrices_only, {"w": True, "b": False}])
@pytest.mark.parametrize("decay", [0.1, lambda count: 0.1 / (count + 1)])
def test_init_of_described_parameters(name, mask, decay):
    """As optax's own test of its optimizers does: shapes and dtypes are all that init needs."""
    tx = MEMBERS[name](0.1, weight_decay=decay, mask=mask)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), DECAYED)
    chex.assert_trees_all_equal(tx.init(shapes), tx.init(DECAYED))


@each_member
def test_a_decay_schedule_is_the_number_at_every_step(name):
    params = {"w": jnp.full((2, 3), 2.0), "b": jnp.ones(3)}
    rates = [0.5, 0.25]
    scheduled = MEMBERS[name](0.1, weight_decay=lambda count: jnp.asarray(rates)[count])
    state = scheduled.init(params)
    for step, rate in enumerate(rates):
        constant = MEMBERS[name](0.1, weight_decay=rate)
        past = constant.init(params)
        for _ in range(step):
            _, past = constant.update(params, past, params)
        expected, _ = constant.update(params, past, params)
        updates, state = scheduled.update(params, state, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)


@pytest.mark.parametrize("mask", [None, matrices_only, {"w": True, "b": False}])
def test_decay_without_parameters(mask):
    tx = adam_jax.adamw(0.1, mask=mask)
    with refused(ValueError, "decay_weights params"):
        tx.update(DECAYED, tx.init(DECAYED))


@each_member
def test_a_mask_without_decay(name):
    with refused(ValueError, "mask weight_decay None"):
        MEMBERS[name](0.1, weight_decay=None, mask=matrices_only)


@jax.tree_util.register_pytree_node_class
class CallableTree:
    """A tree of leaves that can be called, as a model is."""

    def __init__(self, w, b):
        self.w, self.b = w, b

    def __call__(self, x):
        raise AssertionError("a mask that is a tree is not called")

    def tree_flatten(self):
        return (self.w, self.b), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


def test_a_callable_tree_of_booleans_is_a_tree():
    params = CallableTree(jnp.ones((2, 3)), jnp.ones(3))
    tx = adam_jax.adamw(0.1, weight_decay=0.5, mask=CallableTree(True, False))
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates.w, -0.15, rtol=1e-5)
    np.testing.assert_allclose(updates.b, -0.1, rtol=1e-5)


@each_member
def test_a_model_that_is_not_filtered_is_the_parameters(name):
    """As in Equinox: a number of the model is no parameter, and its gradient is None."""
    w = {"w": jnp.ones((2, 3)), "scale": None}
    for mask in (None, matrices_only, {"w": True, "scale": False}):
        tx = MEMBERS[name](0.1, weight_decay=0.1, mask=mask)
        updates, state = tx.update(w, tx.init(w), w | {"scale": 2.0})
        assert updates["scale"] is None
        assert described(state) == described(tx.init(w))
        expected, _ = tx.update(w, tx.init(w), w)
        chex.assert_trees_all_equal(updates, expected)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_bfloat16_is_float32_rounded_once_by_each_stage(optimizer):
    """The stages pass on bfloat16, and compute in float32 with moments that are float32."""
    rng = np.random.default_rng(0)
    low = {"w": jnp.asarray(rng.normal(size=(64, 7)), jnp.bfloat16)}
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    rounded = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)  # noqa: E731
    tx = MEMBERS[optimizer](1e-3, weight_decay=0.1)
    direction = optax.scale_by_adam(eps={"adamw": 1e-8, "lamb": 1e-6}[optimizer])
    state, their_state = tx.init(low), direction.init(wide(low))
    for _ in range(5):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), low)
        updates, state = tx.update(grads, state, low)
        with jax.numpy_dtype_promotion("standard"):
            expected, their_state = direction.update(wide(grads), their_state)
        expected = rounded(expected)
        add = lambda u, p: u + np.float32(0.1) * p  # noqa: E731
        expected = rounded(jax.tree.map(add, wide(expected), wide(low)))
        if optimizer == "lamb":
            ratio = optax.scale_by_trust_ratio().update(
                wide(expected), optax.EmptyState(), wide(low)
            )
            expected = rounded(ratio[0])
        expected = rounded(jax.tree.map(lambda u: np.float32(-1e-3) * u, wide(expected)))
        chex.assert_trees_all_equal(updates, expected)


@each_member
def test_the_derivative_at_a_zero_gradient_is_finite(name):
    """Through one step, of a leaf without any gradient: back to it and to the parameters."""
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.zeros(2)}
    tx = MEMBERS[name](0.1)

    def step(grads, params):
        updates, _ = tx.update(grads, tx.init(params), params)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(updates))

    slopes = jax.grad(step, argnums=(0, 1))(jax.tree.map(jnp.zeros_like, params), params)
    chex.assert_tree_all_finite(slopes)


# --- Moments that must be kept in full ------------------------------------------------------------


@pytest.mark.parametrize("nu_storage", [storage.int8(), "bfloat16", jnp.float32])
def test_a_centered_rmsprop_keeps_its_moments_in_full(nu_storage):
    with refused(ValueError, "nu_storage None"):
        adam_jax.rmsprop(0.1, centered=True, nu_storage=nu_storage)
    adam_jax.rmsprop(0.1, nu_storage=nu_storage)
    with refused(TypeError, "'mu_storage'"):
        adam_jax.rmsprop(0.1, mu_storage=nu_storage)


# --- Descent along a sum --------------------------------------------------------------------------

DESCENTS = {
    "sgd": adam_jax.sgd(0.1),
    "sgd, decay": adam_jax.sgd(0.1, weight_decay=0.1),
    "sgd, momentum": adam_jax.sgd(0.1, 0.9),
    "momentum": adam_jax.momentum(0.1),
    "nesterov_momentum": adam_jax.nesterov_momentum(0.1),
}
WRONG = {
    "shape": {"w": jnp.ones(1), "b": jnp.ones(2)},
    "rank": {"w": jnp.ones((1, 3)), "b": jnp.ones(2)},
    "missing": {"b": jnp.ones(2)},
    "none": {"w": None, "b": jnp.ones(2)},
    "complex": {"w": jnp.ones(3, jnp.complex64), "b": jnp.ones(2)},
}
PARAMS = {"w": jnp.ones(3), "b": jnp.ones(2)}


# Without a sum a gradient may be None, and optax.apply_updates then leaves the parameter as it is.
ACCEPTED = [("sgd", "missing"), ("sgd", "none"), ("sgd, decay", "none")]


@pytest.mark.parametrize(
    ("name", "wrong"), [pair for pair in itertools.product(DESCENTS, WRONG) if pair not in ACCEPTED]
)
def test_gradients_that_do_not_match_the_parameters(name, wrong):
    tx = DESCENTS[name]
    state = tx.init(PARAMS)
    with refused(ValueError, "gradients 'w'"):
        jax.jit(tx.update)(WRONG[wrong], state, PARAMS)


@pytest.mark.parametrize("grads", WRONG.values(), ids=WRONG.keys())
def test_a_sum_remembers_the_parameters(grads):
    tx = adam_jax.momentum(0.1)
    with refused(ValueError, "gradients 'w'"):
        tx.update(grads, tx.init(PARAMS))


@pytest.mark.parametrize("tx", DESCENTS.values(), ids=DESCENTS.keys())
def test_what_has_no_gradient_may_stay_among_the_parameters(tx):
    """As when a whole model is passed as the parameters, and None is its functions' gradient."""
    arrays = {**PARAMS, "number": None, "function": None}
    model = {**PARAMS, "number": jnp.arange(2), "function": jnp.tanh}
    updates, _ = tx.update(arrays, tx.init(arrays), model)
    assert updates["number"] is None
    assert updates["function"] is None
    assert np.all(updates["w"] < 0)


def test_python_numbers_are_parameters():
    tx = adam_jax.sgd(0.5)
    updates, _ = tx.update({"x": 2.0}, tx.init({"x": 1.0}), {"x": 1.0})
    assert updates["x"] == -1


@pytest.mark.parametrize("tx", DESCENTS.values(), ids=DESCENTS.keys())
def test_moments_are_no_gradients(tx):
    wrong = optax.chain(adam_jax.scale_by_moments(), tx)
    with refused(TypeError, "Moments adam_jax.bias_correct"):
        wrong.update(PARAMS, wrong.init(PARAMS), PARAMS)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_sum_kept_in_bfloat16_is_computed_in_float32(nesterov):
    """With a rate that bfloat16 would round: 0.9 is 0.8984 there."""
    kept, full = (adam_jax.sgd(1.0, 0.9, nesterov, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    grads = jnp.linspace(0.1, 1.0, 7)
    update, kept_state = kept.update(grads, kept.init(grads))
    expected, full_state = full.update(grads, full.init(grads))
    np.testing.assert_array_equal(update, expected)
    assert kept_state[0].trace.dtype == jnp.bfloat16
    full_state = jax.tree.map(lambda full, kept: kept.astype(full.dtype), full_state, kept_state)
    update, _ = kept.update(grads, kept_state)
    expected, _ = full.update(grads, full_state)
    np.testing.assert_array_equal(update, expected)


def test_a_sum_is_not_kept_in_integers():
    with refused(ValueError, "dtype floating-point complex"):
        adam_jax.momentum(0.1, accumulator_dtype="int8")


def test_a_sum_keeps_its_dtype(x64):
    params = jnp.ones(3, jnp.float32)
    tx = adam_jax.momentum(0.1)
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        updates, new = tx.update(params.astype(jnp.float64), state, params)
    assert described(new) == described(state)
    assert updates.dtype == jnp.float64


# --- Flags ----------------------------------------------------------------------------------------

FLAGS = [
    (name, parameter.name)
    for name in MEMBERS
    for parameter in arguments(name).values()
    if isinstance(parameter.default, bool) and parameter.name != "eps_hat"
] + [("amsgrad", "eps_hat")]


@pytest.mark.parametrize(("name", "flag"), FLAGS)
@pytest.mark.parametrize("value", [1e-7, 1, None, "False", jnp.asarray(True)], ids=repr)
def test_a_flag_is_a_boolean(name, flag, value):
    others = {"momentum": 0.9} if (name, flag) == ("sgd", "nesterov") else {}
    with refused(TypeError, f"{flag} True False"):
        MEMBERS[name](0.1, **{flag: value}, **others)


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_flags_pass_through_inject_hyperparams(name, flag):
    """They stay Python's booleans: nothing is traced, nothing becomes a number."""
    others = {"momentum": 0.9} if name in ("sgd", "rmsprop") else {}
    if (name, flag) == ("amsgrad", "eps_hat"):
        others = {"max_before_correction": True}
    tx = optax.inject_hyperparams(MEMBERS[name])(0.1, **{flag: True}, **others)
    state = tx.init(PARAMS)
    assert flag not in state.hyperparams
    assert "learning_rate" in state.hyperparams
    with jax.numpy_dtype_promotion("standard"):
        jax.jit(tx.update)(PARAMS, state, PARAMS)


# --- The contract with optax ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in MEMBERS
        for dtype in ("float32", "bfloat16", "complex64")
        if (name, dtype) != ("adopt", "complex64")  # its clipping takes real updates
    ],
)
def test_state_keeps_its_structure(name, dtype):
    params = {"w": jnp.ones((2, 3), dtype), "b": jnp.ones(3, dtype)}
    tx = MEMBERS[name](lambda count: 0.1, weight_decay=0.1, mask=matrices_only)
    state = tx.init(params)
    for _ in range(2):
        with jax.numpy_dtype_promotion("standard"):
            updates, new = jax.eval_shape(tx.update, params, state, params)
        assert described(updates) == described(params)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert described(new) == described(state)
        state = new


@each_member
def test_injected_hyperparameters(name):
    """The learning rate and the decay of a running job can be read and changed."""
    tx = optax.inject_hyperparams(MEMBERS[name])(0.1, weight_decay=0.5)
    state = tx.init(PARAMS)
    assert float(state.hyperparams["weight_decay"]) == 0.5
    state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    with jax.numpy_dtype_promotion("standard"):
        updates, new = jax.jit(tx.update)(PARAMS, state, PARAMS)
    assert described(new) == described(state)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))


@each_member
def test_moments_are_found_by_their_names(name):
    state = MEMBERS[name](0.1).init(PARAMS)
    for field in ("mu", "nu", "trace"):
        found = [value for _, value in optax.tree_utils.tree_get_all_with_path(state, field)]
        trees = [tree for tree in found if tree is not None]
        assert len(trees) <= 1
        for tree in trees:
            assert jax.tree.structure(tree) == jax.tree.structure(PARAMS)


@each_member
def test_parameters_are_found_in_the_state(name):
    """`optax.tree_map_params` on every part of the state that is shaped like the parameters."""
    tx = MEMBERS[name](0.1, weight_decay=0.1)
    doubled = optax.tree_map_params(tx, lambda x: ("param", x.shape), tx.init(PARAMS))
    marked = [x for x in jax.tree.leaves(doubled) if x == "param"]
    shapes = [param.shape for param in PARAMS.values()]
    assert len(marked) == sum(jnp.shape(x) in shapes for x in jax.tree.leaves(tx.init(PARAMS)))
