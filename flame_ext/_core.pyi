from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.floating[Any]]

def build_info() -> dict[str, str]: ...
def isa_compiled() -> list[str]: ...
def isa_supported() -> list[str]: ...
def isa_active() -> str: ...
def set_isa(name: str) -> None: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def cuda_devices() -> list[str]: ...
def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]: ...
def philox_bits(seed: int, stream: int, offset: int, n: int) -> NDArray[np.uint32]: ...
def philox_uniform(seed: int, stream: int, offset: int, n: int) -> NDArray[np.float32]: ...
def philox_normal(seed: int, stream: int, offset: int, n: int) -> NDArray[np.float32]: ...

# Only in a build with CUDA. `out` is a device pointer, `cuda_stream` a cudaStream_t.
def cuda_philox_bits(
    seed: int, stream: int, offset: int, n: int, out: int, cuda_stream: int
) -> None: ...
def cuda_philox_normal(
    seed: int, stream: int, offset: int, n: int, out: int, cuda_stream: int
) -> None: ...

class PackedPolicy:
    def __init__(
        self,
        *,
        kind: Literal["flow", "gaussian"],
        obs_dim: int,
        action_dim: int,
        policy: _Array,
        hidden: Sequence[int],
        activation: str,
        layer_norm: bool = False,
        time_features: _Array | None = None,
        steps: _Array | None = None,
        log_std_range: tuple[float, float] = (-5.0, 2.0),
        critics: _Array | None = None,
        critic_hidden: Sequence[int] = (),
        critic_activation: str = "mish",
        critic_layer_norm: bool = False,
        critic_members: int = 2,
        precision: Literal["fp32", "fp16"] = "fp32",
        obs_shift: _Array | None = None,
        obs_scale: _Array | None = None,
        obs_clip: float = 10.0,
        action_middle: _Array | None = None,
        action_half: _Array | None = None,
    ) -> None: ...
    def act(
        self,
        obs: NDArray[Any],
        noise: _Array | None = None,
        num_particles: int = 1,
        seed: int = 0,
        stream: int = 0,
        offset: int = 0,
    ) -> NDArray[np.float32]: ...
    def q_min(self, obs: NDArray[Any], action: _Array) -> NDArray[np.float32]: ...
    @property
    def obs_dim(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def has_critics(self) -> bool: ...
    @property
    def weight_bytes(self) -> int: ...
