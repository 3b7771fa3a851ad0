"""What each change gains on a GPU: a few layers of phi-4's full width, forward and backward, at 4K and 16K tokens.

    python tests/bench/gpu_slice.py [--layers 4] [--contexts 4096 16384] [--quick]

Hidden size 5,120, 40 heads on 10 key-value heads, MLP 17,920, vocabulary 100,352. A row of the table adds one change to the row above: from attention written
out in float32 to bfloat16, the fused kernel, flash-attn, `torch.compile` of each layer, cross-entropy in chunks, and activation checkpointing, which costs time and gives memory. MFU is the
model's operations (`flops_per_token`, the square of attention counted in full) over what a bfloat16 matrix product of 8,192 reaches on the same GPU at the same hour. The optimiser's step
is not in it: a slice has too few tokens a step for its share to mean anything. A change that runs out of memory, or whose library is missing, says so in its row.

Without a GPU the same script runs a slice of toy size on the CPU, which tests the script and measures nothing.
"""
import argparse, gc, inspect, platform, statistics, time
from dataclasses import replace

import torch

from phi4_ref.model.transformer import ATTENTION, PHI4_14B, ModelConfig, Transformer, flops_per_token
from phi4_ref.train.loop import lm_loss, plain_lm_loss

GPU = torch.cuda.is_available()
DEVICE = torch.device('cuda' if GPU else 'cpu')
TINY = ModelConfig(512, 64, 2, 4, 2, 128, 256)
STEPS = [('eager attention, float32', {}), ('bfloat16 autocast', dict(bf16=True)), ('sdpa', dict(attention='sdpa')), ('flash-attn', dict(attention='flash')),
    ('compiled layers', dict(compiled=True)), ('chunked cross-entropy', dict(loss=lm_loss)), ('activation checkpointing', dict(checkpointing=True))]


def seconds(run, repeats):
    "Median time of a call, after two to warm up."
    times = []
    for i in range(repeats + 2):
        if GPU: torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if GPU: torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def matmul_peak(n):
    "Operations per second of a bfloat16 matrix product."
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=torch.bfloat16)
    return 2 * n**3 / seconds(lambda: a @ b, 10)


def build(config, attention, checkpointing, compiled):
    "The slice; ValueError says what this machine or this package lacks."
    if attention not in ATTENTION: raise ValueError(f'this package has no attention {attention!r}')
    options = dict(activation_checkpointing=True) if checkpointing else {}
    if set(options) - set(inspect.signature(Transformer).parameters): raise ValueError('this package has no activation checkpointing')
    with DEVICE: model = Transformer(config, attention, **options)
    if compiled:
        for layer in model.model.layers: layer.compile(backend='inductor' if GPU else 'eager')
    return model


def measure(config, context, rows, repeats, bf16=False, attention='eager', compiled=False, loss=plain_lm_loss, checkpointing=False):
    "Tokens per second and peak bytes of forward and backward."
    model = build(config, attention, checkpointing, compiled)
    ids_BT = torch.randint(config.vocab_size, (rows, context), device=DEVICE)
    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16): total, count, _ = loss(model, dict(input_ids=ids_BT, labels=ids_BT))
        (total / count).backward()
        model.zero_grad(set_to_none=False)  # gradients stay allocated, as over accumulated micro-batches
    if GPU: torch.cuda.reset_peak_memory_stats()
    return rows * context / seconds(step, repeats), torch.cuda.max_memory_allocated() if GPU else None


def main(layers, contexts, quick):
    torch.manual_seed(0)
    config, contexts = (replace(PHI4_14B, num_hidden_layers=layers), contexts) if GPU else (TINY, [64, 128])
    tokens, repeats = (max(contexts), 3 if quick else 10) if GPU else (128, 2)
    peak = matmul_peak(8192 if GPU else 256)
    print(f'torch {torch.__version__}, {torch.cuda.get_device_name() if GPU else platform.processor() or platform.machine()}, {config.num_hidden_layers} layers, '
          f'bfloat16 matrix product {peak / 1e12:,.2f} TFLOP/s')
    if not GPU: print('No GPU: this is a slice of toy size on the CPU. It tests the script; no figure below says anything about a GPU.')
    ratios = []
    for context in contexts:
        print(f'\n{context:,} tokens in a row, {tokens // context} rows\n{"":26} {"tokens/s":>9} {"MFU":>6} {"gain":>6} {"in all":>6} {"peak GB":>8}')
        settings, speeds = {}, []
        for name, change in STEPS:
            try: speed, memory = measure(config, context, tokens // context, repeats, **settings | change)
            except torch.OutOfMemoryError: message = 'out of memory'; settings |= change
            except ValueError as e: message = str(e)
            else:
                settings, message = settings | change, None
                speeds.append(speed)
                gain, overall = (f'{speed / s:6.2f}' for s in (speeds[max(0, len(speeds) - 2)], speeds[0]))
                print(f'{name:26} {speed:9,.0f} {speed * flops_per_token(config, context) / peak:6.1%} {gain} {overall} {f"{memory / 1e9:8.1f}" if GPU else "":>8}')
            if message: print(f'{name:26} {message}')
            torch._dynamo.reset(); gc.collect()
            if GPU: torch.cuda.empty_cache()
        ratios.append(max(speeds) / speeds[0] if speeds else float('nan'))
    print(f'ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})')


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--layers', type=int, default=4)
    parser.add_argument('--contexts', type=int, nargs='+', default=[4096, 16_384])
    parser.add_argument('--quick', action='store_true', help='fewer repeats')
    args = parser.parse_args()
    main(args.layers, args.contexts, args.quick)
