"Token shards: the plain ids on disk, whatever the workers, the kills and the size of the shards; torn and changed data named."
import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from phi4_ref.data.collect import as_document, stream_rows
from phi4_ref.data.shards import (JoinedStore, PartStore, PickedStore, check_shards, encode_documents, in_order, load_shards, make_store, open_stores, pick, text_chunks,
                                  text_encoder, tokenize_documents, tokenizer_fingerprint, write_shards)
from phi4_ref.model.tokenizer import train_tokenizer
from phi4_ref.records import DOCUMENT, save
from phi4_ref.train.data import MixtureBatches, StreamRows
from phi4_ref.train.checkpoint import check_same_run

settings.register_profile('untimed', deadline=None, max_examples=40)
settings.load_profile('untimed')


SHARD = 60_000  # tokens

def corpus(n=3000, seed=0):
    rng = random.Random(seed)
    return [dict(text=' '.join(f'{rng.choice("Ada Bo Cy".split())} has {rng.randrange(99)} pears <|endoftext|>.' for _ in range(rng.randrange(1, 40))), source=rng.choice(['web', 'web', 'code'])) for _ in range(n)]

ROWS = corpus()
TOKENIZER = train_tokenizer([r['text'] for r in ROWS[:100]], 320)

def files(folder): return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}
def broken(rows, at):
    yield from itertools.islice(rows, at)
    raise OSError('the network is gone')

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shards')/'whole'
    write_shards(ROWS, TOKENIZER, folder, shard_tokens=SHARD, workers=1)
    return folder

# ---- what is written

def test_shards_hold_what_the_plain_version_gives(whole):
    plain, stores = tokenize_documents(ROWS, TOKENIZER), load_shards(whole, tokenizer=TOKENIZER)
    assert stores.keys() == plain.keys()
    for source, store in stores.items():
        assert len(store.parts) > 3 and len(store) == len(plain[source]) and store.size == plain[source].size
        assert (store.read(0, store.size) == plain[source].tokens).all() and (store.offsets == plain[source].offsets).all()
        assert all((a == b).all() for a, b in zip(store, plain[source]))
        assert all(part.size <= SHARD for part in store.parts)

def test_special_tokens_in_a_document_are_text(whole):
    end = TOKENIZER.convert_tokens_to_ids('<|endoftext|>')
    for store in load_shards(whole).values(): assert (store.read(0, store.size) == end).sum() == len(store)

@pytest.mark.parametrize('workers', [2, 3, 5])
def test_the_number_of_workers_changes_no_byte(whole, tmp_path, workers):
    write_shards(ROWS, TOKENIZER, tmp_path, shard_tokens=SHARD, workers=workers)
    assert files(tmp_path) == files(whole)

def test_a_document_larger_than_a_shard_has_one_to_itself(tmp_path):
    rows = [dict(text=t, source='web') for t in ('a', 'pears ' * 500, 'b')]
    write_shards(rows, TOKENIZER, tmp_path, shard_tokens=100, workers=1)
    assert [len(part) for part in load_shards(tmp_path)['web'].parts] == [1, 1, 1]

def test_wide_ids_and_none_at_all(tmp_path):
    assert write_shards([], TOKENIZER, tmp_path/'none') == {} == load_shards(tmp_path/'none')
    big = train_tokenizer(['x'], 66_000)
    write_shards([dict(text='x', source='web')], big, tmp_path/'wide', workers=1)
    store = load_shards(tmp_path/'wide')['web']
    assert store[0].dtype == np.uint32 and store[0].tolist() == encode_documents(['x'], big)[0] and store[0][-1] > 65_535

