"""Which emitter makes the kernels for a platform, or why there is none."""

from typing import Any

import jax

from adam_jax.fusion import _jax
from adam_jax.fusion._kernel import Emitter
from adam_jax.fusion._mosaic_gpu import MosaicGpu
from adam_jax.fusion._pallas_call import Tpu, Triton


def emitter_for(platform: str, interpret: Any = False) -> Emitter | str | None:
    """The emitter for a platform; in words why there is none; None for a CPU, which needs none.

    Args:
      platform: as JAX names it.
      interpret: how Pallas interprets the kernels on another platform; False on the platform.
    """
    if platform == "cpu":
        return None
    if platform == "tpu":
        return _unless_gone("tpu") or Tpu(interpret)
    if platform != "cuda":
        return f"None are made for {platform}."
    if jax.__version_info__ < _jax.MOSAIC_GPU_SINCE:
        return _unless_gone("triton") or Triton(interpret)
    capability = _jax.compute_capability()
    if capability != _jax.MOSAIC_GPU_FOR:
        return (
            f"They are made for GPUs of compute capability {_jax.MOSAIC_GPU_FOR} (Hopper), and "
            f"this one's is {capability}."
        )
    return _unless_gone("mosaic_gpu") or MosaicGpu(interpret)


def _unless_gone(name: str) -> str:
    """Why there is no such backend of Pallas; nothing if there is one."""
    try:
        _jax.backend(name)
    except ImportError as error:
        return f"jax {jax.__version__} has no jax.experimental.pallas.{name} ({error})."
    return ""
