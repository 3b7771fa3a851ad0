"One process is two processes: the shipped launch configurations, on CPUs with gloo."
import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from phi4_ref.config import CONFIGS
from phi4_ref.synth.llm import ReplyStore
from phi4_ref.train.loop import computes_bf16
from phi4_ref.train.zero import asks_for_zero

DRIVER = Path(__file__).parent/'processes_driver.py'
SHIPPED = CONFIGS/'accelerate'
LAUNCHES = ['ddp', 'deepspeed', 'fsdp2', 'fsdp2_zero2']
needs_deepspeed = pytest.mark.skipif(find_spec('deepspeed') is None, reason='deepspeed is not installed: pip install phi4_ref[deepspeed]')

def kinds(*cases): return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=needs_deepspeed if 'deepspeed' in case else ()) for case in cases]

def launch(kind, what, out, ok=True, processes=2, more=(), **variables):
    "The driver under `accelerate launch` with a shipped configuration, or alone."
    env = dict(os.environ, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', DS_ACCELERATOR='cpu', **variables)
    accelerate = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', str(SHIPPED/f'{kind}.yaml'), '--num_processes', str(processes), *more]
    done = subprocess.run([*(accelerate if kind else [sys.executable]), str(DRIVER), what, str(out)], env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(Path(out)/'result.pt', weights_only=True) if ok and (Path(out)/'result.pt').exists() else done.stderr

@pytest.fixture(scope='module')
def one(tmp_path_factory): return launch(None, 'train_all', tmp_path_factory.mktemp('one'))

def assert_same(a, b, tolerance):
    "Every logged number and every weight, but for the rounding of sums taken in another order."
    assert [r['step'] for r in a['rows']] == [r['step'] for r in b['rows']] and [r['targets'] for r in a['rows']] == [r['targets'] for r in b['rows']]
    for key in ('loss', 'grad_norm'): assert np.allclose([r[key] for r in a['rows']], [r[key] for r in b['rows']], rtol=tolerance, atol=0, equal_nan=True), key
    assert [r['val_loss/a'] for r in a['rows'] if 'val_loss/a' in r] == pytest.approx([r['val_loss/a'] for r in b['rows'] if 'val_loss/a' in r], rel=tolerance)
    assert a['weights'].keys() == b['weights'].keys()
    for k, v in a['weights'].items(): assert torch.allclose(v, b['weights'][k], atol=2e-5), k

@pytest.mark.parametrize('kind', kinds(*LAUNCHES))
def test_two_processes_are_one(one, kind, tmp_path):
    two = launch(kind, 'train_all', tmp_path)
    assert not one['sharded'] and two['sharded'] == kind.startswith('fsdp2')
    assert_same(one, two, 1e-4)

def test_tied_weights_stay_tied(tmp_path):
    "Also where a process other than the first has no weights to begin with."
    alone, two = launch(None, 'train_tied', tmp_path/'one'), launch('fsdp2', 'train_tied', tmp_path/'two')
    assert alone['rows'][0]['tied'] and two['rows'][0]['tied'] and two['sharded']
    assert_same(alone, two, 1e-4)

def test_validation_rows_are_shared_or_refused_at_once(tmp_path):
    launch('ddp', 'uneven_validation', tmp_path)
    assert all((tmp_path/f'error_{rank}').read_text() == '3 validation rows of web cannot be shared by 2 processes: choose a multiple of them' for rank in range(2)) and not (tmp_path/'log.jsonl').exists()

def test_a_process_makes_its_own_rows(one, tmp_path): assert_same(one, launch('ddp', 'train_parts', tmp_path), 1e-4)

def test_sharded_weights_travel_in_bf16(tmp_path):
    "The result is that of one process within bfloat16's rounding; what is kept, and the residual stream, stay float32."
    alone, two = launch(None, 'train_bf16', tmp_path/'one'), launch('fsdp2', 'train_bf16', tmp_path/'two')
    assert ('weight', 'torch.bfloat16') in two['rows'][0]['seen'] and ('weight', 'torch.float32') in alone['rows'][0]['seen']
    assert ('normed', 'torch.bfloat16') not in two['rows'][0]['seen'] and all(v.dtype == torch.float32 for v in two['weights'].values())
    assert np.allclose([r['loss'] for r in alone['rows']], [r['loss'] for r in two['rows']], rtol=3e-3)
    again = launch('fsdp2', 'train_recomputed', tmp_path/'again')  # with activation checkpointing, as the 14B is trained: not a bit of the result is another
    assert [[r[k] for k in ('loss', 'grad_norm')] for r in again['rows']] == [[r[k] for k in ('loss', 'grad_norm')] for r in two['rows']]
    assert all(torch.equal(v, two['weights'][k]) for k, v in again['weights'].items())
    assert again['rows'][0]['seen'] == two['rows'][0]['seen'] and again['rows'][0]['calls'] == two['rows'][0]['calls'] + 6 * 2 * 2  # steps, micro-batches of a process, layers

@pytest.mark.parametrize('first, then', kinds(('fsdp2', 'fsdp2'), ('ddp', 'ddp'), ('fsdp2', None), (None, 'fsdp2'), ('deepspeed', 'deepspeed'), ('deepspeed', None), ('fsdp2', 'deepspeed')))
def test_stopped_and_continued(one, first, then, tmp_path):
    launch(first, 'train_part', tmp_path)
    assert len(list(tmp_path.glob('stopped_*'))) == (2 if first else 1) and (tmp_path/'checkpoints'/'step_00000002'/'state.json').exists()
    shards = list((tmp_path/'checkpoints'/'step_00000002').glob('*.distcp'))
    assert len(shards) == 2 or first != 'fsdp2'
    again = launch(then, 'train_all', tmp_path)
    if first == then:
        whole = launch(first, 'train_all', tmp_path/'whole')
        assert all(torch.equal(v, whole['weights'][k]) for k, v in again['weights'].items()) and [r['loss'] for r in again['rows']] == [r['loss'] for r in whole['rows']]
    assert_same(one, again, 1e-4)

@pytest.mark.parametrize('kind', kinds('fsdp2', 'deepspeed'))
def test_killed_while_the_shards_are_written(one, kind, tmp_path):
    launch(kind, 'die_while_saving', tmp_path, ok=False)
    assert sorted(p.name for p in (tmp_path/'checkpoints').iterdir()) == ['step_00000002', 'tmp_step_00000004']
    assert_same(one, launch(kind, 'train_all', tmp_path), 1e-4)
    assert sorted(p.name for p in (tmp_path/'checkpoints').iterdir()) == ['step_00000004', 'step_00000006']

@pytest.mark.parametrize('kind', kinds('fsdp2', 'deepspeed'))
def test_a_sharded_stage_ends_in_hugging_face_layout(one, kind, tmp_path):
    from phi4_ref.model.pretrained import from_pretrained
    launch(kind, 'stage', tmp_path)
    assert not (tmp_path/'checkpoints').exists()
    weights = from_pretrained(tmp_path).state_dict()
    assert all(torch.allclose(v, weights[k], atol=2e-5) for k, v in one['weights'].items())

def test_uneven_shards_end_in_hugging_face_layout(tmp_path):
    from phi4_ref.model.pretrained import from_pretrained
    launch(None, 'odd_stage', tmp_path/'one')
    launch('fsdp2', 'odd_stage', tmp_path/'four', processes=4)
    one, four = (from_pretrained(tmp_path/n).state_dict() for n in ('one', 'four'))
    assert all(torch.allclose(v, four[k], atol=2e-5) for k, v in one.items())

@pytest.mark.parametrize('kind', ['ddp', 'fsdp2'])
def test_pairs_are_scored_by_all_processes(kind, tmp_path):
    "Each scores a part, every one has the margins of a single process to the bit, and the first loss is ln 2."
    one, two = launch(None, 'preferences', tmp_path/'one'), launch(kind, 'preferences', tmp_path/'two')
    alone, *both = (torch.load(tmp_path/name) for name in ('one/references_0.pt', 'two/references_0.pt', 'two/references_1.pt'))
    assert len(alone) == 150 and 0. not in alone and all(each == alone for each in both)
    assert two['rows'][0]['loss'] == pytest.approx(np.log(2), abs=1e-6)
    assert_same(one, two, 1e-4)

@pytest.mark.parametrize('kind', ['llama', pytest.param('lora', marks=pytest.mark.skipif(find_spec('peft') is None, reason='peft is not installed: pip install phi4_ref[peft]'))])
def test_a_model_of_transformers_is_sharded(kind, tmp_path):
    "Preference training of a Llama, whole and by an adapter, over two processes; what it saves is what one process saves."
    one = launch(None, kind, tmp_path/'one')
    two = launch('fsdp2', kind, tmp_path/'two', more=['--fsdp_transformer_layer_cls_to_wrap', 'LlamaDecoderLayer'])
    assert two['sharded'] and two['refused'] and not one['sharded'] and not one['refused']
    assert_same(one, two, 1e-4)
    a, b = (load_file(next((tmp_path/n/'model').glob('*model.safetensors'))) for n in ('one', 'two'))
    assert a.keys() == b.keys() and any(two['weights'][k].equal(v) for k, v in b.items() if k in two['weights']) == (kind == 'llama')
    for k in a: assert torch.allclose(a[k], b[k], atol=2e-5), k

# ---- DeepSpeed

@needs_deepspeed
def test_zero_1_skips_what_one_process_skips_and_leaves_no_hooks(tmp_path):
    "Whole gradients on every process, steps left out, and a second training in the same processes."
    one = launch(None, 'train_twice', tmp_path/'one')
    two = launch('deepspeed', 'train_twice', tmp_path/'two', more=['--zero_stage', '1'])
    assert [r['skipped'] for r in one['rows']] == [r['skipped'] for r in two['rows']] and 0 < sum(r['skipped'] for r in one['rows']) < 6
    assert_same(one, two, 1e-4)

@needs_deepspeed
@pytest.mark.parametrize('more, message', [(['--zero_stage', '3'], 'fsdp2.yaml, which does the same'), (['--offload_optimizer_device', 'cpu'], "offload_optimizer to 'cpu'"), (['--mixed_precision', 'bf16'], "own bf16 engine")])
def test_what_deepspeed_is_not_asked_for_is_refused_at_once(more, message, tmp_path):
    said = launch('deepspeed', 'train_all', tmp_path, ok=False, more=more)
    assert "ValueError: launched with DeepSpeed's" in said and message in said and not (tmp_path/'log.jsonl').exists()

def test_deepspeed_that_is_not_installed_is_said(monkeypatch):
    assert not asks_for_zero()
    monkeypatch.setenv('ACCELERATE_USE_DEEPSPEED', 'true')
    monkeypatch.setitem(sys.modules, 'deepspeed', None)
    with pytest.raises(ValueError, match=r'pip install phi4_ref\[deepspeed\]'): asks_for_zero()

# ---- groups of shards

GROUPS = ['--parallelism_config_dp_replicate_size', '2', '--parallelism_config_dp_shard_size', '2']

def test_two_groups_of_two_shards_are_one(one, tmp_path):
    "HSDP: the groups add up their gradients once a step; stopped and continued, it is the same run."
    four = launch('hsdp', 'train_ones', tmp_path/'whole', processes=4, more=GROUPS)
    assert four['sharded'] and four['rows'][0]['mesh'] == [2, 2] and four['rows'][0]['fsdp2']
    assert_same(one, four, 1e-4)
    launch('hsdp', 'train_part', tmp_path/'part', processes=4, more=GROUPS)
    assert_same(one, launch('hsdp', 'train_all', tmp_path/'part', processes=4, more=GROUPS), 1e-4)

def test_groups_that_are_not_the_processes_are_refused_at_once(tmp_path):
    said = launch('hsdp', 'train_all', tmp_path, ok=False, more=GROUPS)
    assert 'ValueError: 2 processes are not 2 groups of 2: choose a dp_shard_size above 1' in said and not (tmp_path/'log.jsonl').exists()

# ---- compiled

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get('CXX', 'clang++' if sys.platform == 'darwin' else 'g++')) is None, reason='torch.compile needs a C++ compiler')

