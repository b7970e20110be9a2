"""Grouped experts against a plain loop with boolean masks and transformers' Mixtral block; what a trace costs. One run.

    python benchmarks/moe.py --threads 1 2      # the layer, forward and backward
    python benchmarks/moe.py --trace            # `selectbench.nn.trace.trace` beside a plain forward pass

16 experts, 2 per token, 4,096 tokens of width 256. How wide an expert is decides the ratio, so several widths are
shown: with experts a quarter of the model wide (Qwen3-Next has 512 of 2,048), half (OLMoE: 1,024 of 2,048), and as
wide as the model. Each contender has the same weights and routes by the same softmax over the top 2; a round runs each
once, in turn, and the median over rounds is printed, with the least seconds of processor time, which neighbours on the
machine disturb less. There are two loops with masks: `out[m] += w[m] * expert(x[m])` for each expert, m the mask of its
tokens, and `out += (w * m) * expert(x)`, where every expert reads every token. The last line is the time of the matrix
products alone, on rows that are gathered already: no way to group tokens is faster than that, so the loop's time over
it is the largest ratio that any grouping could reach.
"""
import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

# `coverage`, the file beside this one, is also a package that numba looks for.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent: del sys.path[0]


BOUND = "the products alone"


def slope(sizes, seconds):
    "Of log seconds over log size, by least squares."
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    a, b = statistics.fmean(x), statistics.fmean(y)
    return sum((u - a) * (v - b) for u, v in zip(x, y, strict=True)) / sum((u - a) ** 2 for u in x)


