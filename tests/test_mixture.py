"Table 5's arithmetic: exact sums, and the mistakes refused."
import pytest
from hypothesis import given, strategies as st

from phi4_ref.data.mixture import TABLE_4_FRACTIONS, epochs, plan_mixture, select_long
from phi4_ref.paper import PRETRAINING, TABLE_5

UNIQUE = {s: r['unique_tokens'] for s, r in TABLE_5.items()}


def test_the_papers_plan():
    rows = plan_mixture(UNIQUE, PRETRAINING['tokens'])
    assert {r['source']: round(r['epochs'], 1) for r in rows} == {s: r['epochs'] for s, r in TABLE_5.items()}
    assert not any(r['warning'] for r in rows)
    assert plan_mixture(UNIQUE, 2 * PRETRAINING['tokens'])[2]['warning'] == '27.6 epochs, 13.8 in phi-4'


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=6), st.integers(1, 10**9))
def test_tokens_add_up_to_the_budget(parts, budget):
    fractions = {f's{i}': p / sum(parts) for i, p in enumerate(parts)}
    rows = plan_mixture(dict.fromkeys(fractions, 1000), budget, fractions)
    assert sum(r['tokens'] for r in rows) == budget
    assert all(abs(r['tokens'] - r['fraction'] * budget) <= 1 and r['epochs'] == epochs(r['fraction'], budget, 1000) for r in rows)


@pytest.mark.parametrize('tokens, budget, fractions, says', [
    ({'web': 10}, 100, {'web': 0.9}, 'add up to 0.9'),
    ({'web': 10}, 100, {'web': 1.5, 'code': -0.5}, 'negative'),
    ({'web': 10}, 100, {'web': 0.5, 'code': 0.5}, 'no tokens of code'),
    ({'web': 10, 'code': 0}, 100, {'web': 0.5, 'code': 0.5}, 'no tokens of code'),
    ({'web': 10, 'code': 5}, 100, {'web': 1.0}, 'no fraction for code'),
    ({'web': 10}, 0, {'web': 1.0}, 'budget 0')])
def test_mistakes_are_refused(tokens, budget, fractions, says):
    with pytest.raises(ValueError, match=says): plan_mixture(tokens, budget, fractions)


def test_a_source_may_be_left_out():
    rows = plan_mixture({'web': 10, 'code': 5}, 100, {'web': 1.0, 'code': 0.0, 'acquired': 0})
    assert [(r['tokens'], r['epochs']) for r in rows] == [(100, 10.0), (0, 0.0), (0, 0.0)]


def test_variants_freeze_a_quarter():
    for fractions in TABLE_4_FRACTIONS.values():
        assert sum(fractions.values()) == pytest.approx(1)
        assert fractions['code'] + fractions['acquired'] == pytest.approx(0.25)
        assert sum(fractions[s] for s in ('web', 'web_rewrite', 'synthetic')) == pytest.approx(0.75)
    assert TABLE_4_FRACTIONS['S']['synthetic'] == 0.75 and TABLE_4_FRACTIONS['S + W']['web'] == 0.375


def test_long_documents():
    lengths = [256, 257, 512, 513, 1023, 1024, 9999]
    rule = lambda source: select_long(source, lengths, 512, 1024, 256, factor=3).tolist()
    assert rule('acquired') == rule('code') == [0, 0, 0, 1, 1, 3, 3]
    assert rule('synthetic') == [0, 1, 1, 1, 1, 1, 1] and rule('web') == rule('web_rewrite') == [0] * 7
    with pytest.raises(ValueError, match='upweight_from'): select_long('code', [], 10, 5)
