"""The references are micro-batches of one, clipped by hand, and Opacus's engine."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from orchestrator.errors import ConfigError, PrivacyRefusal
from orchestrator.models.modules import ModuleConfig, build_module
from orchestrator.network import NetworkConfig
from orchestrator.privacy import clipping, layer_gradients
from orchestrator.privacy.accounting import Accountant
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.privacy.clipping import ClippedGradients, PartClip
from orchestrator.privacy.dp import PrivateStep
from orchestrator.privacy.engines import engine_for
from orchestrator.privacy.layer_gradients import layers_without_rule
from orchestrator.privacy.per_example import PerExampleHooks
from orchestrator.shard import Shard


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def engine(network, kind=ClippedGradients, *, clip=1.0, sigma=0.0, expected=1.0, seed=0, parts=None):
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0)
    return kind(
        network,
        optimizer,
        noise_multiplier=sigma,
        max_grad_norm=clip,
        expected_batch_size=expected,
        generator=torch.Generator().manual_seed(seed),
        parts=parts,
    )


def taken(network, x, dz, **mechanism):
    """What one step of rate 1 takes from each parameter, from gradients dz of the sum of the losses."""
    network = copy.deepcopy(network)
    made, before = engine(network, **mechanism), {name: p.detach().clone() for name, p in network.named_parameters()}
    z = made.forward(x)
    made.accumulate([z], [dz / max(1, len(x))], len(x))
    made.apply()
    made.close()
    return {name: before[name] - p.detach() for name, p in network.named_parameters()}


def micro_batches(network, x, dz):
    """name -> (B, *shape), in float64."""
    network, rows = copy.deepcopy(network).double(), []
    for i in range(len(x)):
        network.zero_grad()
        network(x[i : i + 1].double()).backward(dz[i : i + 1].double())
        rows.append(
            {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in network.named_parameters()}
        )
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def norms(rows):
    return torch.stack([g.flatten(1).norm(dim=1) for g in rows.values()]).norm(dim=0)


def clipped_sums(rows, clip):
    factors = (clip / (norms(rows) + 1e-6)).clamp(max=1)
    return {name: torch.einsum("b,b...->...", factors, g) for name, g in rows.items()}


def assert_same(found, expected, rtol=1e-5):
    """Each tensor, relative to its own norm."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm()
        assert error < rtol, f"{name}: {error:.1e}"


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "narrow": {"kernel_size": 5, "in_channels": 3, "stride": 2, "padding": 2},
    "padded": {"kernel_size": 3, "padding": 1, "bias": False},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "strided past the edge": {"kernel_size": 2, "stride": 3},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "grouped": {"kernel_size": 3, "groups": 4, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 16, "padding": 1},
    "oblong": {"kernel_size": (1, 5), "stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)},
    "pointwise": {"kernel_size": 1, "stride": 2},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same, an even kernel": {"kernel_size": 4, "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "more padding than image": {"kernel_size": 3, "padding": 9, "stride": 4},
}
LAYERS = {
    **{
        f"conv, {name}": (lambda kind=kind: nn.Conv2d(**{"in_channels": 16, "out_channels": 32} | kind), None)
        for name, kind in CONVOLUTIONS.items()
    },
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "linear over positions": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "linear over a map": (lambda: nn.Linear(6, 5), (4, 3, 2, 6)),
    "norm": (lambda: nn.GroupNorm(2, 8, eps=0.1), (4, 8, 3, 5)),
    "norm of vectors": (lambda: nn.GroupNorm(2, 8), (4, 8)),
    "norm of one group a channel": (lambda: nn.GroupNorm(8, 8), (4, 8, 6)),
}


def layer(name):
    make, shape = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = make()
    return made, shape or (4, made.in_channels, 9, 8)


