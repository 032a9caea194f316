"""The verb that looks for what would keep a run from working here: doctor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffmoe_ep.cli.options import Verb, option, overrides, positional
from diffmoe_ep.config import ConfigError, load


@dataclass(frozen=True, kw_only=True)
class Options:
    """Look at this host, and under a launcher at all hosts and the links between them; say what would keep a run from
    working or make it slow, each with its remedy. Exit code 1 if there is a problem.
    """

    config: Path | None = positional("YAML file: also look at what this config needs", None, "CONFIG")
    overrides: tuple[str, ...] = overrides("folder=runs/digits")
    run: Path | None = option(None, "run folder to look at (default: the config's)", "FOLDER")
    json: bool = option(False, "print JSON in place of the page (diffmoe_ep/doctor/README.md says what is in it)")
    device: Literal["cpu", "cuda"] | None = option(None, "where ranks compute (default: GPUs where there are some)")
    timeout_seconds: float = option(30.0, "longest wait for a peer")


def _doctor(options: Options) -> None:
    config = None
    if options.config is not None:
        if not options.config.is_file() and "=" in str(options.config):
            raise ConfigError(f"{options.config} is a setting, of no config; give the config's file before it")
        config = load(options.config, options.overrides)
    if options.timeout_seconds <= 0:
        raise ConfigError(f"--timeout-seconds is {options.timeout_seconds:g}; it must be more than 0")
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        raise ConfigError(f"torch cannot be imported ({error}); ./launch/setup.sh makes an environment") from error
    from diffmoe_ep.doctor.doctor import Patient, run

    folder = options.run or (Path(config.folder) if config is not None else None)
    run(Patient(config, folder, options.device, options.timeout_seconds), options.json)


VERBS = (Verb(("doctor",), Options, _doctor),)
