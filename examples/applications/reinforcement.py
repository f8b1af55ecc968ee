"""Balance a pole by DQN or A3C: `inject_hyperparams` and `apply_if_finite` around `adam_jax.adam`.

What the learning rate should be depends on how the episodes go, so it is no schedule: it lies in
the optimizer's state, and the program lowers it there while the returns are high. A step whose
gradient is not finite is left out and counted. The pole is gymnasium's CartPole-v1, the metric the
mean return of 20 episodes of the greedy policy, from starts that training does not see.

--algorithm dqn: double Q-learning with replay and a target network (Mnih et al. 2015; van Hasselt
et al. 2016). --algorithm a3c: advantage actor-critic (Mnih et al. 2016) with generalised
advantages. One worker that has all environments, the default, is A3C's synchronous form, A2C; with
--workers N, each of N threads has some of the environments and applies its gradients to the shared
weights as soon as it has them.
"""

import argparse
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path

import application
import jax
import jax.numpy as jnp
import numpy as np
import optax
from cartpole import (
    ACTIONS,
    DISCOUNT,
    EPISODES,
    EVALUATION_SEED,
    HIGHEST,
    Environments,
    Transition,
    by_hand,
    evaluate,
)
from commandline import hardware, positive
from drawing import OURS, STYLES, THEIRS, plt, save
from flax import nnx
from tqdm import tqdm

import adam_jax


def chain(adam, learning_rate: float) -> optax.GradientTransformation:
    """The learning rate is a number in the state, which a program may change between steps.

    The others stay constants. Decay rates in the state might change too, and adam_jax corrects the
    moments for that, in other arithmetic than optax: the weights would agree to 1e-7, not bitwise.
    """
    inject = optax.inject_hyperparams(
        adam, static_args=("b1", "b2", "eps", "eps_root"), hyperparam_dtype=jnp.float32
    )
    clipped = optax.chain(optax.clip_by_global_norm(1.0), inject(learning_rate=learning_rate))
    return optax.apply_if_finite(clipped, max_consecutive_errors=10)


ENVIRONMENTS, STEPS = 8, 160_000  # STEPS are those of all environments together
LEARNING_RATE = {"dqn": 5e-4, "a3c": 1e-3}

# dqn: steps before the first update, steps until only 4 % of the actions are random, transitions in
# a batch, updates after each step of the eight environments, updates with the same target network
WARM_UP, EXPLORATION, BATCH, UPDATES, RENEWAL = 1_000, 10_000, 64, 2, 32
# a3c: steps of each environment for an update, GAE's lambda, the weight of the entropy
ROLLOUT, TRACE, ENTROPY = 16, 0.95, 0.01


# --- What the workers share -----------------------------------------------------------------------


class Network(nnx.Module):
    """Two hidden layers. In dqn it gives the value of each action."""

    def __init__(self, outputs: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(4, 128, rngs=rngs)
        self.second = nnx.Linear(128, 128, rngs=rngs)
        self.last = nnx.Linear(128, outputs, rngs=rngs)

    def __call__(self, observations: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.second(nnx.relu(self.first(observations)))))


class ActorCritic(Network):
    """The actor gives the logits of the actions, the critic the value of a state."""

    def __init__(self, outputs: int, rngs: nnx.Rngs):
        super().__init__(outputs, rngs)
        self.critic = Network(1, rngs)


@cache
def compiled(graph: nnx.GraphDef, loss):
    """What the network gives, and the gradients of the loss: one program for both runs."""
    outputs = jax.jit(lambda params, observations: nnx.merge(graph, params)(observations))
    gradients = jax.jit(jax.grad(lambda params, *data: loss(nnx.merge(graph, params), *data)))
    return outputs, gradients


@partial(jax.jit, static_argnums=0)
def updated(tx: optax.GradientTransformation, params, opt_state, grads):
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


