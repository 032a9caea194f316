"""Captions in the model: cross-attention against the formula in plain float64, padding that changes nothing, the null
caption.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_ep.config import ModelConfig
from diffmoe_ep.data.condition import CaptionFeatures, joined, padded
from diffmoe_ep.model.attention import CrossAttention
from diffmoe_ep.model.count import count, equation_40
from diffmoe_ep.model.dit import DiT, Output
from diffmoe_ep.model.embed import CaptionEmbed
from diffmoe_ep.model.initialize import initialize

SMALL = ModelConfig(
    family="diffmoe", condition="text", text_width=6, text_length=5, input_size=6, in_channels=2, out_channels=2,
    hidden_size=8, num_heads=2,
    num_blocks=2, num_experts=3,
)  # fmt: skip
LENGTHS = [3, 0, 5, 1]  # 0 is the null caption


def busy(model: ModelConfig, dtype: torch.dtype = torch.float64) -> DiT:
    """A model whose weights are all away from zero."""
    made = DiT(model).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2).to(dtype)
    return made


def captions(model: ModelConfig, dtype: torch.dtype = torch.float64) -> CaptionFeatures:
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(len(LENGTHS), model.text_length, model.text_width, generator=generator, dtype=torch.float64)
    return CaptionFeatures(features.to(dtype), torch.tensor(LENGTHS))


def told(model: DiT, text: CaptionFeatures, dtype: torch.dtype = torch.float64) -> tuple[Output, dict[str, Tensor]]:
    """The output in training mode, and all gradients."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(len(text), model.config.in_channels, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    model.zero_grad()
    output = model.train()(x, torch.rand(len(text), generator=generator).to(dtype), text)
    ((output.prediction - 1).square().mean() + output.auxiliary).backward()
    return output, {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def test_a_look_at_the_caption_is_the_formula() -> None:
    """Sample by sample and head by head, over the places that a caption fills and no others."""
    hidden, heads, model = SMALL.hidden_size, SMALL.num_heads, busy(SMALL)
    embed, attend = model.caption, model.blocks[0].cross_attention
    assert isinstance(embed, CaptionEmbed) and isinstance(attend, CrossAttention)
    text, x = captions(SMALL), torch.randn(len(LENGTHS), 9, hidden, dtype=torch.float64)
    found = attend(x, *embed(text))
    for tokens, features, length, answer in zip(x, text.features, LENGTHS, found, strict=True):
        rows = features[:length] if length else embed.null[None]
        inner = rows @ embed.fc1.weight.T + embed.fc1.bias
        gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        caption = gelu @ embed.fc2.weight.T + embed.fc2.bias
        query, key, value = (
            rows @ each.weight.T + each.bias
            for each, rows in ((attend.query, tokens), (attend.key, caption), (attend.value, caption))
        )
        mixed = []
        for head in range(heads):
            part = slice(head * hidden // heads, (head + 1) * hidden // heads)
            scores = query[:, part] @ key[:, part].T / math.sqrt(hidden / heads)
            mixed.append(torch.softmax(scores, dim=1) @ value[:, part])
        expected = torch.cat(mixed, dim=1) @ attend.projection.weight.T + attend.projection.bias
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-12)


def test_the_block_looks_between_attention_and_feed_forward_without_modulation() -> None:
    block = busy(dataclasses.replace(SMALL, family="dense")).blocks[0]
    generator = torch.Generator().manual_seed(1)
    x, c = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 9, 8), (2, 8)))
    caption = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.modulation(F.silu(c))[:, None].split(8, dim=2)
    h = x + gate_a * block.attention(F.layer_norm(x, (8,), eps=1e-6) * (1 + scale_a) + shift_a)
    h = h + block.cross_attention(F.layer_norm(h, (8,), eps=1e-6), *caption)
    h = h + gate_m * block.ffn(F.layer_norm(h, (8,), eps=1e-6) * (1 + scale_m) + shift_m)
    torch.testing.assert_close(block(x, c, caption)[0], h, rtol=0, atol=1e-12)