def plain_loop(layer, dense=False):
    """The layer as a loop over experts, with an ordinary module each; its parameters start as those of `layer`.

    `dense`: each expert reads every token and the mask is a factor of its weight."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Expert(nn.Module):
        def __init__(self, gate, up, down):
            super().__init__()
            for name, w in (("gate", gate), ("up", up), ("down", down)):
                setattr(self, name, nn.Linear(*w.shape[::-1], bias=False))
                getattr(self, name).weight = nn.Parameter(w.detach().clone())

        def forward(self, x): return self.down(F.silu(self.gate(x)) * self.up(x))

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(layer.router.weight.detach().clone())
            self.experts = nn.ModuleList(Expert(*layer.experts.weights(i)) for i in range(layer.experts.n_experts))

        def forward(self, x):
            weights, experts = F.linear(x, self.gate).softmax(-1).topk(2)
            weights = weights / weights.sum(-1, keepdim=True)
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                hit = experts == e
                m, w = hit.any(-1), (weights * hit).sum(-1, keepdim=True)
                if dense: out = out + w * expert(x)
                else: out[m] += w[m] * expert(x[m])
            return out

        def gradients(self):
            first = [torch.cat([e.gate.weight.grad, e.up.weight.grad]) for e in self.experts]
            return self.gate.grad, torch.cat(first), torch.cat([e.down.weight.grad.T for e in self.experts])

    return Loop()


def mixtral(layer, implementation):
    "transformers' Mixtral block with the weights of `layer`, its experts run by `implementation`."
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    e, f, d = layer.experts.n_experts, layer.experts.widths[0], layer.experts.width
    config = MixtralConfig(hidden_size=d, intermediate_size=f, num_local_experts=e, num_experts_per_tok=2,
                           experts_implementation=implementation)
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.weight)
        block.experts.gate_up_proj.copy_(layer.experts.w_in.view(e, 2 * f, d))
        block.experts.down_proj.copy_(layer.experts.w_out.view(e, f, d).transpose(1, 2))

    def gradients():
        x = block.experts
        return block.gate.weight.grad, x.gate_up_proj.grad.flatten(0, 1), x.down_proj.grad.transpose(1, 2).flatten(0, 1)

    block.gradients = gradients
    return block


def products(layer, tokens):
    "A function that runs the products of a step and nothing else, with as many rows for each expert."
    import torch
    e, f, d = layer.experts.n_experts, layer.experts.widths[0], layer.experts.width
    rows = 2 * tokens // e
    x, g, p, h = (torch.randn(rows, k) for k in (d, d, f, 2 * f))
    hidden, scores = torch.randn(tokens, d), torch.randn(tokens, e)
    to_d, to_p, to_h, to_first, to_last = (torch.empty(n, k) for n, k in
                                           ((rows, d), (rows, f), (rows, 2 * f), (2 * f, d), (f, d)))

    def step():
        gate = layer.router.weight.detach()
        for i in range(e):
            first = layer.experts.w_in.detach()[2 * f * i: 2 * f * (i + 1)]
            last = layer.experts.w_out.detach()[f * i: f * (i + 1)]
            torch.mm(x, first.T, out=to_h), torch.mm(p, last, out=to_d)
            torch.mm(g, last.T, out=to_p), torch.mm(p.T, g, out=to_last)
            torch.mm(h, first, out=to_d), torch.mm(h.T, x, out=to_first)
        return hidden @ gate.T, scores @ gate, scores.T @ hidden

    return step


def contenders(width, experts, expert_width):
    "name -> module [b, t, width] -> [b, t, width], all with the same weights; ours first."
    import torch

    from selectbench.nn.moe import Experts, MoELayer, TopK
    torch.manual_seed(0)
    layer = MoELayer(TopK(width, experts, k=2, balance=0.0), Experts(width, experts, expert_width, std=0.05))
    layer.gradients = lambda: (layer.router.weight.grad, layer.experts.w_in.grad, layer.experts.w_out.grad)
    named = {f"transformers, {name}": mixtral(layer, name) for name in ("eager", "grouped_mm")}
    loops = {"loop with masks": plain_loop(layer), "loop, every token": plain_loop(layer, dense=True)}
    runs = {name: lambda x, loop=loop: loop(x[0])[None] for name, loop in loops.items()}
    return {"selectbench": layer} | runs | named, [layer, *loops.values(), *named.values()]


def alone(step):
    "(nothing, seconds, processor seconds) of one call."
    cpu, start = time.process_time(), time.perf_counter()
    step()
    return 0.0, time.perf_counter() - start, time.process_time() - cpu


def once(run, modules, x, grad):
    "(seconds forward, seconds in all, processor seconds, output) of one forward and backward pass."
    for p in (p for m in modules for p in m.parameters()): p.grad = None
    x.grad = None
    cpu, start = time.process_time(), time.perf_counter()
    out = run(x)
    middle = time.perf_counter()
    out.backward(grad)
    return middle - start, time.perf_counter() - start, time.process_time() - cpu, out.detach()


def race(tokens, expert_width, rounds, width=256, experts=16):
    "name -> list of (forward, in all, processor) seconds; name -> differences from ours, over the largest value."
    import torch
    runs, modules = contenders(width, experts, expert_width)
    x, grad = torch.randn(1, tokens, width, requires_grad=True), torch.randn(1, tokens, width)
    times, said, apart, step = {name: [] for name in (*runs, BOUND)}, {}, {}, products(modules[0], tokens)
    for _ in range(rounds + 1):
        times[BOUND].append(alone(step))
        for (name, run), module in zip(runs.items(), modules, strict=True):
            *seconds, out = once(run, modules, x, grad)
            times[name].append(seconds)
            said[name] = [out, x.grad, *module.gradients()]
            apart[name] = [((a - b).abs().max() / b.abs().max()).item()
                           for a, b in zip(said[name], said["selectbench"], strict=True)]
    return {name: t[1:] for name, t in times.items()}, apart


def layers(args):
    "The layer at several expert widths, then at growing numbers of tokens; prints seconds and ratios."
    import torch
    threads = torch.get_num_threads()
    for f in args.widths:
        times, apart = race(args.tokens, f, args.rounds)
        total = {name: statistics.median(t[1] for t in ts) for name, ts in times.items()}
        cpu = {name: min(t[2] for t in ts) for name, ts in times.items()}
        print(f"{args.tokens:,} tokens of width 256, experts {f} wide; {threads} thread(s), {args.rounds} rounds")
        for name, ts in times.items():
            if name == BOUND: continue
            print(f"  {name:26s}{1e3 * total[name]:8.1f} ms, {1e3 * statistics.median(t[0] for t in ts):6.1f} forward; "
                  f"{total[name] / total['selectbench']:.2f} times ours; processor, least: {1e3 * cpu[name]:7.1f} ms, "
                  f"{cpu[name] / cpu['selectbench']:.2f} times; largest relative difference: output "
                  f"{apart[name][0]:.0e}, gradients {max(apart[name][1:]):.0e}", flush=True)
        print(f"  {BOUND:26s}{1e3 * total[BOUND]:8.1f} ms; processor, least: {1e3 * cpu[BOUND]:7.1f} ms; the loop with "
              f"masks takes {cpu['loop with masks'] / cpu[BOUND]:.2f} times as long, the most that grouping could gain",
              flush=True)
    sizes = [args.tokens // 4, args.tokens // 2, args.tokens, args.tokens * 2]
    growth = [race(n, args.widths[0], args.rounds)[0] for n in sizes]
    for name in ("selectbench", "loop with masks"):
        seconds = [statistics.median(t[1] for t in g[name]) for g in growth]
        print(f"  growth of {name} with tokens {sizes}: log-log slope {slope(sizes, seconds):.2f}")


def models():
    "name -> a small model with MoE layers and random weights."
    from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig

    from selectbench.nn.moe import moe_lm
    small = dict(vocab_size=1024, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4)
    configs = {"Mixtral, 8 experts": MixtralConfig(intermediate_size=256, num_local_experts=8, **small),
               "OLMoE, 16 experts, 4 used": OlmoeConfig(intermediate_size=128, num_experts=16, num_experts_per_tok=4,
                                                        eos_token_id=0, **small)}
    made = {name: AutoModelForCausalLM.from_config(c).eval() for name, c in configs.items()}
    return made | {"selectbench, 16 experts": moe_lm(1024, width=256, layers=4, n_experts=16, expert_width=128).eval()}


def traces(args):
    "What `trace` costs beside a forward pass, in turn; prints both and the share."
    import torch

    from selectbench.nn.trace import trace
    for name, model in models().items():
        ids = torch.randint(0, 1024, (8, 128), generator=torch.Generator().manual_seed(0))
        runs = {"forward": lambda: model(ids), "trace": lambda: trace(model, ids)}     # noqa: B023
        times = {what: [] for what in runs}
        with torch.no_grad():
            for _ in range(args.rounds + 1):
                for what, run in runs.items():
                    cpu, start = time.process_time(), time.perf_counter()
                    run()
                    times[what].append((time.perf_counter() - start, time.process_time() - cpu))
        wall, cpu = ({w: pick(t[i] for t in ts[1:]) for w, ts in times.items()}
                     for i, pick in ((0, statistics.median), (1, min)))
        print(f"  {name:28s}forward {1e3 * wall['forward']:7.1f} ms, trace {1e3 * wall['trace']:7.1f} ms "
              f"({wall['trace'] / wall['forward'] - 1:+.1%}); least processor time {1e3 * cpu['forward']:7.1f} and "
              f"{1e3 * cpu['trace']:7.1f} ms ({cpu['trace'] / cpu['forward'] - 1:+.1%})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 32, 128, 256], help="neurons of an expert")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count()], help="a process for each")
    parser.add_argument("--trace", action="store_true", help="the cost of a trace instead")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return (traces if args.trace else layers)(args)
    for threads in sorted(set(args.threads)):
        print(f"{'trace, 8 rows of 128 tokens, ' if args.trace else ''}{threads} thread(s)", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--one"]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        if done.returncode: raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
