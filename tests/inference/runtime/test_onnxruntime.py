"""The default engine passes the published suite."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from modelyard.inference.runtime._base import Engine, RowByRow, open_engine
from modelyard.inference.runtime.onnxruntime import OnnxRuntimeEngine
from modelyard.testing.bundles import late_bundle
from modelyard.testing.engines import EngineTests, MakeEngine


class TestOnnxRuntime(EngineTests):
    @pytest.fixture
    def make_engine(self) -> MakeEngine:
        return OnnxRuntimeEngine


class TestRowByRow(EngineTests):
    """Wrapping an engine changes no answer of a model whose rows are independent."""

    @pytest.fixture
    def make_engine(self) -> MakeEngine:
        def make(model: bytes) -> Engine:
            return RowByRow(OnnxRuntimeEngine(model))

        return make


def test_a_bundle_becomes_an_engine_that_gives_its_golden_answers(tmp_path: Path) -> None:
    bundle = late_bundle(tmp_path / "late")
    cases: Any = bundle.cases()
    engine = open_engine(bundle)
    answers = engine.run(cases.inputs)
    engine.close()
    assert_array_equal(answers["label"], cases.outputs["label"])
    np.testing.assert_allclose(answers["probability"], cases.outputs["probability"], rtol=1e-5)
