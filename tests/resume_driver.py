"Runs for test_resume_loop.py, in a process of their own with one thread, so that they may be forked, killed and compared."
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

import phi4_ref.train.checkpoint as checkpoint
import phi4_ref.train.loop as loop
from phi4_ref.model.transformer import ModelConfig, Transformer
from phi4_ref.post.dpo import PairBatches, preference_loss
from phi4_ref.train.data import MixtureBatches, SFTBatches, make_store, recall_mixture
from phi4_ref.train.loop import TrainSettings, lm_loss, train
from phi4_ref.train.midtrain import raise_rope

STEPS, SAVE_EVERY = 12, 3
SETTINGS = TrainSettings(lr=1e-2, micro_batch_size=2, seed=3, skip_sigma=1.5)
loop.WINDOW = 4  # so that steps are skipped in a run of twelve

class Noisy(Transformer):
    "A model that draws random numbers in training, so that a lost generator state shows."
    def hidden(self, *args, **kw):
        x_BTD = super().hidden(*args, **kw)
        return x_BTD * (1 + .01 * torch.randn(()) + .01 * random.random() + .01 * np.random.rand())

def model(seed=0):
    torch.manual_seed(seed)
    return Noisy(ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=32))

def mixture():
    "12 steps of 6 rows: source b has 5 rows and gives 36, so every step lies within an epoch, late ones in its eighth."
    rng = np.random.default_rng(0)
    stores = dict(a=make_store([rng.integers(0, 64, 16 * 90)], 64), b=make_store([rng.integers(0, 64, 16 * 5)], 64))
    return MixtureBatches(stores, dict(a=.5, b=.5), context=16, batch_size=6, steps=STEPS, seed=0)

def long():
    "Midtraining's batches: a source of whole long documents, padded, read several times over, beside the recalled one."
    rng = np.random.default_rng(2)
    stores = dict(a=make_store([rng.integers(0, 64, 16 * 90)], 64), long=make_store([rng.integers(0, 64, n) for n in rng.integers(9, 16, 7)], 64))
    return MixtureBatches(stores, recall_mixture(dict(a=1.)), context=16, batch_size=6, steps=STEPS, seed=0, whole=('long',))

def pairs(kind):
    "12 steps of 6 of 9 preference pairs: one token each, or whole answers."
    rng = np.random.default_rng(3)
    ids = lambda n: rng.integers(0, 64, n).tolist()
    rows = [dict(prompt_ids=ids(rng.integers(3, 12)), chosen_ids=ids(1 if kind == 'token' else 4), rejected_ids=ids(1 if kind == 'token' else 3)) for _ in range(9)]
    return PairBatches(rows, rng.normal(0, 1, 9).tolist(), 6, epochs=STEPS * 6 / 9, seed=0, kind=kind)

def chats():
    rng = np.random.default_rng(1)
    examples = [(rng.integers(0, 64, n).tolist(), [0] * 3 + [1] * (n - 3)) for n in rng.integers(4, 16, 11).tolist()]
    return SFTBatches(examples, 16, 6, epochs=STEPS * 6 / 11, seed=0)

def packed():
    "12 steps of 6 of the rows into which 40 short chats are packed."
    rng = np.random.default_rng(4)
    examples = [(rng.integers(0, 64, n).tolist(), [0] * 2 + [1] * (n - 2)) for n in rng.integers(3, 10, 40).tolist()]
    rows = len(SFTBatches(examples, 16, 1, epochs=1, seed=0, pack=True))
    return SFTBatches(examples, 16, 6, epochs=STEPS * 6 / rows, seed=0, pack=True)

BATCHES = dict(mixture=mixture, long=long, chats=chats, packed=packed, token=lambda: pairs('token'), full=lambda: pairs('full'))
class Broken:
    "`mixture`, whose row 3 has no finite loss at two steps, one on either side of a checkpoint."
    def __init__(self): self.batches = mixture()
    def __len__(self): return STEPS
    def describe(self): return self.batches.describe()
    def batch(self, step): return self.batches.batch(step) | dict(bad=torch.arange(6) == (3 if step in (5, 6) else -1))

def broken_loss(model, batch):
    total, count, metrics = lm_loss(model, batch)
    return total * (float('nan') if batch['bad'].any() else 1), count, metrics

BATCHES['broken'] = Broken
LOSSES = dict(broken=lambda: broken_loss, token=lambda: preference_loss(.1, model(seed=1), kl_weight=1.), full=lambda: preference_loss(.1))

def die(): os.kill(os.getpid(), signal.SIGKILL)

class Deadly:
    "Kills this process when the batch of one step is asked for a second time (the first and last are read for the run's description)."
    def __init__(self, batches, at): self.batches, self.at, self.asked = batches, at, 0
    def __len__(self): return len(self.batches)
    def describe(self): return self.batches.describe() if hasattr(self.batches, 'describe') else {}
    def batch(self, step):
        if step == self.at:
            self.asked += 1
            if self.asked == (2 if step in (0, len(self) - 1) else 1): die()
        return self.batches.batch(step)