@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
    "Launch with the compiler; kernels are kept, so that only the first launch compiles them."
    kernels = tmp_path_factory.mktemp('kernels')
    return lambda *args, kind='ddp', processes=1, **kw: launch(kind, *args, processes=processes, more=['--dynamo_backend', 'inductor'], TORCHINDUCTOR_CACHE_DIR=str(kernels), TORCHINDUCTOR_COMPILE_THREADS='1', **kw)

@needs_compiler
def test_compiled_and_continued(one, compiled, tmp_path):
    "Compiled, the run is that of the plain model but for rounding; stopped and continued it ends in its own bits; either kind of run takes up the other's checkpoint."
    whole = compiled('train_all', tmp_path/'whole')
    assert_same(one, whole, 1e-4)
    assert any(not torch.equal(v, one['weights'][k]) for k, v in whole['weights'].items()), 'not a bit differs: was it compiled?'
    compiled('train_part', tmp_path/'part')
    shutil.copytree(tmp_path/'part', tmp_path/'to_plain')
    again = compiled('train_all', tmp_path/'part')
    assert all(torch.equal(v, whole['weights'][k]) for k, v in again['weights'].items()) and [r['loss'] for r in again['rows']] == [r['loss'] for r in whole['rows']]
    assert_same(one, launch(None, 'train_all', tmp_path/'to_plain'), 1e-4)
    launch(None, 'train_part', tmp_path/'from_plain')
    assert_same(one, compiled('train_all', tmp_path/'from_plain'), 1e-4)

