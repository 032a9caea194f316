"""Verbs and options that do not exist are answered with what is meant; options are parsed into typed records."""

from pathlib import Path

import pytest

from cli.test_cli import call
from diffmoe_ep.cli import VERBS, parse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sampel", "runs/x"), "there is no verb sampel; did you mean sample?"),
        (("generate", "runs/x"), "there is no verb generate; did you mean sample?"),
        (("eval", "runs/x"), "there is no verb eval; did you mean evaluate?"),
        (("qqq",), "there is no verb qqq; the verbs are train, watch, sample,"),
        (("data", "chek", "folder"), "there is no verb chek; did you mean check?"),
        (("train", "c.yaml", "--dryrun"), "diffmoe train has no option --dryrun; did you mean --dry-run?"),
        (("train", "c.yaml", "--lr", "1"), "given as key=value: the learning rate is train.optimizer.lr"),
        (("train", "c.yaml", "--train.steps", "1"), "given as key=value: train.steps=..."),
        (
            ("train", "c.yaml", "--k", "1"),
            "as key=value: the number of experts that a token chooses (family tc) is model",
        ),
        (("train", "c.yaml", "--epochs=3"), "as key=value: there is none, a run is counted in steps"),
        (("train", "c.yaml", "--qqq"), "given as key=value: list all: diffmoe keys"),
        (("sample", "run", "--out", "x", "--seed", "1"), "given as key=value: seed=..."),
        (("sample", "run", "--sampels", "1"), "diffmoe sample has no option --sampels; did you mean --samples?"),
        (("verify", "--gpu"), "diffmoe verify has no option --gpu; it has --help, --device, --timeout-minutes"),
        (("train", "c.yaml", "--dry-run", "more"), "more cannot be understood here"),
        (("keys", "no-such-thing"), "no key has to do with no-such-thing; list all: diffmoe keys"),
    ],
)
def test_what_does_not_exist_is_answered(arguments: tuple[str, ...], message: str) -> None:
    code, _, err = call(0, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_options_are_typed() -> None:
    _, options = parse(
        ["sample", "runs/x", "seed=3", "--out", "o", "--classes", "1,2", "sample.steps=5", "--prompt", "a"]
    )
    assert options.path == Path("runs/x") and options.out == Path("o")  # type: ignore[attr-defined]
    assert options.overrides == ("seed=3", "sample.steps=5")  # type: ignore[attr-defined]
    assert (options.classes, options.prompt, options.samples) == ((1, 2), ("a",), None)  # type: ignore[attr-defined]
    _, options = parse(["bench", "layer", "--sizes", "384:8192:16,1024:4096:8", "--turns", "4"])
    assert options.sizes == ((384, 8192, 16), (1024, 4096, 8)) and options.turns == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("rank", ["--local_rank=1", "--local-rank=1", "--local_rank 1", "--local-rank 1"])
@pytest.mark.parametrize("behind", [False, True])
def test_the_local_rank_of_a_launcher_is_passed_over(rank: str, behind: bool) -> None:
    words = ["train", "c.yaml", "--dry-run", "seed=3"]
    verb, options = parse([*words, *rank.split()] if behind else [*rank.split(), *words])
    assert verb.words == ("train",)
    assert (options.config, options.overrides, options.dry_run) == (Path("c.yaml"), ("seed=3",), True)  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(verb.words))
def test_every_verb_has_help(verb: object) -> None:
    words = verb.words  # type: ignore[attr-defined]
    code, out, _ = call(0, *words, "--help")
    assert code == 0
    assert f"usage: diffmoe {' '.join(words)}" in out
    assert max(map(len, out.splitlines())) <= 110


def test_keys_are_found_by_name_role_and_what_others_call_them() -> None:
    for words in (["learning_rate"], ["train.optimizer.lr"]):
        assert (
            "recipe     train.optimizer.lr: float = 0.0001\n           peak learning rate" in call(0, "keys", *words)[1]
        )
    out = call(0, "keys", "recipe", "ema")[1]
    assert "train.ema.decay" in out and "train.ema.thresholds" not in out and "execution" not in out
