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
from phi4_ref.synth.llm import ReplyStore

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
    rows = [dict(id=f'q{i}', kind='tree') for i in trees]
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
    trees = forest(12)
    class Killed(Exception): pass
    whole = run(trees, chunk_size=4, confirm_samples=40)
    for limit in range(1, 16):
        left, file = [limit], tmp_path/f'{limit}.sqlite'
        def sampler(*args):
            left[0] -= 1
            if left[0] < 0: raise Killed
            return pts.tree_sampler(trees)(*args)
        try: run(trees, pts.stored(sampler, file, 'trees'), chunk_size=4, confirm_samples=40)
        except Killed: pass
        assert run(trees, pts.stored(pts.tree_sampler(trees), file, 'trees'), chunk_size=4, confirm_samples=40) == whole


def counting(trees):
    drawn = []
    def sampler(prompts, seeds, max_total):
        drawn.append(len(prompts))
        return pts.tree_sampler(trees)(prompts, seeds, max_total)
    return sampler, drawn


def test_a_sampler_that_fails_within_a_call_loses_one_slice(tmp_path):
    trees, bad = forest(8), set()
    sampler, drawn = counting(trees)
    def failing(prompts, seeds, max_total):
        if bad & set(seeds): raise ConnectionError
        return sampler(prompts, seeds, max_total)
    failing.slice = 7
    settings = dict(band=(0., 1.), segments='complete', confirm_samples=20)
    whole, asked = run(trees, **settings), [[i] for i in trees for _ in range(10)]
    kept = pts.stored(failing, tmp_path/'a.sqlite', 'trees')
    bad.add(23)
    with pytest.raises(ConnectionError): kept(asked, list(range(80)), 20)
    assert len(ReplyStore(tmp_path/'a.sqlite')) == sum(drawn) == 21
    bad.clear()
    assert kept(asked, list(range(80)), 20) == pts.tree_sampler(trees)(asked, list(range(80)), 20) and sum(drawn) == 80 and max(drawn) == 7
    assert kept(asked * 2, [*range(80)] * 2, 20)[:80] == kept(asked, list(range(80)), 20) and sum(drawn) == 80
    assert run(trees, pts.stored(failing, tmp_path/'b.sqlite', 'trees'), **settings) == whole
    engine = pts.model_sampler(None, (0,), batch_size=3)
    assert engine.slice >= 2 * 3, 'slices as small as the batch would leave rows of it idle'


@pytest.mark.parametrize('split', ['length', 'surprisal'])
def test_how_segments_are_halved(split, monkeypatch):
    used, plain = set(), pts.split_point
    monkeypatch.setattr(pts, 'split_point', lambda logprobs, by='surprisal': used.add(by) or plain(logprobs, by))
    trees = forest(60)
    pairs, rows, counts = run(trees, n_samples=60, split=split)
    assert used == {split} and counts['pairs'] > 10 and sum(p in t['pivots'] for t in rows for p in t['pivots']) >= counts['pairs']
    at = {split: [p for t in run(trees, n_samples=60, split=split)[1] for p, *_ in t['estimates']] for split in ('length', 'surprisal')}
    assert at['length'] != at['surprisal']


def test_choices_that_are_none_are_refused_before_a_rollout():
    def undrawn(*_): raise AssertionError('a rollout was drawn')
    for wrong, said in ((dict(split='lenght'), "split='lenght'"), (dict(band=(.8, .2)), 'band='), (dict(band=(20, 80)), 'band='), (dict(fdr=5), 'fdr=5')):
        with pytest.raises(ValueError, match=said): run(forest(2), undrawn, **wrong)
    with pytest.raises(ValueError, match="split='lenght'"): pts.split_point([-1., -2.], 'lenght')
    assert pts.split_point([-9., -1., -1., -1.], 'length') == 2 and pts.split_point([-9., -1., -1., -1.]) == 1


