"The report from a made-up run directory: what it states, what it links, what it does when files are missing, broken or hostile."
import json
import random
import re

import pytest

from phi4_ref import paper
from phi4_ref.eval.claims import MARGIN, change, claims, guess_level, learns, level, no_gain, percent, pick, points, rises, stays
from phi4_ref.eval.harness import EVAL_ITEM
from phi4_ref.eval.report import CHECKPOINTS, STAGES, course, outcome_shares, read_log, showcase, smooth, table, write_report
from phi4_ref.eval.stats import Interval
from phi4_ref.records import DOCUMENT, PREFERENCE, load, save, save_json

GREEDY = {'arithmetic': (.5, .5, .5, .8, .6, .8), 'knowledge': (.6,) * 6, 'mcq': (.6,) * 6, 'code': (.4, .4, .6, .6, .6, .6), 'unknown': (.0, .0, .5, .7, .6, .9)}
WARM = dict(sft=.4, dpo=.6, dpo_shuffled=.2, dpo_full=.4, stage2_only=.4, final=.6)
LONG = {1: (.9, .9), 2: (.1, .8), 4: (.0, .6)}


def item(model, benchmark, i, p, sample=0, temperature=0., reply='The answer is 5.', **meta):
    right = (i * 37 % 100) / 100 + random.Random(f'{model}{benchmark}{i}{sample}').uniform(-.05, .05) < p
    outcome = 'incorrect' if not right else 'not attempted' if benchmark == 'unknown' else 'correct'
    return dict(model=model, benchmark=benchmark, id=f'{benchmark}-{i}-{meta.get("length", "")}', kind='problem', sample=sample, temperature=temperature,
                correct=outcome == 'correct', score=float(right), outcome=outcome, reply=reply, tokens=6, answer=str(i % 40), meta=meta)


def make_items(n=100):
    rows = [item(m, b, i, p[k]) for k, m in enumerate(CHECKPOINTS) for b, p in GREEDY.items() for i in range(n)]
    rows += [item(m, b, i, p[k], length=l) for k, m in enumerate(('base', 'midtrained')) for b in ('json_recall', 'rag', 'ledger') for l, p in LONG.items() for i in range(30)]
    return rows + [item(m, 'arithmetic', i, p, s, 1.) for m, p in WARM.items() for i in range(n) for s in range(2)]


def make_run(run, items):
    save(run/'eval/items.parquet', items, EVAL_ITEM)
    save_json(run/'curate/table.json', [{'step': 'near duplicates', 'in': 900, 'out': 800, 'precision': .91, 'recall': None}])
    save_json(run/'synth/counts.json', {'rewrite': {'seeds': 10, 'kept': 9}, 'seeds': {'in': 7, 'by_topic': {'a': 1}}})
    save_json(run/'judge/counts.json', {'prompts': 300, 'pairs': 123, 'overall_by_place': [3.1, 3.2],
        'position_bias': [dict(place=1, n=210, lift=[.25, .1, .4], wins=.5, expected=.4, excess=[.1, -.05, .25])]})
    save_json(run/'pretrain/mixture.json', [{'source': 'synthetic', 'fraction': .4, 'tokens': 1_600_000, 'unique': 400_000, 'epochs': 4.}, {'source': 'other', 'fraction': .6, 'tokens': 1, 'unique': 1, 'epochs': 1.}])
    for stage in ('pretrain', 'sft', 'dpo'):
        (run/stage).mkdir(exist_ok=True, parents=True)
        (run/stage/'log.jsonl').write_text('\n'.join(json.dumps({'step': s, 'loss': 9 / s, 'lr': 1e-3}) for s in range(1, 41)) + '\n{"step": 41, "lo')
    save_json(run/'pts/stats.json', {'questions': 200, 'pairs': 2, 'rollouts': 13696})
    save_json(run/'pts/trajectories.json', [dict(question_id='q', tokens=[1, 2, 3], logprobs=[-.1, -2., -.1], success=False, pivots=[1], estimates=[[0, 10, 6], [1, 10, 6], [2, 10, 1]],
                                                 pieces=['So', ' $9$', '\n'])])
    pair = dict(prompt='p', chosen=' |', rejected='\n', prompt_ids=[1], chosen_ids=[2], rejected_ids=[3], source='pts', meta={})
    save(run/'pts/pairs.parquet', [dict(pair, id=str(i)) for i in range(2)], PREFERENCE)
    for stage in STAGES:
        save_json(run/stage/'manifest.json', dict(stage=stage, config={}, config_hash='x', inputs={}, counts={'tokens': 5000, 'parameters': 7, 'nested': {}} if stage == 'pretrain' else {},
                                                  seed=3, seconds=10., versions={'torch': '2.13.0'}))
    return run