def test_without_a_compiler_a_compiled_run_is_refused_at_once(tmp_path):
    said = launch('ddp', 'train_all', tmp_path, ok=False, processes=1, more=['--dynamo_backend', 'inductor'], CXX='no-such-compiler')
    assert 'ValueError: launched with dynamo backend inductor' in said and 'no-such-compiler' in said and not (tmp_path/'log.jsonl').exists()

@pytest.mark.parametrize('kind', kinds('fsdp2', 'deepspeed'))
def test_a_bad_row_is_named_by_every_process(kind, tmp_path):
    launch(kind, 'poisoned', tmp_path)
    said = [(tmp_path/f'error_{rank}').read_text() for rank in range(2)]
    assert all('step 5: loss is nan' in s and 'from row 6.' in s for s in said), said
    assert (tmp_path/'checkpoints'/'step_00000004'/'state.json').exists()

@pytest.mark.parametrize('kind', ['ddp', 'fsdp2'])
def test_a_bad_step_is_passed_over_by_every_process(kind, tmp_path):
    one, two = launch(None, 'passed_over', tmp_path/'one'), launch(kind, 'passed_over', tmp_path/'two')
    assert_same(one, two, 1e-4)
    assert [(r['skipped'], r.get('broken')) for r in two['rows']] == [(r['skipped'], r.get('broken')) for r in one['rows']] and two['rows'][3]['broken'] == 'row 6'
    assert np.isnan(two['rows'][3]['loss']) and np.isfinite([r['loss'] for r in two['rows'] if r['step'] != 4]).all()

