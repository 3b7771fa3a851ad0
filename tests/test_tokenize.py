"Text tokenised beforehand: the verb, and runs that read its shards instead of documents of their own."
import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from phi4_ref import cli
from phi4_ref.artifact import StageRefused
from phi4_ref.config import load_config
from phi4_ref.data.shards import load_shards, tokenize_documents, tokenize_files, write_shards
from phi4_ref.model.tokenizer import train_tokenizer
from phi4_ref.records import DOCUMENT, load
import phi4_ref.run as run_module
from phi4_ref.run import chosen, run, stress

from tiny import TINY

ROWS = [dict(text=f'{name} has {n} pears, {name} says. ' * (n % 7 + 1), source=source, note=str(n) if n % 2 else n) for n in range(60) for name, source in (('Ada', 'web'), ('Bo', 'code'))]
TOKENIZER = train_tokenizer([row['text'] for row in ROWS], 320)


def files(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
def lines(path, rows): path.write_text(''.join(json.dumps(row) + '\n' for row in rows)); return path

def tokenize(*args):
    "The command: exit status, standard output, standard error."
    done = CliRunner().invoke(cli.app, ['tokenize', *map(str, args)])
    return done.exit_code, done.stdout, done.stderr

@pytest.fixture
def corpus(tmp_path):
    "Half of the rows as lines, half as Parquet, in one directory."
    TOKENIZER.save_pretrained(tmp_path/'tokenizer')
    (tmp_path/'corpus').mkdir()
    lines(tmp_path/'corpus'/'1.jsonl', ROWS[:60])
    pq.write_table(pa.table({name: [row[name] for row in ROWS[60:]] for name in ('text', 'source')}), tmp_path/'corpus'/'2.parquet')
    return tmp_path/'corpus'


# --- the verb -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('names, rows', [(['1.jsonl'], ROWS[:60]), (['2.parquet'], ROWS[60:]), (['.'], ROWS), (['2.parquet', '1.*'], ROWS[60:] + ROWS[:60])])
def test_the_verb_is_the_plain_version(corpus, tmp_path, names, rows):
    status, out, err = tokenize(*(corpus/name for name in names), '--source-column', 'source', '--tokenizer', tmp_path/'tokenizer', '--out', tmp_path/'out', '--shard-tokens', 500)
    stores, plain = load_shards(tmp_path/'out', tokenizer=TOKENIZER), tokenize_documents(rows, TOKENIZER)
    assert status == 0 and stores.keys() == plain.keys(), err
    for source, store in stores.items():
        assert (store.read(0, store.size) == plain[source].tokens).all() and (store.offsets == plain[source].offsets).all()
        assert f'{source}: {len(store)} documents, {store.size:,} tokens, {len(store.parts)} shards' in out and len(store.parts) > 1

def test_one_source_for_all_and_a_limit(corpus, tmp_path):
    status, out, err = tokenize(corpus/'1.jsonl', corpus/'2.parquet', '--source', 'synthetic', '--limit', 70, '--tokenizer', tmp_path/'tokenizer', '--out', tmp_path/'out')
    assert status == 0 and [(source, len(store)) for source, store in load_shards(tmp_path/'out').items()] == [('synthetic', 70)], err

def test_rows_without_text_are_left_out_and_counted(corpus, tmp_path):
    blank = [dict(text=text, source='web') for text in ('', ' \n\t', None)]
    lines(corpus/'1.jsonl', [row for row in ROWS[:60] for row in (*blank, row)])
    status, out, err = tokenize(corpus, '--source-column', 'source', '--tokenizer', tmp_path/'tokenizer', '--out', tmp_path/'out')
    assert status == 0 and 'rows without text, left out: 180' in out, err
    write_shards(ROWS, TOKENIZER, tmp_path/'plain')
    assert files(tmp_path/'out') == files(tmp_path/'plain')

def test_stopped_by_a_broken_file_it_goes_on_from_there(corpus, tmp_path):
    "And ends in the bytes of a call that was not stopped; a third call reads nothing."
    call = [corpus, '--source-column', 'source', '--tokenizer', tmp_path/'tokenizer', '--workers', 1, '--shard-tokens', 20_000, '--out']
    for name in '34567': lines(corpus/f'{name}.jsonl', ROWS * 20)
    for at in (40, 30):  # of the last file
        lines(corpus/'7.jsonl', (ROWS * 20)[:at])
        with open(corpus/'7.jsonl', 'a') as file: file.write('{"text": "cut of')
        status, out, err = tokenize(*call, tmp_path/'out')
        assert status == 2 and err == f"phi4: cannot read {corpus/'7.jsonl'}: line {at + 1} is no JSON: Unterminated string starting at: line 1 column 10 (char 9)\n"
    kept = {tmp_path/'out'/f"{json.loads(line)['name']}.tokens" for line in (tmp_path/'out'/'progress.jsonl').read_text().splitlines()[1:]}
    before = {path: path.stat().st_mtime_ns for path in kept}
    lines(corpus/'7.jsonl', ROWS * 20)
    assert tokenize(*call, tmp_path/'out')[0] == 0 and tokenize(*call, tmp_path/'unbroken')[0] == 0
    assert files(tmp_path/'out') == files(tmp_path/'unbroken') and len(kept) > 3 and all(path.stat().st_mtime_ns == at for path, at in before.items())
    status, out, err = tokenize(*call, tmp_path/'out')
    assert status == 0 and 'was finished before, and nothing was read' in out and 'web: ' in out

def test_a_source_that_no_run_mixes_is_named(corpus, tmp_path):
    status, out, err = tokenize(corpus, '--source', 'wiki', '--tokenizer', tmp_path/'tokenizer', '--out', tmp_path/'out')
    assert status == 0 and 'it leaves wiki unread' in out

@pytest.mark.parametrize('change, said', [
    (dict(data='none.jsonl'), "no file matches '.*none.jsonl'"), (dict(data='none/*'), "no file matches '.*none/\\*'"), (dict(data='a.csv'), "cannot read files ending in '.csv'"),
    (dict(column='content'), r"1.jsonl, row 0 has no column 'content'; it has text, source, note"), (dict(data='corpus/2.parquet', column='content'), "cannot read .*2.parquet: it has no column 'content'; it has text, source"),
    (dict(column='note'), "1.jsonl, row 0: column 'note' holds 0, not text"), (dict(source='the web'), 'row 0 is no document: it needs a text, and a source named in letters'),
    (dict(source=None), 'whose documents are these'), (dict(tokenizer='none'), "--tokenizer: '.*none' is no directory with a tokenizer"), (dict(tokenizer='plain'), "no token '<.endoftext.>' to close documents with"),
    (dict(data='blank.jsonl'), "blank.jsonl has no row with text in its column 'text'"), (dict(out='corpus/shards'), 'would be among the files of')])
def test_what_cannot_be_tokenised_is_one_line(corpus, tmp_path, change, said):
    lines(tmp_path/'blank.jsonl', [dict(text='')])
    (tmp_path/'a.csv').write_text('text\na\n')
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({'a': 0, '?': 1}, unk_token='?')), unk_token='?').save_pretrained(tmp_path/'plain')
    wanted = dict(data='corpus', tokenizer='tokenizer', out='out', column='text', source='web') | change
    more = ['--source', wanted['source']] if wanted['source'] else []
    status, out, err = tokenize(tmp_path/wanted['data'], '--tokenizer', tmp_path/wanted['tokenizer'], '--out', tmp_path/wanted['out'], '--text-column', wanted['column'], *more)
    assert status == 2 and re.match(f'phi4: .*{said}', err) and len(err.splitlines()) == 1, err
    assert not (tmp_path/wanted['out']).exists()