@pytest.fixture(params=["rows", "ghost"])
def route(request, monkeypatch):
    """Each way to a norm, whichever would be the smaller."""
    ghost = request.param == "ghost"
    monkeypatch.setattr(clipping, "_gram_is_smaller", lambda gram, weight: ghost and gram < math.inf)
    return request.param


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_layer_is_clipped_as_its_micro_batches_of_one_are(name):
    made, shape = layer(name)
    x = randn(*shape, seed=1)
    with torch.no_grad():
        dz = randn(*made(x).shape, seed=2) * torch.tensor([1e-3, 1.0, 5.0, 1e4]).view(-1, *[1] * (made(x).ndim - 1))
    rows = micro_batches(made, x, dz)
    clip = float(norms(rows).median())
    assert_same(taken(made, x, dz, clip=clip), clipped_sums(rows, clip))


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("norm")])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_both_ways_to_a_norm_are_equal(name):
    made, shape = layer(name)
    x = randn(*shape, seed=1, dtype=torch.float64)
    gradient = randn(*made.double()(x).shape, seed=2, dtype=torch.float64)
    rule = layer_gradients.RULES[type(made)](made)
    rows = rule.weight_rows(x, gradient)
    torch.testing.assert_close(rule.ghost_squares(x, gradient), rows.flatten(1).square().sum(1), rtol=1e-10, atol=0)
    torch.testing.assert_close(rule.weight_sum(x, gradient), rows.sum(0), rtol=1e-10, atol=1e-10)


def test_an_encoder_uses_both_ways(monkeypatch):
    asked = []
    known = clipping._gram_is_smaller
    monkeypatch.setattr(clipping, "_gram_is_smaller", lambda *sizes: asked.append(known(*sizes)) or asked[-1])
    network = NetworkConfig(split_index=6).build_encoder(seed=0)
    x = randn(2, 3, 32, 32)
    taken(network, x, randn(*network(x).shape))
    assert set(asked) == {True, False}


@pytest.mark.parametrize("k", [5, 6, 7, 8])
def test_an_encoder_is_clipped_as_its_micro_batches_of_one_are(k):
    network = NetworkConfig(split_index=k).build_encoder(seed=0)
    x = randn(3, 3, 32, 32, seed=1)
    with torch.no_grad():
        dz = randn(*network(x).shape, seed=2) * torch.tensor([0.1, 1.0, 10.0]).view(-1, 1, 1, 1)
    rows = micro_batches(network, x, dz)
    clip = float(norms(rows).median())
    # In float32 the network itself is exact to about 1e-6; in float64 nothing but the method is left.
    assert_same(taken(network.double(), x.double(), dz.double(), clip=clip), clipped_sums(rows, clip), rtol=1e-10)
    assert_same(taken(network.float(), x, dz, clip=clip), clipped_sums(rows, clip))


@pytest.mark.parametrize("k", [5, 7])
def test_an_encoder_is_updated_as_by_opacus(k):
    network = NetworkConfig(split_index=k).build_encoder(seed=0)
    x = randn(4, 3, 32, 32, seed=1)
    with torch.no_grad():
        dz = randn(*network(x).shape, seed=2)
    clip = float(norms(micro_batches(network, x, dz)).median())
    theirs = taken(network, x, dz, kind=PerExampleHooks, clip=clip, expected=3.5)
    assert_same(taken(network, x, dz, clip=clip, expected=3.5), theirs)


CHANNELS = {"vector": ChannelConfig(dimensions=4, noise=0.5), "map": ChannelConfig(dimensions=3, noise=0.5, cells=4)}


def bounded_module(channel, side):
    """A module that ends in a bounded vector or map, its inputs, and gradients of very different sizes."""
    network = build_module(ModuleConfig(channels=8, channel=channel), seed=0)
    x = randn(4, 8, side, side, seed=1)
    with torch.no_grad():
        dz = randn(*network(x).shape, seed=2) * torch.tensor([0.1, 1.0, 10.0, 100.0]).view(-1, 1, 1, 1)
    return network, x, dz, float(norms(micro_batches(network, x, dz)).median())


@pytest.mark.parametrize("side", [16, 4, 2])
@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS)
def test_the_module_of_a_bounded_feature_is_clipped_as_its_micro_batches_of_one_are(channel, side):
    network, x, dz, clip = bounded_module(channel, side)
    rows = micro_batches(network, x, dz)
    assert (norms(rows) > clip).any() and (norms(rows) < clip).any()
    assert_same(taken(network.double(), x.double(), dz.double(), clip=clip), clipped_sums(rows, clip), rtol=1e-10)


@pytest.mark.parametrize("side", [16, 4])
@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS)
def test_the_module_of_a_bounded_feature_is_updated_as_by_opacus(channel, side):
    network, x, dz, clip = bounded_module(channel, side)
    theirs = taken(network, x, dz, kind=PerExampleHooks, clip=clip, expected=3.5)
    assert_same(taken(network, x, dz, clip=clip, expected=3.5), theirs, rtol=1e-4)
    assert not layers_without_rule(network), "none is left to Opacus"


