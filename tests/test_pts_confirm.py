"The test that a pivot must pass, on all rollouts or on fresh ones, the runs on nothing that are reported beside it, and how many rollouts both take."
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest

from phi4_ref import run
from phi4_ref.config import load_config
from phi4_ref.post import pts
from phi4_ref.post.statistics import newcombe, p_value
from phi4_ref.records import QUESTION, load, load_json, save

NUMBERS = SimpleNamespace(decode=lambda ids, skip_special_tokens=False: ' '.join(map(str, ids)))
def ends_in_1(question, text): return text.endswith(' 1')
def coin(p): return {1: (p, True), 0: (1 - p, False)}


def candidate(q, own, other, up=None):
    "A question whose first token is 10 with probability q, and then right with probability `own`, else with `other`; found to rise or to fall there."
    up = own > other if up is None else up
    case = pts.Case(dict(id='q'), [100], [10, 1], [math.log(q), math.log(own)], True, rollouts=[(0, [10, 1], True)] * 30)
    tree = {100: (1., {10: (q, coin(own)), 11: (1 - q, coin(other))})}
    return tree, (case, dict(position=0, before=(10, 5), after=(10, 9 if up else 1)))


def confirmed(trees_and_found, confirm_samples=80, margin=0., seed=0, fresh=True, **how):
    "The verdicts on such candidates, by default without the rollouts that they have, and the rollouts drawn: (prompt, seed)."
    drawn, (trees, found) = [], zip(*trees_and_found)
    for i, (case, _) in enumerate(found): case.prompt, case.question = [100 + i], dict(id=f'q{i}')
    tree = {100 + i: t[100] for i, t in enumerate(trees)}
    def sampler(prompts, seeds, max_total):
        drawn.extend(zip(map(tuple, prompts), seeds))
        return pts.tree_sampler(tree)(prompts, seeds, max_total)
    return pts.confirm(list(found), pts.Sampling(sampler, NUMBERS, ends_in_1, 20, seed), confirm_samples, margin, **dict(p_gap=margin) | how, fresh=fresh), drawn


def test_what_is_sure_and_what_is_hopeless_is_drawn_no_further():
    clear, wrong, faint = candidate(.5, .98, .02), candidate(.5, .1, .6, up=True), candidate(.5, .75, .4)
    (sure, hopeless, long), _ = confirmed([clear, wrong, faint], margin=.1)
    before = lambda v: v['n_own'] + v['n_others']
    assert 20 <= before(sure) <= 30 and sure['p_value'] <= .01
    assert before(hopeless) < 80 and hopeless['change'] < .1
    assert before(long) >= 80 <= before(confirmed([clear], sure=0.)[0][0]) and long['p_value'] > .01 and long['change'] >= .1
    assert len({before(confirmed([clear], sure=s)[0][0]) for s in (1e-4, 1e-30)}) == 2
    falls = confirmed([candidate(.5, .02, .98)], margin=.1, sure=0.)[0][0]
    assert falls['change'] < -.1 and before(falls) >= 80 and falls['p_value'] < 1e-6, 'a fall is followed as a rise is'


def test_the_pivots_token_is_seen_at_least_half_as_often_as_the_prefix():
    (rare,), drawn = confirmed([candidate(.1, .9, .1)], sure=0.)
    behind = sum(prompt == (100, 10) for prompt, _ in drawn)
    assert len(drawn) - behind == 80 and behind > 20 and rare['n_own'] == 40 and rare['n_own'] + rare['n_others'] == len(drawn)
    (common,), drawn = confirmed([candidate(.9, .9, .1)], sure=0.)
    assert len(drawn) == 80 == common['n_own'] + common['n_others'], 'seen often enough without rollouts of its own'


def test_a_verdict_is_the_exact_test_of_its_counts_for_all_looks():
    for q, own, other in ((.5, .95, .2), (.6, .1, .9)):
        (v,), _ = confirmed([candidate(q, own, other)], margin=.06, sure=1.)  # one look
        a, b, share = (v['n_own'], v['k_own']), (v['n_others'], v['k_others']), 1 - q
        low, high = newcombe(a, b)
        assert a[0] + b[0] < 40 and v['change'] == pytest.approx(share * (a[1] / a[0] - b[1] / b[0])) and (v['change_low'], v['change_high']) == pytest.approx((share * low, share * high))
        assert v['p_value'] == pytest.approx(2 * p_value(*((a, b) if own > other else (b, a)), .06 / share)) and v['p_value'] < .1
    tree, (case, found) = candidate(.5, .9, .1)
    case.rollouts = [(0, [10, 1], True)] * 12 + [(0, [11, 0], False)] * 8
    (v,), drawn = confirmed([(tree, (case, found))], margin=.06, sure=1., fresh=False)
    assert drawn == [] and (v['n_own'], v['k_own'], v['n_others'], v['k_others']) == (12, 12, 8, 0), 'what the search has drawn is the first look'
    assert v['p_value'] == pytest.approx(3 * p_value((12, 12), (8, 0), .06 / .5))
    (v,), drawn = confirmed([(tree, (case, found))], confirm_samples=20, sure=0., fresh=False)
    assert sum(prompt == (100,) for prompt, _ in drawn) == 20 and v['n_own'] + v['n_others'] == 20 + len(drawn) and v['n_own'] >= 20
    (one_sided,), _ = confirmed([candidate(1 - 1e-12, .5, .5)], sure=1.)
    assert one_sided['n_others'] == 0 and (one_sided['change'], one_sided['p_value']) == (0., 1.)