def test_configurations_are_accelerates():
    from accelerate.commands.config.config_args import load_config_from_file
    assert sorted(p.stem for p in SHIPPED.glob('*.yaml')) == sorted([*LAUNCHES, 'hsdp'])
    for name in [*LAUNCHES, 'hsdp']:
        config, settings = load_config_from_file(str(SHIPPED/f'{name}.yaml')), yaml.safe_load((SHIPPED/f'{name}.yaml').read_text())
        assert config.mixed_precision == 'no' and config.num_processes == 8
        assert settings.get('fsdp_config', {}).get('fsdp_version', 2) == 2

def test_search_and_evaluation_are_shared(tiny_run, tmp_path):
    "Two processes find and answer what one does, in its order; the tests of the search are made over all candidates together."
    from phi4_ref.records import load, load_json
    from test_run import begun
    one, two = (begun(tiny_run, tmp_path/n, 'final') for n in ('one', 'two'))
    for folder, kind in ((one, None), (two, 'ddp')):
        shutil.rmtree(folder/'pts')
        launch(kind, 'search_and_evaluate', folder)
    counts = load_json(one/'pts'/'stats.json')
    assert counts['questions'] > 16 and counts['candidates'] and counts == load_json(two/'pts'/'stats.json')
    for name in ('pts/trajectories.json', 'pts/pairs.parquet', 'eval/items.parquet'):
        read = load if name.endswith('parquet') else load_json
        assert read(one/name) == read(two/name), name
    drawn = [len(ReplyStore(two/'pts'/name)) for name in ('rollouts.sqlite', 'rollouts-1.sqlite')]
    assert min(drawn) > 0 and sum(drawn) >= len(ReplyStore(one/'pts'/'rollouts.sqlite'))  # the trace's question may be the other's, and is drawn again

