"""Reinforcement learning: what may go wrong unseen, because a pole is balanced all the same."""

import copy
import itertools
import sys
import threading
import time
from types import SimpleNamespace

import cartpole
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reinforcement
from cartpole import Environments, Transition
from flax import nnx
from support import assert_close
from tqdm import tqdm

import adam_jax


@pytest.fixture(autouse=True)
def as_a_user_has_it():
    """optax's wrappers are not strict about dtypes; a context manager would miss the threads."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def fresh():
    with tqdm(total=10_000, disable=True) as bar:
        model = reinforcement.Network(2, nnx.Rngs(0))
        yield reinforcement.Learner(model, reinforcement.q_loss, adam_jax.adam, 1e-2, bar)


@pytest.fixture
def learner(fresh):
    """One whose update is compiled once for all tests."""
    one = copy.copy(fresh)
    one.episodes = []
    return one


def transitions(rng, *shape, ended=0.0):
    """Random ones, with the step after an end not valid."""
    over = rng.random(shape) < ended
    observations = rng.normal(size=(*shape, 4)).astype(np.float32)
    return Transition(
        observations=observations,
        actions=rng.integers(2, size=shape),
        rewards=rng.random(shape).astype(np.float32),
        next_observations=np.roll(observations, -1, axis=0),
        terminated=over & (rng.random(shape) < 0.5),
        ended=over,
        valid=~np.concatenate([np.zeros_like(over[:1]), over[:-1]]),
    )


def leaves_equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- Environments ---------------------------------------------------------------------------------


def test_an_episode_that_is_cut_off_did_not_terminate():
    environments = Environments(2, seed=0)
    environments.games.unwrapped.max_episode_steps = 5
    steps = [environments.step(np.full(2, number % 2)) for number in range(8)]
    assert [step.ended.all() for step in steps] == [number == 4 for number in range(8)]
    assert not any(step.terminated.any() for step in steps)
    assert [step.valid.all() for step in steps] == [number != 5 for number in range(8)]
    assert (environments.returns == 2).all()
    assert np.abs(steps[5].next_observations).max() <= 0.05  # a new start
    for step, following in itertools.pairwise(steps):
        np.testing.assert_array_equal(step.next_observations, following.observations)


def test_a_pole_that_falls_terminates():
    environments = Environments(1, seed=0)
    steps = 0
    while not environments.ended:
        transition = environments.step(np.ones(1, int))
        steps += 1
    assert transition.terminated
    assert environments.returns == steps < 20
    assert 12 < np.degrees(np.abs(transition.next_observations[0, 2])) < 24


def test_evaluation_takes_the_first_episode_of_each():
    falls = lambda observations: np.ones(len(observations), int)  # noqa: E731
    assert 8 <= cartpole.evaluate(falls) <= 11
    assert cartpole.evaluate(falls) == cartpole.evaluate(falls)


# --- DQN ------------------------------------------------------------------------------------------


def test_replay_is_a_ring_of_what_is_valid():
    rng = np.random.default_rng(0)
    replay, added = reinforcement.Replay(capacity=7), []
    for number in range(4):
        step = transitions(rng, 3)
        step = step._replace(
            actions=3 * number + np.arange(3), valid=np.arange(3) != number, rewards=rng.random(3)
        )
        added += [row for row in zip(*step, strict=True) if row[-1]]
        replay.add(step)
        batch = replay.sample(rng, 200)
        last = {row[1]: row for row in added[-7:]}
        assert set(batch.actions) == set(last)
        for row in zip(*batch, strict=True):
            for field, expected in zip(row, last[row[1]], strict=True):
                np.testing.assert_array_equal(field, expected)


def test_q_after_a_cut_off_counts_and_after_a_fall_does_not():
    model = reinforcement.Network(2, nnx.Rngs(0))
    target = nnx.state(model)
    other = jax.tree.map(lambda weight: 2 * weight + 1, target)
    batch = transitions(np.random.default_rng(0), 4)
    over = batch._replace(ended=np.ones(4, bool))
    fell = over._replace(terminated=np.ones(4, bool))
    loss = nnx.jit(reinforcement.q_loss)
    assert loss(model, target, fell) == loss(model, other, fell)
    assert loss(model, target, over) != loss(model, other, over)
    values = model(fell.observations)[np.arange(4), fell.actions]
    assert_close(
        loss(model, target, fell),
        jnp.mean(optax.huber_loss(values, fell.rewards)),
        "float32 mean",
    )


# --- A3C ------------------------------------------------------------------------------------------


def test_advantages(x64):
    """Against the definition: the decaying sum of the errors until the end."""
    rng = np.random.default_rng(0)
    rollout = transitions(rng, 12, 5, ended=0.2)
    rollout = rollout._replace(rewards=rng.random((12, 5)))
    values = rng.normal(size=(13, 5))
    expected = np.zeros((12, 5))
    for start, one in np.ndindex(12, 5):
        for step in range(start, 12):
            following = 0 if rollout.terminated[step, one] else values[step + 1, one]
            error = rollout.rewards[step, one] + 0.99 * following - values[step, one]
            expected[start, one] += (0.99 * 0.95) ** (step - start) * error
            if rollout.ended[step, one]:
                break
    cut_off = rollout.ended & ~rollout.terminated
    assert cut_off.any()
    assert rollout.terminated.any()
    assert_close(reinforcement.advantages(rollout, jnp.asarray(values)), expected, "algebra")


def test_the_step_in_which_an_environment_starts_anew_teaches_nothing():
    rng = np.random.default_rng(0)
    rollout = transitions(rng, 12, 5, ended=0.2)
    model = reinforcement.ActorCritic(2, nnx.Rngs(0))
    other = rollout._replace(
        rewards=np.where(rollout.valid, rollout.rewards, 100).astype(np.float32),
        actions=np.where(rollout.valid, rollout.actions, 1 - rollout.actions),
    )
    assert not rollout.valid.all()
    gradients = nnx.jit(nnx.grad(reinforcement.actor_critic_loss))
    assert leaves_equal(gradients(model, rollout), gradients(model, other))
    played = rollout._replace(rewards=rollout.rewards + np.float32(1))
    assert not leaves_equal(gradients(model, rollout), gradients(model, played))


# --- The learner ----------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_is_left_out_and_counted(learner):
    good = jax.tree.map(jnp.ones_like, learner.params)
    bad = jax.tree.map(lambda grad: grad, good)
    bad.last.bias[...] = jnp.array([1.0, jnp.nan])
    learner.apply(good)
    params, inner = learner.params, learner.opt_state.inner_state
    learner.apply(bad)
    assert leaves_equal(learner.params, params)
    assert leaves_equal(learner.opt_state.inner_state, inner)
    assert learner.opt_state.total_notfinite == 1
    learner.apply(good)
    assert not leaves_equal(learner.params, params)
    assert learner.opt_state.total_notfinite == 1


def test_the_learning_rate_falls_while_returns_are_high(learner):
    start = jax.tree.map(jnp.copy, learner.params)
    gradient = jax.tree.map(jnp.ones_like, start)
    environments = Environments(2, seed=0)
    transition = environments.step(np.zeros(2, int))
    learner.record(environments, transition)
    assert optax.tree.get(learner.opt_state, "learning_rate") == np.float32(1e-2)
    for returned, rate in ((100, 8e-3), (400, 5e-3), (0, 1e-2 * (1 - 500 / 3 / 500))):
        environments.returns[:] = returned, -1
        learner.record(environments, transition._replace(ended=np.array([True, False])))
        assert optax.tree.get(learner.opt_state, "learning_rate") == np.float32(rate)
    for _ in range(20):
        environments.returns[:] = 500
        learner.record(environments, transition._replace(ended=np.ones(2, bool)))
    assert optax.tree.get(learner.opt_state, "learning_rate") == np.float32(1e-4)
    assert learner.steps == 2 * 24
    learner.apply(gradient)  # and Adam's first step is as long as the learning rate says
    moved = jax.tree.map(
        lambda a, b: jnp.max(jnp.abs(jnp.abs(a - b) - 1e-4)), learner.params, start
    )
    assert max(jax.tree.leaves(moved)) < 1e-6


# --- Workers --------------------------------------------------------------------------------------


def test_no_update_of_two_workers_is_lost(learner):
    """The same gradient from four threads at once: the weights of as many steps in a row."""
    gradient = jax.tree.map(jnp.ones_like, learner.params)
    params, opt_state = learner.params, learner.opt_state
    for _ in range(200):
        params, opt_state = reinforcement.updated(learner.tx, params, opt_state, gradient)
    work = lambda: [learner.apply(gradient) for _ in range(50)]  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert leaves_equal((learner.params, learner.opt_state), (params, opt_state))


def options(**given):
    return SimpleNamespace(**{"algorithm": "a3c", "steps": 300, "seed": 0, "workers": 3, **given})


def test_workers_play_on_their_own_environments(monkeypatch):
    """Three threads, each with two environments of its own; all gradients reach the weights."""
    updates, seen = [], {}
    apply = reinforcement.Learner.apply
    step = Environments.step

    def counted(learner, grads):
        updates.append(threading.get_ident())
        apply(learner, grads)

    def watched(environments, actions):
        transition = step(environments, actions)
        seen.setdefault(threading.get_ident(), (environments, transition.observations))
        assert seen[threading.get_ident()][0] is environments
        return transition

    monkeypatch.setattr(reinforcement.Learner, "apply", counted)
    monkeypatch.setattr(Environments, "step", watched)
    learner = reinforcement.train("three", adam_jax.adam, options(steps=2000))
    assert learner.steps >= 2000
    assert len(set(updates)) == len(seen) == 3
    starts = [observations for _, observations in seen.values()]
    assert {start.shape for start in starts} == {(2, 4)}
    assert not np.array_equal(starts[0], starts[1])
    count = optax.tree.get_all_with_path(learner.opt_state, "count")
    assert {int(value) for _, value in count} == {len(updates)}
    assert learner.opt_state.total_notfinite == 0


def test_the_error_of_a_worker_ends_all(monkeypatch):
    def play(learner, environments, rng):
        if rng.random() == np.random.default_rng((0, 1)).random():
            raise RuntimeError("the second worker")
        while learner.steps < learner.stop_at:  # for ever, as nobody counts
            time.sleep(0.001)

    monkeypatch.setitem(reinforcement.ALGORITHMS, "a3c", (play, reinforcement.Network, None))
    with pytest.raises(RuntimeError, match="the second worker"):
        reinforcement.train("three", adam_jax.adam, options())


# --- The program ----------------------------------------------------------------------------------


def run(monkeypatch, directory, *arguments):
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "argv", ["reinforcement.py", *arguments])
    reinforcement.main()


@pytest.mark.parametrize("algorithm", ["dqn", "a3c"])
def test_both_optimizers_play_the_same_episodes(algorithm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reinforcement, "WARM_UP", 100)
    run(monkeypatch, tmp_path, "--algorithm", algorithm, "--steps", "1000")
    printed = capsys.readouterr().out
    assert "largest difference of a weight 0\n" in printed
    assert "0 updates left out" in printed
    assert "mean return of 20 episodes" in printed
    picture = tmp_path / f"reinforcement-{algorithm}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_ends_before_its_first_episode(tmp_path, monkeypatch, capsys):
    run(monkeypatch, tmp_path, "--steps", "1", "--alone", "--plot", "one.png")
    assert "NOT better" in capsys.readouterr().out
    assert (tmp_path / "one.png").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--workers", "2"], "dqn has one"),
        (["--seed", "-1"], "from 0"),
        (["--algorithm", "a3c", "--workers", "9", "--seed", "999995"], "seed of the evaluation"),
        (["--algorithm", "ppo"], "invalid choice"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(arguments, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reinforcement.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        reinforcement.main()
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err