@pytest.fixture(scope='module')
def items(): return make_items()


@pytest.fixture
def run(tmp_path, items): return make_run(tmp_path/'toy', items)


def rows_of(text, title):
    "Cells of the first table under a heading."
    lines = text.split(f'## {title}')[1].split('\n## ')[0].splitlines()
    start = next(i for i, l in enumerate(lines) if l.startswith('| '))
    out = []
    for line in lines[start:]:
        if not line.startswith('|'): break
        out.append([c.strip() for c in re.split(r'(?<!\\)\|', line)[1:-1]])
    return out


def test_every_section_and_picture(run):
    path = write_report(run)
    text = path.read_text()
    assert path == run/'report/report.md' and text.startswith('# Report of the run `toy`')
    assert 'nothing to show' not in text and 'Not shown' not in text and 'seed 3' in text and '15 stages in 2.5 minutes' in text
    assert rows_of(text, 'Judge')[2] == ['1', '210', '+0.25 [+0.10, +0.40]', '0.50', '0.40', '+0.10 [-0.05, +0.25]']
    steps = rows_of(text.split('paired by question, with 95% intervals:')[0] + '## Steps' + text.split('paired by question, with 95% intervals:')[1], 'Steps')
    assert steps[0] == ['questions', 'step', 'correct', 'not attempted', 'incorrect', 'F1'] and ['unknown', 'base to SFT'] in [r[:2] for r in steps] and len(steps) == 8
    pictures = re.findall(r'!\[[^\]]+\]\((\w+\.png)\)', text)
    assert sorted(pictures) == ['context.png', 'controls.png', 'figure3.png', 'losses.png', 'refusals.png']
    assert all((path.parent/p).read_bytes()[:4] == b'\x89PNG' and (path.parent/p).stat().st_size < 60_000 for p in pictures)


def test_tables_hold_our_numbers_and_the_papers(run, items):
    text = write_report(run).read_text()
    head, _, *rows = rows_of(text, 'Benchmarks after each stage')
    assert head[1:] == list(CHECKPOINTS.values()) and len(rows) == 6
    arithmetic = next(r for r in rows if r[0].startswith('arithmetic'))
    assert arithmetic[4] == f"{percent(level(pick(items, 'dpo', 'arithmetic')))}<br>*{paper.TABLE_9['MATH']['stage 1']}*" and '<br>' not in arithmetic[1]
    assert rows[-1][0] == 'arithmetic, temperature 1' and rows[-1][1] == '' and '<br>' not in rows[-1][3]
    assert f"*MATH {80.5 - 77.1:+.1f}*" in text and '*TQA -0.8*' in text
    mixture = rows_of(text, 'Mixture')
    assert mixture[2] == ['synthetic', '40%', '400,000', '4.0', '40%', '290B', '13.8'] and mixture[3][4:] == ['', '', '']
    assert rows_of(text, 'Curation')[2] == ['near duplicates', '900', '800', '0.91', '']
    assert rows_of(text, 'Synthesis')[2:] == [['rewrite', 'seeds 10, kept 9'], ['seeds', 'in 7']]
    assert ['pretrain', '10', '5,000', '500', 'parameters 7'] in rows_of(text, 'Time and tokens')
    assert rows_of(text, 'Context length')[2][:2] == ['json_recall', '1x'] and len(rows_of(text, 'Context length')) == 11
    assert 'pairs 123' in text and '[3.1' not in text and 'rollouts 13,696' in text


