"""Training tokens per second and peak memory: our loop, the transformers `Trainer`, and a plain loop in nanoGPT's manner.

    python tests/bench/train_throughput.py [--size toy|medium] [--quick]

The same network of random weights for all (toy: model and batch of `phi4 run toy`; medium: 44M parameters, 8 rows of 1,024 tokens a step), AdamW, clipping, and bfloat16
autocast where the machine computes in it. `Trainer` trains `Phi3ForCausalLM`; the plain loop is get_batch, forward, `cross_entropy` of all logits, backward,
clip, step, with PyTorch's fused attention. Each has a process of its own, which waits while another's steps are timed, so that a busy machine slows all three
alike. Time is from one step's beginning to the next one's, with everything a loop does between. Memory is the process's peak above what it
held before the model was made (on a GPU, PyTorch's own count).
"""
import argparse, os, platform, statistics, tempfile, time

import torch, transformers
import torch.nn.functional as F

from phi4_ref.config import load_config
from phi4_ref.model.transformer import ModelConfig, Transformer, count_parameters
from phi4_ref.train.data import MixtureBatches, make_store
from phi4_ref.train.loop import TrainSettings, computes_bf16, lm_loss, make_optimizer, train

TOY = load_config('toy')
SIZES = dict(toy=(ModelConfig(**TOY.model.model_dump(), max_position_embeddings=TOY.pretrain.context), TOY.pretrain.batch_size, TOY.pretrain.context),
             medium=(ModelConfig(16_384, 512, 8, 8, 2, 1792, 1024), 8, 1024))
DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
BF16 = computes_bf16(DEVICE)


def peak_bytes():
    if DEVICE.type == 'cuda': return torch.cuda.max_memory_allocated()
    status = dict(line.split(':', 1) for line in open('/proc/self/status'))
    return 1024 * int(status.get('VmHWM', status['VmRSS']).split()[0])


class Pace:
    "One end of a pipe: a loop calls it where a step begins, and it returns when the step may be made."
    def __init__(self, pipe): self.pipe, self.base = pipe, peak_bytes()
    def __call__(self):
        self.pipe.send(peak_bytes() - self.base)
        if not self.pipe.recv(): os._exit(0)


class Paced(MixtureBatches):
    "Batches that are handed out one a permission."
    pace = None
    def batch(self, step):
        if self.pace: self.pace()
        return super().batch(step)


def documents(vocab): return [torch.randint(0, vocab, (500_000,)).numpy()]


def ours(pipe, out, size, steps):
    config, rows, context = SIZES[size]
    batches = Paced(dict(web=make_store(documents(config.vocab_size), config.vocab_size)), dict(web=1.), context, rows, steps, seed=0)
    pace = Pace(pipe)
    def loss(model, batch):
        batches.pace = pace  # from the first step on, not while the run is described
        return lm_loss(model, batch)
    train(Transformer(config), batches, TrainSettings(lr=1e-3, precision='bf16' if BF16 else 'float32'), out, loss=loss, save_every=steps + 1, progress=False)


def trainer(pipe, out, size, steps):
    config, rows, context = SIZES[size]
    pace = Pace(pipe)
    class Callback(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kw):
            if args[1].global_step: pace()
    shape = {k: getattr(config, k) for k in ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'intermediate_size', 'max_position_embeddings')}
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**shape, pad_token_id=0, attn_implementation='sdpa', tie_word_embeddings=False))
    ids = torch.from_numpy(documents(config.vocab_size)[0])
    data = [dict(input_ids=row, labels=row) for row in ids[:len(ids) // context * context].view(-1, context)]
    args = transformers.TrainingArguments(out, per_device_train_batch_size=rows, max_steps=steps, learning_rate=1e-3, weight_decay=.1, max_grad_norm=1., optim='adamw_torch_fused',
        bf16=BF16, use_cpu=DEVICE.type == 'cpu', report_to=[], save_strategy='no', logging_strategy='no', disable_tqdm=True)
    transformers.Trainer(model, args, train_dataset=data, callbacks=[Callback()]).train()


def plain(pipe, out, size, steps):
    config, rows, context = SIZES[size]
    data, pace = torch.from_numpy(documents(config.vocab_size)[0]), Pace(pipe)
    model = Transformer(config, 'sdpa').to(DEVICE)
    optimizer = make_optimizer(model, TrainSettings(lr=1e-3))
    for step in range(steps):
        if step: pace()
        starts = torch.randint(len(data) - context - 1, (rows,))
        x, y = (torch.stack([data[i + shift:i + shift + context] for i in starts]).to(DEVICE) for shift in (0, 1))
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=BF16): logits = model(x)
        F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()


def worker(run, pipe, *args):
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    run(pipe, *args)


def main(size, quick, out):
    config, rows, context = SIZES[size]
    rounds, each = (4, 1) if quick else (10, 3)
    runs, pipes, peak = {'phi4_ref': ours, 'Trainer': trainer, 'plain loop': plain}, {}, {}
    for name, run in runs.items():
        pipes[name], theirs = torch.multiprocessing.Pipe()
        torch.multiprocessing.get_context('spawn').Process(target=worker, args=(run, theirs, f'{out}/{run.__name__}', size, rounds * each + 3), daemon=True).start()
        pipes[name].recv()  # the first step is made, the second may begin
    speeds = {name: [] for name in runs}
    for r in range(rounds):
        for name, pipe in pipes.items():
            start = time.perf_counter()
            for _ in range(each):
                pipe.send(True)
                peak[name] = pipe.recv()
            speeds[name].append(each * rows * context / (time.perf_counter() - start))
    for pipe in pipes.values(): pipe.send(False)
    with torch.device('meta'): weights = count_parameters(Transformer(config))
    print(f'torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, {DEVICE.type}, {platform.processor() or platform.machine()}, '
          f'{weights / 1e6:.1f}M parameters, {rows} x {context} tokens, {"bf16 autocast" if BF16 else "float32"}')
    print(f'{"":11} {"tokens/s":>9} {"ours/it":>8} {"peak MB":>8}')
    for name in runs:
        ratio = statistics.median(a / b for a, b in zip(speeds['phi4_ref'], speeds[name]))
        print(f'{name:11} {statistics.median(speeds[name]):9,.0f} {ratio:8.2f} {peak[name] / 1e6:8,.0f}')
    ratios = [a / b for a, b in zip(speeds['phi4_ref'], speeds['Trainer'])]
    print(f'ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})')


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--size', choices=SIZES, default='toy')
    parser.add_argument('--quick', action='store_true', help='fewer rounds')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as out: main(args.size, args.quick, out)
