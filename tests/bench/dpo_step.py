"""Single-token DPO: gradient, pairs per second and peak memory, ours and those of TRL's `DPOTrainer`.

    python tests/bench/dpo_step.py [--size toy|llama] [--pivots 4] [--quick]

The same pairs, weights, reference log-probabilities (computed beforehand by each) and precision for all. toy: 2.7M parameters, TRL trains `Phi3ForCausalLM`, ours is `Transformer`
with the same weights, trajectories of 24 to 72 tokens as in the toy run; llama: `LlamaForCausalLM` of half SmolLM2-135M's width (30M parameters, vocabulary of 49,152), the very
same class for all, trajectories of 60 to 150 tokens. Each trajectory has `--pivots` pairs at positions drawn from its last two thirds; the toy run's search
finds 1.1 on a trajectory, long solutions have more. `DPOTrainer` takes text, which it tokenizes again and ends with an
end-of-text token; here it is handed token ids without one, by a subclass that leaves its data set as it is. In its favour its activation checkpointing, on by default, is off.

Three rows: TRL, ours with a row for each pair (kind 'token'), ours with a row for each trajectory (kind 'trajectory'); all make the same number of pairs a step. Each has a process of its own, which waits
while another's steps are timed, so that a busy machine slows all alike; memory is a process's peak above what it held before its model was made. The last line is the third row over the first.
"""
import argparse, copy, os, platform, random, statistics, sys, tempfile, time, warnings
from importlib.util import find_spec

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # a waiting process must not spin
os.environ |= dict(TQDM_DISABLE='1', HF_DATASETS_DISABLE_PROGRESS_BARS='1', PYTHONWARNINGS='ignore')  # of the libraries in the three processes
import torch, transformers
from train_throughput import BF16, DEVICE, Pace

from phi4_ref.model.transformer import ModelConfig, Transformer
from phi4_ref.post.dpo import PairBatches, preference_loss, reference_margins
from phi4_ref.train.loop import TrainSettings, train

TOY = ModelConfig(1536, 192, 6, 6, 2, 512, 256)
LLAMA = dict(vocab_size=49_152, hidden_size=288, num_hidden_layers=18, num_attention_heads=9, num_key_value_heads=3, intermediate_size=768, tie_word_embeddings=True)
SIZES = dict(toy=(32, 24, 72), llama=(4, 60, 150))  # pairs a step, shortest and longest trajectory
BETA = .1


def make_model(size, seed=0):
    "A model of `transformers` with random weights."
    torch.manual_seed(seed)
    if size == 'llama': model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, attn_implementation='sdpa'))
    else:
        shape = {k: getattr(TOY, k) for k in ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'intermediate_size', 'max_position_embeddings')}
        model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation='sdpa', tie_word_embeddings=False))
    return model


def as_ours(model):
    "The model that phi4_ref trains: `Transformer` for Phi-3's weights, any other as it is."
    if not isinstance(model, transformers.Phi3ForCausalLM): return model
    own = Transformer(TOY)
    own.load_state_dict(model.state_dict())
    return own


def make_pairs(size, pivots, trajectories, seed=0):
    rng, vocab = random.Random(seed), LLAMA['vocab_size'] if size == 'llama' else TOY.vocab_size
    rows = []
    for t in range(trajectories):
        ids = [rng.randrange(1, vocab) for _ in range(rng.randint(*SIZES[size][1:]))]
        for at in sorted(rng.sample(range(len(ids) // 3, len(ids)), pivots)):
            rows.append(dict(id=f'{t}-{at}', prompt='', chosen='', rejected='', prompt_ids=ids[:at], chosen_ids=[ids[at]], rejected_ids=[ids[at] % (vocab - 1) + 1], source='', meta={}))
    return rows


def trl_trainer(model, reference, pairs, batch_size, steps, out, callbacks=()):
    "TRL's trainer, fed with token ids."
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from trl import DPOConfig, DPOTrainer
    class IdTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args): return dataset
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({'<pad>': 0}, unk_token='<pad>')), pad_token='<pad>', eos_token='<pad>')
    args = DPOConfig(out, beta=BETA, per_device_train_batch_size=batch_size, max_steps=steps, learning_rate=1e-6, weight_decay=.1, max_grad_norm=1., optim='adamw_torch_fused', precompute_ref_log_probs=True,
        gradient_checkpointing=False, max_length=None, bf16=BF16, use_cpu=DEVICE.type == 'cpu', report_to=[], save_strategy='no', logging_strategy='no', disable_tqdm=True)
    data = Dataset.from_list([{k: r[k] for k in ('prompt_ids', 'chosen_ids', 'rejected_ids')} for r in pairs])
    return IdTrainer(model, reference, args, train_dataset=data, processing_class=tokenizer, callbacks=[*callbacks])


