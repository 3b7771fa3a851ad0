"The organic pipeline: planted defects go, traps stay, labels decide nothing."
import gzip
import json
import re
from importlib.util import find_spec

import pytest

import pyarrow as pa
import pyarrow.parquet as pq

import phi4_ref.data.collect as collect
from phi4_ref.data.collect import as_question, file_rows, from_files, load_benchmarks, local_files, save_tables, stream_rows
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


@pytest.mark.parametrize('settings, says', [(dict(info=.9, contaminated=.1), 'info=0.9, contaminated=0.1'), (dict(near_duplicate=0), 'threshold 0'), (dict(languages='en'), "languages 'en'"), (dict(languages=('english',)), "'english'")])
def test_settings_that_cannot_be_are_refused_before_any_work(run, settings, says):
    class Unasked:
        name = 'unasked'
        def chat(self, conversations, **_): raise AssertionError('a model was asked')
    with pytest.raises(ValueError, match=says): curate(run[1][:60], Unasked(), {}, **settings)


def test_a_page_without_html_is_named(run):
    for html in ({'html': None}, {'html': 3}, {}):
        with pytest.raises(ValueError, match="page 'p1'.*html"): curate([run[1][0], {'id': 'p1', 'url': '', **html}], run[2], {})


# -- files

def lines(folder, *rows):
    (folder/'a.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return dict(path=str(folder/'a.jsonl'), name=None, split='train', text='text', answer='answer', limit=None)


def tables(**source): return from_files(dict(pages=None, documents={}, questions=None, conversations=None, trivia=None, safety=None, benchmarks={}) | source)


@pytest.mark.parametrize('where, row, says', [
    ('pages', dict(text=None), "a.jsonl, row 1: column 'text' holds None, not text"), ('documents', dict(text=7), "row 1: column 'text' holds 7, not text"), ('documents', dict(txt='a'), "no column 'text'; it has"),
    ('questions', dict(text=None, answer='1'), "row 1: column 'text' holds None"), ('questions', dict(text=' ', answer='1'), "row 1: column 'text' holds ' '"), ('questions', dict(text='q', answer=['1']), "row 1: column 'answer' holds .'1'."),
    ('questions', dict(text='q', answer='1', kind='maths'), "row 1: kind 'maths' is none of problem"),
    ('trivia', dict(text='q', answer=None), "row 1: column 'answer' holds no answer"), ('benchmarks', dict(text='q', answer=''), "row 1: column 'answer' holds no answer"),
    ('benchmarks', dict(text='q', answer='B', choices=['x', 'y']), "row 1: the column 'choices' is not read"),
    ('conversations', dict(messages='hi'), "row 1: column 'messages' holds 'hi'"), ('conversations', dict(messages=None), "row 1: column 'messages' holds None"), ('conversations', dict(messages=[]), "row 1: column 'messages' holds"),
    ('conversations', {'messages': [{'from': 'human', 'value': 'x'}]}, "row 1: column 'messages' holds"), ('conversations', dict(messages=[dict(role='user', content=None)]), "row 1: column 'messages' holds"),
    ('conversations', dict(messages=[dict(role='human', content='x')]), "row 1: column 'messages' holds.*roles system, user and assistant")])
def test_a_row_that_cannot_be_used_is_named(tmp_path, where, row, says):
    good = dict(messages=[dict(role='user', content='a')]) if where == 'conversations' else dict(text='a', answer='1')
    rows = [good, row] if set(row) & set(good) else [row]
    files = lines(tmp_path, *rows)
    with pytest.raises(ValueError, match=says if len(rows) == 2 else says.replace('row 1', 'row 0')): tables(**{where: {'web': files} if where in ('documents', 'benchmarks') else files})


def test_a_data_set_without_rows_is_named_and_an_empty_stage_is_none(tmp_path):
    for text in ('', '\n'):
        files = lines(tmp_path)
        (tmp_path/'a.jsonl').write_text(text)
        assert list(stream_rows(files['path'])) == []
        with pytest.raises(ValueError, match="no rows in .*a.jsonl"): tables(questions=files)
    pq.write_table(pa.table({'text': pa.array([], pa.string())}), tmp_path/'b.parquet')
    assert list(stream_rows(str(tmp_path/'b.parquet'))) == []


def test_files_that_are_no_data_set_say_what_to_give(tmp_path):
    files = lines(tmp_path, dict(text='a'))
    (tmp_path/'a.csv').write_text('text\na\n')
    with pytest.raises(ValueError, match="cannot read files ending in '.csv'"): list(stream_rows(str(tmp_path/'a.*')))
    (tmp_path/'none').mkdir()
    (tmp_path/'none'/'a.csv').write_text('text\na\n')
    with pytest.raises(ValueError, match='none. is a directory without a file to read'): list(stream_rows(str(tmp_path/'none')))
    for path in ('b.jsonl', 'b/*', 'b.jsonl.zst'):
        with pytest.raises(ValueError, match='no file matches .*/b'): list(stream_rows(str(tmp_path/path)))
    with pytest.raises(ValueError, match='limit -1'): list(stream_rows(files['path'], limit=-1))


def test_files_of_all_kinds_are_read_in_the_order_of_their_names(tmp_path):
    "A directory, a glob and a list of its files are the same rows; what is no data, hidden or empty is passed over."
    inner, line = tmp_path/'data'/'inner', lambda text: (json.dumps(dict(text=text)) + '\n').encode()
    inner.mkdir(parents=True)
    (tmp_path/'data'/'a.jsonl').write_bytes(line('a0') + line('a1'))
    pq.write_table(pa.table({'text': ['b0', 'b1']}), tmp_path/'data'/'b.parquet')
    pq.write_table(pa.table({'text': pa.array([], pa.string())}), tmp_path/'data'/'b2.parquet')
    (tmp_path/'data'/'c.jsonl.gz').write_bytes(gzip.compress(line('c0')))
    (tmp_path/'data'/'d.json.gz').write_bytes(gzip.compress(b''))
    (inner/'e[1].json').write_bytes(line('e0'))
    (inner/'f.parquet').write_bytes((tmp_path/'data'/'b.parquet').read_bytes())
    wanted = 'a0 a1 b0 b1 c0 e0 b0 b1'.split()
    for path in ('data/**', 'data/**/*.*'): assert [r['text'] for r in stream_rows(str(tmp_path/path))] == wanted
    for name in ('README.md', '.hidden.jsonl'): (tmp_path/'data'/name).write_bytes(line('not data'))
    assert [r['text'] for r in stream_rows(str(tmp_path/'data'))] == wanted and [r['text'] for r in stream_rows(str(tmp_path/'data'), limit=3)] == wanted[:3]
    assert [r['text'] for file in local_files(str(tmp_path/'data')) for r in file_rows(file, ['text'])] == wanted


def test_zstandard_is_read_or_asked_for(tmp_path, monkeypatch):
    for name, data in dict(a=b'{"text": "a"}\n', b=b'', c=b'{"text": "c"}\n').items(): (tmp_path/f'{name}.jsonl.zst').write_bytes(pa.compress(data, 'zstd', asbytes=True))
    read = lambda: [r['text'] for r in stream_rows(str(tmp_path))]
    assert [r['text'] for name in 'abc' for r in file_rows(str(tmp_path/f'{name}.jsonl.zst'), ['text'])] == ['a', 'c']  # without it
    if find_spec('zstandard'): assert read() == ['a', 'c']
    monkeypatch.setattr(collect, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='a.jsonl.zst.: `datasets` reads such files with zstandard, which is not installed: pip install zstandard'): read()


def test_a_file_is_read_for_its_text_whatever_else_it_holds(tmp_path):
    "Where `datasets` wants one type a column; a file that is cut off is named, not read to where it ends."
    rows = [dict(text='2026-01-01', note=1), dict(text='b', note='two'), dict(text='c', more=[{}]), dict(text='d')]
    files = lines(tmp_path, *rows)
    assert list(file_rows(files['path'], ['text'])) == rows
    (tmp_path/'list.json').write_text(json.dumps(rows, indent=1))
    assert list(file_rows(str(tmp_path/'list.json'), ['text'])) == rows
    whole = b'{"text": "a longer line"}\n' * 50
    (tmp_path/'a.jsonl.gz').write_bytes(gzip.compress(whole)[:-9])
    (tmp_path/'a.jsonl.zst').write_bytes(pa.compress(whole, 'zstd', asbytes=True)[:-5])
    (tmp_path/'a.parquet').write_bytes(b'PAR1 and no more')
    (tmp_path/'words.jsonl').write_text('"a"\n')
    (tmp_path/'broken.jsonl').write_text('{"text": "a"}\n{"text"')
    for name, said in {'a.jsonl.gz': 'ended before the end-of-stream', 'a.jsonl.zst': 'Truncated', 'a.parquet': 'not a parquet file', 'words.jsonl': "'a' is no row with columns", 'broken.jsonl': 'line 2 is no JSON'}.items():
        with pytest.raises(ValueError, match=f'cannot read {tmp_path/name}: .*{said}'): list(file_rows(str(tmp_path/name), ['text']))


def test_a_mistake_in_the_last_set_is_found_before_the_first_is_read(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(collect, 'stream_rows', lambda path, *more: read.append((path, more[-1])) or stream_rows(path, *more))
    long = lines(tmp_path, *[dict(text='a')] * 50)
    with pytest.raises(ValueError, match='no file matches'): tables(documents={'web': long}, benchmarks={'b': long | dict(path=str(tmp_path/'none.jsonl'))})
    assert all(limit == 1 for _, limit in read)


ASKED, SAYS = dict(role='user', content='How?'), lambda text: dict(role='assistant', content=text)

@pytest.mark.parametrize('row', [dict(prompt='How?', chosen='No.', rejected='So.'), dict(prompt='How?', chosen=[ASKED, SAYS('No.')], rejected=[ASKED, SAYS('So.')]),
    dict(chosen=[ASKED, SAYS('No.')], rejected=[ASKED, SAYS('So.')]), dict(prompt=[ASKED], chosen='No.', rejected='So.'), dict(prompt=[ASKED], chosen=[SAYS('No.')], rejected=[SAYS('So.')])])
def test_a_pair_is_read_in_each_of_the_published_ways(tmp_path, row):
    files = lines(tmp_path, row) | dict(prompt='prompt', chosen='chosen', rejected='rejected')
    [pair] = tables(documents={}, safety=files)['safety']
    assert pair == dict(id=f"{files['path']}/0", messages=[ASKED], chosen='No.', rejected='So.', source='safety')


@pytest.mark.parametrize('row, says', [(dict(prompt='How?', chosen='No.'), "no column 'rejected'; it has"), (dict(chosen='No.', rejected='So.'), 'a.jsonl, row 1 has no prompt: name its column'),
    (dict(prompt='How?', chosen='No.', rejected=' '), "column 'rejected' holds ' ', not text"), (dict(prompt='How?', chosen='No.', rejected=3), "row 1, column 'rejected': column 'messages' holds 3"),
    (dict(chosen=[ASKED], rejected=[ASKED]), "the chat in column 'chosen' ends with the role user"), (dict(chosen=[ASKED, SAYS('No.')], rejected=[SAYS('So.')]), "differ before their last turn")])
def test_a_pair_that_is_none_is_named(row, says):
    with pytest.raises(ValueError, match=re.escape(says)): collect.as_pair(row, 1, dict(path='a.jsonl', prompt='prompt', chosen='chosen', rejected='rejected'))


def test_a_benchmark_is_named_as_a_file_can_be(tmp_path):
    files = lines(tmp_path, dict(text='q', answer='1'))
    for name in ('a/b', '../b', '', '.b'):
        with pytest.raises(ValueError, match='benchmark .*letters, digits'): tables(documents={'web': files}, benchmarks={name: files})
    save_tables(tables(documents={'web': files}, benchmarks={'gsm8k-1.0': files}), tmp_path/'out')
    assert list(load_benchmarks(tmp_path/'out')) == ['gsm8k-1.0']


def test_questions_that_a_run_saved_are_read_back(tmp_path):
    from phi4_ref.records import QUESTION, save
    rows = [dict(id='m', question='Grass?', answer='', kind='mcq', meta=dict(choices=['red', 'green'], label=1)), dict(id='u', question='Who?', answer='', kind='unknown', meta={})]
    save(tmp_path/'a.parquet', rows, QUESTION)
    files = lines(tmp_path) | dict(path=str(tmp_path/'a.parquet'), text='question')
    assert [q['meta'] for q in tables(questions=files, benchmarks={'b': files})['questions']] == [r['meta'] for r in rows]
    assert as_question(dict(text='q', answer=None, kind=None, meta='by hand'), 0, files | dict(text='text')) == dict(id=f"{tmp_path/'a.parquet'}/0", question='q', answer='', kind='problem', meta=dict(meta='by hand'))


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
