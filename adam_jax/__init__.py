"""Adam as a pipeline of optax gradient transformations.

gradient ──scale_by_moments──▶ Moments ──bias_correct──▶ direction ──scale_by_lr──▶ update
"""

from adam_jax import backward, basis, rules, storage, tasks
from adam_jax.average import Average
from adam_jax.backward import stacked
from adam_jax.basis import in_basis
from adam_jax.correction import (
    MixSlowMomentState,
    NesterovState,
    RunningMaxState,
    cautious,
    center,
    debias,
    delay,
    floor,
    interpolate,
    mix_slow_moment,
    nesterov,
    running_max,
)
from adam_jax.direction import atan2, bias_correct, first_moment, normalize, rectify
from adam_jax.from_optax import from_optax
from adam_jax.fusion import fuse, fused_step
from adam_jax.lazy import lazy
from adam_jax.moments import ScaleByMomentsState, scale_by_moments
from adam_jax.optimizers import (
    adabelief,
    adagrad,
    adam,
    adam_atan2,
    adamax,
    adamaxw,
    adamw,
    ademamix,
    adopt,
    amsgrad,
    cautious_adamw,
    lamb,
    laprop,
    lion,
    momentum,
    nadam,
    nadamw,
    nesterov_momentum,
    radam,
    rmsprop,
    sgd,
    yogi,
)
from adam_jax.rounding import CompensateState, compensate, round_stochastically
from adam_jax.rules import accumulated, belief, infinity, squared
from adam_jax.sharding import state_shardings
from adam_jax.signal import Moments
from adam_jax.updates import (
    AccumulateState,
    CountState,
    accumulate,
    clip_by_schedule,
    decay_weights,
    scale_by_lr,
    scale_by_trust_ratio,
)

__version__ = "0.1.0"

__all__ = [
    # the signal
    "Moments",
    "Average",
    # gradients of several tasks to one gradient: a module of stages
    "tasks",
    # gradients to moments, and the rules for the second one (`rules.yogi` is the fifth)
    "scale_by_moments",
    "rules",
    "squared",
    "belief",
    "infinity",
    "accumulated",
    # how moments are kept between two steps: a module of storages
    "storage",
    # moments to moments
    "debias",
    "nesterov",
    "running_max",
    "center",
    "delay",
    "floor",
    "interpolate",
    "mix_slow_moment",
    "cautious",
    # moments to updates
    "normalize",
    "bias_correct",
    "rectify",
    "atan2",
    "first_moment",
    # updates to updates
    "scale_by_lr",
    "decay_weights",
    "accumulate",
    "scale_by_trust_ratio",
    "clip_by_schedule",
    # updates to updates that low-precision parameters land on
    "round_stochastically",
    "compensate",
    # a chain in another basis of every matrix: SOAP, GaLore
    "in_basis",
    "basis",
    # a chain as one kernel a leaf, on a GPU and a TPU
    "fuse",
    "fused_step",
    # every layer of a stack by itself; a step inside the backward pass: a module
    "stacked",
    "backward",
    # rows without a gradient stay as they are
    "lazy",
    # a running job goes on here
    "from_optax",
    # where the state lives on many devices
    "state_shardings",
    # the states
    "ScaleByMomentsState",
    "NesterovState",
    "RunningMaxState",
    "MixSlowMomentState",
    "CountState",
    "AccumulateState",
    "CompensateState",
    # whole optimizers, one chain each
    "sgd",
    "momentum",
    "nesterov_momentum",
    "adagrad",
    "rmsprop",
    "adam",
    "adamw",
    "nadam",
    "nadamw",
    "amsgrad",
    "radam",
    "adabelief",
    "adamax",
    "adamaxw",
    "yogi",
    "lamb",
    "adam_atan2",
    "laprop",
    "adopt",
    "ademamix",
    "lion",
    "cautious_adamw",
]