def test_stored_rollouts_are_not_drawn_again_and_a_larger_search_adds_to_them(tmp_path):
    trees = forest(6)
    sampler, drawn = counting(trees)
    def go(policy='a', **settings):
        drawn.clear()
        found = run(trees, pts.stored(sampler, tmp_path/'r.sqlite', policy), band=(0., 1.), **settings)
        return found, sum(drawn)
    first, n = go(n_samples=10, filter_samples=10)
    assert n == first[2]['rollouts'] > 60 and go(n_samples=10, filter_samples=10) == (first, 0)
    more, extra = go(n_samples=10, filter_samples=25)
    assert more[2]['rollouts'] - extra >= 60 and more == run(trees, band=(0., 1.), n_samples=10, filter_samples=25)
    assert go(n_samples=10, filter_samples=10, policy='b') == (first, n) and go(n_samples=10, filter_samples=10, max_total=21)[1] == n
    (tmp_path/'bad.sqlite').write_text('no database, but a text that is long enough to be read as one')
    with pytest.raises(ValueError, match='bad.sqlite'): pts.stored(sampler, tmp_path/'bad.sqlite', 'a')


def pivot_truth(trees, r):
    at = lambda ids: pts.tree_success(pts.tree_at(trees[r['prompt_ids'][0]][1], r['prompt_ids'][1:] + ids))
    return at([r['meta']['pivot_token_id']]) - at([])


def test_confirmed_pivots_are_true_and_the_rest_is_mostly_not():
    """A false pivot truly changes p by less than the margin; at most 5% of the confirmed ones may be (here: of hundreds, with the slack of three standard errors)."""
    trees = forest(300, seed=8)
    proposed, _, counts = run(trees, n_samples=12, filter_samples=12, p_gap=.15)
    pairs, _, counts = run(trees, n_samples=12, filter_samples=12, p_gap=.15, confirm_samples=80, margin=.15)
    inside = lambda r: not isinstance(pts.tree_at(trees[r['prompt_ids'][0]][1], r['prompt_ids'][1:]), bool) and r['meta']['pivot_token_id'] in pts.tree_at(trees[r['prompt_ids'][0]][1], r['prompt_ids'][1:])
    false = lambda rows: [abs(pivot_truth(trees, r)) < .15 for r in rows if inside(r)]
    assert counts['candidates'] == len(proposed) and counts['pairs'] == len(pairs) > 60 and counts['confirming_tokens'] > 0
    assert sum(false(proposed)) > .08 * len(proposed) and sum(false(pairs)) <= .05 * len(pairs) + 3 * math.sqrt(.05 * .95 * len(pairs))
    for r in pairs:
        m = r['meta']
        assert m['q_value'] <= .05 and m['p_value'] <= m['q_value'] + 1e-12 and m['change_low'] <= m['change'] <= m['change_high'] and m['change'] * m['prob_delta'] > 0
    def excess(key, fresh):
        tested = [r for r in with_tests(trees, fresh) if inside(r)]
        return sum(math.copysign(1, r['meta']['prob_delta']) * (r['meta'][key] - pivot_truth(trees, r)) for r in tested) / len(tested)
    assert excess('prob_delta', True) > .04 and abs(excess('change', True)) < .02, 'the search overstates what it finds, fresh rollouts do not'
    assert .02 < excess('change', False) < min(.05, excess('prob_delta', False)), 'those that proposed it go on overstating it, by less'


def with_tests(trees, fresh):
    "Every candidate with its test, whatever its q-value."
    return run(trees, n_samples=12, filter_samples=12, p_gap=.15, confirm_samples=80, margin=0., fdr=1., fresh=fresh)[0]


def test_the_test_of_all_rollouts_counts_what_could_have_been_proposed_and_costs_less():
    trees = forest(200, seed=3)
    settings = dict(n_samples=12, filter_samples=12, confirm_samples=40)
    proposed, (every, _, counts), (fresh, _, anew) = run(trees, n_samples=12, filter_samples=12)[2], run(trees, **settings), run(trees, **settings, fresh=True)
    assert counts['candidates'] == anew['candidates'] == proposed['candidates'] < counts['tested_tokens'], 'the test does not change what is proposed'
    assert counts['confirming_tokens'] < .8 * anew['confirming_tokens'] and len(every) >= .9 * len(fresh)
    p = [r['meta']['p_value'] for r in every]
    assert max(p) * counts['tested_tokens'] / len(p) == pytest.approx(max(r['meta']['q_value'] for r in every)), 'Benjamini-Hochberg over all tested tokens'
    last = max(fresh, key=lambda r: r['meta']['p_value'])['meta']
    assert last['p_value'] * anew['candidates'] / len(fresh) == pytest.approx(last['q_value']), 'and over the candidates alone where the rollouts are fresh'
    for r in every: assert r['meta']['n_own'] + r['meta']['n_others'] >= 12 and r['meta']['kind'] == 'tree'
    assert min(r['meta']['n_own'] + r['meta']['n_others'] for r in fresh) >= 12


