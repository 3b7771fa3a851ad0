"Intervals against scipy's, against simulation, and at the edges."
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats as ss

from phi4_ref.eval.stats import Z95, difference_interval, mean_interval, paired_interval, seeds_interval, standard_error, t95, wilson


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(kn):
    k, n = kn
    ours, theirs = wilson(k, n), ss.binomtest(k, n).proportion_ci(.95, method='wilson')
    assert ours.low == pytest.approx(theirs.low, abs=1e-9) and ours.high == pytest.approx(theirs.high, abs=1e-9)


def test_real_scores_are_scipys_t():
    x, y = np.random.default_rng(0).normal(3, 2, (2, 12))
    theirs = ss.ttest_1samp(x, 0).confidence_interval(.95)
    assert mean_interval(x)[1:3] == pytest.approx(tuple(theirs))
    assert seeds_interval(list(x))[1:3] == pytest.approx(tuple(theirs))
    assert paired_interval(x, y)[1:3] == pytest.approx(tuple(ss.ttest_rel(x, y).confidence_interval(.95)))


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=2, max_size=30))
def test_clusters_by_the_formula(groups):
    x = [v for g in groups for v in g]
    ids = [f'q{i}' for i, g in enumerate(groups) for _ in g]
    mean, G = sum(x) / len(x), len(groups)
    plain = math.sqrt(G / (G - 1) * sum(sum(v - mean for v in g)**2 for g in groups)) / len(x)
    assert standard_error(x, ids) == pytest.approx(plain, abs=1e-12)
    i = mean_interval(x, ids)
    assert 0 <= i.low <= i.mean <= i.high <= 1 and i.n == G
    order = np.random.default_rng(0).permutation(len(x))  # the order of the rows does not matter
    assert mean_interval([x[k] for k in order], [ids[k] for k in order]) == pytest.approx(i)


def coverage(interval, truth, draw, tries=1500):
    return np.mean([(i := interval(*draw(s))).low <= truth <= i.high for s in range(tries)])


@pytest.mark.parametrize('p,n', [(.02, 100), (.5, 40), (.93, 200)])
def test_proportion_covers(p, n):
    assert .93 < coverage(mean_interval, p, lambda s: (np.random.default_rng(s).random(n) < p,)) < .98


def test_clustered_covers_and_pretending_does_not():
    q = np.repeat(np.arange(60), 4)
    def draw(s):
        rng = np.random.default_rng(s)
        return (rng.random((60, 4)) < rng.beta(.4, .6, 60)[:, None]).ravel(), q
    assert .935 < coverage(mean_interval, .4, draw) < .97
    assert coverage(lambda x, _: mean_interval(x), .4, draw) < .85


def test_paired_covers_under_dependence():
    def draw(s):
        rng = np.random.default_rng(s)
        a = rng.random(80) < .6
        return a & (rng.random(80) < .9), a   # b is right only where a is
    assert .93 < coverage(lambda a, b: paired_interval(b, a), .06, draw) < .99


def test_pairs_beat_two_separate_intervals():
    rng = np.random.default_rng(3)
    a = rng.random(300) < .5
    b = a | (rng.random(300) < .08)
    both = paired_interval(b, a)
    assert both.sign == 1 and mean_interval(a).high > mean_interval(b).low  # separate intervals overlap


def test_difference_of_independent_proportions_is_newcombes():
    # Newcombe (1998), example: 56/70 against 48/80 gives 0.2, interval 0.0524 to 0.3339
    d = difference_interval(wilson(56, 70), wilson(48, 80))
    assert d.mean == pytest.approx(.2) and d[1:3] == pytest.approx((.0524, .3339), abs=1e-4) and d.n == 70
    assert paired_interval([1] * 30, [0] * 30).high == 1


def test_ties_do_not_prove_equality():
    few, many = paired_interval([1] * 10, [1] * 10), paired_interval([1] * 1000, [1] * 1000)
    assert few.mean == 0 and few.sign == 0 and few.high > .1 and many.high < few.high / 10


def test_units_without_spread():
    assert t95(1) == math.inf and standard_error([.3]) == math.inf
    one = mean_interval([1, 1, 0, 1], ['q'] * 4)
    assert (one.n, one.mean) == (1, .75) and one.high - one.low > .7
    assert mean_interval([0] * 20, [0, 1] * 10).high > .5   # two questions, not twenty


@pytest.mark.parametrize('call,word', [
    (lambda: mean_interval([]), 'at least one'), (lambda: mean_interval([1, float('nan')]), 'NaN'),
    (lambda: mean_interval([1, 0], ['a']), '1 clusters for 2'), (lambda: paired_interval([1, 0], [1]), 'same items'),
    (lambda: seeds_interval([.1]), 'at least two'), (lambda: wilson(3, 2), 'no proportion'), (lambda: wilson(0, 0), 'no proportion')])
def test_bad_input_is_named(call, word):
    with pytest.raises(ValueError, match=word): call()


def test_sign_and_print():
    i = mean_interval([1] * 135 + [0] * 29)
    assert str(i) == '0.823 [0.758, 0.874]' and i.sign == 1 and Z95 == pytest.approx(1.959964)
