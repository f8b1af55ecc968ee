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
    leaves of 2048 × 2048, both moments take 8.0 bytes a parameter of the host in float32 and 2.12
    in 8 bits, written in place; during the step they take 2.0 and 0.33 bytes a parameter of the
    device (`pytest tests/test_accelerators.py -k on_the_host`). That is two leaves in float32 and
    one in 8 bits, however many leaves there are; but of float32 leaves of 4 MB XLA moves all at
    once. So take 8 bits.

    Compile `init` and the step with shardings that tell where the state lies, as
    `adam_jax.state_shardings` makes them. On a CPU a step computes what it does with `inner`; jax
    0.7 does not compile it for a mesh of CPUs. XLA for a TPU cannot lay out 8-bit arrays on the
    host: take another dtype there. In the backward pass (`adam_jax.backward`) one layer is moved at
    a time.

    Args:
      inner: a storage or a dtype. None, the default: in the dtype of the parameter, at least
        float32. Leaves that `inner` does not take, such as small ones, stay on the device.

    Returns:
      A `Storage` for the moments that `inner` is for. It keeps the same arrays as `inner`, so a
      checkpoint of one can be restored to the memory of the other.

    Raises:
      ValueError: if `inner` is neither a storage nor a floating-point or complex dtype.

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
