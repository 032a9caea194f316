import importlib.util
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffmoe_ep.config import ConfigError, SampleConfig
from diffmoe_ep.data.condition import CaptionFeatures
from diffmoe_ep.data.rng import generator_for
from diffmoe_ep.parallel.collectives import Group
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.sampling.capacity_record import CapacityRecord
from diffmoe_ep.sampling.generate import SampleTask, generate, join, start_noise
from diffmoe_ep.sampling.picture import to_pixels

SHAPE, STEPS, LAYERS, EXPERTS, TOKENS = (2, 4, 4), 3, 2, 5, 4
CONDITIONS = torch.arange(11) % 3
NULL = torch.tensor([3])


class ToyModel:
    """Deterministic, but every result depends on what shares the batch, as an inference pool does; keeps what it
    saw.
    """

    def __init__(self, moe: bool = True, ddpm: bool = False):
        self.moe = moe
        self.ddpm = ddpm
        self.calls: list[tuple[float | None, list[int], np.ndarray]] = []

    def __call__(self, x, t, condition):
        assert x.dtype == t.dtype == torch.float32
        assert x.shape == (len(condition), *SHAPE)
        shared = x.mean() if len(x) else 0.0
        times = t.view(-1, 1, 1, 1) / (1000 if self.ddpm else 1)
        first = torch.sin(3 * x) * times + condition.view(-1, 1, 1, 1) * 0.3 + shared
        processed = [torch.full((EXPERTS,), float(len(x) * (layer + 1))) + condition.sum() for layer in range(LAYERS)]
        self.calls.append((t[0].item() if len(t) else None, condition.tolist(), torch.stack(processed).numpy()))
        layers = (
            tuple(SimpleNamespace(processed=rows, num_tokens=TOKENS * len(x)) for rows in processed) if self.moe else ()
        )
        second = torch.tanh(first) if self.ddpm else 100 + first
        return SimpleNamespace(prediction=torch.cat([first, second], 1), auxiliary=torch.zeros(()), layers=layers)


class TextToy:
    """The toy model for captions: what it makes of one is the sum of its tokens, so that padding and neighbours would
    show.
    """

    def __init__(self, ddpm: bool = False):
        self.toy = ToyModel(ddpm=ddpm)

    def __call__(self, x, t, text):
        assert isinstance(text, CaptionFeatures)
        assert text.features.shape == (len(x), 5, 3)
        inside = torch.arange(5) < text.lengths[:, None]
        words = torch.where(inside[:, :, None], text.features, 0.0).sum((1, 2))
        return self.toy(x, t, torch.where(text.lengths == 0, 3.0, words))


def captions(count: int) -> CaptionFeatures:
    """Captions of 0 to 5 tokens, with numbers behind their ends that must not matter."""
    generator = torch.Generator().manual_seed(0)
    return CaptionFeatures(torch.randn(count, 5, 3, generator=generator), torch.arange(count) % 6)


def _parts(
    world: int,
    guidance: float = 1.5,
    chunk: int = 3,
    model=None,
    **options,
):
    model = model or ToyModel(ddpm=options.get("objective") == "ddpm")
    return [_parts_of(rank, world, model=model, guidance=guidance, chunk=chunk, **options) for rank in range(world)]


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
        x = torch.stack(
            [torch.from_numpy(generator_for(7, i, "start").standard_normal(SHAPE, dtype=np.float32)) for i in numbers]
        )
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
    assert [len(condition) for _, condition, _ in model.calls] == [3] * a_round + [1] * a_round + [3] * a_round + [
        0
    ] * a_round
    assert join(_parts(5, conditions=conditions))[0].shape == (7, *SHAPE)  # two ranks have nothing in any round


