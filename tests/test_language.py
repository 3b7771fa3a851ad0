"""Language identification: offline, blind to code and mathematics, right on real languages."""
import csv
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from phi4_ref.data.language import identify, is_code_line, mask

GERMAN = "Die Funktion zählt, wie viele Eier die Enten an einem Tag legen, und gibt die Summe zurück."
PYTHON = "def count(ducks, days):\n    total = 0\n    for day in range(days):\n        total += len(ducks)\n    return total\n"

def test_runs_without_a_network(monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError("the network was used")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    from phi4_ref.data import language
    language.detector.cache_clear()
    assert identify([GERMAN])[0][0] == "de"

def test_code_and_mathematics_do_not_vote():
    carriers = [f"{GERMAN}\n\n```python\n{PYTHON * 5}```", f"{GERMAN}\n{PYTHON * 5}", f"{GERMAN} " + r"$\text{the sum of all the eggs is } x$ " * 10, f"> {GERMAN}\n>\n> ```\n> {PYTHON.splitlines()[0]}\n> ```",
                f"{GERMAN}\n- Liste:\n  ```python\n  {'print(the_number_of_all_the_ducks)'}\n  ```\n" * 3, f"{GERMAN}\n\n```python\n{PYTHON * 5}"]
    for text in carriers: assert identify([text])[0][0] == "de", text
    assert identify([PYTHON, f"```\n{PYTHON}```", "$x^2$", "", "12 + 3", "https://example.org/the/house/of/the/rising/sun"]) == [("und", 0.0)] * 6

def test_prose_is_not_masked():
    for line in ("For a start, we buy eggs.", "If it rains, we stay at home; if not, we go.", "Wir kaufen Eier (zehn Stück) und Milch.", "She said: now or never!", "Return it to the shop."):
        assert not is_code_line(line, False), line
    assert mask("One line.\n\nAnd   another\none.") == "One line. And another one."

def test_order_and_length():
    answers = identify([GERMAN, "How many eggs do the ducks lay in a week?", "アヒルは一日に卵をいくつ産みますか。"])
    assert [lang for lang, _ in answers] == ["de", "en", "ja"] and all(0.5 < p <= 1 for _, p in answers)
    assert identify([]) == [] and identify(["\ud800 " + GERMAN])[0][0] == "de"

@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet=st.characters(blacklist_categories=()), max_size=80), max_size=4))
def test_anything_gets_an_answer(texts):
    answers = identify(texts)
    assert len(answers) == len(texts) and all(isinstance(lang, str) and 0 <= p <= 1 for lang, p in answers)

def test_long_lines_are_cheap():
    for text in ("`" * 200_000, "$" * 200_000, "(" * 200_000, "a = " * 50_000, "x" * 300_000, "```\n" * 50_000): assert identify([text])

def test_mgsm():
    folder = Path(os.environ.get("PHI4_REF_DATA") or pytest.skip("PHI4_REF_DATA is not set: no MGSM to read")) / "mgsm"
    for path in sorted(folder.glob("mgsm_*.tsv")):
        texts = [row[0] for row in csv.reader(path.open(encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE)]
        right = sum(lang == path.stem[-2:] for lang, _ in identify([text + "\n" + PYTHON for text in texts]))
        assert right >= 0.9 * len(texts), (path.name, right)
