"The README is the index notebook, and its commands are those that continuous integration runs."
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from render_readme import render

README = (ROOT/"README.md").read_text(encoding="utf-8")

def test_readme_is_the_index_notebook():
    assert README == render(), "README.md is stale: run `python render_readme.py`"

def test_two_one_line_commands():
    block = re.search(r"```sh\n(.*?)\n```", README, re.S)[1].splitlines()
    assert len(block) == 2
    assert block[0].startswith("python3 -m venv .venv && ") and block[0].endswith("phi4 run toy")
    assert "nbdev_test" in block[1] and "pytest" in block[1]
    assert "README.md" in (ROOT/".ci"/"run").read_text(), "continuous integration takes the commands from the README"

def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README): assert (ROOT/target).exists(), target