def test_guidance_runs_the_halves_apart_and_scale_one_runs_one():
    model = ToyModel()
    _parts(1, guidance=1.5, chunk=11, model=model)
    assert [condition for _, condition, _ in model.calls] == [CONDITIONS.tolist(), [3] * 11] * STEPS
    model = ToyModel()
    _parts(1, guidance=1.0, chunk=11, model=model)
    assert [condition for _, condition, _ in model.calls] == [CONDITIONS.tolist()] * STEPS


@pytest.mark.parametrize("world", [2, 5])
@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_captions_give_the_same_bits_on_any_number_of_ranks(world, objective):
    """Law 7 for text, and each sample agrees with a run of its chunk alone."""
    text, null = captions(11), CaptionFeatures(torch.zeros(1, 5, 3), torch.zeros(1, dtype=torch.int64))
    given = {"conditions": text, "null": null, "objective": objective}

    def toy():
        return TextToy(ddpm=objective == "ddpm")

    latents, capacity = join(_parts(1, model=toy(), **given))
    others, other_capacity = join(_parts(world, model=toy(), **given))
    assert torch.equal(latents, others)
    assert torch.equal(capacity.processed, other_capacity.processed)
    behind = CaptionFeatures(
        torch.where(torch.arange(5)[None, :, None] < text.lengths[:, None, None], text.features, torch.nan),
        text.lengths,
    )
    assert torch.equal(join(_parts(1, model=toy(), **(given | {"conditions": behind})))[0], latents)
    assert torch.equal(join(_parts(1, model=toy(), **(given | {"conditions": text[:3]})))[0], latents[:3])


def test_guidance_leads_away_from_the_negative_prompt():
    text, away = captions(4), captions(5)[4:]
    plain, negative = (
        join(_parts(1, steps=1, chunk=4, guidance=2.0, model=TextToy(), conditions=text, null=null))[0]
        for null in (CaptionFeatures(away.features, torch.zeros(1, dtype=torch.int64)), away)
    )
    x, ones = start_noise(7, range(4), SHAPE), torch.ones(4)
    repeated = CaptionFeatures(away.features.expand(4, -1, -1), away.lengths.expand(4))
    towards, back = (TextToy()(x, ones, condition).prediction[:, :2] for condition in (text, repeated))
    torch.testing.assert_close(negative, x - (back + 2 * (towards - back)), rtol=1e-5, atol=1e-5)
    assert not torch.equal(plain, negative)


def test_a_sample_of_its_own_seed_follows_from_that_seed_alone():
    together = join(_parts(2, chunk=1, seed=range(20, 31)))[0]
    alone = join(_parts(1, chunk=1, seed=[24], conditions=CONDITIONS[4:5]))[0]
    assert torch.equal(together[4:5], alone)
    assert torch.equal(start_noise([5, 9], range(1, 2), SHAPE), start_noise(9, range(1), SHAPE))


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
        return CapacityRecord(
            torch.full((1, 1, 2), processed, dtype=torch.float64), torch.full((1, 1), tokens, dtype=torch.float64)
        )

    assert record(10, 10).merge(record(0, 30)).average() == 0.5
    assert record(5, 10).merge(record(0, 0)).average() == 1
    assert record(5, 10).merge(CapacityRecord.empty()).average() == 1
    with pytest.raises(ValueError, match="do not add up"):
        record(5, 10).merge(CapacityRecord(torch.ones(1, 2, 2), torch.ones(1, 2)))
    with pytest.raises(ValueError, match="do not add up"):
        record(5, 10).merge(CapacityRecord(torch.ones(1, 1, 3), torch.ones(1, 1)))


def test_merging_adds_the_steps_of_a_shorter_record_to_the_first_of_a_longer_one():
    short = CapacityRecord(torch.full((1, 1, 2), 5.0).double(), torch.full((1, 1), 10.0).double())
    long = CapacityRecord(torch.full((3, 1, 2), 2.0).double(), torch.full((3, 1), 10.0).double())
    for merged in (short.merge(long), long.merge(short)):
        assert merged.processed[:, 0, 0].tolist() == [7, 2, 2]
        assert merged.tokens[:, 0].tolist() == [20, 10, 10]
        np.testing.assert_allclose(merged.per_step().numpy(), [0.7, 0.4, 0.4])


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


