"""Every kernel is the loop, and the loop is the formula."""

from collections.abc import Callable, Sequence
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from diffmoe_ep.config import ConfigError
from diffmoe_ep.moe import experts as experts_module
from diffmoe_ep.moe.experts import Experts
from diffmoe_ep.moe.kernels import fused as fused_module
from diffmoe_ep.moe.kernels import onednn
from diffmoe_ep.moe.kernels.choose import KERNELS, Kernel, choose_kernel
from diffmoe_ep.moe.kernels.gelu import gelu, gelu_and_gradient
from diffmoe_ep.moe.kernels.plain import do_not_group

HIDDEN = 8  # grouped_mm reads 16 bytes at a time
COUNTS = {
    "even": [3, 3, 3, 3],
    "ragged": [0, 5, 1, 2],
    "runs": [2, 2, 4, 4],
    "all to one": [0, 0, 7, 0],
    "none": [0, 0, 0, 0],
    "one expert": [5],
}
EXACT: list[Kernel] = ["auto", "loop", "batched", "fused"]  # those that compute in float64


def experts(kernel: Kernel, num: int = 4, kind: torch.dtype = torch.float64, granularity: int = 1) -> Experts:
    generator = torch.Generator().manual_seed(0)
    made = Experts(num, HIDDEN, kernel, granularity).to(kind)
    for parameter in made.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3).to(kind)
    return made


