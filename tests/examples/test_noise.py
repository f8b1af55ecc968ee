"""The example on the noise of rounding: its measures where the answer is known, and its table."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import noise
import numpy as np
import pytest

from adam_jax import storage


def test_the_measures_without_noise(monkeypatch):
    """Adam and Lion then step by the sign of the true gradient: norm, cosine and step are known."""
    monkeypatch.setattr(noise, "MOMENTS", {"float32": {}})
    monkeypatch.setattr(noise, "NOISES", {"none": lambda key: jnp.zeros(noise.SHAPE)})
    rows = {row.optimizer: row for row in noise.measured(steps=5, seed=0)}
    for name in ("adam", "lion"):
        assert rows[name].norm == pytest.approx(math.sqrt(math.prod(noise.SHAPE)), rel=1e-4)
        assert rows[name].cosine == pytest.approx(math.sqrt(2 / math.pi), abs=0.01)
        assert rows[name].largest == pytest.approx(1, abs=1e-4)


def test_what_is_kept_of_the_steps(monkeypatch):
    """The mean of norm and cosine over the last tenth, the largest step of all."""
    of_steps = np.arange(20.0), np.arange(20.0) / 20, np.array([1.0] * 9 + [7.0] + [2.0] * 10)
    monkeypatch.setattr(noise, "figures", lambda *arguments: of_steps)
    row = noise.measured(steps=20, seed=0)[0]
    assert row[3:] == pytest.approx((18.5, 0.925, 7))


def test_heavy_noise_is_of_three_degrees():
    """Of Student's t with 3 degrees, 5 % lies beyond 3.182 and 1 % beyond 5.841."""
    draws = jax.vmap(noise.heavy)(jax.random.split(jax.random.key(0), 16))
    t = math.sqrt(3) * np.abs(np.asarray(draws))
    assert np.mean(t > 3.182) == pytest.approx(0.05, rel=0.05)
    assert np.mean(t > 5.841) == pytest.approx(0.01, rel=0.1)


def test_a_wrong_storage_shows(monkeypatch):
    """What keeps a moment well stays near float32, and what rounds v to powers of two does not."""
    nearest = storage.Storage(
        save=lambda moment, leaf: jnp.exp2(jnp.round(jnp.log2(moment + 1e-30))),
        load=lambda stored, leaf: stored,
        only="nu",
    )
    kept = {name: noise.MOMENTS[name] for name in ("float32", "bfloat16, at random", "8-bit")}
    monkeypatch.setattr(noise, "MOMENTS", kept | {"powers of two": {"nu_storage": nearest}})
    monkeypatch.setattr(noise, "OPTIMIZERS", {"adam": noise.OPTIMIZERS["adam"]})
    monkeypatch.setattr(noise, "NOISES", {"normal": noise.normal})
    rows = {row.moments: row for row in noise.measured(steps=300, seed=0)}
    base = rows["float32"]
    ratio = {name: row.norm / base.norm for name, row in rows.items()}
    assert ratio["bfloat16, at random"] == pytest.approx(1, abs=0.01)
    assert ratio["8-bit"] == pytest.approx(1, abs=0.1)
    assert rows["8-bit"].cosine == pytest.approx(base.cosine, abs=0.03)
    assert abs(ratio["powers of two"] - 1) > 0.3


def test_noise(tmp_path, monkeypatch, capsys):
    """Two optimizers for a few steps: the table shows the figures of the file."""
    kept = {name: noise.MOMENTS[name] for name in ("float32", "8-bit", "4-bit m alone")}
    monkeypatch.setattr(noise, "MOMENTS", kept)
    monkeypatch.setattr(noise, "OPTIMIZERS", {k: noise.OPTIMIZERS[k] for k in ("adam", "lion")})
    monkeypatch.setattr(sys, "argv", ["noise.py", "--steps=3", f"--json={tmp_path / 'rows.json'}"])
    noise.main()
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    cases = [("adam", moments) for moments in kept] + [("lion", "float32"), ("lion", "8-bit")]
    assert [(row["optimizer"], row["moments"]) for row in rows[::2]] == cases
    base = {}
    for normal, heavy in zip(rows[::2], rows[1::2], strict=True):
        cells = f"| {normal['optimizer']} | {normal['moments']} |"
        for row in (normal, heavy):
            if row["moments"] == "float32":
                base[row["noise"]] = row
            against = base[row["noise"]]
            cells += f" {row['norm'] / against['norm']:.2f} ×"
            cells += f" | {row['cosine']:.2f} of {against['cosine']:.2f}"
            cells += f" | {row['largest']:.1f} of {against['largest']:.1f} |"
        assert cells in printed.splitlines()
    assert printed.startswith("3 steps, seed 0; ")
    assert f"jax {jax.__version__}" in printed


def test_noise_refuses_a_missing_directory(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["noise.py", "--json=no/where.json"])
    with pytest.raises(SystemExit, match="2"):
        noise.main()
    assert "there is no directory" in capsys.readouterr().err