def test_a_frozen_bias_or_weight_has_no_part_in_the_norm():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    network[0].weight.requires_grad_(False)
    network[2].bias.requires_grad_(False)
    x, dz = randn(3, 3, 8, 8, seed=1), randn(3, 2, seed=2)
    rows = {name: g for name, g in micro_batches(network, x, dz).items() if name in {"0.bias", "2.weight"}}
    found = taken(network, x, dz, clip=0.5)
    assert not found.pop("0.weight").any()
    assert not found.pop("2.bias").any()
    assert_same(found, clipped_sums(rows, 0.5))


# -- what one image can do --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_one_image_moves_the_sum_by_at_most_the_clip_whatever_the_size_of_its_gradient(scale):
    network = NetworkConfig(split_index=6).build_encoder(seed=0)
    x = randn(3, 3, 16, 16, seed=1)
    dz = scale * randn(3, 128, 2, 2, seed=2)
    with_it, without = flat(taken(network, x, dz, clip=0.3)), flat(taken(network, x[:2], dz[:2], clip=0.3))
    moved = (with_it.double() - without.double()).norm()
    assert moved <= 0.3 * (1 + 1e-5)
    if scale >= 1:
        assert moved == pytest.approx(0.3, rel=1e-4)


@pytest.mark.usefixtures("route")
def test_a_gradient_that_cancels_to_rounding_is_clipped_all_the_same():
    """Over many positions, of numbers that add up to nothing: what is left is rounding, magnified."""
    made = engine(nn.Conv2d(2, 2, 1, bias=False), clip=1.0)
    made._verified = True  # there is nothing but rounding to be compared
    half = randn(16, 2, 4, 8)
    x = (3 + 0.01 * randn(16, 2, 1, 1, seed=1)).expand(16, 2, 8, 8).contiguous()
    dz = 1e12 * torch.cat([half, -half[:, :, [1, 3, 0, 2]]], dim=2)
    for i in range(16):
        made.accumulate([made.forward(x[i : i + 1])], [dz[i : i + 1]], 1)
        assert made._sums["weight"].norm() <= 1.01


def test_an_image_without_a_gradient_moves_nothing():
    network = NetworkConfig(split_index=5).build_encoder(seed=0).double()
    x, dz = randn(2, 3, 16, 16, dtype=torch.float64), randn(2, 64, 4, 4, dtype=torch.float64)
    dz[1] = 0
    assert_same(taken(network, x, dz), taken(network, x[:1], dz[:1]))


# -- parts ------------------------------------------------------------------------------------------------------------


def two_parts():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten())
        return nn.ModuleDict({"body": body, "heads": nn.Linear(8 * 36, 300)})


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = two_parts()

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["heads"](self.parts["body"](x))


HEAD = "parts.heads."


def test_each_part_is_clipped_to_its_own_norm():
    network, x, dz = Chain(), randn(5, 3, 8, 8, seed=1), randn(5, 300, seed=2)
    dz *= torch.tensor([0.01, 0.03, 0.1, 1, 10]).view(-1, 1)
    rows = micro_batches(network, x, dz)
    head, rest = ({name: g for name, g in rows.items() if name.startswith(HEAD) == own} for own in (True, False))
    clips = {HEAD: float(norms(head).median()), "": 0.5 * float(norms(rest).median())}
    parts = {key: PartClip(max_grad_norm=clip, noise_multiplier=0.0) for key, clip in clips.items()}
    expected = clipped_sums(rest, clips[""]) | clipped_sums(head, clips[HEAD])
    assert_same(taken(network, x, dz, parts=parts), {name: expected[name] for name in rows})


def test_each_part_has_its_own_noise():
    network = Chain()
    parts = {
        "": PartClip(max_grad_norm=2.0, noise_multiplier=3.0),
        HEAD: PartClip(max_grad_norm=0.5, noise_multiplier=4.0),
    }
    found = taken(network, randn(0, 3, 8, 8), randn(0, 300), parts=parts, sigma=2.4, expected=10.0)
    for own, std in ((True, 4.0 * 0.5 / 10), (False, 3.0 * 2.0 / 10)):
        values = flat({name: value for name, value in found.items() if name.startswith(HEAD) == own})
        assert values.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * len(values)))


