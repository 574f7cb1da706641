"""Metric services, each imported only when the config asks for it: tensorboard, wandb, trackio."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from reasonrl.config import Config
from reasonrl.records import InputError

PROJECT = "reasonrl"


class Backend(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, config: Config, out: Path):
        from torch.utils.tensorboard import SummaryWriter  # optional: needs tensorboard

        self.writer = SummaryWriter(str(out / "tensorboard"))
        self.writer.add_text("config", f"```\n{config.to_yaml()}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Service:
    """Weights & Biases and Trackio, which share their three calls."""

    def __init__(self, module: Any, config: Config, out: Path, **options: Any):
        self.module = module
        module.init(
            project=PROJECT, name=out.name, config=config.model_dump(mode="json"), **options
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


def _wandb(config: Config, out: Path) -> Backend:
    import wandb  # optional

    return Service(wandb, config, out, dir=str(out), resume="allow")


def _trackio(config: Config, out: Path) -> Backend:
    import trackio  # optional

    return Service(trackio, config, out)


MAKERS = {"tensorboard": TensorBoard, "wandb": _wandb, "trackio": _trackio}


def backends(config: Config, out: Path) -> list[Backend]:
    """The services that the config switches on; InputError naming the package one of them lacks."""
    made: list[Backend] = []
    for name, maker in MAKERS.items():
        if getattr(config.log, name):
            try:
                made.append(maker(config, out))
            except ImportError:
                raise InputError(
                    f"log.{name}: the package {name} is not installed (pip install {name})"
                ) from None
    return made
