"The whole recipe in about 20 seconds of one core: the toy configuration with everything turned down, and the command run on it."
import os
import subprocess
import sys
from pathlib import Path

TINY = """collect.pages=150 collect.max_number=4 collect.seed_questions=400 collect.functions=60 collect.books=60 collect.conversations=300 collect.items=12
curate.annotations=60 synth.vote_on=120 synth.worked=100 synth.reversals=20 synth.fim=20
model.hidden_size=64 model.num_hidden_layers=2 model.num_attention_heads=4 model.vocab_size=512 model.intermediate_size=128
pretrain.tokens=100000 pretrain.batch_size=8 pretrain.micro_batch_size=8 pretrain.lr=5e-3 pretrain.save_every=10
midtrain.tokens=8192 midtrain.batch_size=4 midtrain.micro_batch_size=4
sft.tokens=80000 sft.batch_size=8 sft.micro_batch_size=8 sft.lr=3e-3 sft_data.questions=10 sft_data.refusal_questions=20 sft_data.refusal_samples=2 sft.save_every=20
pts.questions=40 pts.low=0.01 pts.high=0.99 pts.p_gap=0.06 pts.confirm_samples=0 dpo.epochs=1 judge.prompts=12
evaluate.samples=1 evaluate.items=6 evaluate.max_new_tokens=24""".split()

PHI4 = str(Path(sys.executable).parent/"phi4")  # the installed command
ENV = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}


def start(*args, **kw):
    "The command in the background, in a process group of its own."
    return subprocess.Popen([PHI4, *map(str, args)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **kw)


def phi4(*args, **kw):
    "The command to its end: exit status, standard output, standard error."
    done = subprocess.run([PHI4, *map(str, args)], env=ENV, capture_output=True, text=True, timeout=900, **kw)
    return done.returncode, done.stdout, done.stderr