def test_the_first_rollouts_drop_only_what_is_settled():
    trees = {100 + i: (1., {1: (p, True), 0: (1 - p, False)}) for i, p in enumerate([0.] * 20 + [1.] * 20 + [.5] * 20)}
    whole, every = run(trees, filter_samples=20), run(trees, filter_samples=20, band=(0., 1.))
    first = pts.FIRST
    assert whole[2]['in_band'] >= 17 and every[2]['in_band'] == 60, 'a band that holds 0 and 1 drops nothing'
    assert whole[2]['rollouts'] < every[2]['rollouts'] - 40 * (20 - first) + 1


def test_places_named_twice_are_topped_up_once():
    trees = forest(1, seed=5)
    (root, _), = [(i, t) for i, t in trees.items()]
    case, sampling = pts.Case(dict(id='q'), [root]), pts.Sampling(pts.tree_sampler(trees), NUMBERS, ends_in_1, 20)
    pts.top_up([(case, 0, 4), (case, 0, 9), (case, 0, 2)], sampling)
    assert case.counts(0)[0] == 9 and len({str(r) for r in case.rollouts}) > 1
    one = pts.Case(dict(id='q'), [root])
    pts.top_up([(one, 0, 9)], sampling)
    assert one.rollouts == case.rollouts


def test_where_tokens_do_not_matter_nothing_is_confirmed():
    rng = random.Random(4)
    def coin(depth): return {10: (.5, {1: (.5, True), 0: (.5, False)}), 11: (.5, coin(depth - 1))} if depth else {1: (.5, True), 0: (.5, False)}
    trees = {100 + i: (1., coin(4)) for i in range(150)}
    oracle = lambda question, text: rng.random() < .5
    def go(**kw): return pts.search([dict(id=f'q{i}') for i in trees], [[i] for i in trees], pts.tree_sampler(trees), NUMBERS, oracle, max_total=20, n_samples=12, filter_samples=12, **kw)
    assert len(go()[0]) > 30
    for margin in (None, 0.):
        pairs, _, counts = go(confirm_samples=60, margin=margin)
        assert len(pairs) <= 2 and counts['null_pairs'] <= 1


def test_a_whole_search_on_nothing_confirms_next_to_nothing():
    trees, settings = forest(300, seed=8), dict(n_samples=12, filter_samples=12, confirm_samples=40)
    questions, prompts, sampler = [dict(id=f'q{i}') for i in trees], [[i] for i in trees], pts.tree_sampler(trees)
    pairs, trajectories, counts = pts.search(questions, prompts, sampler, NUMBERS, ends_in_1, max_total=20, **settings)
    null = pts.null_search(questions, prompts, trajectories, sampler, NUMBERS, max_total=20, **settings)
    assert null['in_band'] == counts['in_band'] < len(trees), 'every question that was searched, and no other'
    assert null['candidates'] > 10 and null['pairs'] <= .05 * len(pairs) + 1
    assert pts.null_search(questions, prompts, trajectories, sampler, NUMBERS, max_total=20, **settings) == null
    chance, (t, *_) = pts.chance_oracle(trajectories), trajectories
    n, k = t['estimates'][0][1:]
    assert abs(sum(chance(dict(id=t['question_id']), '') for _ in range(2000)) / 2000 - k / n) < .05


def test_pivots_that_cancel_are_found_by_more_segments():
    case = lambda: pts.Case(dict(id='q'), [0], [10, 30, 1], [math.log(.5)] * 3, False, memo={0: (4, 2), 1: (4, 3), 2: (4, 2), 3: (4, 2)})
    whole, every = case(), case()
    pts.subdivide_cases([whole], None, 1, .2)
    pts.subdivide_cases([every], None, 1, .2, segments='complete')
    assert whole.pivots == [] and every.pivots == [0, 1]
    parts = case()
    pts.subdivide_cases([parts], None, 1, .2, segments=3)
    assert parts.pivots == [0, 1]
    for bad in (0, 'all', 1.5):
        with pytest.raises(ValueError, match='segments'): run(forest(2), segments=bad)


