"""Pages cannot rot: each command in a README, at the head of a config and of a script is one that the command line
takes, and each link leads somewhere. Nothing is run.
"""

import contextlib
import io
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffmoe_ep import cli
from diffmoe_ep.config import ConfigError, keys, load

ROOT = Path(__file__).parents[1]
FOLDERS = (".github", "configs", "data_prep", "diffmoe_ep", "docker", "launch", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
HEADS = sorted([*ROOT.glob("configs/**/*.yaml"), *(path for path in ROOT.glob("launch/*.*") if path.suffix != ".md")])
OURS = re.compile(rf"^({'|'.join(re.escape(folder) for folder in FOLDERS)})/")  # a path of this repository

# Scripts whose settings are overrides of one config, and those of pytest.
SETTINGS_OF = {
    "quickstart.sh": "configs/digits.yaml",
    "families.sh": "configs/digits.yaml",
    "same_run.sh": "configs/digits.yaml",
    "text_to_image.sh": "configs/text/digits_diffmoe.yaml",
}
STARTS = {"deepspeed.sh", "slurm.sbatch", "torchrun.sh"}  # they start a verb over ranks
LAUNCHERS = {
    "torchrun": {"--nproc-per-node": 1, "-m": 0},
    "deepspeed": {"--num_gpus": 1, "--hostfile": 1, "--module": 0},
}


class Fault(Exception):
    """What is wrong with a command or a link, in a line."""


# -- commands ----------------------------------------------------------------------------------------------------------


def check(command: str) -> None:
    """Raises Fault unless the command line would take this command; a command of other programs passes."""
    words = shlex.split(command)
    settings = []
    while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
        settings.append(words.pop(0))
    words = [word for word in words if word not in ("...", "key=value")]
    for path in [word for word in words + [one.partition("=")[2] for one in settings] if OURS.match(word)]:
        if not list(ROOT.glob(path)):
            raise Fault(f"there is no {path}")
    program, rest = words[0].removeprefix("./"), words[1:]
    if program in LAUNCHERS:
        program, rest = launched(program, rest)
    elif program.split("/")[-1].startswith("python") and rest[:1] == ["-m"]:
        program, rest = rest[1], rest[2:]
    if rest and re.fullmatch(r"[A-Z]+", rest[0]):
        return  # VERB or SOURCE: a form, no command
    if program in ("diffmoe", "diffmoe_ep"):
        check_verb(rest)
    elif program == "data_prep":
        from data_prep.__main__ import _parser

        parsed(_parser().parse_args, rest)
    elif program == "sbatch":
        place = next((number for number, word in enumerate(rest) if word.endswith("slurm.sbatch")), None)
        if place is None:
            raise Fault("sbatch starts no script")
        check_script("slurm.sbatch", rest[place + 1 :], settings)
    elif program.startswith("launch/"):
        check_script(program.removeprefix("launch/"), rest, settings)
    elif program == "pip":
        check_extras(rest)


def launched(launcher: str, words: list[str]) -> tuple[str, list[str]]:
    """The module that a launcher starts, and its arguments."""
    while words and words[0].startswith("-"):
        option, _, value = words.pop(0).partition("=")
        if option not in LAUNCHERS[launcher]:
            raise Fault(f"{launcher} {option} is not one of the options used here: {', '.join(LAUNCHERS[launcher])}")
        del words[: LAUNCHERS[launcher][option] * (not value)]
    if not words:
        raise Fault(f"{launcher} starts nothing")
    return words[0], words[1:]


def parsed(parse: Callable[[list[str]], object], words: list[str]) -> object:
    """What a parser makes of the words; Fault with its own message if it refuses them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return parse(words)
    except ConfigError as error:
        raise Fault(str(error)) from None
    except SystemExit as end:
        if end.code:
            raise Fault(said.getvalue().strip().splitlines()[-1]) from None
        return None  # --help


def check_verb(words: list[str]) -> None:
    """A verb with its options, and settings by the keys of the config; a verb alone may be spoken of."""
    if tuple(words) in {verb.words[:length] for verb in cli.VERBS for length in (1, 2)}:
        return
    answer = parsed(cli.parse, words)
    if isinstance(answer, tuple):
        check_settings(getattr(answer[1], "config", None), list(getattr(answer[1], "overrides", None) or ()))


def check_settings(config: object, overrides: list[str]) -> None:
    """Settings as the config takes them, or by their keys alone where the config is not one of this repository."""
    known = {key.name for key in keys()}
    for setting in overrides:
        key, sign, _ = setting.partition("=")
        if not sign or not any(name == key or name.startswith(key + ".") for name in known):
            if OURS.match(str(config)):
                break  # and is refused below in the config's own words
            raise Fault(f"there is no key {key}")
    if OURS.match(str(config)):
        try:
            load(ROOT / str(config), overrides)
        except ConfigError as error:
            raise Fault(str(error)) from error


def check_script(name: str, words: list[str], settings: list[str]) -> None:
    """A script of launch/: its options stand in it, its settings are those of the config that it trains."""
    script = ROOT / "launch" / name
    if not script.is_file():
        raise Fault(f"there is no launch/{name}")
    text = script.read_text()
    around = text + "".join((ROOT / "launch" / one).read_text() for one in ("setup.sh", "environment.sh"))
    for setting in settings:
        variable = setting.partition("=")[0]
        if variable not in around and not variable.startswith(("NCCL_", "GLOO_", "OMP_", "CUDA_")):
            raise Fault(f"launch/{name} does not know {variable}")
    verb, rest = "train", []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        option, _, value = word.partition("=")
        if not option.startswith("--"):
            rest.append(word)
            continue
        if name != "test.sh" and not re.search(rf"(?<![\w-]){option}(?![\w-])", text):
            raise Fault(f"launch/{name} has no option {option}")
        if name in STARTS and option not in ("--print", "--help"):
            value = value or (pending.pop(0) if pending else "")
            verb = value if option == "--verb" else verb
    if name in STARTS and (rest or verb != "train"):
        check_verb([verb, *(word.replace("%a", "0") for word in rest)])  # %a: a job's number in its array
    elif name in SETTINGS_OF:
        check_settings(SETTINGS_OF[name], rest)


def check_extras(words: list[str]) -> None:
    """Extras of the project in `pip install -e '.[...]'`."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if match := re.fullmatch(r"\.\[(.*)\]", word):
            for extra in match[1].split(","):
                if extra not in extras:
                    raise Fault(f"there is no extra {extra}")


START = re.compile(
    r"(?:[A-Z_][A-Z0-9_]*=\S+ )*"
    r"(?:diffmoe (?! )|(?:\S*/)?python3? -m (?:diffmoe_ep|data_prep)\b|torchrun |deepspeed |sbatch |pip install "
    r"|(?:\./)?launch/[\w-]+\.(?:sh|sbatch)\b)"
)


def commands_of_page(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, command, what it is answered with) in fenced blocks, and in spans of code in text and tables.

    Only a command after `$ ` has an answer: the line after it, if that is a refusal.
    """
    fenced, lines = False, text.splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip().startswith("```"):
            fenced = not fenced
        elif fenced:
            command = line.strip().removeprefix("$ ")
            if START.match(command):
                after = lines[number].strip() if number < len(lines) else ""
                yield number, uncommented(command), after if after.startswith("diffmoe: error: ") else ""
        else:
            for span in re.findall(r"`([^`]+)`", line):
                if START.match(span):
                    yield number, span, ""


def commands_of_head(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, command, "") in the comment that opens a config or a script."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("#"):
            return
        if line.startswith("#  ") and START.match(command := line.removeprefix("#").strip()):
            yield number, uncommented(command), ""


def uncommented(line: str) -> str:
    """A command without what is said about it behind several spaces or a hash."""
    return re.split(r"\s{2,}|\s#\s", line)[0]


def faults_of_commands(found: Iterator[tuple[int, str, str]]) -> list[str]:
    """A line for each command that would not be taken, or that should be refused in other words."""
    faults = []
    for number, command, refusal in found:
        said = ""
        try:
            check(command)
        except (Fault, ValueError) as fault:
            said = f"diffmoe: error: {fault}"
        if said != refusal:
            faults.append(f"line {number}: {command}: {said.removeprefix('diffmoe: error: ') or 'is taken'}")
    return faults


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_pages_are_taken(page: Path) -> None:
    assert faults_of_commands(commands_of_page(page.read_text())) == []


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.relative_to(ROOT).as_posix())
def test_commands_of_heads_are_taken(head: Path) -> None:
    assert faults_of_commands(commands_of_head(head.read_text())) == []


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("diffmoe trian configs/digits.yaml", "there is no verb trian"),
        ("diffmoe train configs/digit.yaml", "there is no configs/digit.yaml"),
        ("diffmoe train configs/digits.yaml train.stepps=2", "train.stepps"),
        ("diffmoe train configs/digits.yaml model.num_heads=5", "model.num_heads"),
        ("diffmoe sample runs/digits --smaples 3 --out drawn", "--smaples"),
        ("deepspeed --num_gpus 2 --module diffmoe_ep trian configs/digits.yaml", "there is no verb trian"),
        ("torchrun --nproc-per-nod 2 -m diffmoe_ep verify", "--nproc-per-nod "),
        ("python -m data_prep digits --uot x", "--out"),
        ("./launch/quickstar.sh", "there is no launch/quickstar.sh"),
        ("./launch/quickstart.sh train.step=3", "train.step"),
        ("RUM=runs/mine ./launch/quickstart.sh", "does not know RUM"),
        ("./launch/deepspeed.sh --hostfiles hosts configs/digits.yaml", "no option --hostfiles"),
        ("./launch/deepspeed.sh --hostfile hosts --verb verfy", "there is no verb verfy"),
        ("./launch/torchrun.sh --nnodes 2 --rdzv hosts:1 configs/digits.yaml", "no option --rdzv"),
        ("sbatch --nodes=4 launch/slurm.sbatch configs/digits.yaml seeed=1", "seeed"),
        ("pip install -e '.[prepp]'", "there is no extra prepp"),
    ],
)
def test_a_command_that_would_not_be_taken_is_found(command: str, fault: str) -> None:
    (found,) = faults_of_commands(commands_of_page(f"```\n{command}    # so\n```"))
    assert fault in found
    (found,) = faults_of_commands(commands_of_head(f"# A config.\n#   {command}    so\n\n"))
    assert fault in found


def test_a_refusal_is_told_in_the_words_of_the_page() -> None:
    page = "```\n$ diffmoe train configs/digits.yaml train.steps=0\ndiffmoe: error: {}\n```"
    with pytest.raises(ConfigError) as refused:
        load(ROOT / "configs/digits.yaml", ["train.steps=0"])
    assert faults_of_commands(commands_of_page(page.format(refused.value))) == []
    assert len(faults_of_commands(commands_of_page(page.format("no")))) == 1


# -- links -------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub makes of a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    heads = re.findall(r"^#+ +(.*?) *$", text, flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head).lower()).replace(" ", "-")
        for head in heads
    }


def faults_of_links(page: Path) -> list[str]:
    """A line for each link of a page to a file or a heading that is not there."""
    faults = []
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        target = "".join(target)
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = page.parent / file if file else page
        if not place.exists():
            faults.append(f"{target}: there is no such file")
        elif anchor and anchor not in anchors(place / "README.md" if place.is_dir() else place):
            faults.append(f"{target}: there is no such heading")
    return faults


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert faults_of_links(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "# A head: with `code`\n[a](#a-head-with-code) [b](#b) [c](c.md) [d](https://x.y)\n"
    )
    assert faults_of_links(tmp_path / "README.md") == ["#b: there is no such heading", "c.md: there is no such file"]


# -- the landing page --------------------------------------------------------------------------------------------------


def test_the_landing_page_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 110] == []
    pictures = [ROOT / name for name in re.findall(r"src=\"([^\"]+)\"", "\n".join(lines))]
    assert pictures
    assert all(picture.stat().st_size < 150_000 for picture in pictures)


def test_the_version_stands_in_one_place_and_the_citation_agrees() -> None:
    from diffmoe_ep import __version__

    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
