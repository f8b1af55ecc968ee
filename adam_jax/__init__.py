"""Adam as a pipeline of optax gradient transformations.

gradient ──scale_by_moments──▶ Moments ──bias_correct──▶ direction ──scale_by_lr──▶ update
"""

from adam_jax.correction import debias, nesterov
from adam_jax.direction import bias_correct, normalize
from adam_jax.learning_rate import ScaleByLrState, scale_by_lr
from adam_jax.moments import ScaleByMomentsState, Weight, scale_by_moments, squared
from adam_jax.optimizers import adam, adamw, nadam, nadamw
from adam_jax.signals import Moments

__version__ = "0.1.0"

__all__ = [
    # the signal
    "Moments",
    "ScaleByLrState",
    # the states
    "ScaleByMomentsState",
    "Weight",
    # whole optimizers, one chain each
    "adam",
    "adamw",
    "bias_correct",
    # moments to moments
    "debias",
    "nadam",
    "nadamw",
    "nesterov",
    # moments to updates
    "normalize",
    # updates to updates
    "scale_by_lr",
    # gradients to moments
    "scale_by_moments",
    "squared",
]