def gradients(size, pivots=4, trajectories=4):
    "Largest relative difference of any weight's gradient from TRL's: a row for each pair, a row for each trajectory, and TRL with its end-of-text trained."
    global BF16
    before, BF16 = BF16, False
    pairs, model, reference = make_pairs(size, pivots, trajectories), make_model(size), make_model(size, seed=1)
    ours, our_reference, found = as_ours(copy.deepcopy(model)), as_ours(copy.deepcopy(reference)), {}
    def of(m): return {k: v.grad.clone() for k, v in m.named_parameters()}
    def theirs(rows):
        with tempfile.TemporaryDirectory() as out:
            trainer = trl_trainer(copy.deepcopy(model).train(), copy.deepcopy(reference), rows, len(rows), 1, out)
            batch = trainer.data_collator(list(trainer.train_dataset))
            trainer.compute_loss(trainer.model, {k: v.to(DEVICE) for k, v in batch.items()}).backward()
            return {k: v.cpu() for k, v in of(trainer.model).items()}
    plain = theirs(pairs)
    apart = lambda a: max(((a[k] - v).abs().max() / v.abs().max()).item() for k, v in plain.items())
    for kind, rows in (('token', len(pairs)), ('trajectory', trajectories)):
        ours.zero_grad()
        total, n, _ = preference_loss(BETA)(ours, PairBatches(pairs, reference_margins(our_reference, pairs, kind), rows, 1, kind=kind).batch(0))
        (total / n).backward()
        found[kind] = apart(of(ours))
    found['end of text'] = apart(theirs([r | {k: r[k] + [1] for k in ('chosen_ids', 'rejected_ids')} for r in pairs]))
    BF16 = before
    return found


def run_trl(pipe, out, size, pairs, batch_size, steps, pivots):
    pace = Pace(pipe)
    class Callback(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kw):
            if args[1].global_step: pace()
    trl_trainer(make_model(size), None, pairs, batch_size, steps, out, [Callback()]).train()


def run_ours(pipe, out, size, pairs, batch_size, steps, pivots, kind='token'):
    pace, waits = Pace(pipe), []
    class Paced(PairBatches):
        def part(self, *args):
            if waits: pace()
            return super().part(*args)
    model = as_ours(make_model(size)).to(DEVICE).train()
    rows = batch_size if kind == 'token' else batch_size // pivots
    batches = Paced(pairs, reference_margins(model, pairs, kind, BF16), rows, 1, kind=kind)
    batches.steps = [(0, i) for i in range(steps)]
    objective = preference_loss(BETA)
    def loss(model, batch):
        waits[:] = [True]  # from the first step on, not while the run is described
        return objective(model, batch)
    train(model, batches, TrainSettings(lr=1e-6, precision='bf16' if BF16 else 'float32', tracker='none'), out, loss=loss, save_every=steps + 1, progress=False)


def run_shared(*args): run_ours(*args, kind='trajectory')


def worker(run, pipe, *args):
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    run(pipe, *args)


def main(size, pivots, quick, out):
    import trl
    (rounds, each), batch_size = (3, 1) if quick else (7, 3), SIZES[size][0]
    steps, pairs = rounds * each + 3, make_pairs(size, pivots, 4 * batch_size // pivots)
    differences = gradients(size, pivots, trajectories=2)
    runs, pipes, peak = {'TRL': run_trl, 'token': run_ours, 'trajectory': run_shared}, {}, {}
    for name, run in runs.items():
        pipes[name], theirs = torch.multiprocessing.Pipe()
        torch.multiprocessing.get_context('spawn').Process(target=worker, args=(run, theirs, f'{out}/{name}', size, pairs, batch_size, steps, pivots), daemon=True).start()
        pipes[name].recv()  # the first step is made, the second may begin
    speeds = {name: [] for name in runs}
    for r in range(rounds):
        for name, pipe in pipes.items():
            start = time.perf_counter()
            for _ in range(each):
                pipe.send(True)
                peak[name] = pipe.recv()
            speeds[name].append(each * batch_size / (time.perf_counter() - start))
    for pipe in pipes.values(): pipe.send(False)
    print(f'torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}, {torch.get_num_threads()} threads, {DEVICE.type}, {platform.processor() or platform.machine()}, {size}, '
          f'{batch_size} pairs a step, {pivots} on a trajectory, {"bf16 autocast" if BF16 else "float32"}')
    print(f'{"":34} {"pairs/s":>8} {"over TRL":>8} {"peak MB":>8} {"gradient apart":>14}')
    titles = {'TRL': "TRL's DPOTrainer", 'token': 'phi4_ref, a row for each pair', 'trajectory': 'phi4_ref, a row for each trajectory'}
    ratios = {name: [a / b for a, b in zip(speeds[name], speeds['TRL'])] for name in runs}
    for name in runs:
        print(f'{titles[name]:34} {statistics.median(speeds[name]):8.1f} {statistics.median(ratios[name]):8.2f} {peak[name] / 1e6:8,.0f} ' + (f'{differences[name]:14.1e}' if name in differences else ''))
    print(f"gradient of TRL with an end-of-text token trained after the pivot: {differences['end of text']:.1e} apart")
    print(f"ratio: {statistics.median(ratios['trajectory']):.2f} ({min(ratios['trajectory']):.2f}-{max(ratios['trajectory']):.2f})")


if __name__ == '__main__':
    warnings.filterwarnings('ignore')
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser()
    parser.add_argument('--size', choices=SIZES, default='toy')
    parser.add_argument('--pivots', type=int, choices=(1, 2, 4), default=4, help='pairs on a trajectory')
    parser.add_argument('--quick', action='store_true', help='fewer rounds')
    args = parser.parse_args()
    if find_spec('trl') is None: sys.exit('TRL is not installed here: pip install phi4_ref[bench], or pip install --no-deps trl==1.16.0, the version measured')
    with tempfile.TemporaryDirectory() as out: main(args.size, args.pivots, args.quick, out)
