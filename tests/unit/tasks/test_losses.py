import math

import pytest
import torch

from tasks.errors import UnknownNameError
from tasks.losses import LOSSES, loss_function


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 4, generator=generator), torch.randn(4, 3, generator=generator), torch.tensor([0, 2, 1, 1, 0])


def test_equal_logits_cost_the_logarithm_of_the_number_of_classes():
    losses = loss_function("cross_entropy")(torch.zeros(2, 10), torch.tensor([3, 9]))
    assert losses.tolist() == pytest.approx([math.log(10)] * 2)


def test_cross_entropy_is_one_value_per_example():
    logits, targets = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    expected = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1))]
    assert loss_function("cross_entropy")(logits, targets).tolist() == pytest.approx(expected)


def test_errors_of_maps_are_one_value_per_example():
    maps, targets = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    maps[0, 0, 0, 0], maps[1] = 1.0, 0.5
    assert loss_function("mse")(maps, targets).tolist() == [0.25, 0.25]
    assert loss_function("l1")(maps, targets).tolist() == [0.25, 0.5]


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_per_example_gradients_by_torch_func_are_those_of_batches_of_one(name, batch):
    x, weight, targets = batch
    if name in {"mse", "l1"}:
        targets = torch.eye(3)[targets]
    loss = loss_function(name)

    def one(w, x_1, y_1):
        return loss((x_1 @ w)[None], y_1[None]).sum()

    together = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(weight, x, targets)
    for k in range(len(x)):
        w = weight.clone().requires_grad_()
        loss(x[k : k + 1] @ w, targets[k : k + 1]).sum().backward()
        torch.testing.assert_close(together[k], w.grad)


def test_an_empty_batch_has_no_losses():
    assert loss_function("cross_entropy")(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_an_unknown_loss_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"no loss named 'hinge'; known: cross_entropy"):
        loss_function("hinge")
