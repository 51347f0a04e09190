"""The flat-parameter networks against torch.nn and against their own layout."""

import copy

import pytest
import torch
from torch import nn

from flame_ext.critics import Critics
from flame_ext.networks import (
    ACTIVATIONS,
    TIME_FEATURES,
    FlatMLP,
    GaussianPolicyNet,
    MeanVelocityNet,
    time_features,
)
from flame_ext.sampling import PARAMETER_ALIGNMENT

MODULES = {"relu": nn.ReLU, "silu": nn.SiLU, "mish": nn.Mish}


def plain_twin(net: FlatMLP, member: int) -> nn.Sequential:
    """The same function from torch.nn modules."""
    modules: list[nn.Module] = []
    layers = net.layers()
    for i, layer in enumerate(layers):
        linear = nn.Linear(layer.weight.shape[2], layer.weight.shape[1])
        linear.weight.data, linear.bias.data = layer.weight[member].data, layer.bias[member].data
        modules.append(linear)
        if layer.gain is not None and layer.offset is not None:
            norm = nn.LayerNorm(len(layer.bias[member]))
            norm.weight.data, norm.bias.data = layer.gain[member].data, layer.offset[member].data
            modules.append(norm)
        if i < len(layers) - 1:
            modules.append(MODULES[net.activation]())
    return nn.Sequential(*modules)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_ensemble_equals_plain_modules(activation: str, layer_norm: bool) -> None:
    critics = Critics(5, 3, (33, 17), activation=activation, layer_norm=layer_norm)  # type: ignore[arg-type]
    with torch.no_grad():
        critics.flat.add_(0.1 * torch.randn_like(critics.flat))
    obs, action = torch.randn(9, 5), torch.randn(9, 3)
    q = critics.q_values(obs, action)
    for member in range(2):
        expected = plain_twin(critics, member)(torch.cat([action, obs], 1)).squeeze(1)
        torch.testing.assert_close(q[member], expected)


def test_candidates_share_the_observation_part() -> None:
    critics = Critics(5, 3, (32,))
    obs, action = torch.randn(4, 5), torch.randn(4, 6, 3)
    repeated = critics.q_min(obs.repeat_interleave(6, 0), action.flatten(0, 1)).view(4, 6)
    torch.testing.assert_close(critics.candidate_q_min(obs, action), repeated)


def test_layout_is_aligned_and_padding_gets_no_gradient() -> None:
    net = MeanVelocityNet(3, 2, (7, 5))
    start = net.flat.data_ptr()
    for layer in net.layers():
        assert (layer.weight.data_ptr() - start) % (4 * PARAMETER_ALIGNMENT) == 0
        assert (layer.bias.data_ptr() - start) % (4 * PARAMETER_ALIGNMENT) == 0
    z, obs, times = torch.randn(4, 2), torch.randn(4, 3), torch.rand(4, 1)
    net.velocity(z, times, times, obs).sum().backward()
    used = sum(layer.weight.numel() + layer.bias.numel() for layer in net.layers())
    assert net.flat.grad is not None
    assert net.flat.numel() > used
    assert int((net.flat.grad != 0).sum()) <= used


def test_layers_stay_views_after_what_breaks_stored_views() -> None:
    """deepcopy, .double() and set_to_none must not detach the layers from the flat buffer."""
    net = copy.deepcopy(MeanVelocityNet(3, 2, (8,))).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    obs = torch.zeros(1, 3).double()
    z = torch.ones(1, 2).double()
    times = torch.ones(1, 1).double()
    before = net.velocity(z, times, times, obs)
    before.sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert not torch.equal(net.velocity(z, times, times, obs), before)


@pytest.mark.parametrize("members", [1, 2])
def test_gradients_of_the_tangent_pass(members: int) -> None:
    """Second derivatives reach the parameters: gradcheck of values and tangents together."""
    net = FlatMLP((2, 3), (6, 5), 2, members=members, layer_norm=True).double()
    blocks = [torch.randn(3, 2).double(), torch.randn(3, 3).double()]
    direction = torch.randn(4, 3, 2).double()
    flat = net.flat.detach().clone().requires_grad_()

    def outputs(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        object.__setattr__(net, "flat", flat)
        return net.forward_with_tangents(blocks, [direction, None])

    del net._parameters["flat"]
    assert torch.autograd.gradcheck(outputs, (flat,), fast_mode=True)


def test_time_features_depend_on_both_times() -> None:
    t, r = torch.tensor([[0.7]]), torch.tensor([[0.2]])
    features = time_features(t, r)
    assert features.shape == (1, TIME_FEATURES)
    torch.testing.assert_close(features[0, 0], torch.sin(torch.tensor(0.5 * 0.7)))
    torch.testing.assert_close(features[0, -1], torch.cos(torch.tensor(3.0 * 0.5)))


def test_gaussian_log_std_is_bounded() -> None:
    net = GaussianPolicyNet(3, 2, (8,))
    with torch.no_grad():
        net.flat.mul_(1e4)
    _, std = net.distribution(torch.randn(50, 3))
    assert torch.all(std >= 0.0067)
    assert torch.all(std <= 7.4)


def test_wrong_columns_are_named() -> None:
    critics = Critics(5, 3, (8,))
    with pytest.raises(ValueError, match="4 columns, expected 3"):
        critics.q_min(torch.zeros(2, 5), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="got 1 input blocks"):
        critics(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="activation='gelu' is unknown"):
        Critics(5, 3, (8,), activation="gelu")  # type: ignore[arg-type]


def test_a_generator_decides_all_weights_within_the_bounds_of_their_layer() -> None:
    first, second = (
        FlatMLP((100,), (25,), 400, generator=torch.Generator().manual_seed(0)) for _ in range(2)
    )
    assert torch.equal(first.flat, second.flat)
    for layer, fan_in in zip(first.layers(), (100, 25), strict=True):
        for drawn in (layer.weight, layer.bias):
            largest = drawn.abs().max().item() * fan_in**0.5
            assert 0.7 < largest <= 1, (fan_in, tuple(drawn.shape))


def test_a_scaled_output_layer_scales_the_output() -> None:
    net, x = FlatMLP((3,), (8,), 2), torch.randn(5, 3)
    before = net(x)
    net.scale_output_layer(0.1)
    torch.testing.assert_close(net(x), 0.1 * before)