def test_one_part_of_everything_is_no_parts_at_all():
    network, x, dz = Chain(), randn(5, 3, 8, 8, seed=1), randn(5, 300, seed=2)
    one = {"": PartClip(max_grad_norm=0.7, noise_multiplier=1.5)}
    with_parts = taken(network, x, dz, clip=9.0, sigma=1.5, parts=one)
    assert torch.equal(flat(with_parts), flat(taken(network, x, dz, clip=0.7, sigma=1.5)))


@pytest.mark.parametrize(
    ("prefixes", "complaint"),
    [
        ((HEAD,), "must be of one part"),
        (("", "parts.heads.weight"), "must be of one part"),
        (("", "head."), "no parameter begins with 'head.'"),
    ],
)
def test_parts_that_do_not_divide_the_network_are_refused(prefixes, complaint):
    parts = {prefix: PartClip(max_grad_norm=1.0, noise_multiplier=1.0) for prefix in prefixes}
    with pytest.raises(ConfigError, match=complaint):
        engine(Chain(), parts=parts)


@pytest.mark.parametrize(("head", "rest"), [(1.0, 1.0), (0.0, 9.0), (1.41, 1.41)])
def test_parts_with_less_noise_than_is_accounted_are_refused(head, rest):
    parts = {
        "": PartClip(max_grad_norm=1.0, noise_multiplier=rest),
        HEAD: PartClip(max_grad_norm=1.0, noise_multiplier=head),
    }
    with pytest.raises(ConfigError, match="less than the accounted 1"):
        engine(Chain(), sigma=1.0, parts=parts)
    enough = {key: PartClip(max_grad_norm=1.0, noise_multiplier=math.sqrt(2)) for key in parts}
    engine(Chain(), sigma=1.0, parts=enough)


@pytest.mark.parametrize("bad", [{"max_grad_norm": 0.0}, {"max_grad_norm": math.inf}, {"noise_multiplier": -1.0}])
def test_an_impossible_part_is_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        PartClip(**{"max_grad_norm": 1.0, "noise_multiplier": 1.0} | bad)


def test_opacus_refuses_parts():
    with pytest.raises(PrivacyRefusal, match="cannot be clipped apart"):
        engine(Chain(), kind=PerExampleHooks, parts={"": PartClip(max_grad_norm=1.0, noise_multiplier=1.0)})


def test_a_private_step_hands_its_parts_on():
    network, accountant = Chain(), Accountant("rdp")
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    step = PrivateStep(
        network,
        torch.optim.SGD(network.parameters(), lr=1.0),
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        expected_batch_size=1.0,
        sample_rate=0.1,
        noise_generator=None,
        accountant=accountant,
        parts={
            "": PartClip(max_grad_norm=1.0, noise_multiplier=1.0),
            HEAD: PartClip(max_grad_norm=1000.0, noise_multiplier=1.0),
        },
    )
    z = step.forward(randn(2, 3, 8, 8))
    step.step([z], [torch.zeros_like(z)])
    assert (before[HEAD + "weight"] - network.parts["heads"].weight).std().item() == pytest.approx(1000, rel=0.1)
    assert accountant.history == ((0.5, 0.1, 1),)


# -- noise ------------------------------------------------------------------------------------------------------------


def test_of_several_shards_the_first_alone_draws_noise(monkeypatch):
    monkeypatch.setattr(Shard, "sum", lambda self, tensors: None)
    moved = []
    for shard in (Shard(0, 2), Shard(1, 2)):
        network = nn.Linear(4, 4)
        made, before = engine(network, sigma=1.0), network.weight.detach().clone()
        made.forward(randn(0, 4))
        made.accumulate([], [], 0)
        made.apply(shard)
        moved.append(bool((network.weight - before).any()))
    assert moved == [True, False]


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv, padded", "conv, narrow", "linear over positions"])
def test_temporaries_are_bounded_by_the_chunk(name, monkeypatch):
    """The largest Gram matrices and unfolded images, against the limit; the result is the same in small pieces."""
    made, shape = layer(name)
    x = randn(64, *shape[1:])
    with torch.no_grad():
        gradient = randn(*made(x).shape, seed=1)
    rule = layer_gradients.RULES[type(made)](made)
    whole = rule.ghost_squares(x, gradient), rule.weight_rows(x, gradient)
    sizes, limit = [], 50_000
    bmm = torch.bmm
    monkeypatch.setattr(layer_gradients, "_TEMPORARY_BYTES", limit)
    monkeypatch.setattr(layer_gradients, "_gram", lambda v: sizes.append(v.shape[2] ** 2 * len(v) * 4) or bmm(v.mT, v))
    unfold = layer_gradients.functional.unfold
    monkeypatch.setattr(
        layer_gradients.functional, "unfold", lambda *a: sizes.append(unfold(*a).numel() * 4) or unfold(*a)
    )
    torch.testing.assert_close(rule.ghost_squares(x, gradient), whole[0])
    torch.testing.assert_close(rule.weight_rows(x, gradient), whole[1])
    assert len(sizes) > 1
    assert max(sizes) <= limit


