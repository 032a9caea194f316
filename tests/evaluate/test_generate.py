from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffmoe_ep.data.keyed import keyed
from diffmoe_ep.evaluate.generate import CapacityRecord, generate, join, start_noise, to_pixels

SHAPE, STEPS, LAYERS, EXPERTS, TOKENS = (2, 4, 4), 3, 2, 5, 4
CONDITIONS = torch.arange(11) % 3


class ToyModel:
    """Deterministic, but every result depends on what shares the batch, as an inference pool does; keeps what it saw."""

    def __init__(self, moe: bool = True):
        self.moe = moe
        self.calls: list[tuple[float | None, list[int], np.ndarray]] = []

    def __call__(self, x, t, condition):
        assert x.dtype == t.dtype == torch.float32
        assert x.shape == (len(condition), *SHAPE)
        shared = x.mean() if len(x) else 0.0
        first = torch.sin(3 * x) * t.view(-1, 1, 1, 1) + condition.view(-1, 1, 1, 1) * 0.3 + shared
        processed = [torch.full((EXPERTS,), float(len(x) * (layer + 1))) + condition.sum() for layer in range(LAYERS)]
        self.calls.append((t[0].item() if len(t) else None, condition.tolist(), torch.stack(processed).numpy()))
        layers = tuple(SimpleNamespace(processed=rows, num_tokens=TOKENS * len(x)) for rows in processed) if self.moe else ()
        return SimpleNamespace(prediction=torch.cat([first, 100 + first], 1), auxiliary=torch.zeros(()), layers=layers)


def _parts(world: int, guidance: float = 1.5, chunk: int = 3, model=None, conditions=CONDITIONS, **options):
    return [
        generate(
            model or ToyModel(),
            conditions,
            seed=7,
            steps=STEPS,
            guidance=guidance,
            chunk=chunk,
            null_condition=3,
            shape=SHAPE,
            rank=rank,
            world=world,
            **options,
        )
        for rank in range(world)
    ]


@pytest.mark.parametrize("world", [2, 3, 4, 7])
def test_samples_and_capacity_have_the_same_bits_on_any_number_of_ranks(world):
    latents, capacity = join(_parts(1))
    others, other_capacity = join(_parts(world))
    assert latents.shape == (11, *SHAPE)
    assert torch.equal(latents, others)
    assert torch.equal(capacity.processed, other_capacity.processed)
    assert torch.equal(capacity.tokens, other_capacity.tokens)
    assert capacity.average() == other_capacity.average()


def test_the_toy_model_would_show_a_layout_that_changed_the_chunks():
    assert not torch.equal(join(_parts(1, chunk=3))[0], join(_parts(1, chunk=4))[0])


def test_samples_agree_with_a_plain_loop_over_chunks():
    latents, _ = join(_parts(2, guidance=2.0))
    model = ToyModel()
    for first in range(0, 11, 3):
        numbers = range(first, min(first + 3, 11))
        x = torch.stack([torch.from_numpy(keyed(7, i, "start").standard_normal(SHAPE, dtype=np.float32)) for i in numbers])
        condition = CONDITIONS[first : first + 3]
        for t in (1.0, 2 / 3, 1 / 3):
            times = torch.full((len(x),), t)
            towards = model(x, times, condition).prediction[:, :2]
            away = model(x, times, torch.full_like(condition, 3)).prediction[:, :2]
            x = x - (away + 2.0 * (towards - away)) / 3
        torch.testing.assert_close(latents[first : first + 3], x, rtol=1e-5, atol=1e-5)


def test_every_rank_takes_part_in_every_round_with_zero_samples_where_no_chunk_is_left():
    conditions = torch.zeros(7, dtype=torch.int64)  # chunks of 3, 3 and 1 over two ranks: two rounds
    model = ToyModel()
    parts = _parts(2, model=model, conditions=conditions)
    assert [part.index.tolist() for part in parts] == [[0, 1, 2, 6], [3, 4, 5]]
    a_round = 2 * STEPS  # forward passes, the two halves of guidance in each step
    assert [len(condition) for _, condition, _ in model.calls] == [3] * a_round + [1] * a_round + [3] * a_round + [0] * a_round
    assert join(_parts(5, conditions=conditions))[0].shape == (7, *SHAPE)  # two ranks have nothing in any round


def test_guidance_runs_the_halves_apart_and_scale_one_runs_one():
    model = ToyModel()
    _parts(1, guidance=1.5, chunk=11, model=model)
    assert [condition for _, condition, _ in model.calls] == [CONDITIONS.tolist(), [3] * 11] * STEPS
    model = ToyModel()
    _parts(1, guidance=1.0, chunk=11, model=model)
    assert [condition for _, condition, _ in model.calls] == [CONDITIONS.tolist()] * STEPS