@pytest.mark.parametrize("filling", [0.0, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_stands_in_padded_places_changes_no_bit(filling: float, dtype: torch.dtype) -> None:
    model, text = busy(SMALL, dtype), captions(SMALL, dtype)
    expected, gradients = told(model, text, dtype)
    behind = torch.arange(SMALL.text_length)[None, :, None] >= text.lengths[:, None, None]
    output, found = told(model, CaptionFeatures(text.features.masked_fill(behind, filling), text.lengths), dtype)
    assert torch.equal(output.prediction, expected.prediction)
    assert torch.equal(output.auxiliary, expected.auxiliary)
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradients[name]) for name in found)


@pytest.mark.parametrize("places", [6, 11])
def test_more_places_agree_to_rounding(places: int) -> None:
    model, text = busy(SMALL), captions(SMALL)
    expected, gradients = told(model, text)
    rows = [features[:length] for features, length in zip(text.features, LENGTHS, strict=True)]
    output, found = told(model, padded(rows, places, SMALL.text_width))
    torch.testing.assert_close(output.prediction, expected.prediction, rtol=0, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)


def test_a_caption_acts_and_each_on_its_own_sample() -> None:
    model, text = busy(dataclasses.replace(SMALL, family="dense")), captions(SMALL)
    before, _ = told(model, text)
    changed = text.features.clone()
    changed[2, 4] += 1  # the last token of the third caption
    after, _ = told(model, CaptionFeatures(changed, text.lengths))
    differs = (after.prediction - before.prediction).abs().amax((1, 2, 3)) > 1e-6
    assert differs.tolist() == [False, False, True, False]


def test_null_captions_are_one_trained_row() -> None:
    model, text = busy(SMALL), captions(SMALL)
    nothing = CaptionFeatures(text.features, torch.zeros_like(text.lengths))
    output, gradients = told(model, nothing)
    assert gradients["caption.null"].abs().max() > 0
    embed = model.caption
    assert embed is not None
    same = embed.null.detach().expand(len(text), 1, -1)
    again, _ = told(model, padded(list(same), SMALL.text_length, SMALL.text_width))
    torch.testing.assert_close(again.prediction, output.prediction, rtol=0, atol=1e-14)


def test_conditions_join_and_are_cut() -> None:
    text = captions(SMALL)
    both = joined([text[0:1], text[1:4]])
    assert isinstance(both, CaptionFeatures)
    assert torch.equal(both.features, text.features) and torch.equal(both.lengths, text.lengths)
    assert joined([torch.tensor([1]), torch.tensor([2, 3])]).tolist() == [1, 2, 3]  # type: ignore[union-attr]
    cut = padded([torch.ones(9, 6)], 5, 6)
    assert cut.features.shape == (1, 5, 6) and cut.lengths.tolist() == [5]


def test_the_start_is_zero_and_what_looks_at_captions_is_closed() -> None:
    model = initialize(DiT(SMALL), 0)
    assert all(block.cross_attention.projection.weight.abs().max() == 0 for block in model.blocks)
    output, gradients = told(model, captions(SMALL, torch.float32), torch.float32)
    assert output.prediction.abs().max() == 0
    moved = {name for name, gradient in gradients.items() if gradient.abs().max() > 0}
    assert moved == {"head.projection.weight", "head.projection.bias"} | {
        name for name in gradients if "predictor" in name
    }


def test_the_large_models_to_the_digit() -> None:
    """SPEC's totals and parts."""
    large = ModelConfig(
        family="diffmoe",
        condition="text",
        hidden_size=1408,
        num_blocks=28,
        num_heads=22,
        out_channels=4,
        num_experts=16,
    )
    dense = dataclasses.replace(large, family="dense")
    for model, total in ((large, 4_596_486_512), (dense, 1_236_063_376)):
        with torch.device("meta"):
            built = DiT(model)
        assert count(model).total == total == sum(parameter.numel() for parameter in built.parameters())
    sizes = count(dense)
    assert (sizes.attention, sizes.cross_attention, sizes.modulation) == (222_193_664, 222_193_664, 333_290_496)
    assert (sizes.dense_ffn, sizes.other) == (444_269_056, 14_116_496)
    assert f"{equation_40(large) / 1e6:.1f} {count(large).activated() / 1e6:.1f}" == "1239.4 1264.5"