def test_what_is_kept_of_a_layer_is_never_much_more_than_what_plain_training_keeps():
    """Rows, or else the layer's input and its output's gradient; of an encoder at its usual size."""
    for k in (5, 6, 7, 8):
        network = NetworkConfig(split_index=k).build_encoder(seed=0)
        made = engine(network)
        x = randn(2, 3, 64, 64)
        z = made.forward(x)
        inputs = {name: record.input.numel() for name, record in made._records.items()}
        records = dict(made._records)
        made.accumulate([z], [torch.ones_like(z)], 2)
        kept = sum(
            sum(rows.numel() for rows in record.rows.values()) + sum(t.numel() for t in record.pair or ())
            for record in records.values()
        )
        assert kept <= 2 * sum(inputs.values())
        assert all(record.input.numel() == 0 for record in records.values())


# -- what is refused --------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.one(x))


class ChangesAnInput(Twice):
    def forward(self, x: Tensor) -> Tensor:
        u = x * 1.0
        z = self.one(u)
        u += 1
        return z


class ChangesAnOutput(nn.Module):
    """Of a layer whose input needs a gradient itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        u = self.two(self.one(x))
        u += x
        return u


@pytest.mark.parametrize(
    ("module", "complaint"),
    [(Twice, "used twice"), (ChangesAnInput, "in place"), (ChangesAnOutput, "in place")],
)
def test_a_forward_that_hides_a_gradient_is_refused_at_every_step(module, complaint):
    made = engine(module())
    for verified in (False, True):
        made._verified = verified
        with pytest.raises(PrivacyRefusal, match=complaint):
            made.accumulate([made.forward(randn(3, 4))], [torch.ones(3, 4)], 3)
        made.reset()


def shared():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    return network


def with_a_scale():
    network = nn.Linear(4, 4)
    network.scale = nn.Parameter(torch.ones(4))
    return network


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (shared, "the parameter '1.weight', which is also '0.weight'"),
        (with_a_scale, "the Linear at the top"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "the LayerNorm at 1"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), "the Conv2d at 0"),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), "parametrizations"),
    ],
)
def test_a_network_with_a_layer_of_another_kind_is_left_to_opacus(make, what):
    assert what in ", ".join(layers_without_rule(make()))
    assert engine_for(make()) is PerExampleHooks
    assert engine_for(make().requires_grad_(False)) is ClippedGradients
    with pytest.raises(PrivacyRefusal, match="no rule"):
        engine(make())


@pytest.mark.parametrize("k", [5, 9])
def test_our_own_networks_are_left_to_nobody(k):
    config = NetworkConfig(split_index=k)
    modules = config.build_modules(["a"], 64, seed=0).values(), config.build_heads({"a": 2}, 64, seed=0).values()
    assert all(engine_for(m) is ClippedGradients for m in (config.build_encoder(seed=0), *modules[0], *modules[1]))


def test_somebody_elses_backward_between_forward_and_step_is_not_taken_for_ours():
    network, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), randn(3, 4)
    expected = taken(network, x, torch.ones(3, 2))
    made, before = engine(network), {name: p.detach().clone() for name, p in network.named_parameters()}
    z = made.forward(x)
    torch.autograd.grad((7 * z).sum(), list(network.parameters()), retain_graph=True)
    made.accumulate([z], [torch.ones(3, 2) / 3], 3)
    made.apply()
    assert_same({name: before[name] - p.detach() for name, p in network.named_parameters()}, expected)
