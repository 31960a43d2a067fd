from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sekron_search.assembly import Assembler
from sekron_search.config import Config
from sekron_search.costs.traced import traced_flops
from sekron_search.data import evaluate
from sekron_search.errors import DataError
from sekron_search.jobs import job_from_config
from sekron_search.kron.layer import KroneckerLayer
from sekron_search.model import layer_weight
from sekron_search.prepare import prepare
from sekron_search.progress import Reporter
from sekron_search.proxies import FEW_SAMPLES, PROXIES, Judge, Proxy, Subject, score
from sekron_search.response import LinearResponse
from sekron_search.rundir import RunFolder
from sekron_search.search.options import Assignment
from tests.cases import CONFIG, small_data, write_config

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


class Parallel(nn.Module):
    """Linear, its two convolutions side by side: the errors of one say nothing of what the other gets."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.b = nn.Conv2d(3, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = (self.a(x) + self.b(x)).mean((2, 3))
        return pooled


class Chain(nn.Module):
    """Linear, its second convolution fed by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.b = nn.Conv2d(12, 12, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.b(self.a(x)).mean((2, 3))
        return pooled


def parallel() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Parallel()


def chain() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Chain()


def assembler_of(folder: Path, factory: str = "tests.cases:small_net", **replaced: str) -> Assembler:
    folder.mkdir(parents=True, exist_ok=True)
    path = write_config(folder, CONFIG, **{"tests.cases:small_net": factory, **replaced})
    job = job_from_config(Config.load(path))
    job.model.eval()
    return Assembler(job, prepare(job, RunFolder(folder / "out"), Reporter()))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(assembler_of(tmp_path_factory.mktemp("judge")))


def cheapest(assembler: Assembler) -> Assignment:
    return tuple(
        min(range(len(f.table.options)), key=lambda i: f.table.options[i].flops) for f in assembler.tables.fitted
    )


def middle(assembler: Assembler) -> Assignment:
    return tuple(len(f.table.options) // 2 for f in assembler.tables.fitted)


def distribution(logits: Tensor) -> Tensor:
    return torch.softmax(logits.double() / 4, 1)


def kl(output: Tensor, reference: Tensor) -> float:
    """Of class distributions softened by 4, from the definition."""
    p, q = distribution(reference), distribution(output)
    return 16 * float((p * (p / q).log()).sum(1).mean())


def with_weights(judge: Judge, assignment: Assignment) -> nn.Module:
    """The original with dense layers that hold the weights that the factors stand for, and the corrected biases."""
    made = judge.assembler.with_factors(assignment)
    network = copy.deepcopy(judge.job.model)
    for name, layer in made.named_modules():
        if isinstance(layer, KroneckerLayer):
            own = network.get_submodule(name)
            assert isinstance(own, nn.Conv2d | nn.Linear)
            with torch.no_grad():
                own.weight.copy_(layer.group_weights().reshape(own.weight.shape))
                if own.bias is not None:
                    assert layer.bias is not None
                    own.bias.copy_(layer.bias)
    return network


def test_weight_errors_are_those_of_the_weights(judge: Judge) -> None:
    assignment = middle(judge.assembler)
    network = with_weights(judge, assignment)
    total = 0.0
    for info in judge.assembler.tables.layers:
        exact, other = layer_weight(judge.job.model, info), layer_weight(network, info)
        total += float((other - exact).norm() / exact.norm()) ** 2
    assert total > 0.1
    assert score(Subject(judge, assignment), ["weight_error"]).values["weight_error"] == pytest.approx(total, rel=1e-4)


def test_output_errors_are_those_of_the_layers_outputs(tmp_path: Path) -> None:
    """Variances over samples and positions, for a constant error is taken up by a bias or a batch-norm."""
    judge = Judge(assembler_of(tmp_path, **{"refine_steps: 5": "refine_steps: 5, curvature: false"}))
    assignment = middle(judge.assembler)
    network = with_weights(judge, assignment)
    entered: dict[str, list[Tensor]] = {}
    handles = []
    for info in judge.assembler.tables.layers:

        def keep(module: nn.Module, args: tuple[Tensor], name: str = info.name) -> None:
            entered.setdefault(name, []).append(args[0])

        handles.append(judge.job.model.get_submodule(info.name).register_forward_pre_hook(keep))
    with torch.no_grad():
        for inputs in judge.job.calibration:
            judge.job.model(*inputs)
    for handle in handles:
        handle.remove()
    total = 0.0
    for info in judge.assembler.tables.layers:
        x = torch.cat(entered[info.name])
        with torch.no_grad():
            exact, other = (
                n.get_submodule(info.name)(x).transpose(0, 1).flatten(1) for n in (judge.job.model, network)
            )
        total += float((other - exact).var(1).sum() / exact.var(1).sum())
    found = score(Subject(judge, assignment), ["output_error", "curvature"]).values
    # Tables are made from some of the positions, and damped.
    assert found["output_error"] == pytest.approx(total, rel=0.2)
    assert found["curvature"] == found["output_error"]


def test_curvature_weighs_layers_by_their_sensitivity(judge: Judge) -> None:
    assignment = middle(judge.assembler)
    tables = judge.network.tables
    weights = [t.sensitivity for t in tables]
    assert all(w is not None for w in weights)
    mean = sum(w or 0.0 for w in weights) / len(weights)
    total = sum(
        (w or 0.0) / mean * t.options[i].error ** 2 for w, t, i in zip(weights, tables, assignment, strict=True)
    )
    found = score(Subject(judge, assignment), ["curvature", "output_error"]).values
    assert found["curvature"] == pytest.approx(total)
    assert found["curvature"] != pytest.approx(found["output_error"], rel=1e-3)


def test_flops_are_those_of_the_network(judge: Judge) -> None:
    assignment = cheapest(judge.assembler)
    network = judge.assembler.with_factors(assignment)
    counted = traced_flops(network, (judge.job.holdout[0][0][:1],)).total
    assert score(Subject(judge, assignment), ["flops"]).values["flops"] == -counted


def test_divergences_are_those_of_the_outputs(judge: Judge) -> None:
    assignment = cheapest(judge.assembler)
    subject = Subject(judge, assignment)
    images = torch.cat([inputs[0] for inputs in judge.job.holdout])
    found = score(subject, ["divergence", "divergence_fitted"]).values
    with torch.no_grad():
        reference = judge.job.model(images)
        assert found["divergence"] == pytest.approx(
            kl(judge.assembler.assemble(assignment)(images), reference), rel=1e-4
        )
        assert found["divergence_fitted"] == pytest.approx(kl(subject.fitted(images), reference), rel=1e-4)
    assert 0 < found["divergence_fitted"] < found["divergence"]


def test_few_samples_normalise_by_their_own_statistics(judge: Judge) -> None:
    assignment = middle(judge.assembler)
    images = judge.job.holdout[0][0][:FEW_SAMPLES]

    def outputs(network: nn.Module) -> Tensor:
        net: Any = network
        x = F.relu(F.batch_norm(net.conv1(images), None, None, net.bn1.weight, net.bn1.bias, training=True))
        x = F.relu(x + net.conv2(x))
        x = F.relu(F.batch_norm(net.conv3(x), None, None, net.bn3.weight, net.bn3.bias, training=True))
        return net.linear(x.mean((2, 3)))  # type: ignore[no-any-return]

    with torch.no_grad():
        expected = kl(outputs(with_weights(judge, assignment)), outputs(judge.job.model))
    before = judge.job.model.bn1.running_mean.clone()  # type: ignore[operator, union-attr]
    found = score(Subject(judge, assignment), ["divergence_few"]).values["divergence_few"]
    assert found == pytest.approx(expected, rel=1e-3)
    assert torch.equal(before, judge.job.model.bn1.running_mean)  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("factory", ["parallel", "chain"])
def test_responses_add_up_exactly_where_no_layer_feeds_another(factory: str, tmp_path: Path) -> None:
    assembler = assembler_of(
        tmp_path, f"tests.test_proxies:{factory}", **{"{flops: 0.6x, params: 0.8x}": "{flops: 0.6x}"}
    )
    response = LinearResponse(assembler, samples=32)
    images = assembler.job.holdout[0][0][:32]
    both, one = cheapest(assembler), (cheapest(assembler)[0], 0)

    def measured(assignment: Assignment) -> float:
        with torch.no_grad():
            return kl(assembler.with_factors(assignment)(images), assembler.job.model(images))

    assert response.divergence((0, 0)) == 0
    assert response.divergence_alone(0, both[0]) == pytest.approx(measured(one), rel=1e-3)
    assert response.divergence(one) == pytest.approx(measured(one), rel=1e-3)
    if factory == "parallel":
        assert response.divergence(both) == pytest.approx(measured(both), rel=1e-3)
    else:
        assert response.divergence(both) != pytest.approx(measured(both), rel=1e-2)


def test_a_response_is_measured_once(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    response = LinearResponse(judge.assembler)
    first = response.divergence(middle(judge.assembler))
    monkeypatch.setattr(Assembler, "with_factors", lambda *_: pytest.fail("a network was made"))
    assert response.divergence(middle(judge.assembler)) == first


def test_the_metric_before_training_is_that_of_the_fitted_network(judge: Judge) -> None:
    subject = Subject(judge, middle(judge.assembler))
    found = score(subject, ["untrained_metric"]).values["untrained_metric"]
    validation = small_data().validation
    accuracy = evaluate(subject.fitted, validation, "accuracy", batch_size=64)
    assert found == pytest.approx(-accuracy)
    assert found < 0


def test_every_proxy_prefers_the_original(judge: Judge) -> None:
    original = score(Subject(judge, (0,) * len(judge.network.tables))).values
    compressed = score(Subject(judge, cheapest(judge.assembler))).values
    assert list(original) == list(PROXIES)
    for name in PROXIES:
        assert original[name] < compressed[name], name
    assert all(original[n] == pytest.approx(0, abs=1e-6) for n in PROXIES if "error" in n or "divergence" in n)


@pytest.mark.parametrize(
    ("score_of", "says"),
    [
        (lambda subject: float("nan"), "'mine:own': it returned nan; expected a finite number"),
        (lambda subject: 1 / 0, "'mine:own': it failed: ZeroDivisionError: division by zero"),
    ],
)
def test_proxies_of_users_that_fail_are_named(
    judge: Judge, monkeypatch: pytest.MonkeyPatch, score_of: Any, says: str
) -> None:
    monkeypatch.setattr(judge, "proxies", {"mine:own": Proxy(score_of, "mine")})
    with pytest.raises(DataError, match=re.escape(f"audit.proxies {says}")):
        score(Subject(judge, middle(judge.assembler)))


def test_what_proxies_share_counts_for_each_of_them(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("sekron_search.proxies.time.perf_counter", lambda: float(next(clock)))
    seconds = score(Subject(judge, middle(judge.assembler))).seconds
    shared = {"responses", "propagated", "divergence_fitted", "untrained_metric"}
    assert seconds == {name: 2.0 if name in shared else 1.0 for name in PROXIES}
    assert not any(PROXIES[name].is_cheap for name in ("flops", "divergence_fitted", "untrained_metric"))
