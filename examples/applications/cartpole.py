"""Several of gymnasium's CartPole-v1: a cart is pushed so that the pole on it stays upright.

Every step is worth 1. An episode terminates when the pole has fallen or the cart has left the
track, and is cut off after 500 steps.
"""

from typing import NamedTuple

import gymnasium
import numpy as np

ACTIONS, HIGHEST, DISCOUNT = 2, 500, 0.99
EPISODES, EVALUATION_SEED = 20, 1_000_000  # training takes other seeds


class Transition(NamedTuple):
    """One step of several environments, which are the first axis of every field."""

    observations: np.ndarray  # position, velocity, angle, angular velocity
    actions: np.ndarray  # 0 pushes to the left, 1 to the right
    rewards: np.ndarray  # 1 - DISCOUNT for every step, so that values are between 0 and 1
    next_observations: np.ndarray
    terminated: np.ndarray  # the pole fell, or the cart left: what comes after is worth 0
    ended: np.ndarray  # terminated, or cut off after 500 steps
    valid: np.ndarray  # False where the environment did nothing but start anew


class Environments:
    """Environments that are stepped together; each starts anew in the step after its end."""

    def __init__(self, count: int, seed: int):
        self.games = gymnasium.make_vec("CartPole-v1", count)
        self.observations, _ = self.games.reset(seed=seed)
        self.ended, self.returns = np.zeros(count, bool), np.zeros(count)

    def step(self, actions: np.ndarray) -> Transition:
        before, valid = self.observations, ~self.ended
        self.observations, rewards, terminated, truncated, _ = self.games.step(actions)
        self.ended = terminated | truncated
        self.returns = np.where(valid, self.returns + rewards, 0)
        scaled = np.float32(1 - DISCOUNT) * rewards.astype(np.float32)
        return Transition(before, actions, scaled, self.observations, terminated, self.ended, valid)


def evaluate(policy) -> float:
    """The mean return of 20 episodes of a policy, which takes observations and gives actions."""
    environments, returns = Environments(EPISODES, EVALUATION_SEED), np.full(EPISODES, np.nan)
    while np.isnan(returns).any():
        environments.step(policy(environments.observations))
        first = environments.ended & np.isnan(returns)
        returns[first] = environments.returns[first]
    return returns.mean()


def by_hand(observations: np.ndarray) -> np.ndarray:
    """Push to the side that the pole falls to."""
    return (observations[:, 2] + observations[:, 3] > 0).astype(int)
