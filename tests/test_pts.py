"Pivotal token search on trees whose truth is known, and on a small transformer."
import math
import random
from functools import cache
from types import SimpleNamespace

import matplotlib
matplotlib.use('agg')
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4_ref.model.generate import Completion
from phi4_ref.model.transformer import ModelConfig, Transformer
from phi4_ref.post import pts

NUMBERS = SimpleNamespace(decode=lambda ids, skip_special_tokens=False: ' '.join(map(str, ids)))


def ends_in_1(question, text): return text.endswith(' 1')


def random_tree(rng, depth):
    if depth == 0 or rng.random() < .05: return rng.random() < .5
    weights = [rng.random() ** 3 + 1e-6 for _ in range(rng.randint(1, 3))]
    return {10 + i: (w / sum(weights), random_tree(rng, depth - 1)) for i, w in enumerate(weights)}


def forest(n, seed=0):
    rng, trees = random.Random(seed), {}
    while len(trees) < n:
        tree = random_tree(rng, 6)
        if not isinstance(tree, bool) and .15 < pts.tree_success(tree) < .85: trees[100 + len(trees)] = (1., tree)
    return trees


def run(trees, sampler=None, **settings):
    rows = [dict(id=f'q{i}') for i in trees]
    return pts.search(rows, [[i] for i in trees], sampler or pts.tree_sampler(trees), NUMBERS, ends_in_1, **(dict(max_total=20) | settings))


def exact(trees, row):
    tree = trees[row['prompt_ids'][0]][1]
    return [pts.tree_success(pts.tree_at(tree, row['tokens'][:i])) for i in range(len(row['tokens']))] + [float(row['success'])]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([.1, .2, .5]))
def test_a_certified_segment_cannot_hide_a_pivot(seed, p_gap):
    tree = random_tree(random.Random(seed), 5)
    before = pts.tree_success(tree)
    def visit(node, logprobs, previous):
        change = abs(pts.tree_success(node) - before)
        assert change <= 1 - math.exp(sum(logprobs)) + 1e-9
        if logprobs and pts.certified(logprobs, p_gap): assert change < p_gap
        if logprobs and pts.certified(logprobs[-1:], p_gap): assert abs(pts.tree_success(node) - previous) < p_gap
        if not isinstance(node, bool):
            for q, child in node.values(): visit(child, logprobs + [math.log(q)], pts.tree_success(node))
    visit(tree, [], before)


@given(st.lists(st.floats(-20, 0), min_size=2, max_size=60))
def test_split_point_halves_the_surprisal(logprobs):
    k = pts.split_point(logprobs)
    gap = lambda j: abs(2 * sum(logprobs[:j]) - sum(logprobs))
    assert 1 <= k < len(logprobs) and gap(k) <= min(map(gap, range(1, len(logprobs)))) + 1e-9


def test_subdivide_finds_every_pivot_of_a_monotone_course_and_estimates_each_prefix_once():
    course, asked = [.1, .1, .1, .4, .4, .4, .4, .4, .9, .9, .9, .9, 1.], []
    @cache
    def p(prefix): asked.append(prefix); return course[len(prefix)]
    tokens = tuple(range(12))
    segments = pts.subdivide((), tokens, [-1.] * 12, p, .2)
    assert sum(segments, ()) == tokens and pts.pivotal_positions(segments, p, .2) == [2, 7]
    assert len(asked) == len(set(asked)) < 13


def test_given_exact_p_the_batched_search_and_figure_4_find_the_same_pivots():
    pivots = 0
    for i, (_, tree) in forest(150, seed=5).items():
        c = pts.walk({0: (1., tree)}, [0], i, 20)
        success = c.finished and c.ids[-1] == 1
        course = exact({0: (1., tree)}, dict(prompt_ids=[0], tokens=c.ids, success=success))
        case = pts.Case(dict(id='q'), [0], c.ids, c.logprobs, success, memo=dict(enumerate((1, p) for p in course)))
        pts.subdivide_cases([case], None, n_samples=1, p_gap=.2)
        p = lambda prefix: course[len(prefix)]
        assert case.pivots == pts.pivotal_positions(pts.subdivide((), tuple(c.ids), c.logprobs, p, .2), p, .2)
        pivots += len(case.pivots)
    assert pivots > 100


def test_rollouts_that_pass_through_are_unbiased():
    trees, total = forest(40, seed=3), [0., 0.]
    for row in run(trees, n_samples=40, band=(0., 1.))[1]:
        p = exact(trees, row)
        for i, n, k in row['estimates'][:-1]: total[0] += k - n * p[i]; total[1] += n * p[i] * (1 - p[i])
    assert abs(total[0]) < 4 * math.sqrt(total[1]) and total[1] > 100


def test_pairs_prefer_the_better_token_and_carry_their_counts():
    trees = forest(60, seed=1)
    pairs, rows, counts = run(trees, n_samples=60)
    better = 0
    for r in pairs:
        at = lambda ids: pts.tree_success(pts.tree_at(trees[r['prompt_ids'][0]][1], r['prompt_ids'][1:] + ids))
        tree = pts.tree_at(trees[r['prompt_ids'][0]][1], r['prompt_ids'][1:])
        if r['chosen_ids'][0] in tree and r['rejected_ids'][0] in tree: better += at(r['chosen_ids']) > at(r['rejected_ids'])
        m = r['meta']
        assert len(r['chosen_ids']) == len(r['rejected_ids']) == 1 and abs(m['prob_delta']) >= .2
        assert m['k_chosen'] / m['n_chosen'] > m['k_rejected'] / m['n_rejected'] and m['n_before'] >= 20 and m['n_rejected'] >= pts.MIN_SEEN
    assert len(pairs) > 20 and better >= .95 * len(pairs)
    assert counts['questions'] == 60 and counts['pairs'] == len(pairs) and counts['in_band'] == len(rows)


