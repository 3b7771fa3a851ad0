import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import ENV, TINY


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    "One unbroken run of all stages, and the settings its stages read; not to be changed: copy it."
    folder = tmp_path_factory.mktemp("tiny")
    recorder = Path(__file__).parent/"record_reads.py"
    done = subprocess.run([sys.executable, recorder, folder/"reads.json", "run", "toy", f"out={folder/'run'}", *TINY], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder/"run"


@pytest.fixture(scope="session")
def tiny_reads(tiny_run):
    "`Section.field` of everything that the stages of the unbroken run read."
    return set(json.loads((tiny_run.parent/"reads.json").read_text()))