def inputs(counts: Sequence[int], kind: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Rows that want a gradient, and the gradient of their answers."""
    generator = torch.Generator().manual_seed(1)
    rows, gradient = (
        torch.randn(sum(counts), HIDDEN, generator=generator, dtype=torch.float64).to(kind) for _ in range(2)
    )
    return rows.requires_grad_(), gradient


def computed(module: Experts, counts: Sequence[int], call: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """The answers, and the gradients of rows and weights."""
    rows, gradient = inputs(counts, module.fc1_weight.dtype)
    out = (call or module)(rows, counts)
    return [out.detach(), *torch.autograd.grad(out, [rows, *module.parameters()], gradient.to(out.dtype))]


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def formula(module: Experts, counts: Sequence[int]) -> list[Tensor]:
    rows, gradient = inputs(counts, module.fc1_weight.dtype)
    parts, first = [], 0
    for expert, number in enumerate(counts):
        part = rows[first : first + number]
        hidden = F.gelu(part @ module.fc1_weight[expert] + module.fc1_bias[expert], approximate="tanh")
        parts.append(hidden @ module.fc2_weight[expert] + module.fc2_bias[expert])
        first += number
    out = torch.cat(parts)
    return [out.detach(), *torch.autograd.grad(out, [rows, *module.parameters()], gradient)]


@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize("kernel", EXACT)
@pytest.mark.parametrize("case", COUNTS)
def test_kernels_are_the_formula(case: str, kernel: Kernel, granularity: int) -> None:
    counts = COUNTS[case]
    module = experts(kernel, len(counts), granularity=granularity)
    close(computed(module, counts), formula(module, counts), 1e-12)


@pytest.mark.parametrize("run", [1, 2**7, 2**9, 300])
@pytest.mark.parametrize("case", COUNTS)
def test_the_cut_into_runs_changes_nothing(case: str, run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert at a time, two, four, which sizes for tests would never make by themselves."""
    counts = COUNTS[case]
    monkeypatch.setattr(fused_module, "RUN", run)
    for kind, tolerance in (
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
    ):  # only the latter may be multiplied by oneDNN
        module = experts("fused", len(counts), kind)
        close(computed(module, counts), formula(module.double(), counts), tolerance)


@pytest.mark.skipif(not onednn.supports(torch.zeros(1)), reason="this processor's matmuls are not oneDNN's")
@pytest.mark.parametrize("case", COUNTS)
def test_onednn_multiplies_as_torch_does(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, module = COUNTS[case], experts("fused", len(COUNTS[case]), torch.float32)
    called: list[int] = []
    linear = onednn.linear

    def counted(x: Tensor, *others: Tensor | None, **more: Tensor | None) -> Tensor:
        if x.dim() == 2:  # stacked ones come back one by one
            called.append(len(x))
        return linear(x, *others, **more)

    monkeypatch.setattr(onednn, "linear", counted)
    ours = computed(module, counts)
    assert sorted(called) == sorted(4 * counts)  # two products forward, two of the gradients
    monkeypatch.setattr(onednn, "supports", lambda x: False)
    called.clear()
    close(ours, computed(module, counts), 1e-5)
    assert not called


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("kernel", ["batched", "grouped", "fused"])
@pytest.mark.parametrize("case", COUNTS)
def test_kernels_in_lower_precision(case: str, kernel: Kernel, kind: torch.dtype, tolerance: float) -> None:
    counts = COUNTS[case]
    module = experts(kernel, len(counts), kind)
    found = computed(module, counts)
    assert all(tensor.dtype == kind for tensor in found)
    close(found, formula(module.double(), counts), tolerance)


@pytest.mark.parametrize("kernel", ["loop", "grouped", "fused"])
@pytest.mark.parametrize("rows_kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", COUNTS)
def test_autocast_computes_in_bfloat16_and_keeps_float32_weights(
    case: str, rows_kind: torch.dtype, kernel: Kernel
) -> None:
    counts = COUNTS[case]
    module = experts(kernel, len(counts), torch.float32)
    rows, gradient = inputs(counts, rows_kind)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(rows, counts)
    assert out.dtype == torch.bfloat16
    out.backward(gradient.bfloat16())
    found = [out, rows.grad, *(parameter.grad for parameter in module.parameters())]
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, rows_kind] + [torch.float32] * 4
    close(found, formula(module.double(), counts), 0.05)


def test_backward_inside_autocast_is_the_same() -> None:
    module = experts("fused", kind=torch.float32)
    rows, gradient = inputs([1, 4, 0, 3], torch.float32)
    results = []
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            out = module(rows, [1, 4, 0, 3])
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            results.append(torch.autograd.grad(out, [rows, *module.parameters()], gradient.bfloat16()))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kernel", EXACT)
@pytest.mark.parametrize("case", ["even", "ragged", "none"])
def test_recomputation_changes_nothing(case: str, kernel: Kernel) -> None:
    module = experts(kernel)

    def recomputed(rows: Tensor, counts: Sequence[int]) -> Tensor:
        out: Tensor = checkpoint(module, rows, counts, use_reentrant=False)
        return out

    for one, other in zip(computed(module, COUNTS[case]), computed(module, COUNTS[case], recomputed), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["loop", "grouped", "fused"])
def test_two_runs_give_the_same_bits(kernel: Kernel, kind: torch.dtype) -> None:
    module = experts(kernel, kind=kind)
    for one, other in zip(computed(module, [4, 0, 9, 2]), computed(module, [4, 0, 9, 2]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kernel", EXACT)
def test_without_gradient_the_answers_are_the_same(kernel: Kernel) -> None:
    module = experts(kernel)
    rows, _ = inputs([0, 5, 1, 2])
    with torch.no_grad():
        quiet = module(rows, [0, 5, 1, 2])
    assert not quiet.requires_grad
    assert torch.equal(quiet, module(rows, [0, 5, 1, 2]).detach())


def test_fused_accumulates_into_gradients_that_are_there() -> None:
    module = experts("fused")
    wanted = [2 * gradient for gradient in computed(module, [1, 2, 3, 4])[2:]]
    for _ in range(2):
        rows, gradient = inputs([1, 2, 3, 4])
        module(rows, [1, 2, 3, 4]).backward(gradient)
    close([parameter.grad for parameter in module.parameters() if parameter.grad is not None], wanted, 1e-12)


def test_fused_keeps_one_activation_of_a_row_and_hidden_unit() -> None:
    """Half of what autograd keeps for a dense FFN: nothing after GELU."""
    module = experts("fused", kind=torch.float32)
    rows, _ = inputs([2, 2, 4, 0], torch.float32)
    owned = {parameter.data_ptr() for parameter in module.parameters()} | {rows.data_ptr()}
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in owned:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(rows, [2, 2, 4, 0])
    assert sum(kept) == 8 * 4 * HIDDEN


@pytest.mark.parametrize(
    "frozen", [("fc1_weight", "fc2_weight"), ("fc1_bias", "fc2_bias"), ("fc1_weight", "fc1_bias"), ("fc2_weight",)]
)
@pytest.mark.parametrize("case", ["even", "ragged"])
def test_fused_leaves_frozen_weights_out(case: str, frozen: tuple[str, ...]) -> None:
    """The others' gradients are the same bits, and a frozen weight's matmul is not computed."""
    counts = COUNTS[case]
    module = experts("fused", len(counts))
    rows, gradient = inputs(counts)
    module(rows, counts).backward(gradient)
    wanted = {name: parameter.grad for name, parameter in module.named_parameters()}
    by_rows, rows.grad = rows.grad, None
    work = []
    for part in ((), frozen):
        for name, parameter in module.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(name not in part)
        with FlopCounterMode(display=False, custom_mapping=onednn.flop_formulas()) as counter:
            module(rows, counts).backward(gradient)
        work.append(counter.get_total_flops())
        assert by_rows is not None and rows.grad is not None
        assert torch.equal(rows.grad, by_rows)
        rows.grad = None
        for name, parameter in module.named_parameters():
            if name in part:
                assert parameter.grad is None, name
            else:
                assert torch.equal(parameter.grad, wanted[name]), name
    spared = sum("weight" in name for name in frozen)
    assert work[0] - work[1] == spared * 2 * sum(counts) * HIDDEN * 4 * HIDDEN


def test_a_kernel_that_cannot_run_says_so() -> None:
    rows, _ = inputs([1, 2, 3, 4])
    with pytest.raises(ConfigError, match=r"compute\.kernel grouped: .* not in float64; set compute\.kernel=auto"):
        experts("grouped")(rows, [1, 2, 3, 4])
    odd = Experts(2, 6, "grouped")
    with pytest.raises(ConfigError, match=r"rows of 6 and 24 numbers of 4 bytes do not fit"):
        odd(torch.zeros(4, 6), [2, 2])


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", COUNTS)
def test_auto_can_always_run(case: str, kind: torch.dtype) -> None:
    counts = COUNTS[case]
    rows, _ = inputs(counts, kind)
    kernel = choose_kernel("cpu", kind, len(set(counts)) == 1, HIDDEN, 4 * HIDDEN)
    assert kernel in ("loop", "batched", "grouped", "fused")
    experts("auto", len(counts), kind)(rows, counts)


@pytest.mark.parametrize(
    ("dtype", "even_counts", "width", "kernel"),
    [
        (torch.bfloat16, True, 4096, "batched"),
        (torch.float32, True, 4096, "batched"),
        (torch.bfloat16, False, 4096, "grouped"),
        (torch.bfloat16, False, 4097, "fused"),  # rows that torch's grouped matmul cannot read
        (torch.float32, False, 4096, "fused"),
        (torch.float64, False, 4096, "fused"),
    ],
)
def test_auto_on_a_gpu(dtype: torch.dtype, even_counts: bool, width: int, kernel: Kernel) -> None:
    assert choose_kernel("cuda", dtype, even_counts, 1024, width) == kernel


@pytest.mark.parametrize(
    ("capability", "kernel", "why"),
    [
        ((8, 0), "fused", "waits"),
        ((9, 0), "grouped", None),
        ((10, 0), "fused", "wrong gradients"),
        ((12, 0), "fused", ""),
    ],
)
def test_auto_groups_on_hopper_alone(capability: tuple[int, int], kernel: Kernel, why: str | None) -> None:
    assert choose_kernel("cuda", torch.bfloat16, False, 1024, 4096, capability) == kernel
    reason = do_not_group(capability)
    if why is None:
        assert reason is None
    else:
        assert reason is not None and why in reason and f"is {capability[0]}.{capability[1]}" in reason


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), "grouped"), ((10, 0), "fused")])
def test_experts_ask_their_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: str) -> None:
    """Which kernel is taken on a GPU, told by tensors that say they lie on one."""
    rows = mock.MagicMock(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    taken = {name: mock.Mock() for name in KERNELS}
    monkeypatch.setattr(experts_module, "KERNELS", taken)
    Experts(2, 8, "auto")(rows, [1, 2])
    assert [name for name, kernel in taken.items() if kernel.called] == [chosen]


def test_wrong_gradients_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = mock.MagicMock(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda", 0), shape=(4, 8))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    with pytest.raises(ConfigError, match=r"compute\.kernel grouped: .* wrong gradients .* set compute\.kernel=auto"):
        Experts(2, 8, "grouped")(rows, [1, 2])


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["auto", "batched", "grouped", "fused"])
@pytest.mark.parametrize("case", COUNTS)
def test_kernels_on_a_gpu(case: str, kernel: Kernel) -> None:
    counts = COUNTS[case]
    module = experts(kernel, len(counts), torch.float32)
    wanted = formula(experts("loop", len(counts)), counts)
    module.cuda()
    rows, gradient = inputs(counts, torch.float32)
    rows = rows.detach().cuda().requires_grad_()
    runs = []
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            out = module(rows, counts)
        runs.append([out.detach(), *torch.autograd.grad(out, [rows, *module.parameters()], gradient.cuda().bfloat16())])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
    close([tensor.cpu() for tensor in runs[0]], wanted, 0.1)


@pytest.mark.gpu
def test_grouped_is_the_loop_at_a_real_size_with_empty_experts() -> None:
    counts = [700, 0, 1024, 1, 0, 2048, 15, 0]
    generator = torch.Generator().manual_seed(0)
    made = {kernel: Experts(len(counts), 1024, kernel).cuda() for kernel in ("loop", "grouped")}
    for name, parameter in made["loop"].named_parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.03).cuda()
        made["grouped"].get_parameter(name).data = parameter.data
    rows, gradient = (torch.randn(sum(counts), 1024, generator=generator).cuda() for _ in range(2))
    rows.requires_grad_()
    found = {}
    for kernel, module in made.items():
        with torch.autocast("cuda", torch.bfloat16):
            out = module(rows, counts)
        found[kernel] = [out, *torch.autograd.grad(out, [rows, *module.parameters()], gradient.to(out.dtype))]
    for one, other in zip(found["grouped"], found["loop"], strict=True):
        assert (one - other).abs().max() <= 0.02 * other.abs().max()
    for gradient in found["grouped"][2:]:
        assert not gradient[[expert for expert, count in enumerate(counts) if not count]].any()


def test_gelu_is_the_tanh_form() -> None:
    for kernel in EXACT:
        module = Experts(1, 1, kernel).double()
        for name, parameter in module.named_parameters():
            parameter.data = torch.zeros_like(parameter) if "bias" in name else torch.ones_like(parameter)
        x = torch.tensor([[0.7]], dtype=torch.float64)
        inner = 0.7978845608028654 * (0.7 + 0.044715 * 0.7**3)
        assert module(x, [1]).item() == pytest.approx(
            4 * 0.5 * 0.7 * (1 + torch.tanh(torch.tensor(inner, dtype=torch.float64)).item()), abs=1e-12
        )


def test_gelu_of_large_numbers_stays_finite() -> None:
    """Far out GELU is 0 or x, and its slope 0 or 1, and nothing overflows on the way."""
    x, slopes = torch.tensor([[-1e12, -50.0, 0.0, 50.0, 1e12]]), torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]])
    value, gradient = gelu_and_gradient(x, torch.ones_like(x))
    assert torch.equal(gelu(x), F.relu(x))
    assert torch.equal(value, F.relu(x))
    assert torch.equal(gradient, slopes)
