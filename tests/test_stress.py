"The stress test of the warm-up: what it calls stable, and that it goes on where it stopped."
import json
import signal
from dataclasses import replace

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
    rows = stress(make_model, Repeated(), TrainSettings(lr=1e-3, precision='float32'), tmp_path, steps=20, factors=(1, 1e30), warmups=(0,), say=lambda line: None)
    assert [r['verdict'] for r in rows] == ['stable', 'diverged'] and len(rows[0]['losses']) == 20 > len(rows[1]['losses'])
    assert 'diverged' in stress_table(rows) and safe_lr(rows, 0) is None
    assert not list(tmp_path.rglob('checkpoints'))

def test_cells_that_are_done_are_read_back(tmp_path, monkeypatch):
    grid = dict(steps=8, factors=(1, 2), warmups=(0, .2), say=lambda line: None)
    rows = stress(make_model, Repeated(), TrainSettings(lr=1e-3), tmp_path, **grid)
    assert [(r['lr'], r['warmup']) for r in rows] == [(1e-3, 0), (2e-3, 0), (1e-3, 4), (2e-3, 4)]
    next(tmp_path.glob('lr_0.002_warmup_4')).joinpath('result.json').unlink()
    trained, real = [], module.train
    monkeypatch.setattr(module, 'train', lambda model, batches, settings, *a, **kw: trained.append(settings.lr) or real(model, batches, settings, *a, **kw))
    again = stress(make_model, Repeated(), TrainSettings(lr=1e-3), tmp_path, **grid)
    assert trained == [2e-3] and again == rows

@pytest.mark.parametrize('change', ['steps', 'lr', 'data', 'model', 'nothing'])
def test_a_result_of_another_test_is_not_read(tmp_path, change):
    "The digest of a cell is of its steps, settings, data and model."
    what = dict(steps=6, factors=(1,), warmups=(0,), say=lambda line: None)
    first = stress(make_model, Repeated(), TrainSettings(lr=1e-3), tmp_path, **what)
    class Others(Repeated):
        def batch(self, step): return super().batch(step + 1)
    def deeper(): return Transformer(replace(SHAPE, num_hidden_layers=2))
    again = stress(deeper if change == 'model' else make_model, Others() if change == 'data' else Repeated(),
                   TrainSettings(lr=1e-3, weight_decay=.2 if change == 'lr' else .1), tmp_path, **what | dict(steps=9 if change == 'steps' else 6))
    assert (again == first) == (change == 'nothing') and len(again[0]['losses']) == (9 if change == 'steps' else 6)
    assert len(list(tmp_path.iterdir())) == 1  # the cell was made anew in its place

def test_warm_ups_are_those_of_the_run_and_the_rate_is_held(tmp_path):
    "1,000 steps with 2% of warm-up: 20 steps; without a number of steps, 100 more than the longest warm-up."
    said = []
    rows = stress(make_model, Repeated(), TrainSettings(lr=1e-3, precision='float32'), tmp_path, factors=(1,), warmups=(0, .25, 1), say=said.append)
    assert [r['warmup'] for r in rows] == [0, 5, 20] and {len(r['losses']) for r in rows} == {120} and said[0] == '3 trainings of 120 steps'
    rates = [json.loads(line)['lr'] for line in (tmp_path/'lr_0.001_warmup_20'/'log.jsonl').read_text().splitlines()]
    assert np.allclose(rates, [1e-3 * min(1, (i + 1) / 21) for i in range(120)])
    with pytest.raises(ValueError, match='20 steps end before a warm-up of 20 steps does: give more steps'): stress(make_model, Repeated(), TrainSettings(lr=1e-3), tmp_path, steps=20)

def test_a_cell_that_was_interrupted_goes_on(tmp_path):
    class Impatient(Repeated):
        pressed = False
        def batch(self, step):
            if step == 4 and not self.pressed: self.pressed = True; signal.raise_signal(signal.SIGINT)
            return super().batch(step)
    what, batches = dict(steps=8, factors=(1,), warmups=(0,), say=lambda line: None), Impatient()
    with pytest.raises(KeyboardInterrupt): stress(make_model, batches, TrainSettings(lr=1e-3), tmp_path/'a', **what)
    assert [p.name for p in tmp_path.rglob('step_*')] == ['step_00000005']
    again = stress(make_model, batches, TrainSettings(lr=1e-3), tmp_path/'a', **what)
    assert again[0]['losses'] == stress(make_model, Repeated(), TrainSettings(lr=1e-3), tmp_path/'b', **what)[0]['losses'] and not list(tmp_path.rglob('checkpoints'))

def test_no_more_steps_than_the_run_has():
    assert len(First(Repeated(), 5000)) == 1000