@pytest.mark.parametrize('limit, documents', [(3, 1), (4, 2), (5, 2), (6, 3)])
def test_a_shard_is_filled_to_its_limit(tmp_path, limit, documents):
    write_shards([dict(text='a', source='web')] * 6, TOKENIZER, tmp_path, shard_tokens=limit, workers=1)  # two tokens each
    assert [len(part) for part in load_shards(tmp_path)['web'].parts] == [documents] * (6 // documents)

@pytest.mark.parametrize('row', [dict(source='web'), dict(text=None, source='web'), dict(text='x'), dict(text='x', source='../etc'), dict(text='x', source=''), 'x', dict(text='a\ud800', source='web')])
def test_what_is_no_document_is_refused_by_number(tmp_path, row):
    with pytest.raises(ValueError, match='row 1 is no document'): write_shards([ROWS[0], row], TOKENIZER, tmp_path, workers=1)
    with pytest.raises(ValueError, match='row 1 is no document'): tokenize_documents([ROWS[0], row], TOKENIZER)


def test_where_no_shards_can_be_is_named(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(ValueError, match='cannot make the directory .*file'): write_shards(ROWS, TOKENIZER, tmp_path/'file')
    for wrong in (dict(shard_tokens=0), dict(workers=0)):
        with pytest.raises(ValueError, match=f'{next(iter(wrong))}=0'): write_shards(ROWS, TOKENIZER, tmp_path/'out', **wrong)


@given(st.lists(st.tuples(st.sampled_from('abc'), st.text(max_size=9)), max_size=40), st.integers(1, 30))
def test_chunks_keep_the_order_within_a_source(pairs, characters):
    chunks = list(text_chunks(iter(pairs), characters))
    for source in 'abc': assert [t for s, texts in chunks if s == source for t in texts] == [t for s, t in pairs if s == source]

# ---- workers

def test_no_more_is_read_ahead_than_there_are_workers():
    read = []
    def items():
        for i in range(50): read.append(i); yield i
    for done, (item, result) in enumerate(in_order(lambda i: i * 2, items(), 3), start=1):
        assert result == item * 2 and len(read) <= done + 3

def test_errors_and_deaths_of_workers_are_told():
    def work(i):
        if i == 3: raise KeyError('three')
        if i == 5: os.kill(os.getpid(), signal.SIGKILL)
        return i
    with pytest.raises(ValueError, match='KeyError.*three'): list(in_order(work, range(5), 2))
    with pytest.raises(RuntimeError, match='worker process died'): list(in_order(work, range(4, 9), 2))

# ---- kills

ENDLESS = """
import os, sys, time, json, itertools
from transformers import PreTrainedTokenizerFast
from phi4_ref.data.shards import write_shards
rows = json.load(open(sys.argv[1]))
def slowly():
    for row in rows: time.sleep(.001); yield row
write_shards(slowly(), PreTrainedTokenizerFast.from_pretrained(sys.argv[2]), sys.argv[3], shard_tokens=60_000, workers=2)
"""

def alive(pid): return Path(f'/proc/{pid}/stat').exists() and Path(f'/proc/{pid}/stat').read_text().rsplit(')')[-1].split()[0] not in 'ZX'
def children(pid): return [int(c) for c in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]

@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc to see the workers')
def test_killed_it_goes_on_at_the_last_whole_shard(whole, tmp_path):
    "kill -9 after the first shards; no worker outlives it; the next call reads on and ends in the same bytes."
    (tmp_path/'rows.json').write_text(json.dumps(ROWS))
    TOKENIZER.save_pretrained(tmp_path/'tokenizer')
    out, env = tmp_path/'out', dict(os.environ, TOKENIZERS_PARALLELISM='false')
    process = subprocess.Popen([sys.executable, '-c', ENDLESS, tmp_path/'rows.json', tmp_path/'tokenizer', out], env=env)
    while not (out/'progress.jsonl').exists() or len((out/'progress.jsonl').read_text().splitlines()) < 3: assert process.poll() is None; time.sleep(.01)
    workers = children(process.pid)
    process.kill(); process.wait()
    assert len(workers) == 2 and not (out/'shards.json').exists()
    end = time.time() + 60
    while any(map(alive, workers)) and time.time() < end: time.sleep(.05)
    assert not any(map(alive, workers))
    kept = {name: (out/f'{name}.tokens').stat().st_mtime_ns for name in (json.loads(line)['name'] for line in (out/'progress.jsonl').read_text().splitlines()[1:])}
    with pytest.raises(ValueError, match='holds no finished shards'): load_shards(out)
    write_shards(ROWS, TOKENIZER, out, shard_tokens=SHARD, workers=1)
    assert files(out) == files(whole)
    assert kept and all((out/f'{name}.tokens').stat().st_mtime_ns == at for name, at in kept.items())  # not written again

@pytest.mark.parametrize('at', [1, 1100, 2200, 2999])
def test_stopped_anywhere_twice(whole, tmp_path, at):
    for stop in (at, min(at + 400, 3000)):
        with pytest.raises(OSError, match='network'): write_shards(broken(ROWS, stop), TOKENIZER, tmp_path, shard_tokens=SHARD, workers=1)
        with open(tmp_path/'progress.jsonl', 'a') as progress: progress.write('{"name": "web-0')  # a torn last line
    write_shards(ROWS, TOKENIZER, tmp_path, shard_tokens=SHARD, workers=1)
    assert files(tmp_path) == files(whole)

def test_other_rows_are_refused(tmp_path):
    with pytest.raises(OSError): write_shards(broken(ROWS, 2500), TOKENIZER, tmp_path, shard_tokens=30_000, workers=1)
    changed = [dict(r) for r in ROWS]; changed[7]['text'] += '!'
    with pytest.raises(ValueError, match=f"row 7 is not the document of '{ROWS[7]['source']}'"): write_shards(changed, TOKENIZER, tmp_path, shard_tokens=30_000, workers=1)
    with pytest.raises(ValueError, match='has fewer documents'): write_shards(ROWS[:5], TOKENIZER, tmp_path, shard_tokens=30_000, workers=1)
    with pytest.raises(ValueError, match='shard_tokens: 30000 -> 40000'): write_shards(ROWS, TOKENIZER, tmp_path, shard_tokens=40_000, workers=1)
    with pytest.raises(ValueError, match='tokenizer'): write_shards(ROWS, train_tokenizer(['other words'], 320), tmp_path, shard_tokens=30_000, workers=1)

# ---- torn

def copy(whole, to):
    to.mkdir()
    for name, data in files(whole).items(): (to/name).write_bytes(data)
    return to

@pytest.mark.parametrize('name', ['web-00001.tokens', 'code-00000.documents', 'web-00002.documents'])
@pytest.mark.parametrize('damage', ['cut', 'missing'])
def test_torn_shards_are_named_and_mended(whole, tmp_path, name, damage):
    folder, said = copy(whole, tmp_path/'torn'), []
    if damage == 'cut': os.truncate(folder/name, 10)
    else: (folder/name).unlink()
    with pytest.raises(ValueError, match=name): load_shards(folder)
    write_shards(ROWS, TOKENIZER, folder, shard_tokens=SHARD, workers=1, say=said.append)
    assert name in said[0] and files(folder) == files(whole)

def test_a_shard_cut_while_it_is_read_is_named(whole, tmp_path):
    store = load_shards(copy(whole, tmp_path/'open'))['web']
    os.truncate(tmp_path/'open'/'web-00000.tokens', 50)
    with pytest.raises(ValueError, match='web-00000.tokens ends before'): store.read(0, 100)

def test_a_changed_byte_is_found(whole, tmp_path):
    folder = copy(whole, tmp_path/'flipped')
    assert check_shards(folder) == sum(p.stat().st_size for p in folder.iterdir() if p.name != 'shards.json')
    data = bytearray((folder/'code-00001.tokens').read_bytes()); data[77] ^= 1
    (folder/'code-00001.tokens').write_bytes(data)
    with pytest.raises(ValueError, match='code-00001.tokens'): check_shards(folder)

# ---- reading

STORE = make_store([np.arange(n) + 100 * i for i, n in enumerate((3, 1, 7, 2, 9, 4))], 2000)

def cut(store, *at):
    "The same documents in several stores."
    bounds = [0, *at, len(store)]
    return JoinedStore([make_store([store[i] for i in range(a, b)], 2000) for a, b in zip(bounds, bounds[1:])])

@given(st.lists(st.integers(0, 6), max_size=4), st.integers(0, 26), st.integers(0, 26))
def test_joined_stores_read_like_one(at, a, b):
    joined, start, stop = cut(STORE, *sorted(at)), min(a, b), max(a, b)
    assert joined.read(start, stop).tolist() == STORE.read(start, stop).tolist() and (joined.offsets == STORE.offsets).all() and joined.size == STORE.size
    assert [d.tolist() for d in joined] == [d.tolist() for d in STORE]

@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(0, 80), st.integers(0, 80))
def test_picked_stores_read_like_copies(picked, a, b):
    copied = make_store([STORE[i] for i in picked], 2000)
    store, (start, stop) = PickedStore(STORE, picked), sorted(min(x, copied.size) for x in (a, b))
    if start < stop: assert store.read(start, stop).tolist() == copied.read(start, stop).tolist()
    assert [d.tolist() for d in store] == [d.tolist() for d in copied] and store.size == copied.size

@given(st.lists(st.integers(0, 6), max_size=4), st.integers(1, 60))
def test_rows_of_joined_stores_are_rows_of_one(at, context):
    one, many = StreamRows(STORE, context), StreamRows(cut(STORE, *sorted(at)), context)
    assert len(one) == len(many) and all(one[i].tolist() == many[i].tolist() for i in range(len(one)))

@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 26), st.integers(0, 26))
def test_parts_read_like_copies(a, b, start, stop):
    first, last = sorted((a, b))
    part, copied = PartStore(STORE, first, last), make_store([STORE[i] for i in range(first, last)], 2000)
    start, stop = sorted(min(x, copied.size) for x in (start, stop))
    assert part.read(start, stop).tolist() == copied.read(start, stop).tolist() and (part.offsets == copied.offsets).all()
    assert [d.tolist() for d in part] == [d.tolist() for d in copied]

