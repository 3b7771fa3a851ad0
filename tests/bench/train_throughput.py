"""Training tokens per second and peak memory: our loop, the transformers `Trainer`, both compiled, and a plain loop in nanoGPT's manner.

    python tests/bench/train_throughput.py [--size toy|medium] [--eager] [--quick] [--out FILE]

The same network of random weights for all (toy: model and batch of `phi4 run toy`; medium: 44M parameters, 2 rows of 1,024 tokens a step), AdamW, clipping, and bfloat16
autocast where the machine computes in it. `Trainer` trains `Phi3ForCausalLM`; the plain loop is get_batch, forward, `cross_entropy` of all logits, backward,
clip, step, with PyTorch's fused attention. `compiled` is `torch.compile` as each side offers it: ours launched with ACCELERATE_DYNAMO_BACKEND=INDUCTOR, what
`accelerate launch --dynamo_backend inductor` sets, and `Trainer` with torch_compile=True. Every kernel is compiled anew; start is from the process's begin to the end of its first step.

Each has a process of its own, which waits while another's steps are timed, so that a busy machine slows all alike. Time is from one step's beginning to the next one's, with
everything a loop does between. Memory is the process's peak above what it held before the model was made (on a GPU, PyTorch's own count), the compiler's included.

At the toy size about three quarters of an eager step are matrix products and attention, which both sides take from the same library: a loop that spent nothing on the
rest would be 1.33 times as fast, so none is 1.3 times as fast without a compiler. What the compiler saves is that rest: norms, rotary positions, SwiGLU, each one pass over memory.
"""
import argparse, os, platform, statistics, tempfile, time
from pathlib import Path

import torch, transformers
import torch.nn.functional as F

from phi4_ref.config import load_config
from phi4_ref.model.transformer import ModelConfig, Transformer, count_parameters
from phi4_ref.train.data import MixtureBatches, make_store
from phi4_ref.train.loop import TrainSettings, computes_bf16, make_optimizer, train

TOY = load_config('toy')
SIZES = dict(toy=(ModelConfig(**TOY.model.model_dump(), max_position_embeddings=TOY.pretrain.context), TOY.pretrain.batch_size, TOY.pretrain.context),
             medium=(ModelConfig(16_384, 512, 8, 8, 2, 1792, 1024), 2, 1024), tiny=(ModelConfig(512, 64, 2, 4, 2, 128, 64), 4, 64))  # tiny: to see that it runs
ROUNDS = dict(toy=(40, 3), medium=(10, 1), tiny=(2, 1))  # rounds, and steps of each process in a round
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
    "Batches that are handed out one a permission, but for the first and the last, which also the run's description reads."
    pace = None
    def batch(self, step):
        if 0 < step < len(self) - 1: self.pace()
        return super().batch(step)


def documents(vocab): return [torch.randint(0, vocab, (500_000,)).numpy()]


def ours(pipe, out, size, steps, compiled):
    if compiled: os.environ['ACCELERATE_DYNAMO_BACKEND'] = 'INDUCTOR'
    config, rows, context = SIZES[size]
    batches = Paced(dict(web=make_store(documents(config.vocab_size), config.vocab_size)), dict(web=1.), context, rows, steps, seed=0)
    batches.pace = Pace(pipe)
    train(Transformer(config), batches, TrainSettings(lr=1e-3, precision='bf16' if BF16 else 'float32'), out, save_every=steps + 1, progress=False)


def trainer(pipe, out, size, steps, compiled):
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
        bf16=BF16, torch_compile=compiled, use_cpu=DEVICE.type == 'cpu', report_to=[], save_strategy='no', logging_strategy='no', disable_tqdm=True)
    transformers.Trainer(model, args, train_dataset=data, callbacks=[Callback()]).train()


def plain(pipe, out, size, steps, compiled):
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


