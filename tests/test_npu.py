"""Device "npu" where there is no NPU: the real torch_npu over a stand-in for the chip, against the CPU's plain formulas.

The stand-in (npu_standin/README.md) needs gcc and, once, the wheel of torch_npu; where these cannot be had the tests are
skipped. Each check is a process of its own, with_npu python test_npu.py CHECK, where an operator that torch_npu has no
kernel for is an error. What it cannot see: the rounding and the speed of a real chip, streams, graphs, and what its kernels
refuse beyond what their documents say.
"""
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import kernels
from engine.batching import Request
from engine.kernels import Sequences
from model import ModelConfig, Transformer
from rollout import Sampler
from engine.sampling import row_uniforms
from test_kernels import plain_part

HERE = Path(__file__).resolve().parents[1]
STAND_IN = HERE / "tests" / "npu_standin" / "with_npu"
MISSING = 77        # its exit status when it lacks something
pytestmark = pytest.mark.slow

CHECKS = {}
CLOSE = {torch.float32: dict(atol=1e-5, rtol=1e-5), torch.bfloat16: dict(atol=2e-2, rtol=2e-2)}
PROMPTS = [[1, 2, 3], [40, 5, 6, 17, 8, 9], [7], [8, 9], [30, 2, 2, 2, 11]]
STOPS = list(range(20, 26))
VIEWS = {"aten::unsqueeze"}       # which the stand-in counts as if it were a kernel
FUSED = {"npu_rms_norm": 3, "npu_rotary_mul": 1, "npu_swiglu": 1, "npu_fused_infer_attention_score": 2}     # a layer


def check(function):
    CHECKS[function.__name__] = function
    return function


def on_npu(*command):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", STAND_IN, sys.executable, *command], cwd=HERE, capture_output=True, text=True,
                          env={**os.environ, "PATH": path, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE / 'tests'}"})
    if done.returncode == MISSING:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", ["fused_formulas_equal_the_plain_ones", "completions_are_those_of_the_cpu",
                                  "log_probs_and_gradients_are_those_of_the_cpu", "a_decode_step_never_waits",
                                  "what_a_kernel_does_not_take_is_an_error"])
def test_on_the_npu(name):
    print(on_npu(__file__, name))