def run(out, batches, kind='mixture'):
    m = model()
    if kind == 'long': raise_rope(m, 40_000, 64)
    validation = dict(a=batches.batch(0)) if kind == 'mixture' else None
    rows = train(m, batches, SETTINGS, out, loss=LOSSES.get(kind, lambda: lm_loss)(), validation=validation, save_every=SAVE_EVERY)
    row_values = [repr([r[k] for k in sorted(r) if 'second' not in k and k != 'tokens_per_s']) for r in rows]  # repr: nan is nan
    torch.save([m.state_dict(), row_values, [r['step'] for r in rows], sum(r['skipped'] for r in rows)], Path(out)/'result.pt')

def forked(f, *args, wait=None, **kw):
    "Run in a child; returns the signal that ended it, 0 for a clean end. Killed after `wait` seconds if given."
    pid = os.fork()
    if pid == 0:
        try: f(*args, **kw)
        except BaseException: import traceback; traceback.print_exc(); os._exit(1)
        os._exit(0)
    if wait is not None: time.sleep(wait); os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status): sys.exit('a child failed')
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0

def same(a, b):
    (wa, la, sa, skipped), (wb, lb, sb, _) = (torch.load(Path(p)/'result.pt', weights_only=True) for p in (a, b))
    print(skipped, 'steps skipped')
    return (skipped or 'token' in str(a) or 'full' in str(a)) and all(torch.equal(wa[k], wb[k]) for k in wa) and la == lb and sa == sb == list(range(1, STEPS + 1))

def unbroken(tmp, kind):
    if not (tmp/f'whole_{kind}'/'result.pt').exists(): assert forked(run, tmp/f'whole_{kind}', BATCHES[kind](), kind) == 0
    return tmp/f'whole_{kind}'

def killed_at(tmp, kind, *steps):
    "Killed as each of these steps begins, one after the other, then finished."
    out = tmp/f'killed_{kind}_{"_".join(map(str, steps))}'
    for step in steps: assert forked(run, out, Deadly(BATCHES[kind](), step), kind) == signal.SIGKILL, step
    assert forked(run, out, BATCHES[kind](), kind) == 0
    return same(out, unbroken(tmp, kind))

def killed_while_saving(tmp):
    "Dies in the background with half of the second checkpoint written, while the next step is computed."
    out, real = tmp/'saving', checkpoint.dcp.save
    def half(copies, checkpoint_id, **kw):
        real(copies, checkpoint_id=checkpoint_id, **kw)
        if '0006' in str(checkpoint_id):
            assert threading.current_thread() is not threading.main_thread()
            file = Path(checkpoint_id)/'__0_0.distcp'
            data = file.read_bytes(); file.write_bytes(data[:len(data) // 2]); die()
    def child(): checkpoint.dcp.save = half; run(out, mixture())
    assert forked(child) == signal.SIGKILL
    assert sorted(p.name for p in (out/'checkpoints').iterdir()) == ['step_00000003', 'tmp_step_00000006']
    assert forked(run, out, mixture()) == 0
    assert not list((out/'checkpoints').glob('tmp_*'))
    return same(out, unbroken(tmp, 'mixture'))

def truncated(tmp, name):
    "The newest checkpoint loses the end of a file; the one before it is used."
    out = tmp/f'truncated_{name}'
    assert forked(run, out, mixture()) == 0
    (out/'result.pt').unlink()
    file = out/'checkpoints'/f'step_{STEPS:08}'/name
    file.write_bytes(file.read_bytes()[:-100])
    assert forked(run, out, mixture()) == 0
    return same(out, unbroken(tmp, 'mixture'))

def terminated(tmp):
    "A scheduler ends the job while step 5 is made, and the launcher passes its signal on; then the run is finished."
    out = tmp/'terminated'
    class Ended(Deadly):
        def batch(self, step):
            if step == 4: os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)
            return self.batches.batch(step)
    def child():
        try: run(out, Ended(mixture(), None))
        except KeyboardInterrupt as e: assert 'stopped after step 5' in str(e)
    assert forked(child) == 0
    assert sorted(p.name for p in (out/'checkpoints').iterdir()) == ['step_00000003', 'step_00000005'] and not (out/'result.pt').exists()
    assert forked(run, out, mixture()) == 0
    return same(out, unbroken(tmp, 'mixture'))

def killed_anytime(tmp):
    "Killed by the clock, again and again, until it is through."
    out, rng = tmp/'anytime', random.Random(0)
    start = time.time(); unbroken(tmp, 'mixture'); again = tmp/'timing'
    start = time.time(); forked(run, again, mixture()); whole = time.time() - start
    for _ in range(8): forked(run, out, mixture(), wait=rng.random() * whole)
    forked(run, out, mixture())
    return same(out, unbroken(tmp, 'mixture'))

if __name__ == '__main__':
    torch.set_num_threads(1)
    what, tmp, *args = sys.argv[1:]
    args = [int(a) if a.isdigit() else a for a in args]
    sys.exit(0 if globals()[what](Path(tmp), *args) else f'{what} {args}: not the same')
