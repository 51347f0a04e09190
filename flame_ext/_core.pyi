from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from flame_ext.sampling import CandidateSampling

_Array = NDArray[np.floating[Any]]
_Network = tuple[MlpSpec, _Array]  # with its parameters

def build_info() -> dict[str, str]: ...
def isa_compiled() -> list[str]: ...
def isa_supported() -> list[str]: ...
def isa_active() -> str: ...
def bfloat16_supported() -> bool: ...
def set_isa(name: str) -> None: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def peak_gflops() -> float: ...
def read_gbps(size: int) -> float: ...
def cuda_devices() -> list[str]: ...
def cuda_problem() -> str: ...

# For tests: the training kernels become the CUDA ones, executed on the host, until set_isa.
def run_cuda_on_host(
    order: Literal["rising", "falling", "off"], shared_bytes: int = ..., tensor_cores: bool = ...
) -> None: ...

# For tests: the CUDA acting kernel, executed on the host.
def policy_act_on_host(
    policy: MlpSpec,
    parameters: _Array,
    critics: MlpSpec,
    critic_parameters: _Array,
    obs: _Array,
    noise: _Array,
    time: _Array,
    scale: _Array,
    *,
    order: Literal["rising", "falling"],
    shared_bytes: int,
    multiprocessors: int,
    tensor_cores: bool = ...,
) -> NDArray[np.float32]: ...

# x (rows, depth) times the transpose of w (columns, depth) by tiles of 8 rows_per_warp rows.
def product_on_host(
    x: NDArray[np.float32],
    w: NDArray[np.float32],
    rows_per_warp: int,
    tensor_cores: bool,
    order: Literal["rising", "falling"] = ...,
) -> NDArray[np.float32]: ...

# One emulated tensor-core product: each lane's registers of A (32, 4), B (32, 2) and D (32, 4).
def mma_on_host(
    a: NDArray[np.float32], b: NDArray[np.float32], d: NDArray[np.float32]
) -> NDArray[np.float32]: ...
def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]: ...
def philox_bits(seed: int, stream: int, offset: int, n: int) -> NDArray[np.uint32]: ...
def philox_uniform(seed: int, stream: int, offset: int, n: int) -> NDArray[np.float32]: ...
def philox_normal(seed: int, stream: int, offset: int, n: int) -> NDArray[np.float32]: ...

# A build with CUDA has the kernels' launchers beside these (`cuda_twin_q`, ...): they take device
# pointers, which csrc/bindings_cuda.cpp names.

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
        state_encoder: _Array | None = None,
        pair_encoder: _Array | None = None,
        encoder_hidden: Sequence[int] = (),
        encoder_activation: str = "silu",
        embedding_dim: int = 0,
        embedding_min_scale: float = 0.0,
        precision: Literal["fp32", "fp16", "bf16"] = "fp32",
        obs_shift: _Array | None = None,
        obs_scale: _Array | None = None,
        obs_clip: float = 10.0,
        action_low: _Array | None = None,
        action_high: _Array | None = None,
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
    def has_critics(self) -> bool: ...
    @property
    def weight_bytes(self) -> int: ...
    def read_weights_seconds(self, repeats: int = 100) -> float: ...

# --- Training kernels. Arrays are float32 and used in place; `gradients` is added to.

class MlpSpec:
    def __init__(
        self,
        sizes: Sequence[int],
        *,
        members: int,
        activation: str,
        layer_norm: bool,
        bfloat16: bool = False,
    ) -> None: ...
    @property
    def parameter_count(self) -> int: ...

def mlp_forward(
    spec: MlpSpec,
    parameters: _Array,
    input: _Array,  # noqa: A002
) -> _Array: ...

class RecordedMlp:
    def __init__(
        self,
        spec: MlpSpec,
        parameters: _Array,
        input: _Array,  # noqa: A002
        input_columns: int = 0,
    ) -> None: ...
    @property
    def output(self) -> NDArray[np.float32]: ...
    def backward(
        self, d_output: _Array, gradients: _Array | None = None
    ) -> NDArray[np.float32]: ...

@overload
def twin_q(
    spec: MlpSpec,
    parameters: _Array,
    obs: _Array,
    actions: _Array,
    each: Literal[False] = False,
) -> _Array: ...
@overload
def twin_q(
    spec: MlpSpec,
    parameters: _Array,
    obs: _Array,
    actions: _Array,
    each: Literal[True],
) -> tuple[_Array, _Array]: ...
def critic_step(
    spec: MlpSpec,
    parameters: _Array,
    gradients: _Array,
    obs: _Array,
    action: _Array,
    target: _Array,
) -> tuple[list[float], list[float], _Array]: ...

# --- Embeddings. `pair`, and the third of critics, is the encoder whose features they see.