def test_a_verdict_once_sure_stays_so():
    "The best of the looks counts: each was paid for."
    many = [candidate(.75, .75, .45) for _ in range(30)]
    followed = confirmed(many, sure=0.)[0]
    by_look = zip(*([v['p_value'] for v in confirmed(many, confirm_samples=n, sure=1.)[0]] for n in (80, 267)))  # the first look alone, at 24 and 80 rollouts
    both = [(v['p_value'], looks) for v, looks in zip(followed, by_look) if v['n_own'] + v['n_others'] == 80]
    assert len(both) > 15 and all(p == min(looks) for p, looks in both) and any(p < looks[-1] for p, looks in both)


def forest(n, seed=0):
    rng = random.Random(seed)
    return {100 + i: candidate(.5, rng.random(), rng.random())[0][100] for i in range(n)}


def search(trees, sampler=None, seed=0, **settings):
    return pts.search([dict(id=f'q{i}') for i in trees], [[i] for i in trees], sampler or pts.tree_sampler(trees), NUMBERS, **dict(oracle=ends_in_1, max_total=20, seed=seed) | settings)


def test_no_rollout_of_the_search_is_among_fresh_ones():
    trees, drawn = forest(20), []
    def sampler(prompts, seeds, max_total):
        drawn.extend(zip(map(tuple, prompts), seeds))
        return pts.tree_sampler(trees)(prompts, seeds, max_total)
    search(trees, sampler)
    found, counts = set(drawn), search(trees, sampler, confirm_samples=40, fresh=True)[2]
    assert counts['candidates'] > 5 and len(found) < counts['rollouts'] == len(drawn) - len(found) and found.isdisjoint(drawn[2 * len(found):])


def test_a_pivot_on_several_trajectories_is_one_pair():
    pairs, rows, counts = search(forest(20), trajectories=4, confirm_samples=8, fdr=1.)
    assert len({(*r['prompt_ids'], *r['chosen_ids'], None, *r['rejected_ids']) for r in pairs}) == len(pairs) == counts['candidates'] < counts['pivots'] / 2


def test_the_margin_is_the_one_given_or_two_fifths_of_the_gap():
    def of(**kw): return {round(r['meta']['margin'], 9) for r in search(forest(12), confirm_samples=8, fdr=1., **kw)[0]}
    assert of(p_gap=.3) == {.12} and of(p_gap=.3, margin=.04) == {.04} and of(margin=0.) == {0}
    for bad in (1., -.01):
        with pytest.raises(ValueError, match='margin=.* must be in'): search(forest(2), margin=bad)


def test_confirmation_costs_what_the_counts_say_and_chance_passes_next_to_nothing():
    pairs, _, counts = search(forest(12))
    assert counts['confirming_tokens'] == 0 and 'null_pairs' not in counts and counts['pairs'] == counts['candidates'] > 2 and 'p_value' not in pairs[0]['meta']
    more = search(forest(12), confirm_samples=8)[2]
    assert more['confirming_tokens'] == more['generated_tokens'] - counts['generated_tokens'] > 0
    sure = search(forest(30), confirm_samples=40, fdr=1e-4)[2]
    assert sure['null_pairs'] < .1 * sure['pairs'] and 5 < sure['pairs'] < sure['candidates']


@pytest.mark.parametrize('fresh', [False, True])
def test_sure_is_two_thirds_of_what_the_false_discovery_rate_would_ask(fresh):
    "A candidate is drawn to the end unless it is sure or hopeless; a search that must be surer draws more."
    trees = forest(60)
    asked = [search(trees, confirm_samples=40, fdr=fdr, fresh=fresh)[2]['confirming_tokens'] for fdr in (1e-9, .05, 1.)]
    assert asked[0] > asked[1] > asked[2]
    pairs, _, counts = search(forest(300), confirm_samples=40, fdr=.5, fresh=fresh, chunk_size=300)
    sure = (1 if fresh else counts['candidates'] / counts['tested_tokens']) / 3
    stopped = [r['meta'] for r in pairs if r['meta']['n_own'] + r['meta']['n_others'] < (40 if fresh else 60)]
    assert len(stopped) > 10 and all(m['p_value'] <= sure or math.copysign(m['change'], m['change'] * m['prob_delta']) < .2 for m in stopped)


