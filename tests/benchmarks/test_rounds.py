from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from benchmarks.rounds import __main__ as rounds
from benchmarks.runs import Runs
from benchmarks.tasks import TASKS
from sekron_search.config import Config
from sekron_search.finetune import Distillation
from sekron_search.tensor_files import read_tensors, write_tensors
from tests.cases import CONFIG, blobs, small_net


def config_of(data: Path, *, weights: Path, **changes: Any) -> Config:
    told = yaml.safe_load(CONFIG)
    return Config.model_validate({**told, **changes, "model": {**told["model"], "weights": weights}})


@pytest.mark.slow
def test_a_second_round_starts_from_trained_weights_and_is_trained_towards_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, template = tmp_path / "given.safetensors", tmp_path / "template.yaml"
    original = small_net()
    write_tensors(given, dict(original.state_dict()))
    template.write_text(yaml.safe_dump({"finetune": {"batch_size": 32, "learning_rate": 3e-3}}))
    task = dataclasses.replace(TASKS["resnet20"], config=config_of, template=template, given=lambda data: given)
    monkeypatch.setitem(TASKS, "resnet20", task)
    runs = Runs("resnet20", tmp_path, tmp_path / "runs")
    towards: list[nn.Module] = []

    def trained(distillation: Distillation, network: nn.Module, *_: Any) -> None:
        towards.append(distillation.teacher)
        nn.init.zeros_(network.get_parameter("bn1.bias"))

    monkeypatch.setattr(rounds, "trained", trained)
    found = rounds.sample_of(runs, "0.6x", "0.4x", seed=0, epochs=1)
    one = runs.run({"flops": "0.6x"}, seed=0, epochs=1)
    first, second = one.network, rounds.again(runs, one, "0.4x", seed=0).network
    images = blobs(16, seed=5).tensors[0]
    restored = small_net(seed=1)
    restored.load_state_dict(read_tensors(tmp_path / "runs" / "rounds" / one.folder.path.name / "trained.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(towards[0](images), original(images))
        torch.testing.assert_close(restored.eval()(images), first(images), rtol=1e-4, atol=1e-4)
        near, far = ((second(images) - net(images)).norm() for net in (first, original))
    assert near < far
    assert found["params"]["two rounds"] < sum(p.numel() for p in original.parameters())
    assert found["divergence"]["two rounds"] > found["divergence"]["two rounds, before the second training"]
    (target,) = rounds.targets_of([found])
    assert target.value == pytest.approx(found["divergence"]["two rounds"] / found["divergence"]["one round"])
    assert {*rounds.KEYS, "params", "divergence", "validation"} == set(found)
