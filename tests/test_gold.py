"""The verifiers over real gold answers, where that data is at hand."""

import os
from pathlib import Path

import pytest

import verifier_checks
from helpers import ROOT

DATA = Path(os.environ.get("DATA_DIR", ROOT.parent / "shared" / "data"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA} (DATA_DIR)")


def test_gold_answers_are_right_and_changed_ones_are_wrong():
    for row in verifier_checks.checks(DATA, every=4):
        assert not row["failures"], (row["check"], row["failures"][:3])
        assert row["as_expected"] == row["of"] >= 164