FLOW, DDPM = {"objective": "flow"}, {"objective": "ddpm"}
FIXED = {
    "heun": FLOW | {"sampler": "heun"},
    "interval": FLOW | {"guidance_interval": (0.2, 0.7)},
    "channels": FLOW | {"guidance_channels": 1},
    "ancestral": DDPM | {"sampler": "ddpm"},
    "ddim": DDPM | {"sampler": "ddim"},
    "ddim with noise": DDPM | {"sampler": "ddim", "eta": 0.5},
    "ddpm, euler": DDPM | {"sampler": "euler"},
    "ddpm, heun": DDPM | {"sampler": "heun", "guidance_interval": (0.2, 0.7)},
}


@pytest.mark.parametrize("world", [2, 5])
@pytest.mark.parametrize("options", FIXED.values(), ids=FIXED.keys())
def test_every_sampler_gives_the_same_bits_on_any_number_of_ranks(options, world):
    latents, capacity = join(_parts(1, **options))
    others, other_capacity = join(_parts(world, **options))
    assert latents.isfinite().all()
    assert torch.equal(latents, others)
    assert torch.equal(capacity.processed, other_capacity.processed)
    assert torch.equal(capacity.tokens, other_capacity.tokens)
    assert len(capacity.per_step()) == STEPS
    assert not torch.equal(latents, join(_parts(1))[0])


@pytest.mark.parametrize("options", FIXED.values(), ids=FIXED.keys())
def test_ranks_without_samples_make_the_same_calls_under_every_sampler(options):
    calls = []
    for rank in range(5):  # the last has no chunk
        model = ToyModel(ddpm=options["objective"] == "ddpm")
        _parts_of(rank, 5, model=model, **options)
        calls.append(len(model.calls))
    assert calls[-1] > 0
    assert len(set(calls)) == 1


def _parts_of(
    rank: int, world: int, *, model, conditions=CONDITIONS, objective="flow", null=NULL, seed=7, progress=None,
    count_active=None, **options,
):  # fmt: skip
    config = SampleConfig(**({"steps": STEPS, "guidance": 1.5, "chunk": 3} | options))
    task = SampleTask(seed, objective, SHAPE, null)
    mesh = Mesh(world=Group(world, rank))
    return generate(model, conditions, config, task, mesh, progress=progress, count_active=count_active)


def test_ancestral_samples_agree_with_a_plain_loop_with_keyed_noise_and_one_pool_for_both_halves():
    """The doubled batch matters: the toy model mixes in the mean of all that it is given."""
    model = ToyModel(ddpm=True)
    latents, _ = join(_parts(2, guidance=2.0, steps=4, model=model, objective="ddpm", sampler="ddpm"))
    assert model.calls[0][1] == [0, 1, 2, 3, 3, 3]  # the conditional half first
    beta = np.linspace(1e-4, 0.02, 1000)
    signal = np.cumprod(1 - beta)
    for first in range(0, 11, 3):
        numbers = range(first, min(first + 3, 11))
        count = len(numbers)
        x = np.stack([generator_for(7, i, "start").standard_normal(SHAPE, dtype=np.float32) for i in numbers]).astype(
            np.float64
        )
        condition = torch.cat([CONDITIONS[first : first + count], torch.full((count,), 3)])
        for step, t in enumerate((999, 666, 333, 0)):
            here, before = signal[t], signal[t - 333] if t else 1.0
            now = torch.from_numpy(x).float()
            prediction = (
                ToyModel(ddpm=True)(torch.cat([now, now]), torch.full((2 * count,), float(t)), condition)
                .prediction.double()
                .numpy()
            )
            towards, away, v = prediction[:count, :2], prediction[count:, :2], prediction[:count, 2:]
            eps = away + 2.0 * (towards - away)
            added = 1 - here / before
            x = (x - added / np.sqrt(1 - here) * eps) / np.sqrt(1 - added)
            if t:
                low = added * (1 - before) / (1 - here)
                noise = np.stack(
                    [generator_for(7, i, "start", step + 1).standard_normal(SHAPE, dtype=np.float32) for i in numbers]
                )
                x = x + np.sqrt(added ** ((1 + v) / 2) * low ** ((1 - v) / 2)) * noise
        np.testing.assert_allclose(latents[first : first + count].numpy(), x, rtol=1e-3, atol=1e-3)


