"""yard.toml: defaults, and errors that name file, key and value."""

from pathlib import Path

import pytest

from modelyard.cli.config import load_yard
from modelyard.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "yard.toml"
    path.write_text(text)
    return path


def test_a_name_and_a_source_of_data_are_enough(tmp_path: Path) -> None:
    yard = load_yard(write(tmp_path, 'name = "cells"\n[data]\npath = "cells.csv"\n'))

    assert yard.model.kind == "network"
    assert yard.targets.keep == 0.99


def test_a_folder_stands_for_the_yard_toml_in_it(tmp_path: Path) -> None:
    write(tmp_path, 'name = "cells"\n[data]\npath = "cells.csv"\n')

    assert load_yard(tmp_path).name == "cells"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[data]\npath = "x.csv"\n', "name"),
        ('name = "a"\n[data]\npath = "x.csv"\n[fit]\nepoch = 3\n', "epoch"),
        ('name = "a"\n[data]\npath = "x.csv"\n[fit]\nepochs = 0\n', "fit.epochs.*got 0"),
        ('name = "a/b"\n[data]\npath = "x.csv"\n', "name.*got 'a/b'"),
        ('name = "a"\n[data]\npath = "x.csv"\n[targets]\nkeep = 1.0\n', "targets.keep.*got 1.0"),
        ('name = "a"\n[data]\npath = "x.csv"\n[model]\nkind = "forest"\n', "model.kind.*'forest'"),
        ('name = "a"\n[data]\npath = "x.csv"\n[model]\nkind = "torch"\n', "callable"),
        ('name = "a"\n[data]\npath = "x.csv"\n[compress]\ntechniques = ["int4"]\n', "int4"),
        ('name = "a"\nname = "b"\n', "TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)

    with pytest.raises(ConfigError, match=says) as caught:
        load_yard(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_yard(tmp_path / "nothing.toml")
