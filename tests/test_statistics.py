"Tests of success rates against scipy, and the exactness that scipy has no function for."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from phi4_ref.post.statistics import all_p_values, newcombe, p_value, q_values, wilson

settings.register_profile('untimed', deadline=None, max_examples=40)
settings.load_profile('untimed')


@given(st.integers(1, 200), st.data())
def test_wilson_is_scipys(n, data):
    k = data.draw(st.integers(0, n))
    interval = stats.binomtest(k, n).proportion_ci(.95, 'wilson')
    assert wilson((n, k)) == pytest.approx((interval.low, interval.high), abs=1e-9)


@pytest.mark.parametrize('a, b', [((7, 6), (9, 3)), ((12, 12), (5, 1)), ((15, 4), (15, 9)), ((3, 3), (4, 0))])
def test_without_margin_it_is_barnards_test(a, b):
    table = [[a[1], b[1]], [a[0] - a[1], b[0] - b[1]]]
    assert p_value(a, b) == pytest.approx(stats.barnard_exact(table, alternative='greater', pooled=True, n=99).pvalue, abs=2e-3)


@given(st.integers(1, 18), st.integers(1, 18), st.integers(0, 60))
def test_no_pair_of_rates_within_the_hypothesis_rejects_too_often(na, nb, margin):
    margin /= 100
    p = all_p_values(na, nb, margin)
    for beyond in (0., .1, .3):  # differences below the margin, down to far below
        q = np.linspace(0, 1, 101)
        above = np.clip(q + margin - beyond, 0, 1)
        chances = np.einsum('qa,qb->qab', stats.binom.pmf(np.arange(na + 1), na, above[:, None]), stats.binom.pmf(np.arange(nb + 1), nb, q[:, None]))
        for level in (.01, .05, .2): assert (chances * (p <= level)).sum((1, 2))[above - q <= margin + 1e-12].max() <= level * 1.02


@given(st.integers(1, 25), st.integers(1, 25), st.floats(0, .9))
def test_more_successes_of_a_are_more_evidence(na, nb, margin):
    p = all_p_values(na, nb, round(margin, 2))
    assert (np.diff(p, axis=0) <= 1e-9).all() and (np.diff(p, axis=1) >= -1e-9).all() and 0 <= p.min() and p.max() <= 1


def test_a_larger_margin_is_harder_to_exceed_and_no_sample_is_no_evidence():
    course = [p_value((30, 27), (30, 6), m / 20) for m in range(20)]
    assert course == sorted(course) and course[0] < 1e-6 and course[-1] > .99
    assert p_value((0, 0), (9, 1)) == p_value((9, 9), (0, 0)) == p_value((9, 9), (9, 0), 1.) == 1 and wilson((0, 0)) == (0, 1)
    low, high = newcombe((50, 40), (40, 10))
    assert low < .55 < high and newcombe((40, 10), (50, 40)) == pytest.approx((-high, -low))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_q_values_are_scipys(p):
    assert q_values(p) == pytest.approx(stats.false_discovery_control(p).tolist(), abs=1e-12)
    assert q_values([]) == []


def test_a_margin_between_hundredths_is_rounded_up():
    at = [p_value((30, 24), (30, 12), margin) for margin in (.05, .0501, .06, .07, .0700000001)]
    assert at[0] < at[1] == at[2] < at[3] == at[4]