def test_what_comes_out_below_the_gap_in_the_end_does_not_pass():
    "A change of 0.15 is surely above a margin of 0.05, and below a p_gap of 0.2."
    (v, w), _ = confirmed([candidate(.5, .65, .35), candidate(.5, .95, .05)], 800, margin=.05, p_gap=.2, sure=0.)
    assert v['p_value'] == 1 and .05 < v['change'] < .2 and w['p_value'] < 1e-6 and w['change'] > .4
    assert v['n_own'] + v['n_others'] < w['n_own'] + w['n_others'], 'and is drawn no further'
    (v,), _ = confirmed([candidate(.5, .65, .35)], 800, margin=.05, p_gap=.1, sure=0.)
    assert v['p_value'] < .01
    pairs = search(forest(200), confirm_samples=40)[0]
    assert len(pairs) > 20 and all(abs(r['meta']['change']) >= .2 and (r['meta']['change'] > 0) == r['meta']['is_positive'] for r in pairs)


def test_small_p_values_stay_rare_where_the_filter_lets_in_what_was_lucky():
    "The worst that is known: the true change is just the margin, and the question gets into the band when the token did well."
    trees = {100 + i: (1., {10: (.5, coin(.2)), 11: (.5, coin(0.))}) for i in range(2000)}
    sampling = pts.Sampling(pts.tree_sampler(trees), NUMBERS, ends_in_1, 20, 0)
    _, verdicts, _, counts = pts.search_chunk([dict(id=f'q{i}') for i in trees], [[i] for i in trees], sampling, 12, 16, 1, .2, (.2, .8), 1, 'surprisal', 28, .1, .05, False)
    small, kept, n = sum(v['p_value'] <= .01 for v in verdicts), counts['eligible_tokens'], pts.tested_tokens(counts)
    assert n == round(kept * 2000 / counts['in_band']) > 1000
    assert small <= .01 * n + 3 * (.01 * n) ** .5 and small > .01 * kept + 3 * (.01 * kept) ** .5, 'among the kept questions alone they are not rare'


def verdict(n, own, others, p, side=1): return dict(n_own=n, k_own=own, n_others=n, k_others=others, side=side, share=.5, margin=.05, looks=3, p_value=p)


def test_the_false_discovery_rate_decides_over_all_candidates():
    "Benjamini and Hochberg by hand: 4 tests at 0.05."
    p = [.04, .001, .9, .02]
    kept, _ = pts.confirmed([dict(id=i, meta=dict(position=i)) for i in range(4)], [verdict(20, 15, 5, x) for x in p], .05, 0, 0)
    assert [r['id'] for r in kept] == [1, 3] and [r['meta']['q_value'] for r in kept] == pytest.approx([.004, .04])
    assert kept[0]['meta']['p_value'] == .001 and kept[0]['meta'].keys() == {'position', 'n_own', 'k_own', 'n_others', 'k_others', 'margin', 'p_value', 'q_value'}
    more, _ = pts.confirmed([dict(id=i, meta=dict(position=i)) for i in range(4)], [verdict(20, 15, 5, x) for x in p], .05, 0, 8)
    assert [r['id'] for r in more] == [1] and more[0]['meta']['q_value'] == pytest.approx(.008), 'four more that were not proposed count as tested'
    assert len(pts.confirmed([dict(meta={})] * 4, [verdict(20, 15, 5, x) for x in p], 1., 0, 0)[0]) == 4


def test_a_null_run_shuffles_the_successes_among_the_rollouts():
    found = [verdict(20, 19, 1, 1e-6)] * 10
    assert pts.passing(found, .05, 0)[1] < .5 and pts.passing(found, 1., 0)[1] == 10 and pts.passing([], .05, 0) == ([], 0.)
    p = pts.null_p_values([verdict(20, 12, 8, .1), verdict(40, 30, 10, .1) | dict(n_others=10, k_others=2)] * 20, 0)
    assert p.shape == (20, 40) and (p > 0).all() and (p <= 1).all() and len(np.unique(p)) > 4
    assert (p == pts.null_p_values([verdict(20, 12, 8, .1), verdict(40, 30, 10, .1) | dict(n_others=10, k_others=2)] * 20, 0)).all()
    others = [pts.null_p_values([verdict(20, 12, 8, .1)] * 20, seed) for seed in (0, 1)]
    assert (others[0] != others[1]).any()
    assert (pts.null_p_values([verdict(20, 12, 8, .1) | dict(margin=.45)] * 20, 0) > .5).all(), 'what is to be exceeded is the margin of the test'
    even = pts.null_p_values([verdict(40, 20, 20, 1.) | dict(margin=0.)] * 100, 0)
    assert (even <= .05).mean() <= .05 and pts.passing([verdict(40, 20, 20, 1.) | dict(margin=0.)] * 100, .05, 0)[1] <= .2 < (even <= .05).sum(1).mean(), 'the false discovery rate is that of all tests together'