RUNS = {'phi4_ref': (ours, False), 'phi4_ref, compiled': (ours, True), 'Trainer': (trainer, False), 'Trainer, compiled': (trainer, True), 'plain loop': (plain, False)}


def worker(name, pipe, out, size, steps):
    os.environ['TORCHINDUCTOR_CACHE_DIR'] = f'{out}/kernels'
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    run, compiled = RUNS[name]
    run(pipe, out, size, steps, compiled)


def steps_of(pipe, n):
    "Let a process make n steps; its peak memory after them."
    for _ in range(n):
        pipe.send(True)
        peak = pipe.recv()
    return peak


def measure(size, rounds, each, out, runs=tuple(RUNS)):
    "Of each run: seconds until its first step is made, tokens/s of every round, peak bytes."
    pipes, start, speeds, peak = {}, {}, {name: [] for name in runs}, {}
    for name in runs:
        began, (pipes[name], theirs) = time.perf_counter(), torch.multiprocessing.Pipe()
        torch.multiprocessing.get_context('spawn').Process(target=worker, args=(name, theirs, f'{out}/{len(pipes)}', size, rounds * each + 4), daemon=True).start()
        theirs.close()  # so that a process that fails is an EOFError here, not a wait without end
        pipes[name].recv()  # the first step is made, the second may begin
        start[name] = time.perf_counter() - began
        steps_of(pipes[name], 1)
    for _ in range(rounds):
        for name, pipe in pipes.items():
            began = time.perf_counter()
            peak[name] = steps_of(pipe, each)
            speeds[name].append(each * SIZES[size][1] * SIZES[size][2] / (time.perf_counter() - began))
    for pipe in pipes.values(): pipe.send(False)
    return start, speeds, peak


def table(size, start, speeds, peak):
    config, rows, context = SIZES[size]
    over = lambda a, b: [x / y for x, y in zip(speeds[a], speeds[b])]
    def spread(ratios):
        low, middle, high = statistics.quantiles(ratios, n=4, method='inclusive')
        return f'{middle:.2f} (middle half of the rounds {low:.2f}-{high:.2f})'
    with torch.device('meta'): weights = count_parameters(Transformer(config))
    yield (f'torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, {DEVICE.type}, {platform.processor() or platform.machine()}, '
           f'{weights / 1e6:.1f}M parameters, {rows} x {context} tokens, {"bf16 autocast" if BF16 else "float32"}\n')
    yield f'| {"":18} | {"tokens/s":>8} | {"over Trainer":>12} | {"peak MB":>7} | {"start s":>7} |'
    yield '| :-- | --: | --: | --: | --: |'
    for name in speeds: yield f'| {name:18} | {statistics.median(speeds[name]):8,.0f} | {statistics.median(over(name, "Trainer")):12.2f} | {peak[name] / 1e6:7,.0f} | {start[name]:7.0f} |'
    if 'Trainer, compiled' in speeds:
        yield f'\ncompiled over compiled Trainer: {spread(over("phi4_ref, compiled", "Trainer, compiled"))}  '
        yield f'compiled over Trainer: {spread(over("phi4_ref, compiled", "Trainer"))}  '
    yield f'ratio: {spread(over("phi4_ref", "Trainer"))}'


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--size', choices=SIZES, default='toy')
    parser.add_argument('--eager', action='store_true', help='leave out the compiled runs')
    parser.add_argument('--quick', action='store_true', help='fewer rounds')
    parser.add_argument('--out', type=Path, help='also write the table to this file')
    args = parser.parse_args()
    rounds, each = ROUNDS[args.size]
    with tempfile.TemporaryDirectory() as folder: text = '\n'.join(table(args.size, *measure(args.size, 3 if args.quick else rounds, 1 if args.quick else each, folder, [name for name, (_, compiled) in RUNS.items() if not (args.eager and compiled)])))
    print(text)
    if args.out: args.out.write_text(text + '\n', encoding='utf-8')
