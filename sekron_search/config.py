"""The configuration of a run: one schema, read from YAML, every key checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError, field_validator, model_validator

from sekron_search.errors import ConfigError
from sekron_search.files import read_yaml
from sekron_search.search.budget import Budget
from sekron_search.search.space import SearchSpace, explain
from sekron_search.sections import (
    AuditConfig,
    CalibrationConfig,
    DataConfig,
    Device,
    FinetuneConfig,
    LatencyConfig,
    Metric,
    ModelConfig,
    SearchConfig,
    Section,
    Seed,
)


class Settings(Section):
    """What a run does, whatever the model and the data are.

    Args:
        budget: Most that the network may cost: flops, params, latency_ms, peak_activation_bytes; each a number, or a
            share of the original's such as 0.5x.
        space: The keys of a search space, or the path of a file that holds one.
        metric: For choosing and for the report, higher is better: "accuracy", "neg_mse", "psnr", or
            `package.module:function` of (network, dataset) that returns a number.
        tables: Folder in which fitted tables are kept by their content, for other budgets and runs of the same network;
            by default the run folder's own.
        seed: Of everything that is random.
        device: Where networks are fitted, measured and, unless the training has one of its own, trained: cpu or cuda.
    """

    budget: dict[str, float | str]
    space: SearchSpace = SearchSpace()
    metric: Metric = "accuracy"
    calibration: CalibrationConfig = CalibrationConfig()
    search: SearchConfig = SearchConfig()
    latency: LatencyConfig = LatencyConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    audit: AuditConfig = AuditConfig()
    seed: Seed = 0
    device: Device = "cpu"
    tables: Path | None = None

    @field_validator("budget", mode="before")
    @classmethod
    def _valid_budget(cls, value: Any) -> Any:
        if isinstance(value, dict):  # before pydantic makes 1.0 of `true`
            Budget.of(value)
        return value

    @model_validator(mode="after")
    def _loss_fits(self) -> Settings:
        if self.finetune.loss == "l1" and self.search.divergence == "kl":
            raise ValueError("finetune.loss 'l1' compares values, not logits: set search.divergence to 'mse'")
        return self

    @property
    def metric_name(self) -> str:
        """For people: a function of the user's by its own name."""
        return self.metric.rpartition(":")[2]

    @property
    def bounds(self) -> Budget:
        """The budget as an object."""
        return Budget.of(self.budget)


class Config(Settings):
    """A whole run: settings, model, data and the run folder.

    Args:
        out: The run folder, unless the command line names one.
    """

    model: ModelConfig
    data: DataConfig
    out: Path | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Config:
        """Read a configuration from YAML; paths in it are relative to the file.

        Raises:
            ConfigError: If the file is missing or damaged, or a key is unknown, missing or wrong; names file and key.
        """
        path = Path(path)
        return cls.of(read_yaml(path, f"config {path}"), f"config {path}", path.parent)

    @classmethod
    def of(cls, data: dict[Any, Any], where: str, base: Path) -> Config:
        """As `load`, from what a file holds; errors name `where`, paths are relative to the folder `base`."""
        if isinstance(data.get("space"), str):
            data = {**data, "space": SearchSpace.load(base / data["space"]).model_dump()}
        try:
            config = cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(explain(error, where, cls)) from None
        return config._resolved(base)

    def _resolved(self, base: Path) -> Config:
        """With all paths absolute, and those that must exist checked."""

        def full(path: Path | None, key: str, *, must_exist: bool = True) -> Path | None:
            if path is None:
                return None
            try:
                found = (base / path.expanduser()).resolve()
                there = found.exists()
            except (OSError, ValueError, RuntimeError) as error:  # too long, with a NUL, of a user who is not known
                raise ConfigError(f"config key '{key}': no path: {str(path)[:100]!r}: {error}") from None
            if must_exist and not there:
                raise ConfigError(f"config key '{key}': no such file or folder: {found}")
            return found

        return self.model_copy(
            update={
                "model": self.model.model_copy(update={"weights": full(self.model.weights, "model.weights")}),
                "data": self.data.model_copy(update={"path": full(self.data.path, "data.path")}),
                "latency": self.latency.model_copy(update={"profile": full(self.latency.profile, "latency.profile")}),
                "tables": full(self.tables, "tables", must_exist=False),
                "out": full(self.out, "out", must_exist=False),
            }
        )


def make_settings(budget: Budget | dict[str, Any], settings: dict[str, Any]) -> Settings:
    """Settings from keyword arguments, for the Python interface.

    Raises:
        ConfigError: If a key is unknown or a value wrong.
    """
    bounds = Budget.of(budget)
    data = {**settings, "budget": {name: getattr(bounds, name) for name in bounds.names}}
    if isinstance(data.get("space"), str | os.PathLike):
        data["space"] = SearchSpace.load(data["space"])
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, "settings", Settings)) from None