class Learner:
    """The weights, the optimizer and the history of a run.

    Workers read `params` without the lock: arrays never change, so it is one whole set of weights,
    if perhaps not the newest. An update takes the lock: of two at the same time one would be lost.
    (The paper's workers take none, and may overwrite each other's.)
    """

    def __init__(self, model: nnx.Module, loss, adam, learning_rate: float, bar: tqdm):
        self.graph, self.params = nnx.split(model)
        self.outputs, self.gradients = compiled(self.graph, loss)
        self.tx, self.learning_rate = chain(adam, learning_rate), learning_rate
        self.opt_state = self.tx.init(self.params)
        self.lock, self.bar, self.steps, self.stop_at = threading.Lock(), bar, 0, bar.total
        self.episodes = []  # of each: at which step it ended, its return, the learning rate then

    def greedy(self, observations: np.ndarray) -> np.ndarray:
        return np.asarray(self.outputs(self.params, observations)).argmax(axis=1)

    def apply(self, grads: nnx.State) -> None:
        with self.lock:
            self.params, self.opt_state = updated(self.tx, self.params, self.opt_state, grads)

    def record(self, environments: Environments, transition: Transition) -> None:
        """Count the steps, and lower the learning rate the nearer the last returns are to 500."""
        ended = environments.returns[transition.ended].tolist()
        with self.lock:
            steps = int(transition.valid.sum())
            self.bar.update(min(steps, self.bar.total - self.bar.n))
            self.steps += steps
            if not ended:
                return
            recent = np.mean(([of for _, of, _ in self.episodes[-20:]] + ended)[-20:])
            rate = self.learning_rate * max(1 - recent / HIGHEST, 0.01)
            self.opt_state = optax.tree.set(self.opt_state, learning_rate=jnp.float32(rate))
            self.episodes += [(self.steps, one, rate) for one in ended]
            self.bar.set_postfix_str(f"return {recent:.0f}, rate {rate:.1e}", refresh=False)

    @property
    def model(self) -> nnx.Module:
        return nnx.merge(self.graph, self.params)


def pick(values: jax.Array, actions: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, actions[..., None], axis=-1)[..., 0]


# --- DQN ------------------------------------------------------------------------------------------


class Replay:
    """A ring of the last transitions."""

    def __init__(self, capacity: int = 100_000):
        self.capacity, self.count, self.rows = capacity, 0, None

    def add(self, transition: Transition) -> None:
        new = [field[transition.valid] for field in transition]
        if self.rows is None:
            self.rows = Transition(
                *(np.empty((self.capacity, *field.shape[1:]), field.dtype) for field in new)
            )
        places = (self.count + np.arange(len(new[0]))) % self.capacity
        for rows, field in zip(self.rows, new, strict=True):
            rows[places] = field
        self.count += len(places)

    def sample(self, rng: np.random.Generator, size: int) -> Transition:
        chosen = rng.integers(min(self.count, self.capacity), size=size)
        return Transition(*(rows[chosen] for rows in self.rows))


def q_loss(model: Network, target: nnx.State, batch: Transition) -> jax.Array:
    """Huber's loss. The network chooses the next action, the target network says its value."""
    chosen = model(batch.next_observations).argmax(axis=-1)
    values = nnx.merge(nnx.graphdef(model), target)(batch.next_observations)
    following = jnp.where(batch.terminated, 0, pick(values, chosen))
    goal = jax.lax.stop_gradient(batch.rewards + DISCOUNT * following)
    return optax.huber_loss(pick(model(batch.observations), batch.actions), goal).mean()


def dqn(learner: Learner, environments: Environments, rng: np.random.Generator) -> None:
    replay, target, updates = Replay(), learner.params, 0
    while learner.steps < learner.stop_at:
        epsilon = np.interp(learner.steps, [WARM_UP, EXPLORATION], [1, 0.04])
        actions = learner.greedy(environments.observations)
        explore = rng.random(len(actions)) < epsilon
        actions = np.where(explore, rng.integers(ACTIONS, size=len(actions)), actions)
        transition = environments.step(actions)
        replay.add(transition)
        learner.record(environments, transition)
        for _ in range(UPDATES if learner.steps >= WARM_UP else 0):
            batch = replay.sample(rng, BATCH)
            learner.apply(learner.gradients(learner.params, target, batch))
            updates += 1
            if updates % RENEWAL == 0:
                target = learner.params