# --- runs -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def given(tiny_run, tmp_path_factory):
    "Shards by the verb of the documents that the small run pretrained on, and a run that began with them."
    folder, longest = tmp_path_factory.mktemp('given'), load_config(tiny_run/'config.yaml').pretrain.max_chars
    documents = [d for stage in ('curate', 'synth') for d in load(tiny_run/stage/'documents.parquet', DOCUMENT) if len(d['text']) <= longest]
    for name in ('web', 'others'):
        lines(folder/f'{name}.jsonl', [dict(text=d['text'], source=d['source']) for d in documents if (d['source'] == 'web') == (name == 'web')])
        status, out, err = tokenize(folder/f'{name}.jsonl', '--source-column', 'source', '--tokenizer', tiny_run/'pretrain', '--out', folder/name)
        assert status == 0, err
    for verb in ('pretrain', 'midtrain'): run(config_of(tiny_run, folder), verb)
    return folder

def config_of(tiny_run, folder, *changes, shards=('web', 'others'), out=None):
    return load_config('toy', [*TINY, f'out={out or folder/"run"}', f'pretrain.tokenizer={tiny_run/"pretrain"}', f'pretrain.shards={[str(folder/name) for name in shards]}', *changes])

def model(folder): return (folder/'model.safetensors').read_bytes()

def test_given_shards_train_the_model_that_the_documents_do(tiny_run, given):
    "In an empty directory; nothing is tokenised again."
    assert model(given/'run'/'pretrain') == model(tiny_run/'pretrain')
    assert {p.name for p in (given/'run').iterdir()} == {'pretrain', 'midtrain', 'config.yaml', '.lock'} and not list((given/'run').rglob('shards'))
    assert json.loads((given/'run'/'midtrain'/'manifest.json').read_text())['counts']['tokens'] > 0

