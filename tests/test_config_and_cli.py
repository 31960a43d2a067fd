from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

from sekron_search.cli import app, main
from sekron_search.cli.device import _print_summary
from sekron_search.config import Config
from sekron_search.costs import profiling
from sekron_search.costs.design import design
from sekron_search.costs.profile import DeviceProfile
from sekron_search.data import batches, digits, evaluate, image_folder, load_data
from sekron_search.errors import ConfigError, DataError
from sekron_search.files import read_json, write_json
from sekron_search.kron.enumeration import FAMILIES
from sekron_search.kron.plan import best_plan
from sekron_search.references import import_reference
from sekron_search.scoring import candidates
from sekron_search.search.space import SearchSpace
from sekron_search.sections import DataConfig
from tests.cases import CONFIG, SPACE, blobs, net_of_odd_layers, small_net, write_config
from tests.test_run import ROOT

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("search:", "serach:", "key 'serach' is not known; expected one of: audit, budget, calibration"),
        ("trials: 8", "trails: 8", "key 'search.trails' is not known; expected one of: divergence, generation, "),
        ("trials: 8", "trials: many", "key 'search.trials': input should be a valid integer"),
        ("trials: 8", "trials: 0", "key 'search.trials': input should be greater than or equal to 1"),
        ("flops: 0.6x", "flop: 0.6x", "unknown cost 'flop'"),
        ("0.6x", "lots", "budget.flops: expected a positive number"),
        ('factory: "tests.cases:small_net"', "factory: small_net", "key 'model.factory'"),
        ("source: factory,", "source: web,", "key 'data.source'"),
        ('source: factory, factory: "tests.cases:small_data"', "source: folder", "needs the key 'path'"),
        ("model: {", "model: {weights: nothing.pt, ", "config key 'model.weights': no such file"),
        (SPACE, "space: nothing.yaml", "nothing.yaml: cannot be read"),
        ("budget:", "budget: [", "not YAML"),
        ("flops: 0.6x", "flops: true", "budget.flops: expected a positive number"),
        (
            "epochs: 2,",
            "learning_rate: 0,",
            "key 'finetune.learning_rate': input should be 'auto' or input should be gr",
        ),
        ("epochs: 2,", "temperature: .inf,", "key 'finetune.temperature': input should be a finite number; got inf"),
        ("budget:", "device: abacus\nbudget:", "key 'device': expected a torch device such as 'cpu'"),
        ("budget:", "device: meta\nbudget:", "key 'device': expected 'cpu' or 'cuda'"),
    ],
)
def test_bad_configs_name_the_key(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = write_config(tmp_path, CONFIG, **{old: new})
    with pytest.raises(ConfigError) as caught:
        Config.load(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value) or "YAML" in says


def test_missing_config_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sekron-search", "run", "no-such-file.yaml"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: config no-such-file.yaml: cannot be read: No such file or directory\n"


def test_help_lists_the_commands_without_importing_torch() -> None:
    code = (
        "import sys; from sekron_search.cli import app; from typer.testing import CliRunner; "
        "print(CliRunner().invoke(app, ['--help']).output); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in ("demo", "run", "inspect", "profile", "report"):
        assert command in out
    assert out.strip().endswith("False")


def test_inspect_shows_layers_and_costs(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["inspect", str(write_config(tmp_path))], env={"COLUMNS": "140"})
    assert found.exit_code == 0, found.output
    assert "conv3" in found.output
    assert "12x12x3x3" in found.output
    assert "whole network" in found.output


def test_inspect_says_what_is_not_worth_it(tmp_path: Path) -> None:
    replaced = {"small_net": "net_of_odd_layers", "small_data": "odd_data", "holdout: 128": "holdout: 64"}
    config = write_config(tmp_path, CONFIG, **replaced)
    found = CliRunner().invoke(app, ["inspect", str(config)], env={"COLUMNS": "140"})
    assert found.exit_code == 0, found.output
    tiny = "left alone: scale (Conv2d): no structure of the search space 'default' is cheaper than the dense layer"
    assert tiny in found.output
    excluded = write_config(tmp_path, CONFIG, **replaced, **{SPACE: 'space: {exclude: ["spatial"]}'})
    found = CliRunner().invoke(app, ["inspect", str(excluded)], env={"COLUMNS": "140"})
    assert "left alone: spatial (Conv2d): the search space leaves it out" in found.output


def test_run_and_report_commands(tmp_path: Path) -> None:
    runner = CliRunner()
    config = write_config(tmp_path, CONFIG, **{"epochs: 2": "epochs: 0", "trials: 8": "trials: 2"})
    done = runner.invoke(app, ["run", str(config), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "flops: asked at most" in done.output
    for name in ("report.md", "report.html"):
        (tmp_path / "out" / name).unlink()
    again = runner.invoke(app, ["report", str(tmp_path / "out")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "out" / "report.md").exists()
    assert (tmp_path / "out" / "report.html").exists()
    assert "report.html" in again.output.replace("\n", "")


def test_profile_command_writes_a_profile_that_a_run_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [o for o in design(0, quick=True) if o.moved_bytes < 1e5 and o.flops < 1e6][::8]
    monkeypatch.setattr(profiling, "design", lambda seed, quick: few)
    text = CONFIG.replace("params: 0.8x", "latency_ms: 90x").replace("epochs: 2", "epochs: 0")
    text = text.replace("trials: 8", "trials: 2")
    config = write_config(tmp_path, text)
    runner = CliRunner()
    measured = runner.invoke(app, ["profile", "--for", str(config), "--out", str(tmp_path / "device.yaml"), "--json"])
    assert measured.exit_code == 0, measured.output
    told = json.loads(measured.stdout)
    held = yaml.safe_load((tmp_path / "device.yaml").read_text())
    assert (told["options"], told["operations"]) == (len(held["layers"]), len(held["operations"]))
    assert told["errors"] == held["model"]["errors"]
    _print_summary(DeviceProfile.load(tmp_path / "device.yaml"), Path("device.yaml"))
    wanted = f"{told['operations']} operations and {told['options']} exact latencies written to device.yaml"
    assert capsys.readouterr().out.splitlines()[-1] == wanted
    known = yaml.safe_load((tmp_path / "device.yaml").read_text())["layers"]
    assert len(known) > 10
    assert not (tmp_path / "device.yaml.unfinished").exists()
    refused = runner.invoke(app, ["profile", "--for", str(config), "--threads", "1"])
    assert isinstance(refused.exception, ConfigError)
    assert "leave out --threads" in str(refused.exception)
    second = write_config(tmp_path, text.replace("rounds: 3}", "rounds: 3, profile: device.yaml}"))
    done = runner.invoke(app, ["run", str(second), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert yaml.safe_load((tmp_path / "out" / "profile.yaml").read_text())["layers"] == known


@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_search_space_loads_and_enumerates(path: Path) -> None:
    from sekron_search.inspection import inspect_model

    space = SearchSpace.load(path)
    assert path.read_text().startswith("#"), "a space begins with a comment that says what it is for"
    layers = inspect_model(small_net(), torch.randn(1, 3, 8, 8)).layers
    linear = inspect_model(torch.nn.Linear(48, 64), torch.randn(2, 48)).layers[0]
    for info in (layers[1], linear):
        found = candidates(info, space)
        assert found
        assert all(c.structure.weight_shape == info.weight_shape for c in found)
        if space.name == "phone_cpu":
            plans = [best_plan(c.structure, info.geometry, info.input_size) for c in found]
            assert not any(plan.num_permutes for plan in plans)
    assert set(space.families) <= set(FAMILIES)


def test_depthwise_layers_and_prime_channels_have_options() -> None:
    from sekron_search.inspection import inspect_model

    layers = {info.name: info for info in inspect_model(net_of_odd_layers(), torch.randn(1, 7, 8, 8)).layers}
    depthwise = {str(c.structure) for c in candidates(layers["spatial"], SearchSpace())}
    assert "1x1x3x1[a] * 1x1x1x3[a]; a=1" in depthwise
    for multiple, expected in ((8, {(13, 13), (13, 16), (16, 13), (16, 16)}), (1, {(13, 13)})):
        found = candidates(layers["prime"], SearchSpace(channel_multiple=multiple))
        assert {c.structure.weight_shape[:2] for c in found} == expected


def test_bad_search_spaces_name_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("families: [sekron, quantum]")
    with pytest.raises(ConfigError, match=r"space.yaml: key 'families.1': expected sekron, cp, "):
        SearchSpace.load(path)
    path.write_text("rank_level: 3")
    with pytest.raises(
        ConfigError, match=r"key 'rank_level' is not known; expected one of: channel_multiple, dense_execution"
    ):
        SearchSpace.load(path)


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 12), (value, 0, 0)).save(path)


def folder_config(path: Path) -> DataConfig:
    return DataConfig(source="folder", path=path, image_size=(8, 8))


def test_image_folder_is_split_and_labelled(tmp_path: Path) -> None:
    for label, name in enumerate(("cat", "dog")):
        for i in range(10):
            picture(tmp_path / name / f"{i}.png", 100 * label)
    data = image_folder(folder_config(tmp_path), seed=0)
    sizes = [len(split) for split in (data.train, data.validation, data.test)]  # type: ignore[arg-type]
    assert sizes == [13, 3, 4]
    for (images,), labels in batches(data.train, 32):
        assert images.shape == (13, 3, 8, 8)
        assert torch.equal(labels, (images[:, 0, 0, 0] > -1).long())


def test_an_original_that_is_seldom_right_is_pointed_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in range(4):
        for i in range(10):
            picture(tmp_path / "images" / str(label) / f"{i}.png", 60 * label)
    asked = ["run", "--model", "tests.cases:small_net", "--data", str(tmp_path / "images"), "--budget", "flops=0.7x"]
    sets = ["calibration.samples=8", "calibration.holdout=8", "search.trials=1", "latency.rounds=2"]
    sets += ["calibration.refine_steps=1", "data.mean=[0,0,0]", "data.std=[1,1,1]"]
    done = CliRunner().invoke(
        app, [*asked, "--epochs", "0", "--out", str(tmp_path / "out"), *(f"--set={s}" for s in sets)]
    )
    assert done.exit_code == 0, done.output
    told = next(line for line in done.stderr.splitlines() if "WARNING" in line)
    assert re.search(r"accuracy on the validation split is \d+\.\d%; if it should be higher", told)
    assert "its weights (model.weights is not given)" in told
    assert "read as RGB in [0, 1], data.mean [0.0, 0.0, 0.0], data.std [1.0, 1.0, 1.0]" in told


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--budget", "flpos=0.5x"], "unknown cost 'flpos'; expected any of latency, flops, params"),
        (["--budget", "flops=0.5"], "'0.5' is less than one, in multiply-adds per sample.* write '0.5x'"),
        (
            ["--budget", "flops=0.5x", "--data", "C:/x/y"],
            "neither a folder that is there nor a function",
        ),
    ],
)
def test_slips_in_options_are_told_in_words(options: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["run", "--model", "tests.cases:small_net", "--data", "digits", *options])
    assert isinstance(done.exception, ConfigError)
    assert re.search(says, str(done.exception))
    assert "alue error" not in str(done.exception)
    assert "pattern" not in str(done.exception)


def test_image_folder_with_splits(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        for name in ("cat", "dog"):
            picture(tmp_path / split / name / "0.png", 1)
    data = image_folder(folder_config(tmp_path), seed=0)
    assert len(data.test) == 2  # type: ignore[arg-type]
    picture(tmp_path / "test" / "horse" / "0.png", 1)
    with pytest.raises(DataError, match=r"classes \['horse'\] are not in the training folder"):
        image_folder(folder_config(tmp_path), seed=0)


def test_bad_image_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a sub-folder per class, found none"):
        image_folder(folder_config(tmp_path), seed=0)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        image_folder(folder_config(tmp_path), seed=0)
    for i in range(8):
        (tmp_path / "cat" / f"{i}.png").write_text("not a picture")
    data = image_folder(folder_config(tmp_path), seed=0)
    with pytest.raises(DataError, match=r"cat/\d\.png cannot be read"):
        list(batches(data.train, 4))


@pytest.mark.parametrize(("channels", "ending"), [(1, "png"), (3, "png"), (1, "pgm"), (3, "tiff")])
def test_images_of_sixteen_bits_are_read_in_full(tmp_path: Path, channels: int, ending: str) -> None:
    (tmp_path / "cat").mkdir()
    for i in range(8):
        Image.fromarray(np.full((8, 8), 13107 * (1 + i % 4), dtype=np.uint16)).save(tmp_path / "cat" / f"{i}.{ending}")
    plain = {"mean": [0.0] * channels, "std": [1.0] * channels}
    config = DataConfig.model_validate({**folder_config(tmp_path).model_dump(), **plain})
    (((images,), _),) = batches(image_folder(config, seed=0).train, 8)
    assert images.shape[1] == channels
    assert set(images.mul(5).round(decimals=4).unique().tolist()) <= {1.0, 2.0, 3.0, 4.0}
    for i in range(8):
        (tmp_path / "cat" / f"{i}.{ending}").unlink()
        Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(tmp_path / "cat" / f"{i}.tiff")
    with pytest.raises(DataError, match=r"its pixels are of mode 'F', numbers of 32 bits .* expected 8 or 16 bits"):
        list(batches(image_folder(config, seed=0).train, 8))


def test_images_of_a_folder_keep_their_common_size_and_are_never_resized_unasked(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        picture(tmp_path / split / "cat" / "0.png", 1)
    config = DataConfig(source="folder", path=tmp_path)
    for part in (image_folder(config, seed=0).train, image_folder(config, seed=0).test):
        [((images,), _)] = batches(part, 8)
        assert images.shape == (1, 3, 12, 10)
    Image.new("RGB", (20, 12)).save(tmp_path / "test" / "cat" / "1.png")
    said = r"cat/0\.png is 12x10 \(height x width\), .*test/cat/1\.png is 12x20\. .*--set data\.image_size=\[224,224\]"
    with pytest.raises(DataError, match=said):
        image_folder(config, seed=0)
    [((images,), _)] = batches(image_folder(folder_config(tmp_path), seed=0).train, 8)
    assert images.shape == (1, 3, 8, 8)
    (tmp_path / "test" / "cat" / "1.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"cat/1\.png cannot be read"):
        image_folder(config, seed=0)


def test_labels_that_the_network_does_not_have_are_refused() -> None:
    images, labels = blobs(8).tensors
    with pytest.raises(DataError, match="labels run from 1 to 4, the network has 4 classes"):
        evaluate(small_net(), TensorDataset(images, labels + 1), "accuracy", batch_size=8)


def test_digits_are_split_without_overlap() -> None:
    data = digits(0)
    splits = [data.train, data.validation, data.test]
    assert [len(s) for s in splits] == [1097, 300, 400]  # type: ignore[arg-type]
    rows = torch.cat([s.tensors[0].flatten(1) for s in splits])  # type: ignore[attr-defined]
    assert len(torch.unique(rows, dim=0)) == 1797


@pytest.mark.parametrize(
    "reference", ["os:system", "subprocess:run", "tests.cases:nothing", "no.such:thing", "torch:os.system"]
)
def test_references_to_foreign_code_are_refused(reference: str) -> None:
    with pytest.raises(ConfigError, match=r"key 'model\.factory'"):
        import_reference(reference, "model.factory")


def test_resuming_needs_a_folder_and_a_missed_budget_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, CONFIG, **{"epochs: 2": "epochs: 0", "trials: 8": "trials: 1"})
    monkeypatch.setattr(sys, "argv", ["sekron-search", "run", str(config), "--resume"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "name its folder with --out" in capsys.readouterr().err.lower()
    runner = CliRunner()
    assert runner.invoke(app, ["run", str(config), "--out", str(tmp_path / "out")]).exit_code == 0
    report = tmp_path / "out" / "report.json"
    facts = read_json(report)
    write_json(report, {**facts, "budgets": [{**budget, "met": False} for budget in facts["budgets"]]})
    assert runner.invoke(app, ["report", str(tmp_path / "out")]).exit_code == 3


@pytest.mark.parametrize(
    ("factory", "kwargs", "says"),
    [
        ("broken_module:data", {}, "cannot import 'broken_module:data': SyntaxError"),
        ("tests.cases:small_data", {"size": 3}, "data.factory 'tests.cases:small_data' failed: TypeError"),
    ],
)
def test_broken_data_factories_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, kwargs: dict[str, int], says: str
) -> None:
    (tmp_path / "broken_module.py").write_text("def data(:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((ConfigError, DataError), match=says):
        load_data(DataConfig(source="factory", factory=factory, kwargs=kwargs), seed=0)


@pytest.mark.parametrize("damage", ["median_ms: 0", "noise_ms: null", "noise_ms: .nan", "samples: many"])
def test_latencies_of_profiles_are_numbers(tmp_path: Path, damage: str) -> None:
    sample = yaml.safe_load((Path(__file__).parent.parent / "runs/sample/profile.yaml").read_text())
    key, latency = next(iter(sample["layers"].items()))
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(sample | {"layers": {key: latency | yaml.safe_load(damage)}}))
    name = damage.partition(":")[0]
    with pytest.raises(ConfigError, match=rf"profile.yaml: layers\[.*\]\.{name} must be a number of at least"):
        DeviceProfile.load(path)


def test_damaged_profiles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text("format: 2\nprovenance: {}\noperations: [1]")
    with pytest.raises(ConfigError, match=r"profile.yaml: .*expected keys 'provenance', 'fuses_elementwise'"):
        DeviceProfile.load(path)
