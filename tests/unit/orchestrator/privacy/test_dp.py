"""The reference everywhere is the plain one: micro-batches of one, clipped by hand. Float64, so agreement is exact."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from orchestrator.errors import CheckpointError, ConfigError, PrivacyRefusal, ProtocolError
from orchestrator.privacy import dp
from orchestrator.privacy.accounting import Accountant
from orchestrator.privacy.clipping import ClippedGradients
from orchestrator.privacy.dp import DpBudget, DpConfig, PrivateStep, default_delta, refuse_unsafe
from orchestrator.privacy.per_example import PerExampleHooks


@pytest.fixture(params=[ClippedGradients, PerExampleHooks])
def engine(request, monkeypatch):
    """Each way to the clipped sums, whichever a network would get."""
    monkeypatch.setattr(dp, "engine_for", lambda module: request.param)


both_engines = pytest.mark.usefixtures("engine")


class Gates(nn.Module):
    """Two splits, each gated by the other's squeeze and excitation: the shape of a Cross-SEC, but smaller."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.squeeze = nn.ModuleList(nn.Linear(half, half, bias=False) for _ in range(2))
        self.mix = nn.ModuleList(nn.Conv2d(half, half, 1, bias=False) for _ in range(2))

    def forward(self, u: Tensor) -> Tensor:
        one, two = u.chunk(2, dim=1)
        gate = [torch.sigmoid(f(part.mean((2, 3))))[..., None, None] for f, part in zip(self.squeeze, (one, two))]  # noqa: B905
        return torch.cat([self.mix[0](one * gate[1]), self.mix[1](two * gate[0])], dim=1)