def test_the_fingerprint_of_a_choice_is_of_what_was_chosen():
    "Equal sizes, other documents: a run begun on one refuses the others."
    same = make_store([[1, 2], [3, 4], [1, 2]], 2000)
    chosen = [PickedStore(same, [0, 1]), PickedStore(same, [1, 0]), PartStore(same, 0, 2), PartStore(same, 1, 3), cut(same, 1), cut(same, 2), same,
              cut(make_store([[1, 2], [3, 4], [5, 6]], 2000), 2)]
    assert len({store.fingerprint for store in chosen}) == len(chosen)
    assert PickedStore(same, [0, 1]).fingerprint == chosen[0].fingerprint and PartStore(same, 0, 2).fingerprint == chosen[2].fingerprint

def test_picks_need_no_tokens(whole, monkeypatch):
    store = load_shards(whole)['web']
    monkeypatch.setattr(type(store.parts[0]), 'read', lambda *a: pytest.fail('tokens were read'))
    assert sorted(pick(store, lambda n: n > 200).lengths.tolist()) == sorted(n for n in store.lengths.tolist() if n > 200)

def test_several_directories_are_one_corpus(whole, tmp_path):
    write_shards(ROWS[:1250], TOKENIZER, tmp_path/'a', workers=1); write_shards(ROWS[1250:], TOKENIZER, tmp_path/'b', workers=1)
    both, one = load_shards(tmp_path/'a', tmp_path/'b'), load_shards(whole)
    assert all((both[s].read(0, both[s].size) == one[s].read(0, one[s].size)).all() for s in one)
    write_shards(ROWS, train_tokenizer(['other words'], 320), tmp_path/'c', workers=1)
    with pytest.raises(ValueError, match='another tokenizer'): load_shards(tmp_path/'a', tmp_path/'c')
    with pytest.raises(ValueError, match='another tokenizer'): open_stores([tmp_path/'c'], TOKENIZER)

