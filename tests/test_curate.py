"The organic pipeline: planted defects go, traps stay, labels decide nothing."
import json

import pytest

from phi4_ref.data.curate import OWN_DEFECTS, curate, precision_recall
from phi4_ref.teacher import WorldTeacher
from phi4_ref.world import World


@pytest.fixture(scope='module')
def run():
    world = World(3, pages=1200)
    pages, teacher = world.pages(), WorldTeacher(world, error_rate=0.1)
    before = json.dumps(pages)
    documents, table = curate(pages, teacher, world.benchmarks())
    assert json.dumps(pages) == before, 'curate changed the pages it was given'
    return world, pages, teacher, documents, table


def test_the_table_adds_up(run):
    _, pages, _, documents, table = run
    assert [r['step'] for r in table] == list(OWN_DEFECTS)
    assert all(set(r) == {'step', 'in', 'out', 'seconds', 'precision', 'recall'} for r in table)
    assert table[0]['in'] == len(pages) and table[-1]['out'] == len(documents)
    assert all(a['out'] == b['in'] for a, b in zip(table, table[1:]))


def test_planted_defects_go_and_clean_pages_stay(run):
    _, pages, _, documents, table = run
    row = {r['step']: r for r in table}
    for step in ('language', 'outliers', 'exact copies', 'near copies', 'quality', 'benchmarks'): assert row[step]['recall'] >= 0.9, row[step]
    for step in ('language', 'outliers', 'exact copies', 'near copies', 'quality'): assert row[step]['precision'] >= 0.9, row[step]
    left = [d['meta']['defect'] for d in documents]
    assert not {'language', 'corrupted', 'repetitive', 'low_quality', 'leak'} & set(left)
    origins = [d['meta'].get('of') or d['meta']['page'] for d in documents]
    assert len(set(origins)) >= 0.99 * len(origins)
    clean = {p['id'] for p in pages if p['meta']['defect'] is None}
    assert len(clean & set(origins)) >= 0.97 * len(clean)


def test_the_boilerplate_trap_is_kept(run):
    _, pages, _, documents, _ = run
    traps = {p['id'] for p in pages if 'trap' in p['meta']}
    kept = {d['meta'].get('of') or d['meta']['page'] for d in documents}
    assert traps and len(traps & kept) >= 0.8 * len(traps)


def test_partial_leaks_are_marked_and_kept(run):
    documents = run[3]
    partial = [d for d in documents if d['meta']['defect'] == 'partial_leak']
    assert partial and sum('contamination' in d['meta'] for d in partial) >= 0.7 * len(partial)
    mark = next(d['meta']['contamination'] for d in partial if 'contamination' in d['meta'])
    assert mark['item'].startswith('arithmetic/') and 0.3 < mark['ratio'] < 0.7


def test_documents_are_documents(run):
    documents = run[3]
    assert all(set(d) == {'id', 'text', 'source', 'lang', 'meta'} and d['source'] == 'web' and d['lang'] in ('en', 'und') for d in documents)
    assert len({d['id'] for d in documents}) == len(documents)
    assert all(2 <= d['meta']['quality'] <= 5 for d in documents)


def test_labels_decide_nothing_and_runs_repeat(run):
    world, pages, teacher, _, _ = run
    few = pages[:350]
    with_labels, _ = curate(few, teacher, world.benchmarks(), seed=5)
    without, table = curate([{**p, 'meta': {}} for p in few], teacher, world.benchmarks(), seed=5)
    assert [d['text'] for d in with_labels] == [d['text'] for d in without]
    assert all(r['precision'] is None and r['recall'] is None for r in table)
    assert curate(few, teacher, world.benchmarks(), seed=5)[0] == with_labels


def test_languages_can_be_chosen(run):
    world, pages, teacher, _, _ = run
    german = [p for p in pages if p['meta'].get('lang') == 'de'] + pages[:250]
    documents, _ = curate(german, teacher, {}, languages=('en', 'de'), min_quality=0)
    assert any(d['lang'] == 'de' for d in documents)


def test_mistakes_are_explained(run):
    world, pages, teacher, _, _ = run
    with pytest.raises(ValueError, match='no pages'): curate([], teacher, {})
    with pytest.raises(ValueError, match="step 'language' left none"): 
        curate([p for p in pages if p['meta'].get('lang') == 'de'], teacher, {})
    with pytest.raises(ValueError, match="step 'quality' left none"): curate(pages[:200], teacher, {}, min_quality=6)

    class Broken:
        name = 'broken-model'
        def chat(self, conversations, **_): return ['I would rather not say.'] * len(conversations)
    with pytest.raises(ValueError, match='broken-model gave 0 usable ratings'): curate(pages[:60], Broken(), {})


def document(page, defect, of=None): return {'id': page, 'text': page, 'meta': {'page': page, 'defect': defect} | ({'of': of} if of else {})}


def test_precision_and_recall():
    documents = [document('a', None), document('a2', 'near_duplicate', 'a'), document('b', None), document('c', 'leak'), document('d', 'corrupted')]
    near, leak = OWN_DEFECTS['near copies'], OWN_DEFECTS['benchmarks']
    assert precision_recall(documents, {1: 0}, near) == (1.0, 1.0)
    assert precision_recall(documents, {0: 1}, near) == (1.0, 1.0)      # of two copies either may stay
    assert precision_recall(documents, {2: 0}, near) == (0.0, 0.0)      # merged two different pages
    assert precision_recall(documents, {3: None, 4: None, 2: None, 0: None}, leak) == (0.5, 1.0)  # any defect counts as right
    assert precision_recall(documents, {}, leak) == (None, 0.0)
    assert precision_recall([{'id': 'x', 'text': '', 'meta': {}}], {0: None}, leak) == (None, None)