def test_what_the_runs_own_models_reply_is_shared(tiny_run, tmp_path):
    "Two processes ask the base model its trivia, and collect the judge's replies, as one does; each keeps its own."
    from phi4_ref.records import load, load_json
    from test_run import begun
    folder = begun(tiny_run, tmp_path/'two', 'final')
    for stage in ('sft_data', 'judge'): shutil.rmtree(folder/stage)
    launch('ddp', 'ask_and_judge', folder)
    for name in ('sft_data/conversations.parquet', 'sft_data/refusal_pairs.parquet', 'judge/pairs.parquet', 'sft_data/refusal_counts.json', 'judge/counts.json'):
        read = load if name.endswith('parquet') else load_json
        assert read(folder/name) == read(tiny_run/name), name
    for stage in ('sft_data', 'judge'):
        kept = [len(ReplyStore(run/stage/name)) for run, name in ((tiny_run, 'own_replies.sqlite'), (folder, 'own_replies.sqlite'), (folder, 'own_replies-1.sqlite'))]
        assert kept[0] == kept[1] + kept[2] and min(kept) > 0, stage

def test_the_command_under_accelerate(tiny_run, tmp_path):
    "A stage that trains is shared; one that does not says that it belongs to one process."
    from phi4_ref.model.pretrained import from_pretrained
    from test_run import begun
    folder = begun(tiny_run, tmp_path/'run', 'curate')
    env = dict(os.environ, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', TOKENIZERS_PARALLELISM='false')
    command = lambda verb, *more: subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', '--config_file', str(SHIPPED/'fsdp2.yaml'), '--num_processes', '2',
                                           '-m', 'phi4_ref.cli', verb, str(folder), *more], env=env, capture_output=True, text=True)
    done = command('synth')
    assert done.returncode and 'stage synth belongs to one process: run `phi4 synth`' in done.stderr
    folder = begun(tiny_run, tmp_path/'run2', 'synth')
    for steps, rows in (4, 1), (6, 2):  # the first process alone writes, says and deletes; other settings are another test
        done = command('stress', 'pretrain.batch_size=16', '--steps', str(steps), '--factors', '1,2'[:2 * rows - 1], '--warmups', '0')
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines()[0] == f'{rows} trainings of {steps} steps' and done.stdout.count('warm-up 0 steps: ') == 1 and not list(folder.rglob('checkpoints'))
    done = command('pretrain')
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(path.samefile(folder/'stress'/'shards'/path.name) for path in (folder/'pretrain'/'shards').iterdir())  # tokenised once
    two, one = (from_pretrained(path/'pretrain').state_dict() for path in (folder, tiny_run))
    assert (folder/'pretrain'/'manifest.json').exists() and done.stdout.count('[1/1] pretrain') == 2  # begun and done, from one process
    # the rows of a step are added up in another order, so equal but for float32 rounding (6e-6 of the weights, 2e-7 of the losses in 48 steps); where a CPU computes in bfloat16, shards travel in it
    bf16 = computes_bf16(torch.device('cpu'))
    losses = [[json.loads(line)['loss'] for line in (path/'pretrain'/'log.jsonl').read_text().splitlines()] for path in (folder, tiny_run)]
    assert np.allclose(*losses, rtol=1e-2 if bf16 else 1e-5, atol=0)
    for k, v in one.items(): assert (v - two[k]).norm() <= (5e-2 if bf16 else 1e-4) * v.norm(), k

def test_the_command_over_two_machines(tiny_run, tmp_path):
    "Two launches of two processes each, as on two machines of a cluster that share a disk: two copies of the model, each in two shards."
    from test_run import begun
    folder = begun(tiny_run, tmp_path/'run', 'synth')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    env = dict(os.environ, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', TOKENIZERS_PARALLELISM='false')
    launches = [subprocess.Popen([sys.executable, '-m', 'accelerate.commands.launch', '--config_file', str(SHIPPED/'hsdp.yaml'), '--num_machines', '2', '--num_processes', '4', '--machine_rank', str(rank),
                                  '--main_process_ip', '127.0.0.1', '--main_process_port', str(port), *GROUPS, '-m', 'phi4_ref.cli', 'pretrain', str(folder)],
                                 env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    said = [process.communicate(timeout=600) for process in launches]
    assert [process.returncode for process in launches] == [0, 0], said[0][1][-3000:] + said[1][1][-3000:]
    assert said[0][0].count('[1/1] pretrain') == 2 and '[1/1]' not in said[1][0], 'the first process of the first machine speaks'
    losses = [[json.loads(line)['loss'] for line in (path/'pretrain'/'log.jsonl').read_text().splitlines()] for path in (folder, tiny_run)]
    assert np.allclose(*losses, rtol=1e-2 if computes_bf16(torch.device('cpu')) else 1e-5, atol=0)