def test_batches_from_shards_are_those_from_memory(whole):
    make = lambda data: MixtureBatches(open_stores(data, TOKENIZER), dict(web=.7, code=.3), 64, 8, 30, seed=1)
    a, b = make(ROWS), make(str(whole))
    assert all((a.batch(s)['input_ids'] == b.batch(s)['input_ids']).all() for s in range(30)) and a.epochs() == b.epochs()

# ---- what a run was trained on

def test_another_data_set_is_refused_by_the_name_of_its_source(whole, tmp_path):
    changed = [dict(r) for r in ROWS]
    last = max(i for i, r in enumerate(ROWS) if r['source'] == 'code')
    first = min(i for i, r in enumerate(ROWS) if r['source'] == 'code')
    changed[first], changed[last] = changed[last], changed[first]  # as many documents, as many tokens
    write_shards(changed, TOKENIZER, tmp_path/'changed', shard_tokens=SHARD, workers=1)
    make = lambda folder, seed=1, **fractions: MixtureBatches(load_shards(folder), fractions, 64, 8, 2, seed=seed).describe()
    check_same_run(make(whole, web=.7, code=.3), make(whole, web=.7, code=.3), 'OUT')
    with pytest.raises(ValueError) as refused: check_same_run(make(whole, web=.7, code=.3), make(tmp_path/'changed', web=.7, code=.3), 'OUT')
    assert 'source code: ' in str(refused.value) and 'documents' in str(refused.value) and 'source web' not in str(refused.value)
    with pytest.raises(ValueError, match='seed'): check_same_run(make(whole, web=1.), make(whole, seed=2, web=1.), 'OUT')
    with pytest.raises(ValueError, match='fractions'): check_same_run(make(whole, web=.7, code=.3), make(whole, web=1.), 'OUT')