class Net(nn.Module):
    """conv, GroupNorm, a residual addition, and one gated branch per task."""

    def __init__(self, tasks: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.branches = nn.ModuleDict({task: Gates(8) for task in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        u = F.relu(self.norm(self.stem(x)))
        u = u + self.conv(u)
        return {task: branch(u) for task, branch in self.branches.items()}


def build(seed=0, tasks=("a", "b"), dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(tasks).to(dtype)


def data(n, seed=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 8, 8, generator=g, dtype=dtype)
    return x, torch.randint(0, 3, (n,), generator=g), torch.randint(0, 2, (n,), generator=g)


def heads(dtype=torch.float64, scale=3.0):
    """Two consumers' heads, which the producer never sees."""
    g = torch.Generator().manual_seed(5)
    sizes = (("a", 3), ("b", 2))
    return {task: scale * torch.randn(8 * 16, n, generator=g, dtype=dtype) for task, n in sizes}


def consumer_gradients(z, y_a, y_b, weights=None, tasks=("a", "b")):
    """What the tenants answer: d(mean cross-entropy)/dz."""
    weights, labels, answers = weights or heads(), {"a": y_a, "b": y_b}, []
    for task in tasks:
        leaf = z[task].detach().requires_grad_()
        F.cross_entropy(leaf.flatten(1) @ weights[task], labels[task]).backward()
        answers.append(leaf.grad)
    return answers


def per_example_reference(net, x, y_a, y_b, tasks=("a", "b")):
    """name -> (B, *shape) gradients of the summed task losses, one image at a time."""
    rows = []
    for i in range(len(x)):
        net.zero_grad()
        z, labels = net(x[i : i + 1]), {"a": y_a[i : i + 1], "b": y_b[i : i + 1]}
        sum(F.cross_entropy(z[t].flatten(1) @ heads()[t], labels[t]) for t in tasks).backward()
        rows.append({k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in net.named_parameters()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def norms(reference):
    return torch.stack([g.flatten(1).norm(dim=1) for g in reference.values()]).norm(dim=0)


def private_step(net, *, sigma=0.0, clip=1.0, expected=4.0, lr=1.0, generator=None, accountant=None, optimizer=None):
    return PrivateStep(
        net,
        optimizer or torch.optim.SGD(net.parameters(), lr=lr),
        noise_multiplier=sigma,
        max_grad_norm=clip,
        expected_batch_size=expected,
        sample_rate=0.1,
        noise_generator=generator or torch.Generator().manual_seed(3),
        accountant=accountant or Accountant("rdp"),
    )


def update_of(net, before):
    """What one SGD step of rate 1 took away."""
    return {name: before[name] - p.detach() for name, p in net.named_parameters()}


def snapshot(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


def run(net, step, x, y_a, y_b):
    before = snapshot(net)
    z = step.forward(x)
    step.step(list(z.values()), consumer_gradients(z, y_a, y_b))
    return update_of(net, before)


# -- the gradients --------------------------------------------------------------------------------------------------


def test_per_example_gradients_equal_micro_batches_of_one():
    net, (x, y_a, y_b) = build(), data(6)
    reference = per_example_reference(build(), x, y_a, y_b)
    engine = PerExampleHooks(
        net,
        torch.optim.SGD(net.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=6,
        generator=torch.Generator(),
    )
    z = engine.forward(x)
    engine.accumulate(list(z.values()), consumer_gradients(z, y_a, y_b), 6)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad_sample, reference[name], rtol=0, atol=1e-12, msg=name)


@both_engines
def test_the_update_is_the_sum_of_jointly_clipped_gradients_over_the_expected_batch_size():
    (x, y_a, y_b), net = data(7), build()
    reference = per_example_reference(build(), x, y_a, y_b)
    clip = float(norms(reference).median())  # so that some are clipped and some are not
    assert (norms(reference) > clip).any()
    assert (norms(reference) < clip).any()
    factor = (clip / norms(reference)).clamp(max=1)
    expected = {name: torch.einsum("b,b...->...", factor, g) / 4.5 for name, g in reference.items()}
    update = run(net, private_step(net, clip=clip, expected=4.5), x, y_a, y_b)
    for name, value in expected.items():
        torch.testing.assert_close(update[name], value, rtol=1e-5, atol=1e-12, msg=name)


@both_engines
def test_several_adamw_steps_follow_the_reference():
    net, twin = build(), build()
    step = private_step(net, clip=0.5, optimizer=torch.optim.AdamW(net.parameters(), lr=0.01))
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for k, n in enumerate((4, 1, 0, 6, 3)):
        x, y_a, y_b = data(n, seed=10 + k)
        z = step.forward(x)
        step.step(list(z.values()), consumer_gradients(z, y_a, y_b) if n else [torch.zeros_like(v) for v in z.values()])
        reference = per_example_reference(twin, x, y_a, y_b) if n else None
        factor = (0.5 / (norms(reference) + 1e-6)).clamp(max=1) if n else None  # Opacus's 1e-6
        for name, p in twin.named_parameters():
            p.grad = torch.einsum("b,b...->...", factor, reference[name]) / 4.0 if n else torch.zeros_like(p)
        optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, dict(twin.named_parameters())[name], rtol=1e-9, atol=1e-12, msg=name)


@both_engines
def test_one_image_that_serves_two_tasks_moves_the_sum_by_c_and_not_by_two_c():
    net, (x, _, _) = build(), data(1)
    y_a, y_b = ((net(x)[t].flatten(1) @ heads()[t]).argmin(1) for t in ("a", "b"))  # wrong: the gradients are large
    alone = [flat(per_example_reference(build(), x, y_a, y_b, tasks=(task,))) for task in ("a", "b")]
    clipped_apart = sum(0.1 * g / g.norm() for g in alone)
    assert min(g.norm() for g in alone) > 0.1
    assert clipped_apart.norm() > 0.13  # what the update would be if each task had a clip of its own
    update = run(net, private_step(net, clip=0.1, expected=1.0), x, y_a, y_b)
    assert flat(update).norm().item() == pytest.approx(0.1, rel=1e-4)


@both_engines
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_adding_one_image_moves_the_sum_by_at_most_c(scale):
    x, y_a, y_b = data(6)
    updates = []
    for n in (5, 6):
        net = build()
        step, before = private_step(net, clip=0.3, expected=1.0), snapshot(net)
        z = step.forward(x[:n])
        step.step(list(z.values()), [scale * g for g in consumer_gradients(z, y_a[:n], y_b[:n])])
        updates.append(flat(update_of(net, before)))
    assert (updates[1] - updates[0]).norm() <= 0.3 * (1 + 1e-9)


@both_engines
def test_gradients_are_of_the_mean_so_the_same_images_twice_give_twice_the_update():
    x, y_a, y_b = data(3)
    once, twice = build(), build()
    one = run(once, private_step(once, clip=1e9), x, y_a, y_b)
    two = run(twice, private_step(twice, clip=1e9), x.repeat(2, 1, 1, 1), y_a.repeat(2), y_b.repeat(2))
    torch.testing.assert_close(flat(two), 2 * flat(one), rtol=1e-9, atol=1e-12)


# -- the noise ------------------------------------------------------------------------------------------------------


def noise_update(seed=3, sigma=0.7, clip=1.2, expected=64.0, rows=2):
    layer = nn.Sequential(nn.Linear(300, 300), nn.GroupNorm(3, 300)).double()
    before = snapshot(layer)
    step = private_step(layer, sigma=sigma, clip=clip, expected=expected, generator=torch.Generator().manual_seed(seed))
    z = step.forward(torch.ones(rows, 300, dtype=torch.float64))
    step.step([z], [torch.zeros_like(z)])
    return update_of(layer, before)


@both_engines
def test_the_noise_of_a_coordinate_is_sigma_c_over_the_expected_batch_size():
    update, expected = noise_update(), 0.7 * 1.2 / 64
    values = flat(update)
    n = len(values)
    # five standard errors of a Gaussian's standard deviation and mean
    assert values.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * n))
    assert abs(values.mean().item()) < 5 * expected / math.sqrt(n)
    kurtosis = ((values / values.std()) ** 4).mean().item()
    assert kurtosis == pytest.approx(3, abs=5 * math.sqrt(24 / n))
    for name, value in update.items():
        assert value.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * value.numel())), name


@both_engines
def test_the_noise_comes_from_the_given_generator_and_no_other():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = flat(noise_update(seed=3))
        torch.manual_seed(0)
        other_seed = flat(noise_update(seed=4))
        torch.manual_seed(1)
        again = flat(noise_update(seed=3))
    assert torch.equal(first.round(decimals=9), again.round(decimals=9))
    assert not torch.allclose(first, other_seed)


@both_engines
def test_without_a_generator_the_noise_is_new_each_time_whatever_the_global_seed():
    updates = []
    for _ in range(2):
        layer = nn.Linear(20, 20).double()
        before = snapshot(layer)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            step = PrivateStep(
                layer,
                torch.optim.SGD(layer.parameters(), lr=1.0),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                expected_batch_size=1,
                sample_rate=0.1,
                noise_generator=None,
                accountant=Accountant("rdp"),
            )
            step.step([step.forward(torch.ones(1, 20, dtype=torch.float64))], [torch.zeros(1, 20)])
        updates.append(flat(update_of(layer, before)))
    assert not torch.allclose(updates[0], updates[1])


@both_engines
def test_noise_is_drawn_anew_at_every_step():
    layer = nn.Linear(30, 30).double()
    step, updates = private_step(layer, sigma=1.0), []
    for _ in range(2):
        before = snapshot(layer)
        step.step([step.forward(torch.ones(1, 30, dtype=torch.float64))], [torch.zeros(1, 30, dtype=torch.float64)])
        updates.append(flat(update_of(layer, before)))
    assert abs(torch.corrcoef(torch.stack(updates))[0, 1].item()) < 0.2


@both_engines
def test_an_empty_batch_gets_the_same_noise_and_is_charged_like_any_other():
    assert torch.allclose(flat(noise_update(rows=0)), flat(noise_update(rows=2)), rtol=0, atol=1e-15)
    net, accountant = build(), Accountant("rdp")
    step, before = private_step(net, sigma=1.0, accountant=accountant), snapshot(net)
    z = step.forward(torch.zeros(0, 3, 8, 8, dtype=torch.float64))
    assert {task: tuple(value.shape) for task, value in z.items()} == {"a": (0, 8, 4, 4), "b": (0, 8, 4, 4)}
    step.step(list(z.values()), [torch.zeros_like(value) for value in z.values()])
    assert accountant.history == ((1.0, 0.1, 1),)
    assert all(value.abs().min() > 0 for value in update_of(net, before).values())


@both_engines
def test_a_parameter_that_no_output_depends_on_is_noised_too():
    net = build()
    step, before = private_step(net, sigma=1.0), snapshot(net)
    x, y_a, y_b = data(3)
    z = step.forward(x)
    step.step([z["a"]], consumer_gradients(z, y_a, y_b, tasks=("a",)))
    assert all(value.abs().min() > 0 for value in update_of(net, before).values())


# -- the order of things --------------------------------------------------------------------------------------------


@both_engines
def test_a_step_is_charged_before_it_is_applied():
    class Full(Accountant):
        def step(self, *, noise_multiplier, sample_rate):
            raise ConfigError("the budget is spent")

    net, (x, y_a, y_b) = build(), data(3)
    before, step = snapshot(net), private_step(net, sigma=1.0, accountant=Full("rdp"))
    z = step.forward(x)
    with pytest.raises(ConfigError, match="the budget is spent"):
        step.step(list(z.values()), consumer_gradients(z, y_a, y_b))
    assert torch.equal(flat(snapshot(net)), flat(before))


def test_every_step_is_charged_once():
    net, accountant = build(), Accountant("prv")
    step = private_step(net, sigma=0.9, accountant=accountant)
    for _ in range(3):
        run(net, step, *data(2))
    assert accountant.history == ((0.9, 0.1, 3),)


def spoiled(gradients, how):
    a, b = gradients
    return {
        "nan": [a, b.clone().index_fill_(0, torch.tensor([1]), math.nan)],
        "infinity": [a * math.inf, b],
        "rows": [a[:-1], b],
        "shape": [a, b.flatten(1)],
        "one missing": [a],
        "integers": [a, b.long()],
        "numpy": [a, b.numpy()],
    }[how]


@both_engines
@pytest.mark.parametrize("how", ["nan", "infinity", "rows", "shape", "one missing", "integers", "numpy"])
def test_a_bad_cut_gradient_is_refused_before_anything_is_charged_or_changed_and_can_be_sent_again(how):
    net, twin, (x, y_a, y_b) = build(), build(), data(3)
    accountant = Accountant("rdp")
    step, before = private_step(net, sigma=1.0, accountant=accountant), snapshot(net)
    z = step.forward(x)
    good = consumer_gradients(z, y_a, y_b)
    with pytest.raises(ProtocolError):
        step.step(list(z.values()), spoiled(good, how))
    assert accountant.steps == 0
    assert torch.equal(flat(snapshot(net)), flat(before))
    step.step(list(z.values()), good)
    expected = run(twin, private_step(twin, sigma=1.0), x, y_a, y_b)
    assert torch.equal(flat(update_of(net, before)), flat(expected))


@both_engines
def test_a_finite_gradient_that_overflows_on_its_way_is_refused_before_anything_is_charged_or_changed():
    net, (x, _, _) = build(dtype=torch.float32), data(3, dtype=torch.float32)
    accountant = Accountant("rdp")
    step, before = private_step(net, sigma=1.0, accountant=accountant), snapshot(net)
    z = step.forward(x)
    with pytest.raises(ProtocolError, match="not finite"):
        step.step(list(z.values()), [torch.full_like(value, 3e38) for value in z.values()])
    assert accountant.steps == 0
    assert torch.equal(flat(snapshot(net)), flat(before))
    run_again = step.forward(x)
    step.step(list(run_again.values()), [torch.full_like(value, 1e30) for value in run_again.values()])
    assert torch.isfinite(flat(snapshot(net))).all()


def test_a_second_forward_before_the_step_is_refused():
    net, (x, _, _) = build(), data(3)
    step = private_step(net)
    step.forward(x)
    with pytest.raises(ProtocolError, match="in flight"):
        step.forward(x)


def test_a_step_without_a_forward_is_refused():
    with pytest.raises(ProtocolError, match="no forward in flight"):
        private_step(build()).step([torch.zeros(1)], [torch.zeros(1)])


@both_engines
def test_a_discarded_forward_leaves_no_trace():
    net, twin, (x, y_a, y_b) = build(), build(), data(4)
    step = private_step(net)
    step.forward(data(5, seed=9)[0])
    step.discard()
    assert torch.equal(flat(run(net, step, x, y_a, y_b)), flat(run(twin, private_step(twin), x, y_a, y_b)))


@both_engines
def test_other_uses_of_the_module_leave_no_trace():
    net, twin, (x, y_a, y_b) = build(), build(), data(4)
    step, before, other = private_step(net), snapshot(net), data(5, seed=9)[0]
    with warnings.catch_warnings():
        # torch, about any backward through a hooked module whose input needs no gradient
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        net(other)["a"].sum().backward()
        z = step.forward(x)
        net(other)["b"].sum().backward()
    with torch.no_grad():
        net.eval()(other)
    net.train()
    step.step(list(z.values()), consumer_gradients(z, y_a, y_b))
    assert torch.equal(flat(update_of(net, before)), flat(run(twin, private_step(twin), x, y_a, y_b)))


def test_a_module_in_evaluation_mode_is_refused():
    net, (x, _, _) = build(), data(2)
    step = private_step(net)
    net.eval()
    with pytest.raises(ProtocolError, match=r"module\.train"):
        step.forward(x)


@both_engines
def test_outputs_without_a_graph_are_refused():
    net, (x, y_a, y_b) = build(), data(2)
    step = private_step(net)
    with torch.no_grad():
        z = step.forward(x)
    with pytest.raises(ProtocolError, match="gradients enabled"):
        step.step(list(z.values()), consumer_gradients(z, y_a, y_b))


@both_engines
def test_the_module_may_return_a_tensor():
    layer = nn.Linear(4, 2, bias=False).double()
    step, before = private_step(layer, clip=1e9, expected=1.0), snapshot(layer)
    x = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    z = step.forward(x)
    step.step([z], [torch.ones_like(z) / 3])
    torch.testing.assert_close(update_of(layer, before)["weight"], x.sum(0).expand(2, 4))


# -- which parameters -----------------------------------------------------------------------------------------------


@both_engines
def test_frozen_parameters_are_never_touched():
    net, (x, y_a, y_b) = build(), data(3)
    net.stem.requires_grad_(False)
    net.norm.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    update = run(net, private_step(net, sigma=1.0, optimizer=optimizer), x, y_a, y_b)
    moved = {name for name, value in update.items() if value.any()}
    assert moved == {name for name, p in net.named_parameters() if p.requires_grad}
    assert {"stem.weight", "stem.bias", "norm.weight"}.isdisjoint(moved)


@both_engines
def test_frozen_layers_before_the_trained_ones_do_not_change_their_gradients():
    net, twin, (x, y_a, y_b) = build(), build(), data(4)
    for one in (net, twin):
        one.stem.requires_grad_(False)
    reference = {
        name: g for name, g in per_example_reference(build(), x, y_a, y_b).items() if not name.startswith("stem")
    }
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    update = run(net, private_step(net, clip=1e9, expected=1.0, optimizer=optimizer), x, y_a, y_b)
    for name, value in reference.items():
        torch.testing.assert_close(update[name], value.sum(0), rtol=1e-9, atol=1e-12, msg=name)


def test_an_optimiser_that_misses_a_parameter_is_refused_by_name():
    net = build()
    optimizer = torch.optim.SGD([p for name, p in net.named_parameters() if name != "conv.weight"], lr=1.0)
    with pytest.raises(ConfigError, match=r"conv\.weight"):
        private_step(net, optimizer=optimizer)


def test_an_optimiser_that_holds_a_strangers_parameter_is_refused():
    net, stranger = build(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*net.parameters(), *stranger.parameters()], lr=1.0)
    with pytest.raises(ConfigError, match="2 parameter"):
        private_step(net, optimizer=optimizer)


def test_a_module_with_nothing_to_train_is_refused():
    net = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    with pytest.raises(ConfigError, match="frozen"):
        private_step(net.requires_grad_(False), optimizer=optimizer)


@pytest.mark.parametrize(
    "bad",
    [
        {"sigma": -1.0},
        {"sigma": math.nan},
        {"clip": 0.0},
        {"clip": math.inf},
        {"expected": 0.0},
    ],
)
def test_an_impossible_mechanism_is_refused(bad):
    with pytest.raises(ConfigError):
        private_step(build(), **bad)


@both_engines
def test_the_names_of_the_weights_stay_as_they_are_and_closing_takes_the_hooks_off():
    net = build()
    names = list(net.state_dict())
    step = private_step(net)
    run(net, step, *data(2))
    assert list(net.state_dict()) == names
    step.close()
    copy.deepcopy(net)
    assert not any(hasattr(p, "grad_sample") or hasattr(p, "summed_grad") for p in net.parameters())
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in net.modules())


