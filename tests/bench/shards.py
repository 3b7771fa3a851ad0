"""Tokens/s of `write_shards` against `datasets.map(num_proc=...)`, from the same Parquet file with as many processes.

    python tests/bench/shards.py [--quick] [--documents N]

The text is real where PHI4_REF_DATA is set (Python files and grade-school problems, repeated under different first lines), generated elsewhere. Both start from the file and end with ids on disk: ours in shards,
theirs in an Arrow cache; the peer's function is what its documentation advises (batched, Python tokenizer threads off, text columns removed). Rounds alternate, so that a busy machine slows both.
"""
import argparse
import gzip
import json
import os
import platform
import random
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

os.environ['TOKENIZERS_PARALLELISM'] = 'false'
import datasets
import tokenizers

from phi4_ref.data.collect import stream_rows
from phi4_ref.data.shards import cpus, end_of_document, write_shards
from phi4_ref.model.tokenizer import train_tokenizer
from phi4_ref.records import DOCUMENT, save

def texts():
    "Real documents, or generated ones."
    if data := os.environ.get('PHI4_REF_DATA'):
        with tarfile.open(Path(data)/'code_with_tests/thealgorithms_python.tar.xz') as tar: code = [tar.extractfile(m).read().decode() for m in tar if m.name.endswith('.py')]
        with gzip.open(Path(data)/'gsm8k/train.jsonl.gz', 'rt') as file: return code + [f"{row['question']}\n{row['answer']}" for row in map(json.loads, file)]
    rng = random.Random(0)
    words = [''.join(rng.choices('abcdefghijklmnopqrstuvwxyz', k=rng.randint(2, 9))) for _ in range(20_000)]
    return [' '.join(rng.choices(words, k=300)) + '.' for _ in range(4000)]

def ours(path, tokenizer, out):
    "Tokens/s, and the tokens."
    start = time.perf_counter()
    counts = write_shards(stream_rows(str(path)), tokenizer, out, workers=cpus())
    tokens = sum(n['tokens'] for n in counts.values())
    return tokens / (time.perf_counter() - start), tokens

def theirs(path, tokenizer, out):
    "The same through `datasets.map`."
    end, start = end_of_document(tokenizer), time.perf_counter()
    def encode(batch):
        ids = [[*document, end] for document in tokenizer(batch['text'], add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)['input_ids']]
        return dict(ids=ids, length=[len(document) for document in ids])
    rows = datasets.load_dataset('parquet', data_files=str(path), split='train', cache_dir=str(out))
    rows = rows.map(encode, batched=True, num_proc=cpus(), remove_columns=rows.column_names)
    seconds = time.perf_counter() - start
    tokens = sum(rows['length'])
    return tokens / seconds, tokens

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--quick', action='store_true', help='less text, fewer rounds')
    parser.add_argument('--documents', type=int, help='only the first so many')
    args = parser.parse_args()
    rounds, copies = (2, 1) if args.quick else (5, 5)
    datasets.disable_progress_bars()
    documents = [f'{i}\n{text}' for i in range(copies) for text in texts()[:args.documents]]
    tokenizer = train_tokenizer(documents[:3000], 8192)
    print(f'datasets {datasets.__version__}, tokenizers {tokenizers.__version__}, {cpus()} processes, {platform.processor() or platform.machine()}, {sum(map(len, documents)) / 1e6:.1f}M characters')
    print(f'{"round":>5} {"ours":>11} {"map":>11} {"ratio":>6}   tokens/s')
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder)/'documents.parquet', [dict(id=str(i), text=t, source='web', lang='') for i, t in enumerate(documents)], DOCUMENT)
        for r in range(rounds):
            (a, n), (b, m) = ours(path, tokenizer, Path(folder)/f'ours{r}'), theirs(path, tokenizer, Path(folder)/f'theirs{r}')
            if n != m: raise SystemExit(f'not the same work: {n} tokens and {m}')
            ratios.append(a / b)
            print(f'{r:>5} {a:>11,.0f} {b:>11,.0f} {a / b:>6.2f}', flush=True)
    print(f'ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})')

if __name__ == '__main__': main()
