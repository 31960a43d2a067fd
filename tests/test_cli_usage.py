"""The command line as such: help, exit codes, options in place of a file, completion, the page that describes it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

import sekron_search.cli.runs
from sekron_search.cli import app, main
from sekron_search.cli.arguments import UsageError
from sekron_search.cli.configuration import Given
from sekron_search.cli.output import json_alone, print_json, print_table
from sekron_search.errors import ConfigError
from sekron_search.report.document import Code
from sekron_search.report.usage import use_section
from tests.cases import CONFIG, SPACE, write_config
from tests.pages import sample
from tests.test_run import ROOT

PAGE = ROOT / "docs" / "command-line.md"
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def code_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["sekron-search", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_the_command_line_and_what_lists_runs_import_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from sekron_search.cli import main\n"
        "heavy = lambda: sorted({'torch', 'optuna', 'matplotlib', 'scipy', 'rich'} & {*sys.modules})\n"
        "print(heavy()); sys.argv = ['sekron-search', 'list', sys.argv[1]]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(heavy())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.splitlines() == ["[]", "[]"]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_an_example_and_plain_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code_of(monkeypatch, name, "--help") == 0
    text = capsys.readouterr().out
    assert re.search(rf"Examples?:\n +sekron-search {name}", text)
    assert all(c.isprintable() or c == "\n" for c in text), "no boxes' colours, no control characters"
    assert "\b" not in text


def test_the_page_names_every_command_and_every_option() -> None:
    text = PAGE.read_text()
    sections = dict(re.findall(r"^## `sekron-search ([\w-]+).*?`\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    assert set(sections) == set(COMMANDS)
    for name, command in COMMANDS.items():
        assert f"sekron-search {name}" in sections[name], f"{name}: an example"
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                option = parameter.opts[0]
                assert re.search(rf"`[^`\n]*{option}\b", sections[name]), f"{name} {option}"
    for code in ("0", "1", "2", "3", "130"):
        assert re.search(rf"^\| {code} \|", text, re.M), f"exit code {code}"


@pytest.mark.parametrize("source", [None, "trial 3", "selection params-0.4x"])
def test_commands_that_reports_name_are_there(source: str | None) -> None:
    report = sample()
    report["finishes"] = None if source is None else {"run": "abc", "source": source, "trial": 3, "budget": {}}
    [_, _, commands, *_] = use_section(report).blocks
    assert isinstance(commands, Code)
    lines = [line.partition("#")[0].replace(" N", " 3").split() for line in commands.text.splitlines()]
    assert len(lines) >= 5
    for program, name, *arguments in lines:
        assert program == "sekron-search"
        COMMANDS[name].make_context(name, arguments)  # raises where an option is unknown or lacks its value


def test_commands_that_answer_have_json_and_the_others_are_named() -> None:
    without = {name for name, c in COMMANDS.items() if not any("--json" in p.opts for p in c.params)}
    for page in (PAGE, ROOT / "README.md"):
        [said] = re.findall(r"(All commands but [^:]*:|All that answer something [^.]*\.)", page.read_text())
        assert set(re.findall(r"`(\w+)`", said)) == without


def test_wrong_usage_is_exit_code_2_and_names_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(write_config(tmp_path))
    wrong = {
        ("run", "--nonsense"): "No such option",
        ("run",): "give a CONFIG, or --model, --data and --budget; --model, --data, --budget is missing",
        ("run", "--model", "tests.cases:small_net", "--data", "digits"): "--budget is missing",
        ("run", config, "--set", "search.trails=2"): "--set search.trails=2: key 'search.trails' is not known",
        (
            "run",
            config,
            "--set",
            "search.trials=many",
        ): "--set search.trials=many: key 'search.trials': input should be",
        ("run", config, "--set", "trials"): "--set trials: expected KEY=VALUE",
        ("run", config, "--set", "seed.a=1"): "--set seed.a=1: ",
        ("run", config, "--set", "seed=[1"): "--set seed=[1: the value is not YAML",
        ("run", config, "--budget", "flop=0.5x"): "--budget flop=0.5x: unknown cost 'flop'",
        ("run", config, "--budget", "flops=lots"): "--budget flops=lots: key 'budget'",
        (
            "run",
            config,
            "--data",
            str(tmp_path / "none"),
        ): f"--data {tmp_path / 'none'}: config key 'data.path': no such",
        ("run", config, "--device", "abacus"): "--device abacus: key 'device'",
        ("run", config, "--time-limit", "soon"): "--time-limit: expected a time",
        ("run", config, "--time-limit", "0s"): "--time-limit: expected more than no time",
        ("run", config, "--resume"): "--resume: which run?",
        ("run", "--resume", "--out", str(tmp_path / "none")): "holds no run that has begun",
        ("select", str(tmp_path), "--budget", "flops"): "--budget: expected every cost once",
        ("select", str(tmp_path), "--budget", "flop=0.5x"): "--budget flop=0.5x: unknown cost 'flop'",
        ("select", str(tmp_path), "--budget", "flops=lots"): "--budget: budget.flops: expected a positive number",
        ("export", str(tmp_path), "--format", "tiff"): "--format: expected onnx, pt2, safetensors, got 'tiff'",
        ("export", str(tmp_path), "--format", "pt2", "--int8"): "--int8: for --format onnx only, got pt2",
        ("compare", str(tmp_path)): "at least two run folders",
        ("finish", str(tmp_path)): "--trial, --selection: give one of the two",
        ("finish", str(tmp_path), "--trial", "1", "--export", "tiff"): "--export: expected onnx, pt2, safetensors",
        ("show", str(tmp_path), "--trial", "1", "--candidate", "a"): "--trial, --candidate: give one of the two",
    }
    for arguments, says in wrong.items():
        assert code_of(monkeypatch, *arguments) == 2, arguments
        captured = capsys.readouterr()
        assert says in captured.err, arguments
        assert captured.out == ""


def test_errors_are_exit_code_1_and_interruptions_130(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (
        ["run", "no-such-file.yaml"],
        ["list", str(tmp_path / "none")],
        ["show", str(tmp_path)],
        ["compare", str(tmp_path), str(tmp_path)],
        ["finish", str(tmp_path), "--trial", "1"],
    ):
        assert code_of(monkeypatch, *arguments) == 1, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1, "one line"

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sekron_search.jobs.job_from_config", interrupted)
    out = tmp_path / "out"
    assert code_of(monkeypatch, "run", str(write_config(tmp_path)), "--out", str(out)) == 130
    assert "interrupted; nothing was done yet" in capsys.readouterr().err
    out.mkdir()
    (out / "config.yaml").touch()
    assert code_of(monkeypatch, "run", str(write_config(tmp_path)), "--out", str(out)) == 130
    assert f"go on with: sekron-search run --out {out} --resume" in capsys.readouterr().err


def test_every_command_says_that_it_was_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sekron_search.catalog.list_runs", interrupted)
    assert code_of(monkeypatch, "list", str(tmp_path)) == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "interrupted\n")


def test_json_stands_alone_whoever_prints_beside_it(capfd: pytest.CaptureFixture[str]) -> None:
    """Python, a library in C, another process."""
    with json_alone(True):
        print("python")
        os.write(1, b"library\n")
        subprocess.run(["echo", "process"], check=True)
    print_json({"met": True})
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"met": True}
    assert {*captured.err.split()} == {"python", "library", "process"}


def test_what_an_export_needs_is_asked_for_before_the_long_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "onnx" or n == "sekron_search.runtimes.onnx"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sekron_search.runtimes, "onnx", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert code_of(monkeypatch, "finish", str(tmp_path / "none"), "--trial", "1", "--export", "onnx") == 1
    assert "pip install 'sekron-search[onnx]'" in capsys.readouterr().err


def test_options_alone_make_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "weights.pt").touch()
    config = Given(
        model="tests.cases:small_net",
        weights=Path("weights.pt"),
        data="photos",
        budget=["latency=0.5x", "params=1e5"],
        epochs=4,
        seed=3,
        device="cpu",
        set=["search.trials=20", "space.families=[sekron, cp]", "model.kwargs.seed=1", "finetune.learning_rate=1e-3"],
    ).load()
    assert config.model.weights == tmp_path / "weights.pt"
    assert (config.data.source, config.data.path) == ("folder", tmp_path / "photos")
    assert config.budget == {"latency_ms": "0.5x", "params": "1e5"}
    assert config.bounds.names == ("params", "latency_ms")
    assert (config.finetune.epochs, config.seed, config.search.trials) == (4, 3, 20)
    assert config.space.families == ("sekron", "cp")
    assert config.model.kwargs == {"seed": 1}
    assert config.finetune.learning_rate == 1e-3
    needed = {"model": "tests.cases:small_net", "budget": ["flops=0.5x"]}
    assert Given(data="digits", **needed).load().data.source == "digits"  # type: ignore[arg-type]
    made = Given(data="tests.cases:small_data", **needed).load().data  # type: ignore[arg-type]
    assert (made.source, made.factory) == ("factory", "tests.cases:small_data")


def test_options_win_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / "space.yaml").write_text("max_factors: 3\nrank_levels: 5\n")
    path = write_config(home, **{SPACE: "space: space.yaml"})
    monkeypatch.chdir(elsewhere)
    config = Given(
        config=path, budget=["flops=0.3x"], epochs=0, set=["space.rank_levels=4", "tables=kept", "search.trials=2"]
    ).load()
    assert config.budget == {"flops": "0.3x"}, "the whole budget"
    assert (config.space.max_factors, config.space.rank_levels) == (3, 4)
    assert config.tables == elsewhere / "kept", "paths of options are relative to the working directory"
    assert (config.finetune.epochs, config.finetune.batch_size) == (0, 32), "the rest of a section stays"
    # What is wrong in the file is no wrong usage, and is not laid at an option's door.
    with pytest.raises(ConfigError, match=r"config .*config\.yaml: key 'latency\.round' is not known") as caught:
        Given(config=write_config(home, CONFIG, **{"rounds": "round"}), epochs=0).load()
    assert not isinstance(caught.value, UsageError)


def test_tables_in_a_file_have_neither_colour_nor_cuts(capsys: pytest.CaptureFixture[str]) -> None:
    long = "a very long name of a layer " * 20
    print_table(["layer", "flops"], [[long, "1"], ["two\nlines\x1b[31m", "1,234"]], left=["layer"])
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.startswith("layer")
    assert head.endswith("flops")
    assert long in first
    assert second.startswith("two lines?[31m ")
    assert second.endswith(" 1,234")


def complete(words: str, cwd: Path, shell: str = "bash") -> list[str]:
    """What a shell is told when the cursor is at the end of the words."""
    environment = {
        **os.environ,
        "_SEKRON_SEARCH_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "PYTHONPATH": str(ROOT),
    }
    code = "import sys; sys.argv[0] = 'sekron-search'; from sekron_search.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=cwd)
    return done.stdout.split()


def test_shells_complete_commands_runs_and_trials(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    trials = [{"index": number, "divergence": 0.5} for number in (3, 12, 15)]
    (run / "search.json").write_text(json.dumps({"trials": trials}))
    assert complete("sekron-search fin", tmp_path) == ["finish"]
    assert complete("sekron-search show ru", tmp_path) == ["runs/"]
    assert complete("sekron-search show runs/", tmp_path) == ["runs/mine"]
    assert complete("sekron-search finish runs/mine --trial 1", tmp_path) == ["12", "15"]


def test_completion_can_be_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda *args: ("bash", "/bin/bash"))
    assert code_of(monkeypatch, "--show-completion") == 0
    assert "complete_bash" in capsys.readouterr().out


OPTIONAL = {
    "onnx": ("onnx", ["export", "RUN", "--format", "onnx"]),
    "onnxruntime": ("onnx", ["profile", "--runtime", "onnxruntime"]),
    "onnxscript": ("onnx", ["run", "CONFIG", "--set", "latency.runtime=onnxruntime", "--budget", "latency=0.9x"]),
    "openvino": ("openvino", ["profile", "--runtime", "openvino"]),
    "psycopg": ("postgres", ["run", "CONFIG", "--storage", "postgresql://me@nowhere/searches"]),
    "grpc": ("grpc", ["run", "CONFIG", "--storage", "grpc://nowhere:1"]),
    "boto3": ("s3", ["run", "CONFIG", "--storage", "JOURNAL", "--artifacts", "s3://bucket/prefix"]),
    "optuna_dashboard": ("dashboard", ["dashboard", "RUN"]),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("package", sorted(OPTIONAL))
def test_a_missing_optional_package_is_one_line_that_says_what_to_install(
    package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    extra, command = OPTIONAL[package]
    for name in list(sys.modules):
        if name.split(".")[0] == package or name in ("sekron_search.runtimes.onnx", "sekron_search.runtimes.openvino"):
            monkeypatch.delitem(sys.modules, name)
    for name in ("onnx", "openvino"):  # a package knows its modules too, once they have been imported
        monkeypatch.delattr(sekron_search.runtimes, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"format": 3, "fingerprint": {}}))
    (run / "report.json").write_text("{}")
    (run / "study.journal").write_text("")
    places = {
        "RUN": str(run),
        "CONFIG": str(write_config(tmp_path)),
        "JOURNAL": str(tmp_path / "journal"),
    }
    monkeypatch.chdir(tmp_path)
    assert code_of(monkeypatch, *(places.get(word, word) for word in command)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert f"pip install 'sekron-search[{extra}]'" in error


def test_the_effective_configuration_is_what_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` hands on what the options say, and `inspect` needs no budget."""
    seen = []
    monkeypatch.setattr(sekron_search.cli.runs, "_foretell", lambda config, folder, **_: seen.append(config))
    options = ["--model", "tests.cases:small_net", "--data", "tests.cases:small_data"]
    assert code_of(monkeypatch, "run", *options, "--budget", "flops=0.6x", "--dry-run", "--time-limit", "90s") == 0
    config = seen[0]
    assert config.search.time_limit_s == 90
    assert yaml.safe_load(config.model_dump_json())["model"]["factory"] == "tests.cases:small_net"
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "config.yaml"
    file.write_text(f"""model: {{factory: "tests.cases:small_net"}}
data: {{source: folder, path: {tmp_path}, image_size: [8, 8]}}
budget: {{flops: 0.6x}}
""")
    assert code_of(monkeypatch, "run", str(file), "--data", "tests.cases:small_data", "--dry-run") == 0
    data = seen[1].data
    assert (data.source, data.factory, data.path, data.image_size) == (
        "factory",
        "tests.cases:small_data",
        None,
        (8, 8),
    )