def test_the_start_noise_of_a_sample_depends_on_seed_and_number_alone():
    some = start_noise(7, range(2, 5), SHAPE)
    assert torch.equal(some[1:], start_noise(7, range(3, 5), SHAPE))
    assert not torch.equal(some, start_noise(8, range(2, 5), SHAPE))
    assert some.dtype == torch.float32
    many = start_noise(0, range(500), SHAPE)
    assert abs(many.mean().item()) < 0.05
    assert abs(many.std().item() - 1) < 0.05


def test_capacity_agrees_with_a_plain_loop_over_the_calls():
    model = ToyModel()
    _, capacity = join(_parts(1, model=model))
    times = sorted({t for t, _, _ in model.calls}, reverse=True)
    expected = np.zeros((STEPS, LAYERS, EXPERTS))
    for step, time in enumerate(times):
        calls = [(condition, processed) for t, condition, processed in model.calls if t == time]
        tokens = sum(len(condition) * TOKENS for condition, _ in calls)
        expected[step] = EXPERTS * sum(processed for _, processed in calls) / tokens
        assert tokens == 2 * 11 * TOKENS  # both halves count
    np.testing.assert_allclose(capacity.per_step().numpy(), expected.mean((1, 2)))
    np.testing.assert_allclose(capacity.per_layer_expert().numpy(), expected.mean(0))
    assert capacity.average() == pytest.approx(expected.mean())


def test_capacity_is_one_when_experts_take_their_even_share():
    processed = torch.full((4, 3, 8), 2.0, dtype=torch.float64)  # 8 experts take 2 of 16 tokens each
    record = CapacityRecord(processed, torch.full((4, 3), 16.0, dtype=torch.float64))
    assert record.average() == 1
    twice = record.merge(record)
    assert twice.average() == 1
    assert twice.tokens.sum() == 2 * record.tokens.sum()


def test_merging_weighs_ranks_by_their_tokens_and_leaves_out_idle_ones():
    def record(processed: float, tokens: float) -> CapacityRecord:
        return CapacityRecord(torch.full((1, 1, 2), processed, dtype=torch.float64), torch.full((1, 1), tokens, dtype=torch.float64))

    assert record(10, 10).merge(record(0, 30)).average() == 0.5
    assert record(5, 10).merge(record(0, 0)).average() == 1
    assert record(5, 10).merge(CapacityRecord.empty()).average() == 1
    with pytest.raises(ValueError, match="do not add up"):
        record(5, 10).merge(CapacityRecord(torch.ones(2, 1, 2), torch.ones(2, 1)))


def test_a_dense_model_has_an_empty_record_and_capacity_one():
    _, capacity = join(_parts(2, model=ToyModel(moe=False)))
    assert capacity.is_empty
    assert capacity.average() == 1.0


def test_progress_counts_the_solver_steps_of_all_rounds():
    seen: list[tuple[int, int]] = []
    _parts(1, chunk=6, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 2 * STEPS) for done in range(1, 2 * STEPS + 1)]


def test_no_gradients_are_kept():
    weight = torch.ones((), requires_grad=True)
    toy = ToyModel()

    def model(x, t, condition):
        output = toy(x * weight, t, condition)
        assert not output.prediction.requires_grad
        return output

    assert not join(_parts(1, model=model))[0].requires_grad


def test_join_misses_a_lost_part_and_generate_refuses_nothing_to_do():
    with pytest.raises(ValueError, match="part missing"):
        join(_parts(2)[1:])
    with pytest.raises(ValueError, match="at least 1 sample"):
        _parts(1, conditions=CONDITIONS[:0])
    with pytest.raises(ValueError, match="chunks of at least 1"):
        _parts(1, chunk=0)


@pytest.mark.parametrize(("scale", "shift", "highest"), [(1 / 8, -1.0, 16), (2 / 255, -1.0, 255)])
def test_pixels_come_back_from_final_latents(scale, shift, highest):
    stored = torch.arange(highest + 1, dtype=torch.uint8).view(-1, 1, 1, 1)
    final = stored * scale + shift
    assert torch.equal(to_pixels(final, scale, shift), stored)
    assert torch.equal(to_pixels(final * 5, scale, shift)[[0, -1]], stored[[0, -1]])  # clipped at both ends
    assert torch.equal(to_pixels(final + 0.4 * scale, scale, shift), stored)  # rounded to the nearest


def test_pixels_need_a_stored_range_that_fits():
    assert to_pixels(torch.tensor([5.0]), 1.0, 0.0, highest=3).tolist() == [3]
    with pytest.raises(ValueError, match="give the largest stored value"):
        to_pixels(torch.zeros(1), 1 / 5000, 0.0)
