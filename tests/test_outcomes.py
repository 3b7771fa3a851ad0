"Outcomes before and after: shares, F1 and changes agree with plain counting, and refusals are told from random ones."
import random

import pytest
from hypothesis import given, settings, strategies as st

from phi4_ref.eval.claims import level
from phi4_ref.eval.outcomes import moves, outcome_table, selectivity, with_f1
from phi4_ref.eval.tasks import OUTCOMES, simpleqa_f1


def rows(outcomes, name='m', samples=1): return [dict(model=name, benchmark='facts', id=str(i // samples), sample=i % samples, outcome=o) for i, o in enumerate(outcomes)]

outcomes = st.lists(st.sampled_from(OUTCOMES), min_size=2, max_size=40)

@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(OUTCOMES), st.sampled_from(OUTCOMES)), min_size=2, max_size=40), st.integers(1, 3))
def test_the_table_is_what_counting_gives(pairs, samples):
    before, after = rows([a for a, _ in pairs], samples=samples), rows([b for _, b in pairs], 'n', samples)
    random.Random(0).shuffle(after)
    table = {r['measure']: r for r in outcome_table(before, after)}
    assert list(table) == [*OUTCOMES, 'F1']
    for side, got in (('before', before), ('after', after)):
        n = [sum(r['outcome'] == o for r in got) for o in OUTCOMES]
        for o, k in zip(OUTCOMES, n): assert table[o][side].mean == pytest.approx(k / len(got)) and 0 <= table[o][side].low <= table[o][side].high <= 1
        assert table['F1'][side].mean == pytest.approx(simpleqa_f1(*n))
    whole = len(pairs) % samples == 0
    if whole:  # questions weigh alike in a change; with as many replies each, that is the difference of the means
        for r in table.values(): assert r['change'].mean == pytest.approx(r['after'].mean - r['before'].mean, abs=1e-9)
    assert table['correct']['change'].n == len({r['id'] for r in before})


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(OUTCOMES), st.sampled_from(OUTCOMES)), min_size=1, max_size=40))
def test_moves_count_each_reply_once(pairs):
    table = moves(rows([a for a, _ in pairs]), rows([b for _, b in pairs]) + [dict(benchmark='facts', id='new', sample=0, outcome='correct')])
    for o in OUTCOMES:
        here = [b for a, b in pairs if a == o]
        assert (o in table) == bool(here)
        if here: assert [table[o][t].mean for t in OUTCOMES] == pytest.approx([here.count(t) / len(here) for t in OUTCOMES])


def test_the_interval_of_f1_covers_it():
    rng, truth, covered = random.Random(1), simpleqa_f1(6, 60, 34), 0
    for _ in range(600):
        i = level(with_f1(rows(rng.choices(OUTCOMES, (6, 60, 34), k=300))), lambda r: r['f1'])
        covered += i.low <= truth <= i.high
    assert .92 <= covered / 600 <= .98


def test_knowing_what_one_does_not_know():
    before = rows(['correct'] * 40 + ['incorrect'] * 60)
    decline = lambda right, wrong: [r | dict(outcome='not attempted') if i % 10 < (right if i < 40 else wrong) else r for i, r in enumerate(before)]
    assert selectivity(before, decline(1, 8)).mean == pytest.approx(.7) and selectivity(before, decline(1, 8)).sign == 1
    assert selectivity(before, decline(5, 5)).sign == 0 and selectivity(before, decline(8, 1)).sign == -1
    with pytest.raises(ValueError, match='no incorrect reply'): selectivity(rows(['correct'] * 3), rows(['correct'] * 3))
    with pytest.raises(ValueError, match='0 replies before'): outcome_table([], before)
