"The stress test of the warm-up: what it calls stable, and that it goes on where it stopped."
import json

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import phi4_ref.train.stress as module
from phi4_ref.model.transformer import ModelConfig, Transformer
from phi4_ref.train.loop import TrainSettings
from phi4_ref.train.stress import First, count_spikes, safe_lr, stress, stress_table, verdict

SHAPE = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=32)

def make_model():
    torch.manual_seed(0)
    return Transformer(SHAPE)

class Repeated:
    def __len__(self): return 1000
    def batch(self, step):
        ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(step % 2))
        return dict(input_ids=ids, labels=ids.clone())

@given(st.integers(20, 100), st.integers(18, 60), st.floats(1, 50))
def test_a_spike_is_counted_once(steps, at, height):
    losses = [3 + .01 * np.sin(i) for i in range(max(steps, at + 2))]
    assert count_spikes(losses) == 0 and verdict(losses, len(losses)) == 'stable'
    losses[at] += height
    assert count_spikes(losses) == 1

def test_a_training_that_breaks_off_is_diverged(tmp_path):
    rows = stress(make_model, Repeated(), TrainSettings(lr=1e-3, precision='float32'), tmp_path, steps=20, factors=(1, 1e30), warmups=(0.,), say=lambda line: None)
    assert [r['verdict'] for r in rows] == ['stable', 'diverged'] and len(rows[0]['losses']) == 20 > len(rows[1]['losses'])
    assert 'diverged' in stress_table(rows) and safe_lr(rows, 0) is None
    assert not list(tmp_path.rglob('checkpoints'))

def test_cells_that_are_done_are_read_back(tmp_path, monkeypatch):
    grid = dict(steps=8, factors=(1, 2), warmups=(0., .5), say=lambda line: None)
    rows = stress(make_model, Repeated(), TrainSettings(lr=1e-3), tmp_path, **grid)
    assert [(r['lr'], r['warmup']) for r in rows] == [(1e-3, 0), (2e-3, 0), (1e-3, 4), (2e-3, 4)]
    next(tmp_path.glob('lr_0.002_warmup_0.5')).joinpath('result.json').unlink()
    trained, real = [], module.train
    monkeypatch.setattr(module, 'train', lambda model, batches, settings, *a, **kw: trained.append(settings.lr) or real(model, batches, settings, *a, **kw))
    again = stress(make_model, Repeated(), TrainSettings(lr=1e-3), tmp_path, **grid)
    assert trained == [2e-3] and again == rows

def test_no_more_steps_than_the_run_has():
    assert len(First(Repeated(), 5000)) == 1000
