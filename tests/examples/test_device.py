"""The command for an accelerator: what it reports, and that it tells what is wrong."""

import json

import device
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax


@pytest.fixture
def report(tmp_path, monkeypatch):
    """What a run of some sections writes on small work, and its exit code."""
    shapes = ((80, 64), (64,))
    trees = {"mlp": shapes, "gpt2": shapes, "stacked": shapes}
    sides = {name: device.SIDES[name] for name in (device.FIRST, "8-bit, fused", "flashoptim-jax")}
    monkeypatch.setattr(device, "trees", lambda: trees)
    monkeypatch.setattr(device, "SIDES", sides)
    monkeypatch.setattr(device, "BITS", ("adam",))
    monkeypatch.setattr(device, "BIT_SHAPES", {"matrix": (16, 8)})
    monkeypatch.setattr(device, "case_shapes", lambda: {"matrix": (70, 64)})
    cases = {name: device.CASES[name] for name in ("adam", "bfloat16 + int8, 8-bit")}
    monkeypatch.setattr(device, "CASES", cases)

    def run(*sections):
        path = tmp_path / "device.json"
        with jax.numpy_dtype_promotion("standard"):  # optax is not strict
            code = device.main(["--json", str(path), "--sections", *sections])
        return code, json.loads(path.read_text())

    return run


def test_every_section_is_written_and_printed(report, capsys):
    code, written = report(*device.SECTIONS)
    assert code == 0
    assert written["failed"] == []
    rows = {name: [row["of"] for row in rows] for name, rows in written["sections"].items()}
    assert rows == {
        "bits": ["adam"],
        "kernels": list(device.CASES),
        "launches": [f"{tree}: {side}" for tree in ("mlp", "gpt2") for side in device.SIDES],
        "gpt2": ["limit", *device.SIDES],
        "stacked": ["limit", *device.SIDES],
        "torch": ["gpt2: AdamW, fused", "stacked: AdamW, fused"],
    }
    limit, first, fused, _ = written["sections"]["stacked"]
    assert limit["of the limit"] == 1
    assert first["bytes/param"] == pytest.approx(28, rel=0.01)
    assert 16 < fused["bytes/param"] < 17
    assert all("skipped" in row for row in written["sections"]["torch"])  # no GPU
    assert written["machine"]["jax"] == jax.__version__
    printed = capsys.readouterr().out
    assert "Here fused_step is the plain chain" in printed
    assert "no check failed" in printed


def test_another_epsilon_is_not_optax(report, monkeypatch):
    monkeypatch.setattr(adam_jax, "adam", lambda rate: optax.adam(rate, eps=1e-6))
    code, written = report("bits")
    assert code == 1
    assert written["failed"] == ["bits: adam"]
    assert written["sections"]["bits"][0]["FAILED"] == "not the bits of optax"


def test_wrong_kernels_fail_and_do_not_end_the_run(report, monkeypatch, capsys):
    """Of two cases one does not compile, and one has weights that are 4 ulp off in one place."""
    fused_step = adam_jax.fused_step

    def wrong(tx):
        if tx is not device.CASES["adam"][1]:
            raise ValueError("no such kernel\nand more")
        step = fused_step(tx)

        def off(params, state, grads):
            params, state = step(params, state, grads)
            at = params["matrix"][3, 5]
            return {"matrix": params["matrix"].at[3, 5].set(at * (1 + 4 * 2.0**-23))}, state

        return off

    monkeypatch.setattr(adam_jax, "fused_step", wrong)
    code, written = report("kernels", "bits")
    assert code == 1
    adam, other = written["sections"]["kernels"]
    assert adam["FAILED"] == "too far apart: weights"
    assert 2 < adam["weights, ulp"] < 9
    assert other["FAILED"] == "ValueError: no such kernel"
    assert written["sections"]["bits"][0]["FAILED"] == ""
    assert "FAILED: kernels: adam" in capsys.readouterr().out


def test_codes_and_counts():
    """One code in 100,000 may differ, and no count."""
    codes, count = np.zeros((400, 1000), np.int8), np.int32(3)
    few, many = codes.copy(), codes.copy()
    few[0, :4], many[0, :5] = 1, 1

    def failed(found, n=count):
        weights = np.ones(1, np.float32)
        due = weights, [codes, count]
        return device.compare([((weights, [found, n]), due, due)])["FAILED"]

    assert failed(codes) == failed(few) == ""
    assert failed(many) == "too far apart: codes"
    assert failed(codes, np.int32(4)) == "too far apart: scalars"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ulps(dtype):
    one, eps = jnp.ones((), dtype), jnp.finfo(dtype).eps
    assert device.ulps(one + eps, one, one) == 1
    assert device.ulps(one, one + eps, one) == 1
    assert device.ulps(one, one, one) == 0
    assert device.ulps(one * jnp.nan, one, one) > 1e8


def test_operations_within_a_call_are_counted():
    """As in a GPU's command buffer, and a long tuple is written with comments."""

    class Module:
        def as_text(self):
            return """HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} add(%p, %p)
}

%command_buffer (p: f32[8]) -> (f32[8], f32[8]) {
  %p.1 = f32[8]{0} parameter(0)
  %a = f32[8]{0} fusion(%p.1), kind=kLoop, calls=%fused
  %b = (f32[8]{0}, /*index=1*/f32[8]{0}) fusion(%a), kind=kLoop, calls=%fused
  ROOT %t = (f32[8]{0}, f32[8]{0}) tuple(%a, %a)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %call = (f32[8]{0}, f32[8]{0}) call(%x), to_apply=%command_buffer
  %y = f32[8]{0} get-tuple-element(%call), index=0
  %k = f32[8]{0} custom-call(%y), custom_call_target="__gpu$xla.gpu.triton"
  ROOT %copy = f32[8]{0} copy(%k)
}
"""

    assert device.operations(Module()) == ["fusion", "fusion", "custom-call", "copy"]
    assert device.pallas(Module()) == 1