# --- A3C ------------------------------------------------------------------------------------------


def advantages(rollout: Transition, values: jax.Array) -> jax.Array:
    """GAE (Schulman et al. 2016): a decaying sum of the errors of the values that follow.

    `values` has one more step than the rollout. What follows after 500 steps, where an episode is
    cut off, is what the critic expects; what follows where it terminated is 0.
    """
    following = jnp.where(rollout.terminated, 0, values[1:])
    errors = rollout.rewards + DISCOUNT * following - values[:-1]

    def backwards(later, step):
        error, ended = step
        advantage = error + DISCOUNT * TRACE * jnp.where(ended, 0, later)
        return advantage, advantage

    start = jnp.zeros_like(values[-1])
    return jax.lax.scan(backwards, start, (errors, rollout.ended), reverse=True)[1]


def actor_critic_loss(model: ActorCritic, rollout: Transition) -> jax.Array:
    states = jnp.concatenate([rollout.observations, rollout.next_observations[-1:]])
    values = model.critic(states)[..., 0]
    advantage = jax.lax.stop_gradient(advantages(rollout, values))
    goal = advantage + jax.lax.stop_gradient(values[:-1])
    log_probabilities = jax.nn.log_softmax(model(rollout.observations))
    actor = -advantage * pick(log_probabilities, rollout.actions)
    critic = optax.l2_loss(values[:-1], goal)
    entropy = -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)
    return jnp.mean(actor + 0.5 * critic - ENTROPY * entropy, where=rollout.valid)


def a3c(learner: Learner, environments: Environments, rng: np.random.Generator) -> None:
    """One worker: it plays, and takes its gradients, with the weights from before the rollout."""
    while learner.steps < learner.stop_at:
        params, rollout = learner.params, []
        for _ in range(ROLLOUT):
            logits = np.asarray(learner.outputs(params, environments.observations))
            actions = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # drawn by softmax
            rollout.append(environments.step(actions))
            learner.record(environments, rollout[-1])
        stacked = Transition(*map(np.stack, zip(*rollout, strict=True)))
        learner.apply(learner.gradients(params, stacked))


# --- Runs, picture, command line ------------------------------------------------------------------

ALGORITHMS = {"dqn": (dqn, Network, q_loss), "a3c": (a3c, ActorCritic, actor_critic_loss)}


