"Rows to Parquet and back, and what is said of files that are broken."
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from phi4_ref import records
from phi4_ref.records import CONVERSATION, DOCUMENT, PAGE, PREFERENCE, QUESTION, check_row, load, load_json, save, save_json

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=5)
MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3)
KINDS = {"page": PAGE, "document": DOCUMENT, "question": QUESTION, "conversation": CONVERSATION, "preference": PREFERENCE}


def rows_of(features):
    values = {"meta": st.dictionaries(TEXT, JSON, max_size=3), "messages": MESSAGES, "prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS}
    return st.lists(st.fixed_dictionaries({name: values.get(name, TEXT) for name in features}), max_size=4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded(tmp_path_factory, kind):
    folder = tmp_path_factory.mktemp(kind)
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(rows_of(KINDS[kind]))
    def round_trip(rows):
        before = json.dumps(rows)
        assert load(save(folder/"rows.parquet", rows, KINDS[kind]), KINDS[kind]) == rows
        assert json.dumps(rows) == before  # and the rows themselves are left alone
    round_trip()


def test_equal_rows_are_equal_bytes(tmp_path):
    rows = [{"id": "a", "text": "t", "source": "web", "lang": "en", "meta": {"b": 1, "a": [2]}}]
    again = [{"meta": {"a": [2], "b": 1}, "lang": "en", "source": "web", "text": "t", "id": "a"}]
    assert save(tmp_path/"1.parquet", rows, DOCUMENT).read_bytes() == save(tmp_path/"2.parquet", again, DOCUMENT).read_bytes()


def test_no_rows_keep_their_columns(tmp_path):
    path = save(tmp_path/"deep"/"er"/"none.parquet", [], PREFERENCE)
    assert load(path, PREFERENCE) == [] and pq.read_schema(path).names == list(PREFERENCE)


def test_meta_may_be_left_out_and_nothing_else():
    row = {"id": "a", "text": "t", "source": "web", "lang": "en"}
    assert check_row(row, DOCUMENT)["meta"] == "{}" and "meta" not in row
    with pytest.raises(ValueError, match=r"row: missing keys \['lang'\], unknown keys \['langg'\]; expected \['id', 'text'"): check_row({**{k: v for k, v in row.items() if k != "lang"}, "langg": 1}, DOCUMENT)


def test_a_bad_row_is_named_and_nothing_written(tmp_path):
    good = {"id": "a", "text": "t", "source": "web", "lang": "en"}
    save(tmp_path/"rows.parquet", [good], DOCUMENT)
    before = (tmp_path/"rows.parquet").read_bytes()
    with pytest.raises(ValueError, match=r"rows.parquet\[1\]: missing keys \['text'\]"): save(tmp_path/"rows.parquet", [good, {"id": "b", "source": "web", "lang": "en"}], DOCUMENT)
    with pytest.raises((ValueError, TypeError, pa.ArrowException)): save(tmp_path/"rows.parquet", [{**good, "text": 5}], DOCUMENT)
    assert (tmp_path/"rows.parquet").read_bytes() == before


def test_a_missing_file_says_which_and_why(tmp_path):
    for read in (load, load_json):
        with pytest.raises(FileNotFoundError, match="no file .*none.parquet: has the stage that writes it run"): read(tmp_path/"none.parquet")


@pytest.mark.parametrize("left", [0, 3, 40, -1])
def test_a_truncated_file_is_named(tmp_path, left):
    path = save(tmp_path/"rows.parquet", [{"id": str(i), "text": "t" * 50, "source": "web", "lang": "en"} for i in range(20)], DOCUMENT)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match="rows.parquet is not a readable Parquet file .*; delete it and run its stage again"): load(path, DOCUMENT)


@pytest.mark.parametrize("rows", [0, 2])
def test_missing_columns_are_named(tmp_path, rows):
    pq.write_table(pa.table({"id": ["a"] * rows, "text": ["t"] * rows}), tmp_path/"rows.parquet")
    with pytest.raises(ValueError, match=r"rows.parquet lacks the columns \['lang', 'meta', 'source'\]"): load(tmp_path/"rows.parquet", DOCUMENT)
    assert len(load(tmp_path/"rows.parquet")) == rows


def test_broken_meta_is_named(tmp_path):
    pq.write_table(pa.table({name: ["{broken" if name == "meta" else "a"] for name in DOCUMENT}), tmp_path/"rows.parquet")
    with pytest.raises(ValueError, match="rows.parquet"): load(tmp_path/"rows.parquet", DOCUMENT)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(tmp_path/"rows.parquet", [{"id": "a", "text": "t", "source": "web", "lang": "en"}], DOCUMENT)
    save_json(tmp_path/"a.json", [1])
    def fails(*a, **kw): raise OSError(28, "No space left on device")
    monkeypatch.setattr(records.pq, "write_table", fails)
    monkeypatch.setattr(records.Path, "write_text", fails)
    with pytest.raises(OSError): save(path, [], DOCUMENT)
    with pytest.raises(OSError): save_json(tmp_path/"a.json", [2])
    assert len(load(path)) == 1 and load_json(tmp_path/"a.json") == [1]


@pytest.mark.parametrize("left", [0, 5, 13])  # 13 is within the bytes of a letter
def test_json_that_is_cut_is_named(tmp_path, left):
    save_json(tmp_path/"a.json", {"text": "é"})
    (tmp_path/"a.json").write_bytes((tmp_path/"a.json").read_bytes()[:left])
    with pytest.raises(ValueError, match="a.json is not valid JSON .*; delete it and run its stage again"): load_json(tmp_path/"a.json")