def test_midtraining_is_that_of_the_same_documents(tiny_run, tmp_path):
    "With the long documents among the shards, where the run's own wait in a folder of their own."
    config = config_of(tiny_run, tiny_run, shards=('pretrain/shards', 'midtrain/shards'), out=tmp_path/'run')
    (stage,) = chosen(config, 'midtrain')
    assert stage.inputs == ('pretrain',)
    stage.make(stage.view(config), {'pretrain': tiny_run/'pretrain'}, tmp_path/'out')
    assert model(tmp_path/'out') == model(tiny_run/'midtrain')

def test_moved_shards_are_the_same_and_others_are_refused(tiny_run, given, tmp_path, capsys):
    folder = shutil.copytree(given, tmp_path/'moved')
    for name in ('web', 'others'): (folder/name).rename(folder/f'{name}2')
    for verb in ('pretrain', 'midtrain'): run(config_of(tiny_run, folder, shards=('others2', 'web2')), verb)
    assert capsys.readouterr().out.count('done before') == 2
    rows = [json.loads(line) for line in (folder/'web.jsonl').open()]
    for name, some in (('web', rows[:-1]), ('extra', [dict(text='A page.', source='code')])):
        write_shards(some, run_module.open_tokenizer(tiny_run/'pretrain'), folder/name)
    with pytest.raises(StageRefused, match=r"pretrain was made with different settings:\n  input shards of web: '\w+' -> '\w+'\nUse"): run(config_of(tiny_run, folder, shards=('web', 'others2')), 'pretrain')
    with pytest.raises(StageRefused, match=r'midtrain was made with different settings:\n  input shards of code: '): run(config_of(tiny_run, folder, shards=('web2', 'others2', 'extra')), 'midtrain')
    with pytest.raises(ValueError, match='^pretrain.shards: no directory .*/gone with shards$'): run(config_of(tiny_run, folder, shards=('gone',)), 'midtrain')
    for stage in ('curate', 'synth'): shutil.copytree(tiny_run/stage, folder/'run'/stage)
    with pytest.raises(StageRefused, match='input shards of web: .* -> .absent'): run(config_of(tiny_run, folder, 'pretrain.shards=[]'), 'pretrain')

def test_force_makes_again_what_read_other_shards(tiny_run, given):
    asked = lambda *changes, **more: (config := config_of(tiny_run, given, *changes, **more)) and run_module.needs_again(given/'run'/'pretrain', chosen(config, 'pretrain')[0], config, {})
    assert not asked() and asked(shards=('others',)) and asked('pretrain.lr=1e-3')

def test_the_stress_test_reads_them_too(tiny_run, given, tmp_path):
    rows = stress(config_of(tiny_run, given, out=tmp_path/'run'), steps=3, warmups=(0,), factors=(1,))
    assert len(rows[0]['losses']) == 3 and not list(tmp_path.rglob('shards'))

@pytest.mark.parametrize('shards, said', [
    (['none'], 'pretrain.shards: no directory .*none with shards$'), (['begun'], 'pretrain.shards: .*begun holds no finished shards: run `phi4 tokenize`'), (['foreign'], 'pretrain.shards: .*foreign was tokenised by another tokenizer'),
    (['web'], 'pretrain.fractions wants web_rewrite, synthetic, code, acquired, and pretrain.shards hold web: set the share to 0'), (['web', 'torn'], 'pretrain.shards: torn shard: .*web-00000.tokens has 7 bytes')])
def test_shards_that_cannot_be_read_are_one_line(tiny_run, given, tmp_path, shards, said):
    folder = shutil.copytree(given, tmp_path/'wrong', ignore=shutil.ignore_patterns('run'))
    (folder/'begun').mkdir()
    write_shards(ROWS, TOKENIZER, folder/'foreign')
    shutil.copytree(folder/'web', folder/'torn')
    (folder/'torn'/'web-00000.tokens').write_bytes(b'7 bytes')
    for verb in ('pretrain', 'run'):
        with pytest.raises(ValueError, match=f'^{said}'): run(config_of(tiny_run, folder, shards=shards), verb)
    assert [p.name for p in (folder/'run').iterdir()] == ['.lock']

def test_shards_need_their_tokenizer():
    with pytest.raises(ValueError, match='toy.yaml: pretrain: shards are ids of one tokenizer, which the model needs too: name it in tokenizer'): load_config('toy', ['pretrain.shards=[a]'])

def test_a_whole_run_still_makes_its_questions_and_is_planned(tiny_run, given):
    "Synthesis serves the later stages, too; only what pretraining reads is replaced."
    config = config_of(tiny_run, given)
    inputs = {stage.name: stage.inputs for stage in chosen(config, 'run')}
    assert inputs['pretrain'] == () and inputs['midtrain'] == ('pretrain',) and 'synth' in inputs['pts'] and list(inputs)[:3] == ['collect', 'curate', 'synth']
    done = CliRunner().invoke(cli.app, ['plan', 'toy', *TINY, f'pretrain.tokenizer={tiny_run/"pretrain"}', f'pretrain.shards={[str(given/"web")]}'])
    assert done.exit_code == 0, done.stderr
