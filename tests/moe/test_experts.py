"""Every kernel is the loop, and the loop is the formula."""

import pytest
import torch
import torch.nn.functional as F

from diffmoe_ep.moe.experts import Experts


def experts(kernel: str, num: int = 4, hidden: int = 6) -> Experts:
    generator = torch.Generator().manual_seed(0)
    made = Experts(num, hidden, kernel).double()  # type: ignore[arg-type]
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return made


@pytest.mark.parametrize("kernel", ["auto", "loop"])
@pytest.mark.parametrize("counts", [[3, 3, 3, 3], [0, 5, 1, 2], [0, 0, 7, 0], [0, 0, 0, 0]])
def test_kernels_are_the_formula(kernel: str, counts: list[int]) -> None:
    module = experts(kernel)
    rows = torch.randn(sum(counts), 6, dtype=torch.float64, requires_grad=True)
    out = module(rows, counts)
    weights = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weights).sum(), [rows, *module.parameters()], allow_unused=False)

    parts, first = [], 0
    for expert, number in enumerate(counts):
        part = rows[first : first + number]
        hidden = F.gelu(part @ module.fc1_weight[expert] + module.fc1_bias[expert], approximate="tanh")
        parts.append(hidden @ module.fc2_weight[expert] + module.fc2_bias[expert])
        first += number
    expected = torch.cat(parts)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), [rows, *module.parameters()])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


def test_gelu_is_the_tanh_form() -> None:
    module = Experts(1, 1).double()
    for name, parameter in module.named_parameters():
        parameter.data = torch.zeros_like(parameter) if "bias" in name else torch.ones_like(parameter)
    x = torch.tensor([[0.7]], dtype=torch.float64)
    inner = 0.7978845608028654 * (0.7 + 0.044715 * 0.7**3)
    assert module(x, [1]).item() == pytest.approx(
        4 * 0.5 * 0.7 * (1 + torch.tanh(torch.tensor(inner, dtype=torch.float64)).item()), abs=1e-12
    )