def test_verdicts_follow_the_intervals(items):
    verdict = {c.text: c for c in claims(items)}
    assert verdict['Pivotal-token DPO beats SFT at temperature 1'].verdict == 'holds' and verdict['Shuffled pairs do not beat SFT'].verdict == 'holds'
    assert verdict['Midtraining lifts recall at 4x the context'].verdict == 'holds' and verdict['Midtraining lifts recall at 4x the context'].interval.n == 90
    assert verdict['The final model refuses more unknown facts than SFT'].verdict == 'holds'
    swap = {'sft': 'dpo', 'dpo': 'sft', 'base': 'midtrained', 'midtrained': 'base'}
    other = {c.text: c.verdict for c in claims([{**r, 'model': swap.get(r['model'], r['model'])} for r in items])}
    assert other['Pivotal-token DPO beats SFT at temperature 1'] == 'does not hold' and other['Midtraining lifts recall at 2x the context'] == 'does not hold'
    forgets = {c.text: c for c in claims([{**r, 'score': 0.} if r['model'] == 'midtrained' and r['benchmark'] == 'arithmetic' else r for r in items])}
    assert forgets['Midtraining keeps the short benchmarks'].verdict == 'does not hold' and verdict['Midtraining keeps the short benchmarks'].verdict == 'holds'
    silent = {c.text: c.verdict for c in claims([{**r, 'score': 0., 'outcome': 'not attempted'} if r['model'] == 'final' and r['benchmark'] == 'knowledge' else r for r in items])}
    assert silent['The final model still answers the facts it knew'] == 'does not hold' and silent['The final model refuses unknown facts more than known ones'] != 'holds'
    nothing = {c.text: c for c in claims([{**r, 'score': 0.} if r['meta'].get('length') == 1 else r for r in items])}
    assert nothing['Midtraining keeps recall at 1x'].verdict == 'not resolved' and 'little to keep' in nothing['Midtraining keeps recall at 1x'].evidence
    few = {c.text: c.verdict for c in claims([r for r in items if r['id'].split('-')[1] in '12'])}
    assert few['Midtraining keeps recall at 1x'] == 'not resolved'


def test_rules_at_their_edges():
    at = lambda low, high: Interval((low + high) / 2, low, high, 100)
    assert [rises('', at(*e)).verdict for e in ((.01, .1), (-.01, .1), (-.1, -.01))] == ['holds', 'not resolved', 'does not hold']
    assert [stays('', at(*e)).verdict for e in ((-MARGIN + .01, 0), (-MARGIN - .01, 0), (-.2, -MARGIN - .01))] == ['holds', 'not resolved', 'does not hold']
    assert [no_gain('', at(*e)).verdict for e in ((-.1, MARGIN - .01), (-.1, MARGIN + .01), (.01, MARGIN - .01))] == ['holds', 'not resolved', 'does not hold']
    assert rises('', None).verdict == 'not measured'


def test_guessing_is_not_learning():
    rows = [dict(benchmark='k', id=str(i), score=float(i % 4 == 0), answer='cat' if i % 4 == 0 else f'x{i}', meta={'attribute': 'pet'}) for i in range(80)]
    assert guess_level(rows) == .25 and learns('facts', rows).verdict == 'not resolved'
    assert learns('facts', [dict(r, score=1.) for r in rows]).verdict == 'holds'
    assert guess_level([dict(answer='a', meta={'choices': list('abcd')})] * 3) == .25


def test_changes_pair_by_question_and_sample(items):
    a, b = pick(items, 'sft', 'arithmetic', True), pick(items, 'dpo', 'arithmetic', True)
    assert change(a, b) == change(list(reversed(a)), b) and change(a, b[:10]).n == 5 and change(a, []) is None
    assert {r['temperature'] for r in pick(items, 'sft', 'arithmetic')} == {0.} and points(None) == '' and points(Interval(-.001, -.02, .03, 9)) == '+0 [-2, +3]'


def test_missing_files_are_named(tmp_path, run):
    text = write_report(make_empty := tmp_path/'empty_run', tmp_path/'out').read_text() if (tmp_path/'empty_run').mkdir() is None else ''
    assert text.count('nothing to show here') == 11 and '`pts/stats.json`, `pts/trajectories.json`' in text and '15 were not measured' in text
    (run/'judge/counts.json').unlink(); (run/'dpo/log.jsonl').unlink()
    text = write_report(run).read_text()
    assert text.count('nothing to show here') == 1 and 'This run has no `judge/counts.json`' in text and '| sft | 40 |' in text and '| dpo | 40 |' not in text
    with pytest.raises(ValueError, match='no run directory'): write_report(tmp_path/'nowhere')


