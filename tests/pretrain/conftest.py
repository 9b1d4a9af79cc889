"""A store that the tests of pretraining share."""

from __future__ import annotations

import pytest

from colm_ds.data.generated.text import write_text
from tests.pretrain.runs import Prepared, call, make_recipe


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("pretrain")
    write_text(folder / "text", megabytes=0.6)
    recipe = make_recipe(folder)
    done = call("pretrain/prepare.py", str(recipe), "--data", str(folder / "text"))
    assert done.returncode == 0, done.stderr
    return Prepared(folder / "text", folder / "store", recipe, done.stdout)