@both_engines
def test_a_step_that_goes_on_from_its_saved_state_draws_the_same_noise():
    def trained(save_after):
        net = build()
        step = private_step(net, sigma=1.0, optimizer=torch.optim.AdamW(net.parameters(), lr=0.01))
        for k in range(4):
            if k == save_after:
                state, weights, net = copy.deepcopy(step.state_dict()), net.state_dict(), build(seed=99)
                net.load_state_dict(weights)
                step = private_step(
                    net,
                    sigma=1.0,
                    generator=torch.Generator().manual_seed(77),
                    optimizer=torch.optim.AdamW(net.parameters(), lr=0.01),
                )
                step.load_state_dict(state)
            run(net, step, *data(3, seed=k))
        return flat(snapshot(net))

    assert torch.equal(trained(save_after=2), trained(save_after=None))
    with pytest.raises(CheckpointError):
        private_step(build()).load_state_dict({"kind": "privacy_accountant"})


# -- what is refused ------------------------------------------------------------------------------------------------

TORCHVISION_BLOCK = "torchvision's own residual block"


def unsafe(kind):
    if kind == TORCHVISION_BLOCK:
        from torchvision.models.resnet import BasicBlock

        return BasicBlock(4, 4, norm_layer=lambda c: nn.GroupNorm(2, c))
    return {
        "BatchNorm1d": nn.BatchNorm1d(4),
        "BatchNorm2d": nn.BatchNorm2d(4),
        "BatchNorm3d": nn.BatchNorm3d(4),
        "SyncBatchNorm": nn.SyncBatchNorm(4),
        "frozen BatchNorm2d": nn.BatchNorm2d(4).requires_grad_(False).eval(),
        "BatchNorm2d without weights": nn.BatchNorm2d(4, affine=False),
        "InstanceNorm2d": nn.InstanceNorm2d(4, track_running_stats=True),
        "ReLU": nn.ReLU(inplace=True),
        "LSTM": nn.LSTM(4, 4),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("BatchNorm1d", "use GroupNorm"),
        ("BatchNorm2d", "use GroupNorm"),
        ("BatchNorm3d", "use GroupNorm"),
        ("SyncBatchNorm", "use GroupNorm"),
        ("frozen BatchNorm2d", "use GroupNorm"),
        ("BatchNorm2d without weights", "use GroupNorm"),
        ("InstanceNorm2d", "use track_running_stats=False"),
        ("ReLU", "use inplace=False"),
        ("LSTM", "DPLSTM"),
        (TORCHVISION_BLOCK, "inplace=False|out = out"),
    ],
)
def test_an_unsafe_layer_is_refused_with_its_name_and_what_to_use(kind, advice):
    module = nn.Sequential()
    module.add_module("first", nn.Linear(2, 2))
    module.add_module("second", unsafe(kind))
    with pytest.raises(PrivacyRefusal, match=advice) as refusal:
        refuse_unsafe(module)
    assert "second" in str(refusal.value)
    assert type(unsafe(kind)).__name__ in str(refusal.value) or kind == TORCHVISION_BLOCK