@given(st.lists(st.floats(-9, -.001), min_size=1, max_size=40), st.integers(1, 9))
def test_first_segments_cover_everything_that_could_be_pivotal(logprobs, segments):
    for wanted in (segments, 'complete'):
        found = pts.first_segments(logprobs, wanted, .2)
        assert all(a < b for a, b in found) and all(b <= c for (_, b), (c, _) in zip(found, found[1:]))
        inside = {i for a, b in found for i in range(a, b)}
        assert all(i in inside for i, lp in enumerate(logprobs) if not pts.certified([lp], .2))


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
    def oracle(question, text):
        if question['id'] == 'c': return False
        raise RuntimeError
    with pytest.warns(RuntimeWarning): _, rows, counts = pts.search([dict(id=i) for i in 'abc'], [[i] for i in trees], pts.tree_sampler(trees), NUMBERS, oracle, max_total=20)
    assert rows == [] and counts['oracle_errors'] == 2 * pts.FIRST and counts['rollouts'] == 3 * pts.FIRST


def test_on_a_transformer(tmp_path):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(32, 32, 2, 4, 2, 64, 64)).eval()
    model.lm_head.weight.data *= 20
    questions, prompts = [dict(id=str(i)) for i in range(6)], [[i + 1, 5] for i in range(6)]
    odd = lambda question, text: sum(map(int, text.split())) % 2 == 1
    def go(sampler, **kw): return pts.search(questions, prompts, sampler, NUMBERS, odd, max_total=16, n_samples=10, filter_samples=10, chunk_size=3, **kw)
    sampler = pts.model_sampler(model, stop_ids=(0,))
    whole = go(sampler)
    calls = [0]
    def breaking(*args):
        calls[0] += 1
        if calls[0] > 4: raise KeyboardInterrupt
        return sampler(*args)
    with pytest.raises(KeyboardInterrupt): go(pts.stored(breaking, tmp_path/'r.sqlite', 'm'))
    assert go(pts.stored(sampler, tmp_path/'r.sqlite', 'm')) == whole and whole[0]
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


@pytest.mark.parametrize('change, says', [(dict(p_gap=0.), 'p_gap=0.0 must be in'), (dict(p_gap=1.), 'p_gap=1.0'), (dict(p_gap=20), 'p_gap=20'), (dict(band=(.8, .2)), 'band='), (dict(band=(20, 80)), 'band='), (dict(n_samples=0), 'n_samples=0'),
    (dict(filter_samples=0), 'filter_samples=0'), (dict(trajectories=0), 'trajectories=0'), (dict(chunk_size=0), 'chunk_size=0'), (dict(confirm_samples=-1), 'confirm_samples=-1'), (dict(split='middle'), "split='middle'"), (dict(fdr=5), 'fdr=5'),
    (dict(max_total=None), 'max_total=None')])
def test_settings_that_cannot_be_are_refused_before_a_rollout(change, says):
    def undrawn(*_): raise AssertionError('a rollout was drawn')
    with pytest.raises(ValueError, match=says): run(forest(2), undrawn, **change)


def test_questions_that_cannot_be_searched_are_named_before_a_rollout():
    def undrawn(*_): raise AssertionError('a rollout was drawn')
    row = lambda i, **more: dict(id=i, kind='problem', question='1 + 1?', answer='2', meta={}) | more
    go = lambda rows, prompts, **kw: pts.search(rows, prompts, undrawn, NUMBERS, max_total=20, **kw)
    with pytest.raises(ValueError, match="2 questions have the id 'a'"): go([row('a'), row('b'), row('a')], [[1]] * 3, oracle=ends_in_1)
    with pytest.raises(ValueError, match='question 1 has no id'): go([row('a'), dict(kind='problem')], [[1]] * 2, oracle=ends_in_1)
    with pytest.raises(ValueError, match="the prompt of 'b' has no tokens"): go([row('a'), row('b')], [[1], []])
    with pytest.raises(ValueError, match='2 questions and 1 prompts'): go([row('a'), row('b')], [[1]])
    with pytest.raises(ValueError, match="question 'b' has no answer"): go([row('a'), row('b', answer='')], [[1]] * 2)


def test_an_oracle_that_never_answers_ends_the_search():
    def broken(question, text): raise RuntimeError('no sandbox here')
    trees = forest(4)
    rows = [dict(id=f'q{i}', kind='tree') for i in trees]
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match='broken.* failed on all 24 completions'):
        pts.search(rows, [[i] for i in trees], pts.tree_sampler(trees), NUMBERS, broken, max_total=20)