def test_the_noise_of_a_sampling_step_differs_from_every_other():
    parts = [start_noise(7, range(3), SHAPE, part) for part in range(4)]
    assert all(not torch.equal(a, b) for i, a in enumerate(parts) for b in parts[:i])
    assert torch.equal(parts[2][1:], start_noise(7, range(1, 3), SHAPE, 2))


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        (FLOW, [1] * 1 + [2] * 2 + [1]),  # t = 1, 3/4, 1/2, 1/4: guided at the middle two
        (DDPM | {"sampler": "ddim"}, [1, 2, 2, 1]),  # t = 999, 666, 333, 0 are 1, 0.667, 0.334, 0.001
        (
            DDPM | {"sampler": "euler"},
            [1, 2, 2, 2],
        ),  # the flow's t = 1/4 has signal 0.9, which the chain has after 0.0978
    ],
    ids=["flow", "ddim", "euler on a chain"],
)
def test_outside_the_interval_a_step_is_one_conditional_pass(options, passes):
    model = ToyModel(ddpm=options["objective"] == "ddpm")
    interval = (0.097, 0.9) if options.get("sampler") == "euler" else (0.3, 0.8)
    _, capacity = join(_parts(1, chunk=11, steps=4, model=model, guidance_interval=interval, **options))
    assert capacity.tokens[:, 0].tolist() == [11 * TOKENS * count for count in passes]
    if options is FLOW:
        assert [condition[0] for _, condition, _ in model.calls] == [0, 0, 3, 0, 3, 0]
    else:
        assert [len(condition) for _, condition, _ in model.calls] == [11 * count for count in passes]


def test_guided_channels_leave_the_others_conditional():
    """With one step from the same noise the effect shows directly."""
    conditional, all_guided, one = (
        join(_parts(1, steps=1, **options))[0]
        for options in ({"guidance": 1.0}, {"guidance": 3.0}, {"guidance": 3.0, "guidance_channels": 1})
    )
    assert torch.equal(one[:, :1], all_guided[:, :1])
    assert torch.equal(one[:, 1:], conditional[:, 1:])
    assert not torch.equal(one[:, :1], conditional[:, :1])


def test_a_step_of_heun_counts_both_its_evaluations():
    model = ToyModel()
    _, capacity = join(_parts(1, model=model, sampler="heun"))
    assert len(model.calls) == 4 * STEPS * 4  # chunks, steps, two evaluations of two halves
    assert capacity.tokens[:, 0].tolist() == [4 * 11 * TOKENS] * STEPS


def test_samplers_that_do_not_fit_are_errors_that_name_the_key():
    for sampler in ("ddpm", "ddim"):
        with pytest.raises(ConfigError, match=f"sample.sampler is {sampler}"):
            _parts(1, sampler=sampler)
    with pytest.raises(ConfigError, match="sample.steps is 2000"):
        _parts(1, steps=2000, **DDPM, sampler="ddpm")
    with pytest.raises(ConfigError, match="sample.guidance_channels is 3"):
        _parts(1, guidance_channels=3)

    def narrow(x, t, condition):
        return SimpleNamespace(prediction=x, auxiliary=torch.zeros(()), layers=())

    for guidance in (1.0, 2.0):
        with pytest.raises(ConfigError, match="model.out_channels is 2"):
            _parts(1, model=narrow, guidance=guidance, **DDPM, sampler="ddim")