def test_a_residual_block_that_adds_in_place_is_refused_even_with_its_relu_mended():
    block = unsafe(TORCHVISION_BLOCK)
    block.relu.inplace = False
    with pytest.raises(PrivacyRefusal, match="BasicBlock"):
        refuse_unsafe(block)


def test_a_layer_with_state_beside_its_weights_is_refused():
    layer = nn.Linear(2, 2)
    layer.register_buffer("running_mean", torch.zeros(2))
    with pytest.raises(PrivacyRefusal, match="buffers"):
        refuse_unsafe(nn.Sequential(layer))


@pytest.mark.parametrize(
    "safe",
    [
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Dropout(0.5),
    ],
)
def test_layers_that_treat_each_image_alone_are_let_through(safe):
    refuse_unsafe(nn.Sequential(safe))


def test_a_private_step_refuses_a_network_with_batch_normalisation():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(PrivacyRefusal, match="BatchNorm2d"):
        private_step(net)


class AddsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y += x
        return y


class MixesTheBatch(nn.Module):
    """Treats every image as two rows."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x.reshape(-1, 2)).reshape(len(x), -1)


class UsesAWeightElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.one.weight


class UsesAWeightTwice(UsesAWeightElsewhere):
    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) @ self.one.weight


@both_engines
@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        (AddsInPlace, "in place"),
        (MixesTheBatch, "batch axis"),
        (UsesAWeightElsewhere, "outside its layer"),
        (UsesAWeightTwice, "do not add up"),
    ],
)
def test_a_forward_that_defeats_per_example_gradients_is_refused_before_anything_is_charged(module, complaint):
    net, accountant = module().double(), Accountant("rdp")
    step, before = private_step(net, accountant=accountant), snapshot(net)
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def whole_step():
        z = step.forward(x)
        step.step([z], [torch.ones_like(z)])

    with pytest.raises(PrivacyRefusal, match=complaint):
        whole_step()
    assert accountant.steps == 0
    assert torch.equal(flat(snapshot(net)), flat(before))


# -- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "delta"), [(1, 0.1), (9, 0.1), (10, 0.01), (999, 1e-3), (1000, 1e-4), (17934, 1e-5), (162000, 1e-6)]
)
def test_the_default_delta_is_the_largest_power_of_ten_below_one_over_n(n, delta):
    assert default_delta(n) == delta < 1 / n
    assert 10 * delta >= 1 / n
    assert DpConfig().delta_for(n) == delta
    assert DpConfig(delta=0.5).delta_for(n) == 0.5


@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"epsilon": math.inf},
        {"epsilon": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": math.inf},
        {"noise_seed": -1},
        {"dp_mode": "partial"},
        {"accountant": "gdp"},
        {"surrogate": "none"},
    ],
)
def test_an_impossible_setting_is_refused_by_name(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        DpConfig(**bad)


def test_an_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"known: surrogate_then_freeze, .*whole, .*encoder_only_paper"):
        DpConfig(dp_mode="partial")


def test_the_mode_of_a_budget_alone_is_that_of_modules_and_no_setting():
    assert DpBudget().mode == "surrogate_dp_modules"
    assert DpConfig(dp_mode="whole").mode == "whole"
    assert not {"mode", "head_apart"} & {f.name for f in dataclasses.fields(DpConfig)}


def test_only_two_budget_takes_the_head_apart():
    assert DpBudget().head_apart is None
    assert DpConfig(dp_mode="whole", head_budget=0.2).head_apart is None
    assert DpConfig(dp_mode="two_budget", head_budget=0.2, max_grad_norm=3.0).head_apart == (0.2, 3.0)
    assert DpConfig(dp_mode="two_budget", head_max_grad_norm=0.7).head_apart == (0.5, 0.7)
