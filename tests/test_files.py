"""Files of runs: what is written is read again, whatever it holds; what was changed is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sekron_search.errors import RunFolderError
from sekron_search.export import load, save_artefact
from sekron_search.files import read_json, write_json
from sekron_search.tensor_files import read_tensors, write_tensors
from tests.cases import small_net

DOCUMENTS: dict[str, dict[str, Any]] = {
    "empty": {},
    "floats": {"a": [1e22, -0.0, 5e-324, 0.1 + 0.2, 1e-7], "b": 2**70},
    "texts": {"a": '\u2028 \U0001f600 "quoted" \\ \n', "\u00e9}": {"checksum": "a name"}},
    "nested": {"b": {"a": [], "c": {}}, "a": None, "c": [[True], {"z": 1, "a": 2}]},
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_json_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.json"
    write_json(path, DOCUMENTS[name])
    found = read_json(path)
    assert found == DOCUMENTS[name]
    assert list(found) == list(DOCUMENTS[name])
    assert set(json.loads(path.read_text())) == {*DOCUMENTS[name], "checksum"}  # for programs of others, too


def test_the_checksum_is_that_of_the_text_without_it(tmp_path: Path) -> None:
    path, data = tmp_path / "a.json", DOCUMENTS["nested"]
    write_json(path, data)
    text = json.dumps(data, indent=1) + "\n"
    assert json.loads(path.read_text())["checksum"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("1.5", "1.25", "was changed"),
        ("1.5", "NaN", "damaged or unreadable .NaN"),
        ("1.5", "-Infinity", "damaged or unreadable"),
        ('"a"', '"c"', "was changed"),
        ("}\n", '}\n{"a": 1}\n', "damaged or unreadable"),
        ('"checksum": "', '"checksum": "0', "was changed"),
        ('"checksum"', '"sum"', "has no checksum"),
    ],
)
def test_json_that_was_changed_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1.5, "b": [1, 2]})
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(RunFolderError, match=says):
        read_json(path)


TENSORS: dict[str, Tensor] = {
    "\u00e9 \u2028": torch.zeros(0, 3),
    "nan": torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.bfloat16),
    "scalar": torch.tensor(True),
    "turned": torch.arange(12.0).reshape(3, 4).t(),
    "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "expanded": torch.ones(3).expand(2, 3),
    "eight bits": torch.ones(2, dtype=torch.float8_e4m3fn),
    "conjugate": torch.tensor([1 + 2j]).conj(),
}


def test_tensors_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS)
    found = read_tensors(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        wide = torch.complex128 if tensor.is_complex() else torch.float64
        torch.testing.assert_close(found[name].to(wide), tensor.to(wide), rtol=0, atol=0, equal_nan=True)


def test_a_bit_that_changed_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match="not those that were written"):
        read_tensors(path)


@pytest.mark.parametrize("factory", [{"reference": {"a": 1}}, {"reference": "a:b", "kwargs": 3}, {"kwargs": {}}, []])
def test_an_artefact_whose_factory_is_none_is_refused(tmp_path: Path, factory: Any) -> None:
    save_artefact(tmp_path, small_net(), None)
    facts = read_json(tmp_path / "model.json")
    write_json(tmp_path / "model.json", {**facts, "factory": factory})
    with pytest.raises(RunFolderError, match=r"model\.json: damaged"):
        load(tmp_path, model=small_net())
