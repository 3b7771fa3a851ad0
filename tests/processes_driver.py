"Work for test_processes.py, run under `accelerate launch`: python processes_driver.py WHAT FOLDER."
import copy
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import phi4_ref.train.checkpoint as checkpoint
import phi4_ref.post.dpo as dpo
import phi4_ref.train.loop as loop_module
from phi4_ref.model.transformer import Attention, ModelConfig, Transformer
from phi4_ref.post.dpo import train_dpo
from phi4_ref.train.checkpoint import gathered
from phi4_ref.train.data import share_of
from phi4_ref.train.loop import TrainSettings, lm_loss, made_by_first, train
from phi4_ref.train.pretrain import finish_stage

RANK, STEPS = int(os.environ.get('RANK', 0)), 6
SETTINGS = TrainSettings(lr=1e-2, precision='float32', micro_batch_size=2, skip_sigma=6.)

class Ragged:
    "Eight rows a step, masked more and more; the first four, one process's share of two, have no target at the last step."
    def __init__(self, poison=None): self.poison = poison
    def __len__(self): return STEPS
    def batch(self, step):
        g = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 64, (8, 16), generator=g)
        keep = torch.rand(8, 16, generator=g) < torch.linspace(0, 1, 8)[:, None]
        if step == STEPS - 1: keep[:4] = False
        return dict(input_ids=ids, labels=torch.where(keep, ids, -100), bad=torch.arange(8) == (6 if step == self.poison else -1))

def loss(model, batch):
    total, count, metrics = lm_loss(model, batch)
    return total * (float('nan') if batch['bad'].any() else 1), count, metrics

def model(device='cpu', **more):
    torch.manual_seed(0)
    with torch.device(device): return Transformer(ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=32, **more))

def run(out, batches=None, settings=SETTINGS, m=None, recompute=False, **kw):
    m = m or made_by_first(model)
    m.activation_checkpointing = recompute
    rows = train(m, batches or Ragged(), settings, out, loss=loss, save_every=2, validation=dict(a=Ragged().batch(99)), **kw)
    return m, rows

def sharded(m): return isinstance(m.lm_head.weight, DTensor)

def keep(out, m, rows):
    "What the test compares, from the main process, with the model gathered."
    whole, shards = gathered(m), sharded(m)
    if RANK: assert rows and (whole is None) == shards; return
    torch.save(dict(weights=whole.state_dict(), rows=rows, sharded=shards), Path(out)/'result.pt')

def uneven_validation(out):
    try: train(model(), Ragged(), SETTINGS, out, loss=loss, validation=dict(web={k: v[:3] for k, v in Ragged().batch(0).items()}))
    except ValueError as e: (Path(out)/f'error_{RANK}').write_text(str(e))

def train_all(out): keep(out, *run(out))

def train_tied(out):
    m, rows = run(out, m=made_by_first(partial(model, tie_word_embeddings=True)))
    rows[0]['tied'] = m.lm_head.weight is m.model.embed_tokens.weight
    keep(out, m, rows)

def train_ones(out):
    "One row a forward pass, so that a process of four has two micro-batches; notes the mesh of groups and shards."
    m, rows = run(out, settings=replace(SETTINGS, micro_batch_size=1))
    weight = m.lm_head.weight
    rows[0]['mesh'] = list(weight.device_mesh.shape) if sharded(m) else []
    rows[0]['fsdp2'] = Accelerator().is_fsdp2  # as Accelerate sees it after the run
    keep(out, m, rows)

def train_bf16(out, recompute=False):
    "Notes the widths in which weights and the residual stream come to a layer, and how often one is computed."
    seen, calls, forward = set(), [], Attention.forward
    def noted(self, x_BTD, *rest):
        calls.append(1)
        seen.add(('normed', str(x_BTD.dtype)))
        seen.add(('weight', str(self.qkv_proj.weight.dtype)))
        return forward(self, x_BTD, *rest)
    Attention.forward = noted
    m, rows = run(out, settings=replace(SETTINGS, precision='bf16'), recompute=recompute)
    rows[0] |= dict(seen=sorted(seen), calls=len(calls))
    keep(out, m, rows)

def train_recomputed(out): train_bf16(out, recompute=True)

def train_parts(out):
    "Batches that can make each process's rows alone, and refuse to make them all once training has begun."
    class Parts(Ragged):
        def part(self, step, rank, processes):
            share = share_of(8, rank, processes)
            return {k: v[share.start:share.stop] for k, v in Ragged.batch(self, step).items()}
        def batch(self, step):
            assert step in (0, STEPS - 1) and not RANK, 'the whole batch is asked for by the description only, which the first process makes'
            return super().batch(step)
    keep(out, *run(out, Parts()))

def train_part(out):
    "Stops after three steps, as a run does whose fourth batch cannot be read; the last checkpoint is that of step 2."
    class Breaks(Ragged):
        def batch(self, step):
            if step == 3: raise OSError('the machine went away')
            return super().batch(step)
    try: run(out, Breaks())
    except OSError: (Path(out)/f'stopped_{RANK}').touch()