def observe(encoder: _Network, obs: _Array, *, min_scale: float) -> NDArray[np.float32]: ...
def encoder_step(
    state: _Network,
    pair: _Network,
    state_gradients: _Array,
    pair_gradients: _Array,
    obs: _Array,
    action: _Array,
    next_obs: _Array,
    *,
    min_scale: float,
) -> float: ...

# --- The agent's steps.

_SeenCritics = tuple[MlpSpec, _Array, _Network | None]

class PolicySampler:
    @staticmethod
    def gaussian(spec: MlpSpec, log_std_range: tuple[float, float]) -> PolicySampler: ...
    @staticmethod
    def flow(spec: MlpSpec, time: _Array, scale: _Array) -> PolicySampler: ...
    @staticmethod
    def denoising(spec: MlpSpec, time: _Array, steps: _Array) -> PolicySampler: ...
    def sample(self, parameters: _Array, obs: _Array, noise: _Array) -> _Array: ...

def gaussian_loss(
    policy: PolicySampler,
    parameters: _Array,
    gradients: _Array,
    critics: _SeenCritics,
    obs: _Array,
    noise: _Array,
    alpha: float,
) -> tuple[float, float]: ...
def flow_reverse_kl(
    policy: PolicySampler,
    parameters: _Array,
    gradients: _Array,
    critics: _SeenCritics,
    obs: _Array,
    noise: _Array,
    alpha: float,
    *,
    weight: float,
    boundary_width: float,
    monotonicity_margin: float,
    wall_scale: float,
) -> tuple[float, float, float]: ...
def flow_matching(
    policy: PolicySampler,
    parameters: _Array,
    gradients: _Array,
    critics: _SeenCritics,
    obs: _Array,
    action: _Array,
    noise: _Array,
    uniform: _Array,
    alpha: float,
    *,
    weight: float,
    min_time: float,
    instantaneous_fraction: float,
    acting_fraction: float,
    num_candidates: int,
    sampling: CandidateSampling,
    seed: int,
) -> tuple[float, float]: ...
def critic_updates(
    policy: PolicySampler,
    policy_parameters: _Array,
    critics: MlpSpec,
    parameters: _Array,
    first_moment: _Array,
    second_moment: _Array,
    target_parameters: _Array,
    obs: _Array,
    action: _Array,
    reward: _Array,
    discount: _Array,
    next_obs: _Array,
    noise: _Array,
    *,
    reward_scale: float,
    alpha: float,
    tau: float,
    updates: int,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    pair: _Network | None = None,
) -> tuple[float, float]: ...
def adam(
    parameters: _Array,
    gradients: _Array,
    first_moment: _Array,
    second_moment: _Array,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> None: ...
def soft_update(target: _Array, online: _Array, tau: float) -> None: ...
def q_gradient(
    spec: MlpSpec, parameters: _Array, obs: _Array, action: _Array
) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
def reweighted_velocity(
    spec: MlpSpec,
    parameters: _Array,
    obs: _Array,
    z: _Array,
    signal: _Array,
    scale: _Array,
    alpha: float,
    *,
    uniform: _Array | None = None,
    num_candidates: int = 32,
    seed: int = 0,
    stream: int = 0,
    offset: int = 0,
    sampling: CandidateSampling = "stratified",
) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
def truncated_normal(low: _Array, high: _Array, uniform: _Array) -> NDArray[np.float32]: ...
def tanh_gaussian(
    output: _Array, noise: _Array, log_std_range: tuple[float, float]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
def tanh_gaussian_gradient(
    output: _Array,
    noise: _Array,
    d_action: _Array,
    d_log_prob: _Array,
    log_std_range: tuple[float, float],
) -> NDArray[np.float32]: ...
def monotonicity_gap(
    transport: _Array, margin: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
def meanflow_step(
    spec: MlpSpec,
    parameters: _Array,
    gradients: _Array,
    obs: _Array,
    z: _Array,
    r: _Array,
    t: _Array,
    velocity: _Array,
) -> float: ...
def flow_density(
    spec: MlpSpec,
    parameters: _Array,
    obs: _Array,
    noise: _Array,
    time: _Array,
    scale: _Array,
    divergence: Literal["none", "log_det", "trace", "probe"],
    probe: _Array | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]: ...

class RecordedDensity:
    def __init__(
        self,
        spec: MlpSpec,
        parameters: _Array,
        obs: _Array,
        noise: _Array,
        time: _Array,
        scale: _Array,
    ) -> None: ...
    @property
    def action(self) -> NDArray[np.float32]: ...
    @property
    def log_prob(self) -> NDArray[np.float32]: ...
    @property
    def folded(self) -> NDArray[np.bool_]: ...
    @property
    def transport(self) -> NDArray[np.float32]: ...
    def backward(
        self,
        gradients: _Array,
        d_action: _Array,
        d_log_prob: _Array,
        d_transport: _Array | None = None,
    ) -> None: ...