def train(name: str, adam, options: argparse.Namespace) -> Learner:
    play, model, loss = ALGORITHMS[options.algorithm]
    share = max(1, ENVIRONMENTS // options.workers)
    with (
        tqdm(total=options.steps, unit="step", desc=name) as bar,
        ThreadPoolExecutor(options.workers) as pool,
    ):
        network = model(ACTIONS, nnx.Rngs(options.seed))
        learner = Learner(network, loss, adam, LEARNING_RATE[options.algorithm], bar)
        workers = []
        for number in range(options.workers):
            environments = Environments(share, options.seed + number)
            rng = np.random.default_rng((options.seed, number))
            workers.append(pool.submit(play, learner, environments, rng))
        try:
            for worker in as_completed(workers):
                worker.result()
        finally:  # after an error or Ctrl-C the other workers end too
            learner.stop_at = 0
    return learner


def draw(
    algorithm: str, runs: dict[str, Learner], reached: float, baselines: dict, path: Path
) -> None:
    """Returns, rates and policy; `reached` is what the greedy policy returns at the end."""
    figure = plt.figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    above, below = left.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for name, learner in runs.items():
        steps, returns, rates = np.array(learner.episodes).reshape(-1, 3).T
        means = [returns[max(0, end - 20) : end].mean() for end in range(1, len(returns) + 1)]
        above.plot(steps / 1000, means, label=name, **STYLES[name])
        below.plot(steps / 1000, rates, **STYLES[name])
    for (name, value), style in zip(baselines.items(), (":", "-."), strict=True):
        above.axhline(value, label=name, color="0.4", linestyle=style, linewidth=1)
    played = "some actions random" if algorithm == "dqn" else "actions drawn from the policy"
    title = f"Mean of 20 returns in training, {played};\n{reached:.4g} by the greedy policy"
    above.set(ylabel="return", ylim=(0, 1.04 * HIGHEST))
    above.set_title(f"{title} at the end", fontsize="medium")
    above.legend(loc="lower right")
    highest = LEARNING_RATE[algorithm]
    below.set(yscale="log", ylim=(highest / 120, highest * 1.2))
    below.set(xlabel="thousand steps", ylabel="learning rate")
    for axes in (above, below):
        axes.grid(alpha=0.3)

    angle, velocity = np.linspace(-0.2, 0.2, 81), np.linspace(-2, 2, 81)
    states = np.zeros((81, 81, 4), np.float32)  # the cart stands in the middle
    states[..., 2], states[..., 3] = np.meshgrid(angle, velocity)
    left_and_right = np.asarray(runs[OURS].outputs(runs[OURS].params, states))
    preference = np.diff(left_and_right)[..., 0]
    shown, levels, title = preference, 12, "Value of right minus that of left"
    if algorithm == "a3c":
        shown, levels = 1 / (1 + np.exp(-preference)), np.linspace(0, 1, 11)
        title = "Probability of pushing to the right"
    axes = right.subplots()
    right.colorbar(axes.contourf(angle, velocity, shown, levels, cmap="cividis"), ax=axes)
    if preference.min() < 0 < preference.max():
        axes.contour(angle, velocity, preference, [0], colors="white", linewidths=2)
    axes.plot([], [], color="white", linewidth=2, label="border of the policy")
    axes.plot(angle, -angle, "--", color="white", label="border of that written by hand")
    axes.set(title=title, xlabel="angle, rad", ylabel="angular velocity, rad/s")
    axes.set_xticks(angle[::20])
    axes.legend(loc="upper right", facecolor="0.3", labelcolor="white", framealpha=1)
    save(figure, path)


def main() -> None:
    made = application.parser(__doc__, steps=STEPS, plot="reinforcement-ALGORITHM.png")
    made.add_argument(
        "--algorithm", choices=ALGORITHMS, default="dqn", help="(default: %(default)s)"
    )
    made.add_argument(
        "--workers", type=positive, default=1, help="threads of a3c (default: %(default)s: A2C)"
    )
    options = made.parse_args()
    if options.algorithm == "dqn" and options.workers > 1:
        made.error("--workers: dqn has one; add --algorithm a3c")
    if not 0 <= options.seed <= EVALUATION_SEED - options.workers:
        made.error(f"--seed: from 0 to under {EVALUATION_SEED}, the seed of the evaluation")
    plot = options.plot.with_name(options.plot.name.replace("ALGORITHM", options.algorithm))

    start = time.perf_counter()
    runs = {
        name: train(name, adam, options)
        for name, adam in ((OURS, adam_jax.adam), (THEIRS, optax.adam))
        if name == OURS or not options.alone
    }
    print(f"{options.steps} steps in {time.perf_counter() - start:.0f} s on {hardware()}")

    rng, ours = np.random.default_rng(EVALUATION_SEED), runs[OURS]
    random = evaluate(lambda observations: rng.integers(ACTIONS, size=len(observations)))
    baselines = {"random policy": random, "policy written by hand": evaluate(by_hand)}
    metric, reached = f"mean return of {EPISODES} episodes", evaluate(ours.greedy)
    for name, value in baselines.items():
        application.report(metric, reached, f"the {name}", value)
    left_out = optax.tree.get(ours.opt_state, "total_notfinite")
    print(f"{left_out} updates left out because a gradient was not finite")
    if THEIRS in runs:
        apart = application.difference(ours.model, runs[THEIRS].model)
        returned = evaluate(runs[THEIRS].greedy)
        print(f"with optax.adam {returned:.4g}; largest difference of a weight {apart:g}")
    draw(options.algorithm, runs, reached, baselines, plot)
    print(f"returns, learning rates and policy: {plot}")


if __name__ == "__main__":
    main()
