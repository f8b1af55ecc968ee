"""What the tests range over: members, storages and stages. A new one is entered here."""

from typing import Any, NamedTuple

import chains
import optax

import adam_jax
from adam_jax import storage

MEMBERS = chains.members()

# --- Storages -------------------------------------------------------------------------------------

STORAGES = {
    "cast": storage.cast("bfloat16"),
    "stochastic": storage.stochastic(),
    "int8": storage.int8(),
    "int4": storage.int4(),
    "factored": storage.factored(),
    "block_mean": storage.block_mean(),
}


def keeping(*how):
    """The options that keep both moments in one storage, or m in one and v in another.

    A storage that is for one moment alone keeps that one. Each is given by its name, or as it is;
    other names are dtypes, and without any the moments are kept as they are computed.
    """
    how = [STORAGES.get(one, one) if isinstance(one, str) else one for one in how]
    moments = "mu", "nu"
    if len(how) == 1:
        only = getattr(how[0], "only", None)
        moments = moments if only is None else (only,)
        how *= len(moments)
    return {f"{moment}_storage": one for moment, one in zip(moments, how, strict=False)}


# --- Stages ---------------------------------------------------------------------------------------


class Stage(NamedTuple):
    tx: Any
    takes: str = "moments"  # or updates
    emits: str = "updates"  # or moments, or the steps of parameters in low precision
    local: bool = True  # whether each element of an update comes of the same element
    decays: tuple = (0.9, 0.999)  # of the moments before it


# The first word of a name is that of the function.
STAGES = {
    "scale_by_moments": Stage(adam_jax.scale_by_moments(), "updates", "moments"),
    "debias": Stage(adam_jax.debias(), emits="moments"),
    "debias mu": Stage(adam_jax.debias(nu=False), emits="moments"),
    "debias nu": Stage(adam_jax.debias(mu=False), emits="moments"),
    "nesterov": Stage(adam_jax.nesterov(), emits="moments"),
    "nesterov of a schedule": Stage(
        adam_jax.nesterov(lambda count: 1 - 1 / (count.astype(float) + 2)), emits="moments"
    ),
    "running_max": Stage(adam_jax.running_max(), emits="moments"),
    "center": Stage(adam_jax.center(), emits="moments"),
    "delay": Stage(adam_jax.delay(), emits="moments"),
    "floor": Stage(adam_jax.floor(eps=1e-3), emits="moments"),
    "interpolate": Stage(adam_jax.interpolate(0.5), emits="moments"),
    "interpolate 0": Stage(adam_jax.interpolate(0.0), emits="moments"),
    "mix_slow_moment": Stage(adam_jax.mix_slow_moment(0.75, 2.0), emits="moments"),
    "cautious": Stage(adam_jax.cautious(), emits="moments", local=False),
    "normalize": Stage(adam_jax.normalize()),
    "bias_correct": Stage(adam_jax.bias_correct(eps=0.0)),
    "bias_correct eps_hat": Stage(adam_jax.bias_correct(eps=0.0, eps_hat=True)),
    "rectify": Stage(adam_jax.rectify(), decays=(0.9, 0.9)),  # which soon gathers enough
    "atan2": Stage(adam_jax.atan2()),
    "first_moment": Stage(adam_jax.first_moment(), decays=(0.9, None)),
    "scale_by_lr": Stage(adam_jax.scale_by_lr(0.1), "updates"),
    "decay_weights": Stage(adam_jax.decay_weights(0.1), "updates"),
    "decay_weights of a schedule": Stage(
        adam_jax.decay_weights(lambda count: 0.1 / (count.astype(float) + 1)), "updates"
    ),
    "accumulate": Stage(adam_jax.accumulate(0.9), "updates"),
    "accumulate nesterov": Stage(adam_jax.accumulate(0.9, nesterov=True), "updates"),
    "scale_by_trust_ratio": Stage(adam_jax.scale_by_trust_ratio(), "updates", local=False),
    "clip_by_schedule": Stage(
        adam_jax.clip_by_schedule(lambda count: 0.1 * (count.astype(float) + 1)), "updates"
    ),
    "round_stochastically": Stage(adam_jax.round_stochastically(seed=3), "updates", "steps"),
    "compensate bfloat16": Stage(adam_jax.compensate("bfloat16"), "updates", "steps"),
    "compensate int8": Stage(adam_jax.compensate("int8"), "updates", "steps"),
}


def stages(takes, emits):
    """The stages from moments or updates to moments, updates or steps, by their names."""
    return {name: stage.tx for name, stage in STAGES.items() if stage[1:3] == (takes, emits)}


def from_gradients(name):
    """A stage behind the moments that it takes, if it takes them."""
    stage = STAGES[name]
    if stage.takes == "updates":
        return stage.tx
    return optax.chain(adam_jax.scale_by_moments(*stage.decays), stage.tx)


def to_updates(name):
    """A stage between gradients and updates."""
    tx = from_gradients(name)
    return optax.chain(tx, adam_jax.bias_correct()) if STAGES[name].emits == "moments" else tx
