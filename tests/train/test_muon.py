import pytest
import torch

from overparam.train.muon import Muon, orthogonalised


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_update_is_near_the_orthogonal_factor(shape):
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix)
    singular = torch.linalg.svdvals(found)
    assert singular.min() > 0.6  # the iteration's coefficients trade accuracy for speed
    assert singular.max() < 1.3
    cosine = (found * (u @ v)).sum() / (found.norm() * (u @ v).norm())
    assert cosine > 0.98


def test_a_stack_is_treated_one_matrix_at_a_time():
    stack = torch.randn(3, 2, 6, 10)
    expected = torch.stack([torch.stack([orthogonalised(each) for each in row]) for row in stack])
    torch.testing.assert_close(orthogonalised(stack), expected)


def test_steps_on_a_stack_are_those_on_its_matrices():
    start, gradients = torch.randn(4, 6, 10), torch.randn(3, 4, 6, 10)
    stack = torch.nn.Parameter(start.clone())
    alone = [torch.nn.Parameter(each.clone()) for each in start]
    settings = {"lr": 0.1, "weight_decay": 0.1}
    optimizers = [Muon([stack], **settings), Muon(alone, **settings)]
    for gradient in gradients:
        stack.grad = gradient.clone()
        for parameter, each in zip(alone, gradient, strict=True):
            parameter.grad = each.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stack.data, torch.stack([each.data for each in alone]))


def test_one_step_by_hand():
    parameter = torch.nn.Parameter(torch.zeros(4, 9))
    parameter.grad = torch.randn(4, 9)
    expected = -0.5 * 0.2 * 9**0.5 * orthogonalised(parameter.grad)  # the scale makes AdamW's rates serve
    Muon([parameter], lr=0.5).step()
    torch.testing.assert_close(parameter.data, expected)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"matrices, got a parameter of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