def test_a_manifest_or_items_of_another_kind_are_named(run):
    save_json(run/'sft/manifest.json', {})
    with pytest.raises(ValueError, match='sft/manifest.json lacks seconds'): write_report(run)
    (run/'report_file').write_text('')
    with pytest.raises(ValueError, match='cannot make the directory .*report_file'): write_report(run, run/'report_file')
    save(run/'eval/items.parquet', [dict(id='a', text='', source='', lang='', meta={})], DOCUMENT)
    with pytest.raises(ValueError, match='items.parquet lacks the columns'): write_report(run)


def test_broken_files_cost_their_section_only(run):
    (run/'curate/table.json').write_text('[{"step": ')
    save_json(run/'pretrain/mixture.json', [{'fraction': 1}])
    text = write_report(run).read_text()
    assert text.count('Not shown, because') == 2 and 'table.json' in text and '## Judge' in text and "KeyError('source')" in text


def test_trajectories_without_text_are_decoded_or_say_so(run):
    rows = [{k: v for k, v in r.items() if k != 'pieces'} for r in load_rows(run)]
    save_json(run/'pts/trajectories.json', rows)
    assert 'no sft/tokenizer.json' in write_report(run).read_text()
    from phi4_ref.model.tokenizer import train_tokenizer
    train_tokenizer(['So 9 is it'], 300).save_pretrained(run/'sft')
    assert '(figure3.png)' in write_report(run).read_text()
    save_json(run/'pts/trajectories.json', [])
    assert 'no trajectory to draw' in write_report(run).read_text()


def load_rows(run): return json.loads((run/'pts/trajectories.json').read_text())


def test_replies_cannot_break_the_page(tmp_path, items):
    hostile = '<script>alert(1)</script>\n## Judge\n```\n| a | b |\n![x](http://evil/x.png)'
    run = make_run(tmp_path/'toy', [dict(r, reply=hostile) if r['benchmark'] == 'arithmetic' else r for r in items])
    text = write_report(run).read_text()
    assert text.count('\n## ') == 13 and '\n```' not in text
    lines = [l for l in text.splitlines() if 'alert(1)' in l]
    assert lines and all(l.startswith('    ') for l in lines)
    assert '| `" \\|"` | `"\\n"` | 2 |' in text  # token strings in a table keep their place


def test_written_again_it_is_the_same(run, tmp_path):
    a, b = write_report(run), write_report(run, tmp_path/'again')
    assert a.read_text() == b.read_text() and all(p.read_bytes() == (b.parent/p.name).read_bytes() for p in a.parent.iterdir())


def test_small_parts():
    assert table(['a', 'b'], [['x', '+3 [1, 5]'], ['y', None]]).splitlines()[1] == '| :-- | --: |'
    assert course(dict(tokens=[1, 2], success=True, estimates=[[0, 4, 1]])) == [.25, .25, 1.]
    assert course(dict(tokens=[1], trace=[[4, 1], [0, 0]], success=True, estimates=[])) == [.25, 0.]
    assert showcase([dict(tokens=[1], pivots=[0, 1]), dict(tokens=[1], pivots=[0], trace=[[1, 1]])])['pivots'] == [0]
    assert smooth([(1, 2.), (2, 4.)], over=2) == [(1, 2.), (2, 3.)]


def test_the_papers_bars_are_figure_6(items):
    panels = outcome_shares(items)
    assert panels['SimpleQA (phi-4 Figure 6)']['final'] == {'correct': 3.0, 'not attempted': 81.1, 'incorrect': 15.8}
    assert panels['unknown']['base'] == {'correct': 0., 'not attempted': pytest.approx(0, abs=6), 'incorrect': pytest.approx(100, abs=6)}
    assert all(sum(s.values()) == pytest.approx(100, abs=.2) for p in panels.values() for s in p.values())