def train_twice(out):
    "A training that skips every step above the last ones' mean, then the same again with a model that the first one left."
    loop_module.WINDOW = 4
    settings = replace(SETTINGS, skip_sigma=.01)
    first, _ = run(out, settings=settings)
    first.load_state_dict(model().state_dict())
    keep(out, *run(Path(out)/'again', settings=settings, m=first))

def stage(out):
    m, rows = run(out)
    finish_stage(m, None, out, rows)

def odd_stage(out):
    "No size is a multiple of four processes: shards are padded, and one process may hold none of a matrix."
    class Fewer(Ragged):
        def batch(self, step): return {k: v % 61 if k == 'input_ids' else v.where(v < 61, -100) if k == 'labels' else v for k, v in super().batch(step).items()}
    torch.manual_seed(0)
    m = Transformer(ModelConfig(vocab_size=61, hidden_size=6, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, intermediate_size=9, max_position_embeddings=32))
    finish_stage(m, None, out, train(m, Fewer(), SETTINGS, out, loss=loss))

def peer(out, adapter):
    "A model of transformers, perhaps with an adapter, trained on single-token pairs; saved as the message of `gathered` says."
    Accelerator()
    torch.manual_seed(0)
    m = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, initializer_range=.2))
    ref = None if adapter else copy.deepcopy(m)
    if adapter:
        from peft import LoraConfig, get_peft_model
        m = get_peft_model(m, LoraConfig(r=4, target_modules=['q_proj', 'v_proj']))
    g = torch.Generator().manual_seed(1)
    ids = lambda n: torch.randint(0, 64, (n,), generator=g).tolist()
    pairs = [dict(id=str(i), prompt_ids=ids(3 + i % 8), chosen_ids=ids(1), rejected_ids=ids(1), meta={}) for i in range(16)]
    rows = train_dpo(m, ref, pairs, replace(SETTINGS, skip_sigma=None), out, kl_weight=1., epochs=3, batch_size=8)
    shards = any(isinstance(p, DTensor) for p in m.parameters())
    weights = get_model_state_dict(m, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    try: refused = gathered(m) is not m
    except ValueError as e: refused = 'get_model_state_dict' in str(e)
    if RANK: return
    torch.save(dict(weights=weights, rows=rows, sharded=shards, refused=refused), Path(out)/'result.pt')
    m.save_pretrained(Path(out)/'model', state_dict=dict(weights))

def preferences(out):
    "Pairs scored and trained without a reference model; keeps the margins that the training starts from."
    Accelerator()
    g, kept, m = torch.Generator().manual_seed(2), [], model()
    ids = lambda n: torch.randint(0, 64, (n,), generator=g).tolist()
    pairs = [dict(id=str(i), prompt_ids=ids(3 + i % 8), chosen_ids=ids(1 + i % 2), rejected_ids=ids(1), meta={}) for i in range(150)]
    class Kept(dpo.PairBatches):
        def __init__(self, pairs, references, *rest): kept.extend(references); super().__init__(pairs, references, *rest)
    dpo.PairBatches = Kept
    rows = train_dpo(m, None, pairs, replace(SETTINGS, skip_sigma=None), out, epochs=1, batch_size=30)
    keep(out, m, rows)
    torch.save(kept, Path(out)/f'references_{RANK}.pt')

def llama(out): peer(out, adapter=False)

def lora(out): peer(out, adapter=True)

def search_and_evaluate(out):
    "Two stages of a run directory, the search in chunks of eight questions."
    import phi4_ref.post.pts as pts
    from phi4_ref.config import load_config
    from phi4_ref.run import run as run_stages
    pts.search = partial(pts.search, chunk_size=8)
    config = load_config(Path(out)/'config.yaml', [f'out={out}', 'pts.confirm_samples=20'])
    run_stages(config, 'pts')
    run_stages(config, 'eval', force=True)

def ask_and_judge(out):
    "The two stages in which a run's own models reply."
    import phi4_ref.run as stages
    from phi4_ref.config import load_config
    config = load_config(Path(out)/'config.yaml', [f'out={out}'])
    for stage in stages.STAGES:
        if stage.name in ('sft_data', 'judge'): stages.run_stage(config, stage, '', False, False)

def poisoned(out):
    try: run(out, Ragged(poison=4), replace(SETTINGS, skip_sigma=None))
    except FloatingPointError as e: (Path(out)/f'error_{RANK}').write_text(str(e))

def passed_over(out): keep(out, *run(out, Ragged(poison=3)))

def die_while_saving(out):
    "Every process is killed in the background, with the shards of step 4 written and not yet renamed."
    real = checkpoint.dcp.save
    def save(copies, checkpoint_id, **kw):
        real(copies, checkpoint_id=checkpoint_id, **kw)
        if '0004' in str(checkpoint_id): os.kill(os.getpid(), 9)
    checkpoint.dcp.save = save
    run(out)

if __name__ == '__main__':
    torch.set_num_threads(1)
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    globals()[sys.argv[1]](sys.argv[2])
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()
