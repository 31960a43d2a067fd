"""A small training, alone or as a process of a team: `torchrun ... -m tests.team_training FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sekron_search.files import write_json
from sekron_search.finetune import Distillation
from sekron_search.kron import families as fam
from sekron_search.kron.conv import KroneckerConv
from sekron_search.model import replace_layers
from sekron_search.sections import FinetuneConfig
from sekron_search.team import Team
from sekron_search.team_task import Task
from sekron_search.tensor_files import write_tensors
from sekron_search.training_data import TrainingData

#: What the data is; how many samples a batch has.
SIZES = {"dataset": 16, "batches": 8, "loader": 8}


def distillation(name: str) -> Distillation:
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.Flatten(), nn.Linear(12 * 64, 4)
    )
    data = TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(4, (64,)))
    size = SIZES[name]
    source: Dataset[Any] | Iterable[Any] = data
    if name == "batches":
        source = [data[i : i + size] for i in range(0, 64, size)]
    elif name == "loader":
        source = DataLoader(data, size, shuffle=True)
    # The layers' errors are relative to the spread of the samples that a process has: without them all is the same.
    config = FinetuneConfig(
        epochs=2,
        batch_size=size,
        learning_rate=1e-2,
        layer_weight=0.0,
        accumulate=1 + (name == "batches"),
        mirrored_teacher=name == "dataset",
    )
    return Distillation(teacher, TrainingData(source, size, seed=3), config, "kl")


def trained(name: str, folder: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The curve and the weights of a training that is stopped after an epoch and gone on with."""
    task = distillation(name)
    conv: Any = task.teacher.get_submodule("2")
    layer = KroneckerConv.from_conv(conv, fam.spatial_svd((12, 12, 3, 3), 4))
    for last in (1, 2):
        model = replace_layers(task.teacher, {"2": layer})
        if last == 2:
            nn.init.zeros_(model.get_parameter("4.weight"))  # the checkpoint's weights count
        curve = task.train(
            model,
            checkpoint=folder / f"{name}.pt",
            measure=None,
            after_epoch=lambda row, last=last: row["epoch"] < last,  # type: ignore[misc]
            progress=lambda done: None,
        )
    return curve, dict(model.state_dict())


def main() -> None:
    folder, team = Path(sys.argv[1]), Team.here()
    torch.set_num_threads(1)
    for name in SIZES:
        if team.rank == 0:
            curve, state = trained(name, folder)
            write_json(folder / f"{name}.json", {"curve": curve})
            write_tensors(folder / f"{name}.safetensors", state)
        else:
            for _ in range(2):
                distillation(name).assist(Task.from_plain(team.told()))


if __name__ == "__main__":
    main()
