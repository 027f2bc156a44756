"""The verifiers over real gold answers, where that data is at hand."""

import os
from pathlib import Path

import pytest

import verifier_checks
from helpers import ROOT

DATA = Path(os.environ.get("DATA_DIR", ROOT.parent / "shared" / "data"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA} (DATA_DIR)")


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_gold_answers_are_right_and_changed_ones_are_wrong(every):
    for row in verifier_checks.checks(DATA, every=every):
        assert not row["failures"], (row["check"], row["failures"][:3])
        assert row["as_expected"] == row["of"] >= 164 // every