def test_collectives_and_fsdp2_over_ranks():
    out = on_npu("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "tests/npu_standin/check_hccl.py")
    assert "4 ranks, mesh 2 x 2: collectives and FSDP2 are right" in out


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    """A tiny model that guesses among three answers (heads of 16, which all kernels take), and its problems."""
    import sft
    folder = tmp_path_factory.mktemp("npu")
    rows = [{"problem": f"Which one, {i}?", "answer": str(i % 3), "solution": f"#### {i % 3}"} for i in range(60)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sft.warm_start(sft.SFTConfig(device="cpu", data=str(folder / "problems.jsonl"), out=str(folder / "model"), steps=60,
                                 hidden_size=32, layers=1, heads=2, vocab_size=280, lr=8e-3), progress=False)
    return folder


def options(begin, out, device, algo, dtype="float32"):
    return [f"--data={begin}/problems.jsonl", f"--model={begin}/model", f"--out={out}", f"--device={device}", f"--algo={algo}",
            f"--dtype={dtype}", *"--steps=2 --prompts-per-step=5 --group-size=4 --max-new-tokens=8 --lr=1e-3 --eval-every=2 "
            "--eval-problems=2 --eval-samples=2 --threads=1".split()]


def lines(out):
    untimed = [json.loads(x) for x in (out / "log.jsonl").open()]
    return [{k: v for k, v in x.items() if not any(word in k for word in ("time", "per_s", "memory"))} for x in untimed]


@pytest.fixture(scope="module")
def on_cpu(begin):
    """The log of a run on the CPU, made when it is first asked for."""
    import train
    made = {}

    def log(algo):
        if algo not in made:
            train.main(options(begin, begin / f"cpu-{algo}", "cpu", algo))
            made[algo] = lines(begin / f"cpu-{algo}")
        return made[algo]
    return log


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("algo", ["grpo", "gtpo", "offpolicy"])
def test_a_run_logs_what_it_logs_on_the_cpu(algo, ranks, begin, on_cpu, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    on_npu(*launcher, "train.py", *options(begin, tmp_path / "run", "npu", algo))
    assert len(on_cpu(algo)) == 3 and any(x["grad_norm"] > 0 for x in on_cpu(algo)[1:])
    for npu, cpu in zip(lines(tmp_path / "run"), on_cpu(algo), strict=True):
        assert npu == pytest.approx(cpu, rel=1e-4, abs=1e-5)


def test_a_run_in_bfloat16_on_two_ranks(begin, tmp_path):
    """The default there: fused attention when sampling and when training, float32 masters, one optimizer on the host."""
    on_npu("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py", "--offload",
           *options(begin, tmp_path / "run", "npu", "grpo", "bfloat16"))
    assert [x["step"] for x in lines(tmp_path / "run")] == [0, 1, 2] and lines(tmp_path / "run")[1]["ratio_max_dev"] < 0.2


# ------------------------------------------------------------------------------------------ what runs under the stand-in

def near(npu, cpu, dtype=torch.float32, scale=1):
    tolerance = {name: scale * x for name, x in CLOSE[dtype].items()}
    torch.testing.assert_close(npu.detach().cpu().float(), cpu.detach().float(), **tolerance)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(function, *inputs):
    """function(device, *inputs) on the NPU, and in float32 from the same numbers on the CPU: outputs and all gradients."""
    found = []
    for device, dtype in (("npu", inputs[0].dtype), ("cpu", torch.float32)):
        x = [t.to(device, dtype, copy=True).requires_grad_() for t in inputs]
        y = function(device, *x)
        assert y.dtype == dtype and y.device.type == device
        y.backward(random(*y.shape, seed=9).to(y))
        found.append([y, *(t.grad for t in x)])
    for npu, cpu in zip(*found, strict=True):
        near(npu, cpu, inputs[0].dtype, scale=1 + cpu.abs().max().item())


def tiny(layers=2, dtype=torch.float32, spread=0.3):
    """The same model for both devices; spread: sharp enough distributions for a mistake to show."""
    config = ModelConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, head_dim=16,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=spread)
    return [Transformer(config).init_weights(1).to(device, dtype) for device in ("npu", "cpu")]


@check
def fused_formulas_equal_the_plain_ones():
    for dtype in CLOSE:
        x = random(1200, 6, 16, dtype=dtype)
        for shape in ((16,), (6, 16)):
            compare(lambda _, x, w: kernels.rms_norm(x, w, 1e-3), x, 1 + random(*shape, dtype=dtype, seed=1))
        compare(lambda _, x: kernels.swiglu(x), random(50, 32, dtype=dtype))

        def rotated(device, x):
            frequencies = 1e4 ** -(torch.arange(8, device=device) / 8)
            return kernels.rotate(x, *kernels.rope_tables(torch.arange(1200, device=device) % 700, frequencies, x.dtype))
        compare(rotated, x)
        compare(lambda device, x: rotated(device, x[:, 1:5]), x)        # some of the heads, as in decode

        shared = dict(queries=[3, 4, 1, 5, 2], keys=[3, 7, 4, 5, 7],    # prompts of 3 and 5 tokens, completions behind them
                      index=[0, 1, 2, *range(7), 0, 1, 2, 7, *range(8, 13), *range(8, 13), 13, 14])
        many = dict(queries=[1, 2] * 520)                               # more sequences than one call takes
        last = dict(queries=[1, 1, 1], keys=[3, 7, 5])                  # as at the end of prefill
        for how in (shared, many, last, dict(queries=[5, 300, 60])):
            keys = sum(how["queries"] if "index" in how else how.get("keys", how["queries"]))
            q, k, v = (random(n, heads, 16, dtype=dtype, seed=s)
                       for s, (n, heads) in enumerate(((sum(how["queries"]), 4), (keys, 2), (keys, 2))))
            compare(lambda device, q, k, v: kernels.attention(q, k, v, Sequences(**how, device=device)), q, k, v)

    for queries in (1, 3):
        q, k, v = (random(*shape, 16, dtype=torch.bfloat16, seed=s)
                   for s, shape in enumerate(((4, queries, 2), (4, 2, 20), (4, 2, 20))))
        lengths, q = [1, 20, 7, 13], q.transpose(1, 2)                  # not contiguous
        by_slot = [x.to("npu").transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]           # as the cache is
        npu, want = kernels.partial_attention(q.to("npu"), *by_slot, None, host_lengths=lengths), plain_part(q.float(), k, v, lengths)
        for one, other in zip(npu, want):
            assert one.shape == other.shape
            near(one, other, torch.bfloat16)
        near(npu[1], want[1])       # these are float32


@check
def what_a_kernel_does_not_take_is_an_error():
    """Of the stand-in's references: a call beyond the documents, or beyond what a formula knows, is not computed."""
    q, cache = (torch.zeros(4, n, 2, 16, dtype=torch.bfloat16, device="npu") for n in (1, 20))
    right = dict(num_heads=2, input_layout="BSND", actual_seq_lengths_kv=[1, 20, 7, 13], softmax_lse_flag=True)

    def decode(q, k=cache, **options):
        return torch.ops.npu.npu_fused_infer_attention_score(q, k, k, **{**right, **options})
    assert decode(q)[1].shape == (4, 2, 1, 1) and decode(q, softmax_lse_flag=False)[1].numel() == 0
    for text, *tensors, options in [("contiguous", q, cache[:, :10], {}), ("float32", q.float(), {}),
                                    ("20 slots", q, dict(actual_seq_lengths_kv=[21] * 4)),
                                    ("20 slots", q, dict(actual_seq_lengths_kv=[0] * 4)),
                                    (r"2, 8\)", q[..., :8].contiguous(), cache[..., :8].contiguous(), {}),
                                    ("actual_seq_lengths ", q, dict(actual_seq_lengths=[1] * 4)),
                                    ("num_key_value_heads", q.repeat(1, 1, 2, 1), dict(num_heads=4))]:
        with pytest.raises(RuntimeError, match=text):
            decode(*tensors, **options)
    x, ends = torch.zeros(1025, 2, 16, device="npu"), list(range(1, 1026))
    with pytest.raises(RuntimeError, match="1024 sequences"):
        torch.ops.npu.npu_fusion_attention(x, x, x, 2, "TND", actual_seq_qlen=ends, actual_seq_kvlen=ends)
    with pytest.raises(RuntimeError, match="logcumsumexp"):       # which torch_npu has no kernel for
        x.logcumsumexp(0)


@check
def completions_are_those_of_the_cpu():
    """float32: token by token. bfloat16, which takes Ascend's kernel: as likely as the sampler says, by a CPU in float32."""
    for temperature, rows in ((0, 256), (1.0, 3)):      # 3: completions come in as others finish
        npu, cpu = (Sampler(m, STOPS, rows).generate(PROMPTS, 3, 24, temperature, seed=3) for m in tiny())
        assert temperature == 0 or len(set((cpu.lengths - cpu.prompt_lengths).tolist())) > 5
        for name in ("tokens", "lengths", "finished"):
            assert torch.equal(getattr(npu, name).cpu(), getattr(cpu, name)), name
        near(npu.logps, cpu.logps)

        npu, cpu = tiny(dtype=torch.bfloat16, spread=0.12)
        out = Sampler(npu, STOPS, rows).generate(PROMPTS, 3, 24, temperature, seed=5)
        tokens, mask = out.tokens.cpu(), out.completion_mask().cpu()[:, 1:]
        with torch.no_grad():
            logps = cpu.float()(tokens)[:, :-1].log_softmax(-1)
        likely = logps.gather(-1, tokens[:, 1:, None])[..., 0] * mask
        print(f"bfloat16: log-probs off by {(out.logps[:, 1:].cpu() - likely).abs().max():.3f}")
        torch.testing.assert_close(out.logps[:, 1:].cpu(), likely, atol=0.08, rtol=0)
        assert temperature or (logps.amax(-1) * mask - likely).max() < 0.08


@check
def log_probs_and_gradients_are_those_of_the_cpu():
    """After a rollout, as in training: it must leave the weights able to learn."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(96, (6, 20), generator=generator)
    tokens[1:3, :7], tokens[4:, :5] = tokens[:1, :7], tokens[3:4, :5]
    mask = torch.zeros(6, 20)
    for row, (start, end) in enumerate([(7, 20), (7, 12), (7, 8), (5, 19), (5, 6), (5, 15)]):
        mask[row, start:end] = 1
    for dtype, checkpointing in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        models, found = tiny(dtype=dtype, spread=0.1), []
        models[1].float()
        for model in models:
            Sampler(model, STOPS).generate(PROMPTS, 2, 4)
            model.activation_checkpointing = checkpointing
            logps, entropy = model.token_logps(tokens.to(model.device), mask.to(model.device), 0.9, [0, 0, 0, 1, 1, 1])
            (logps.exp() - 0.3 * logps).sum().backward()
            found.append((logps, entropy, [p.grad for p in model.parameters()]))
        assert (found[0][0].cpu() != 0).equal(mask.bool())
        for npu, cpu in zip(found[0][:2], found[1][:2]):
            near(npu, cpu, dtype, scale=1 if dtype == torch.float32 else 4)
        for (name, _), npu, cpu in zip(models[0].named_parameters(), found[0][2], found[1][2]):
            off = ((npu.cpu().float() - cpu).norm() / cpu.norm()).item()
            assert off < (1e-5 if dtype == torch.float32 else 0.05), (name, off)


class Watch(TorchDispatchMode):
    """Notes every operator that carries something from the device to the host, or a tensor from the host to the device."""
    def __init__(self):
        super().__init__()
        self.crossings = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        npu = any(x.device.type == "npu" for x in given)
        waits = npu and any(not isinstance(x, torch.Tensor) or x.device.type == "cpu" for x in tree_leaves(result))
        if waits or any(x.device.type == "cpu" and x.ndim for x in given) or counts_a_mask(function, args):
            self.crossings.append(str(function))
        return result


def counts_a_mask(function, args):
    """x[mask] has a shape that only the device knows."""
    indices = args[1] if function.name().startswith(("aten::index.", "aten::index_put")) else []
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


@check
def a_decode_step_never_waits():
    """Between two looks nothing crosses between host and device, and the fused kernels are what runs."""
    from fakenpu import called
    kernels_of = {}
    for layers in (1, 3):
        sampler = Sampler(tiny(layers, torch.bfloat16)[0], STOPS)
        uniforms = row_uniforms([(0, i) for i in range(5)], 4, 40).to("npu")
        with sampler.loaded(), torch.inference_mode():
            batch = sampler.batch_of(Request(PROMPTS, 4, [40] * 20, sampler.eos_ids, uniforms))
            assert batch.refill() and batch.look_every == 8
            called.clear()
            with Watch() as watch:
                batch.advance()
            assert not watch.crossings and not [x for x in called if "local_scalar" in x or "nonzero" in x]
            kernels_of[layers] = Counter({name.split("::")[1]: n / 8 for name, n in called.items() if name not in VIEWS})
            with Watch() as watch:
                batch.refill()           # a look does wait: the watch sees it
            assert watch.crossings
    layer = {name: (n - kernels_of[1][name]) / 2 for name, n in kernels_of[3].items() if n != kernels_of[1][name]}
    assert {name: layer.get(name) for name in FUSED} == FUSED
    rest = {name: kernels_of[1][name] - layer.get(name, 0) for name in kernels_of[1]}
    for where, counts in (("layer", layer), ("step besides its layers", rest)):
        print(f"{sum(counts.values()):g} kernels a {where}:", ", ".join(f"{n:g} {name}" for name, n in counts.items() if n))


if __name__ == "__main__":
    torch.set_num_threads(1)
    CHECKS[sys.argv[1]]()