def _uneven_odeint(slope, x, times, **options):
    """Stands in for torchdiffeq: Euler, in a number of steps that depends on the samples."""
    steps = 2 + int(x.abs().sum() * 10) % 4
    for step in range(steps):
        x = x - slope(torch.tensor(1 - step / steps), x) / steps
    return torch.stack([x, x])


class Meeting:
    """A sum over the ranks of a world of threads, who wait for each other in it."""

    def __init__(self, world: int):
        self.barrier = threading.Barrier(world, timeout=30)
        self.values = [0] * world

    def sum(self, rank: int, value: int) -> int:
        self.values[rank] = value
        self.barrier.wait()
        total = sum(self.values)
        self.barrier.wait()
        return total


@pytest.mark.parametrize("options", [{}, {"guidance_interval": (0.2, 0.7)}], ids=["always", "interval"])
@pytest.mark.parametrize("objective", [FLOW, DDPM], ids=["flow", "ddpm"])
@pytest.mark.parametrize("world", [2, 5])
def test_adaptive_ranks_whose_passes_wait_for_each_other_all_finish(monkeypatch, world, objective, options):
    """Chunks need different numbers of passes and one rank has no chunk: a pass that the others do not make would break
    the barrier.
    """
    monkeypatch.setitem(sys.modules, "torchdiffeq", SimpleNamespace(odeint=_uneven_odeint))
    options = objective | options | {"sampler": "dopri5"}
    expected, alone = join(_parts(1, **options))
    active, passed = Meeting(world), Meeting(world)
    models = [ToyModel(ddpm=objective is DDPM) for _ in range(world)]

    def work(rank: int):
        def model(x, t, condition):
            assert passed.sum(rank, len(x)) > 0  # as experts on other ranks would; some rank has samples
            return models[rank](x, t, condition)

        return _parts_of(rank, world, model=model, count_active=lambda working: active.sum(rank, working), **options)

    with ThreadPoolExecutor(world) as pool:
        parts = list(pool.map(work, range(world)))
    latents, capacity = join(parts)
    assert torch.equal(latents, expected)
    assert torch.equal(capacity.processed, alone.processed)
    assert torch.equal(capacity.tokens, alone.tokens)
    assert len({len(model.calls) for model in models}) == 1
    assert (
        capacity.tokens[0, 0] > capacity.tokens[-1, 0] > 0
    )  # the last evaluations are those of the slowest chunks alone


def test_adaptive_ranks_on_their_own_do_no_idle_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", SimpleNamespace(odeint=_uneven_odeint))
    model = ToyModel()
    part = _parts_of(4, 5, model=model, sampler="dopri5")
    assert model.calls == []
    assert part.latents.shape == (0, *SHAPE)
    assert part.capacity.is_empty


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("torchdiffeq") is None, reason="torchdiffeq is not installed (extra: sample)"
)
@pytest.mark.parametrize("options", [FLOW, DDPM], ids=["flow", "ddpm"])
def test_dopri5_gives_the_same_bits_on_any_number_of_ranks_and_ends_near_heun(options):
    seen: list[tuple[int, int]] = []
    tight = options | {"sampler": "dopri5", "rtol": 1e-4, "atol": 1e-4}
    latents, capacity = join(_parts(1, progress=lambda done, total: seen.append((done, total)), **tight))
    others, other_capacity = join(_parts(3, **tight))
    assert torch.equal(latents, others)
    assert torch.equal(capacity.processed, other_capacity.processed)
    assert seen == sorted(seen)
    assert seen[-1] == (400, 400)
    if options is FLOW:  # as a chain the toy model's paths run apart too fast to compare
        assert (latents - join(_parts(1, steps=400, sampler="heun"))[0]).abs().mean() < 0.01


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
