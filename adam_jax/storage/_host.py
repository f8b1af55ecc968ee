"""A storage whose arrays lie in the memory of the host between two steps."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from adam_jax._checks import check_dtype
from adam_jax.storage._protocol import AS_COMPUTED, Storage, StorageLike, in_dtype, is_large


def on_host(inner: StorageLike = None) -> Storage:
    r"""Keep what another storage keeps in the memory of the host, and load it for the step.

    .. math:: \operatorname{save}(x) = \text{to the host}(\operatorname{save}_{inner}(x)), \qquad
              \operatorname{load}(s) = \operatorname{load}_{inner}(\text{to the device}(s))

    So the state takes no memory of the device between two steps, and every step moves it there and
    back: with `int8` for both moments 4.25 bytes a parameter, and 6.3 on an H100, where the two
    kernels of a leaf each read its codes from the host. Compiled for an H100, with eight
    leaves of 2048 × 2048, it is 8.0 bytes a parameter on the host in float32 and 2.12 in 8 bits,
    written in place; during the step it needs 2.0 and 0.33 bytes of the device (`pytest
    tests/test_accelerators.py -k on_the_host`). That is two leaves in float32 and one in 8 bits,
    however many there are; of leaves of 4 MB XLA moves all at once in float32. So take 8 bits.

    Compile `init` and the step with shardings that tell where the state lies, as
    `adam_jax.state_shardings` makes them. On a CPU a step computes what it does with `inner`; with
    jax 0.7 it is not compiled for a mesh of CPUs. XLA for a TPU cannot lay out 8-bit arrays on the
    host: take another dtype there. In the backward pass (`adam_jax.backward`) a layer at a time is
    moved.

    Args:
      inner: a storage, a dtype, or None, the default: as computed. What it leaves as it is, such as
        small leaves, stays on the device.

    Returns:
      A `Storage` for the moments that `inner` is for; it keeps what `inner` keeps, so a checkpoint
      of one fits the other, restored to the memory that is asked for.

    Raises:
      ValueError: if `inner` is neither a storage nor a floating-point dtype.

    Example:
      >>> import adam_jax, jax, jax.numpy as jnp
      >>> from adam_jax.storage import int8, on_host
      >>> tx = adam_jax.adam(1e-3, mu_storage=on_host(int8()), nu_storage=on_host(int8()))
      >>> params = jnp.ones((64, 64))
      >>> state = jax.jit(tx.init)(params)
      >>> print(state[0].nu.codes.dtype, state[0].nu.codes.shape)
      uint8 (64, 64)

    Source: Ren et al., "ZeRO-Offload" (arXiv 2101.06840).
    """
    if inner is None:
        storage = AS_COMPUTED._replace(fits=is_large)
    elif isinstance(inner, Storage):
        storage = inner
    else:
        storage = in_dtype(check_dtype("inner", inner, jnp.inexact))

    def save(moment, leaf):
        return jax.device_put(storage.save(moment, leaf), jax.memory.Space.Host)

    def load(stored, leaf):
        stored = jax.device_put(stored, jax.memory.Space.Device)
        return storage.load(stored, replace(leaf, stored=stored))

    return storage._replace(save=save, load=load)