def test_the_tokenizers_fingerprint_is_of_what_decides_an_id():
    before = tokenizer_fingerprint(TOKENIZER)
    TOKENIZER(['a', 'b c'], padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(TOKENIZER) == before != tokenizer_fingerprint(train_tokenizer(['other words'], 320))
    assert encode_documents(['pears ' * 9], TOKENIZER)[0] == text_encoder(TOKENIZER)(['pears ' * 9])[2].tolist()

# ---- larger than memory

MEMORY = """
import itertools, resource, sys
import numpy as np
from phi4_ref.data.shards import load_shards, write_shards
from phi4_ref.model.tokenizer import train_tokenizer
from phi4_ref.train.data import MixtureBatches
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
tokenizer = train_tokenizer(['pears and apples'] * 2, 300)
def rows(n): return (dict(text=f'pears and apples {i % 10} ' * 3000, source='web') for i in range(n))
def read(folder, steps):
    batches = MixtureBatches(load_shards(folder), dict(web=1.), 1024, 8, steps, seed=0)
    for step in range(steps): batches.batch(step)
    return batches.rows['web'].store.size
write_shards(rows(40), tokenizer, sys.argv[1] + '/small', shard_tokens=500_000, workers=1); read(sys.argv[1] + '/small', 20)
before = peak()
write_shards(rows(500), tokenizer, sys.argv[1] + '/large', shard_tokens=500_000, workers=1)
tokens = read(sys.argv[1] + '/large', 200)
print(tokens * 2, peak() - before)
"""

def test_memory_does_not_grow_with_the_corpus(tmp_path):
    out = subprocess.run([sys.executable, '-c', MEMORY, tmp_path], capture_output=True, text=True, check=True, env=dict(os.environ, RAYON_NUM_THREADS='1')).stdout
    corpus_bytes, growth = map(int, out.split())
    assert corpus_bytes > 12_000_000 and growth < 2_000_000, out  # a shard is 1 MB

# ---- real data

def test_real_parquet_and_json_lines(tmp_path):
    data = Path(os.environ.get('PHI4_REF_DATA') or pytest.skip('PHI4_REF_DATA is not set: no real text to read'))
    with tarfile.open(data/'code_with_tests/thealgorithms_python.tar.xz') as tar:
        code = [tar.extractfile(m).read().decode() for m in tar if m.name.endswith('.py')][:200]
    with gzip.open(data/'gsm8k/train.jsonl.gz', 'rt') as file: problems = [json.loads(line) for line in itertools.islice(file, 500)]
    save(tmp_path/'code.parquet', [dict(id=str(i), text=t, source='code', lang='') for i, t in enumerate(code)], DOCUMENT)
    (tmp_path/'problems.jsonl').write_text(''.join(json.dumps(p) + '\n' for p in problems))
    sets = dict(code=dict(path=str(tmp_path/'code.parquet'), text='text'), synthetic=dict(path=str(tmp_path/'problems.jsonl'), text='question'))
    rows = [as_document(row, i, files, source) for source, files in sets.items() for i, row in enumerate(stream_rows(files['path']))]
    tokenizer = train_tokenizer([r['text'] for r in rows], 1024)
    counts = write_shards(iter(rows), tokenizer, tmp_path/'shards', shard_tokens=50_000, workers=2)
    assert counts['code']['documents'] == 200 and counts['synthetic']['documents'] == 500 and counts['code']['shards'] > 2
    stores = load_shards(tmp_path/'shards')
    assert [tokenizer.decode(d[:-1]) for d in stores['synthetic']] == [p['question'] for p in problems]
    assert [tokenizer.decode(d[:-1]) for d in stores['code']] == code