def test_full_length_pairs_are_right_over_wrong_and_whole():
    trees = forest(10)
    rows = run(trees, trajectories=2)[1]
    pairs = pts.full_length_pairs(rows, NUMBERS)
    assert len({r['id'] for r in pairs}) == len(pairs) >= len(rows) / 2
    assert all(r['chosen_ids'][-1] == 1 and r['rejected_ids'][-1] == 0 and r['prompt_ids'][0] in trees for r in pairs)


def test_a_pivot_is_where_the_truth_changes():
    trees, false, found, missed = forest(60, seed=2), 0, 0, 0
    for row in run(trees, n_samples=200, filter_samples=200)[1]:
        p = exact(trees, row)
        change = [abs(p[i + 1] - p[i]) for i in range(len(row['tokens']))]
        found += len(row['pivots']); false += sum(change[i] < .1 for i in row['pivots'])
        missed += sum(c > .3 and i not in row['pivots'] for i, c in enumerate(change))
    assert found > 40 and false == 0 and missed < .35 * found  # bisection misses pivots that cancel


def test_results_do_not_depend_on_the_company_and_do_on_the_seed():
    trees = forest(20)
    whole = run(trees)
    assert run(trees, chunk_size=3) == whole == run(trees, chunk_size=1)
    assert run(trees, seed=1)[0] != whole[0]


def test_killed_at_any_call_and_continued_it_is_the_unbroken_search(tmp_path):
    trees, base = forest(12), None
    class Killed(Exception): pass
    whole = run(trees, chunk_size=4)
    for limit in range(1, 12):
        left = [limit]
        def sampler(*args):
            left[0] -= 1
            if left[0] < 0: raise Killed
            return pts.tree_sampler(trees)(*args)
        try: run(trees, sampler, chunk_size=4, work_dir=tmp_path/str(limit))
        except Killed: pass
        assert not list((tmp_path/str(limit)).glob('*.part')) if (tmp_path/str(limit)).exists() else True
        assert run(trees, chunk_size=4, work_dir=tmp_path/str(limit)) == whole


def test_a_finished_chunk_is_not_sampled_again_and_other_settings_are_refused(tmp_path):
    trees = forest(6)
    first = run(trees, work_dir=tmp_path)
    def never(*args): raise AssertionError('sampled again')
    assert run(trees, never, work_dir=tmp_path) == first
    with pytest.raises(ValueError, match='p_gap'): run(trees, work_dir=tmp_path, p_gap=.3)
    with pytest.raises(ValueError, match='questions'): run(dict(list(trees.items())[1:]), work_dir=tmp_path)


def test_every_prefix_has_the_same_horizon_and_a_cut_off_rollout_fails():
    trees, totals = forest(10), set()
    def sampler(prompts, seeds, max_total):
        totals.add(max_total)
        return [Completion([1] * (max_total - len(p)), [-.7] * (max_total - len(p)), False) for p in prompts]
    pairs, rows, counts = run(trees, sampler, band=(0., 1.))
    assert totals == {20} and not any(r['success'] for r in rows) and all(k == 0 for r in rows for _, n, k in r['estimates'])
    with pytest.raises(ValueError, match='q100'): run(trees, max_total=1)


def test_a_raising_oracle_is_counted():
    trees = forest(3)
    def oracle(question, text): raise RuntimeError
    _, rows, counts = pts.search([dict(id='a')] * 3, [[i] for i in trees], pts.tree_sampler(trees), NUMBERS, oracle, max_total=20)
    assert rows == [] and counts['oracle_errors'] == counts['rollouts'] == 60


def test_on_a_transformer(tmp_path):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(32, 32, 2, 4, 2, 64, 64)).eval()
    model.lm_head.weight.data *= 20
    questions, prompts = [dict(id=str(i)) for i in range(6)], [[i + 1, 5] for i in range(6)]
    odd = lambda question, text: sum(map(int, text.split())) % 2 == 1
    def go(sampler, **kw): return pts.search(questions, prompts, sampler, NUMBERS, odd, max_total=16, n_samples=10, filter_samples=10, chunk_size=3, **kw)
    sampler = pts.model_sampler(model, stop_ids=(0,))
    whole = go(sampler)
    def breaking(*args):
        if any(tmp_path.iterdir()): raise KeyboardInterrupt
        return sampler(*args)
    with pytest.raises(KeyboardInterrupt): go(breaking, work_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1 and go(sampler, work_dir=tmp_path) == whole and whole[0]
    row = whole[1][0]
    with torch.no_grad(): logp = model(torch.tensor([row['prompt_ids'] + row['tokens']])).log_softmax(-1)[0]
    start = len(row['prompt_ids']) - 1
    assert all(abs(logp[start + i, t].item() - lp) < 1e-4 for i, (t, lp) in enumerate(zip(row['tokens'], row['logprobs'])))


def test_trace_and_figure():
    trees = forest(8)
    row = run(trees, band=(0., 1.))[1][0]
    counts = pts.trace(dict(id='x'), row, pts.tree_sampler(trees), NUMBERS, ends_in_1, max_total=20, n_samples=300)
    assert all(abs(pts.ratio(c) - p) < 5 * math.sqrt(.25 / c[0]) for c, p in zip(counts, exact(trees, row))) and counts[-1] == (1, row['success'])
    figure = pts.figure3(['a $x$\n', ' b_{1}', ' c'], [.5, .9, .1, .1], [-.1, -3., -.1])
    figure.canvas.draw()
    text = figure.axes[0]
    assert len(text.patches) == 3 and [p.get_edgecolor()[3] for p in text.patches] == [1, 1, 0] and len(text.lines) == 1