def test_chance_is_right_as_often_as_the_question_was_and_repeats_itself():
    trajectories = [dict(question_id=f'q{i}', estimates=[[0, 10, k], [1, 10, 10]]) for i, k in enumerate((2, 8, 5, 5))]
    def says(i, seed=0, n=1000, text=' 1'):
        chance = pts.chance_oracle(trajectories, seed)
        return [chance(dict(id=f'q{i}'), text) for _ in range(n)]
    assert [sum(says(i)) / 1000 for i in range(3)] == pytest.approx([.2, .8, .5], abs=.07)
    assert says(2) == says(2, text=' 0') != says(3) and says(2) != says(2, seed=1)


def test_a_search_on_nothing_is_that_search_with_chance_for_an_oracle():
    trees = forest(30)
    questions, prompts, sampler, settings = [dict(id=f'q{i}') for i in trees], [[i] for i in trees], pts.tree_sampler(trees), dict(max_total=20, confirm_samples=8, seed=3)
    _, trajectories, counts = search(trees, **settings)
    searched = {t['question_id'] for t in trajectories}
    assert 5 < len(searched) < len(trees)
    kept = {i: t for i, t in trees.items() if f'q{i}' in searched}
    null = pts.null_search(questions, prompts, trajectories, sampler, NUMBERS, **settings)
    assert null == search(kept, oracle=pts.chance_oracle(trajectories, 3), band=(0., 1.), **settings)[2]
    assert null == pts.null_search(questions, prompts, trajectories, sampler, NUMBERS, oracle=ends_in_1, band=(.2, .8), **settings), 'the settings of the search, whole'


def test_a_run_searches_as_its_section_says(tiny_run, tmp_path):
    def found(out, *changes):
        stage, config = next(s for s in run.STAGES if s.name == 'pts'), load_config(tiny_run/'config.yaml', list(changes))
        counts = stage.make(stage.view(config), {name: tiny_run/name for name in stage.inputs}, tmp_path/out)
        return counts, load_json(tmp_path/out/'trajectories.json'), load(tmp_path/out/'pairs.parquet')
    plain, before = load_json(tiny_run/'pts'/'stats.json'), {t['question_id']: t for t in load_json(tiny_run/'pts'/'trajectories.json')}
    rate = lambda t: t['estimates'][0][2] / t['estimates'][0][1]
    assert 'null_pairs' not in plain and plain['confirming_tokens'] == 0 and max(map(rate, before.values())) > .2
    counts, rows, pairs = found('more', 'pts.confirm_samples=4', 'pts.fdr=1', 'pts.segments=3', 'pts.high=0.2')
    assert counts['confirming_tokens'] > 0 and counts['pairs'] == counts['candidates'] == counts['null_pairs'] == len(pairs) > 0 and all('q_value' in r['meta'] for r in pairs)
    assert max(map(rate, rows)) <= .2 and sum(len(t['estimates']) for t in rows) > sum(len(before[t['question_id']]['estimates']) for t in rows)
    counts, rows, _ = found('cold', 'pts.temperature=0.1', 'pts.p_gap=0.5', 'pts.trajectories=2')
    assert len(rows) == 2 * counts['in_band'] > 0 and min(np.mean(t['logprobs']) for t in rows) > min(np.mean(t['logprobs']) for t in before.values()) + .2
    assert counts['eligible_tokens'] == sum(not pts.certified([p], .5) for t in rows for p in t['logprobs'])


def test_a_run_searches_the_kinds_of_questions_asked_for(tiny_run, tmp_path):
    some = load(tiny_run/'synth'/'questions.parquet')[:6]
    for q in some[1::2]: q |= dict(kind='mcq', meta=dict(choices=[q['answer'], 'none'], label=0))
    save(tmp_path/'synth'/'questions.parquet', some, QUESTION)
    stage = next(s for s in run.STAGES if s.name == 'pts')
    for i, kinds in enumerate((['mcq'], ['problem'], ['problem', 'mcq'])):
        config = load_config(tiny_run/'config.yaml', [f'pts.kinds=[{",".join(kinds)}]', 'pts.filter_samples=2', 'pts.samples=2', 'pts.low=0', 'pts.high=1'])
        stage.make(stage.view(config), {name: (tmp_path if name == 'synth' else tiny_run)/name for name in stage.inputs}, tmp_path/f'out{i}')
        assert {t['question_id'] for t in load_json(tmp_path/f'out{i}'/'trajectories.json')} == {q['id'] for q in some if q['kind'] in kinds}
