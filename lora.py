"""LoRA: train a low-rank change of every linear layer, and leave the model as it is (2106.09685).

    y = W x + b + (alpha / r) B A x         A (r, in) uniform in +-1/sqrt(in), B (out, r) zero

W and b are frozen: no gradient, no Adam state, no float32 master. A and B are float32 masters. At
first B = 0, so the model computes what it did. All linear layers of the blocks have adapters.
In RL small ranks are enough: a rollout tells little more than which completions are right, a bit
each. The learning rate is about 10 x that of full fine-tuning ("LoRA Without Regret", Thinking
Machines 2025). `View` is the same model with another adapter: with none it is the reference, with
an older one the policy that draws under --sync-every. So neither needs a second model in memory.

In a float32 run the sampler reads W + (alpha / r) B A, added once a rollout. In a bfloat16 run that
sum would round small updates away, so there it computes both products, as the trainer does
(engine/decode.py, Linear).

Files are PEFT's (adapter_config.json, adapter_model.safetensors), both ways. Left out: dropout,
adapters of the embedding, rank-stabilised scaling, DoRA, other ranks for other layers.
"""
import math
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import dist
from engine.weights import own_rows, read_json, whole, write_json
from rollout import Sampler

PREFIX = "base_model.model."        # before the names of PEFT's tensors


class Adapted(nn.Module):
    """A frozen linear layer with its adapter: tokens (M, in) -> (M, out). scale is alpha / rank.

    Weight and bias keep their names."""

    def __init__(self, linear, rank, scale):
        super().__init__()
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.scale = scale
        self.on = True

        out_size, in_size = linear.weight.shape
        like = {"device": linear.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(rank, in_size, **like))
        self.lora_B = nn.Parameter(torch.empty(out_size, rank, **like))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.on:
            return y
        low = F.linear(x, self.lora_A.to(x.dtype)) * self.scale             # (M, r)
        return torch.addmm(y, low, self.lora_B.to(x.dtype).t())

    def change(self):
        """Returns (alpha / r) B A in float32, of the rows of B that this rank holds: (rows, in)."""
        return dist.local(self.lora_B).float() @ whole(self.lora_A).float() * self.scale

    # what the sampler reads (engine/decode.py)

    def inference_weight(self):
        """Returns W plus its change if W is float32; else W alone, and `adapter` has the change."""
        if not self.on or self.weight.dtype != torch.float32:
            return self.weight
        return self.weight + self.change()

    def adapter(self):
        """Returns (A, B, alpha / r) where the sampler has to compute them beside the weight."""
        if not self.on or self.weight.dtype == torch.float32:
            return None
        return self.lora_A.to(self.weight.dtype), self.lora_B.to(self.weight.dtype), self.scale


# ------------------------------------------------------------------------------ adapters of a model

def attach(model, rank, alpha=32.0, seed=0, dtype=None):
    """Give every linear layer of the blocks an adapter, and freeze the rest. Returns the model.

    dtype: the frozen weights are cast to it, if it is given. A model on the meta device has no
    values yet: call `reset` when it does. Raises ValueError for a rank or alpha that is not above
    0, and for a model that has adapters."""
    if rank < 1 or not alpha > 0:
        raise ValueError(f"LoRA of rank {rank} and alpha {alpha}: both must be above 0")
    if adapters(model):
        raise ValueError("the model has adapters already: merge them first")

    for p in model.parameters():
        p.requires_grad_(False)
        if dtype is not None:
            p.data = p.data.to(dtype)
    for block in model.model.layers:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Adapted(child, rank, alpha / rank))

    if model.lm_head.weight.device.type != "meta":
        reset(model, seed)
    return model


def adapters(model):
    """Returns the adapted layers of a model, {name: Adapted}."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


@torch.no_grad()
def reset(model, seed=0):
    """Draw A anew and set B to 0; the same on any number of ranks. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapters(model).values():
        bound = 1 / math.sqrt(layer.lora_A.shape[1])
        A = torch.rand(layer.lora_A.shape, generator=generator) * 2 * bound - bound
        fill(layer.lora_A, A)
        fill(layer.lora_B, torch.zeros(layer.lora_B.shape))
    return model


@torch.no_grad()
def fill(parameter, value):
    """Copy a whole tensor into a parameter, of which this rank may hold a part."""
    part, rows = own_rows(parameter)
    if part.numel():
        part.copy_(value[rows])


@torch.no_grad()
def merge(model):
    """Add the changes to the weights, in float32, and take the adapters away. Returns the model.

    In bfloat16 the sum is rounded, so that a small change may be lost: `merged_tensors` adds in
    float32 and does not round."""
    for name, layer in adapters(model).items():
        weight = dist.local(layer.weight)
        weight.copy_(weight.float() + layer.change())

        out_size, in_size = layer.weight.shape
        linear = nn.Linear(in_size, out_size, bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return model


class MergedWeight:
    """A weight with its change, in float32, which is computed when it is asked for.

    It has what `save_pretrained` asks of a sharded tensor."""

    def __init__(self, layer):
        self.layer = layer

    def numel(self):
        return self.layer.weight.numel()

    @torch.no_grad()
    def full_tensor(self):
        layer = self.layer
        change = whole(layer.lora_B).float() @ whole(layer.lora_A).float() * layer.scale
        return whole(layer.weight).float() + change


def merged_tensors(model):
    """Returns what save_pretrained shall write, {name: tensor}: the weights with their changes.

    Every rank has to read them in the same order."""
    tensors = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    changed = {f"{name}.weight": MergedWeight(layer) for name, layer in adapters(model).items()}
    return tensors | changed


# -------------------------------------------------------------- the model with another adapter

class View:
    """The model as it is without its adapter, or with an older one.

    lagging: keep a copy of the adapter; the parameters of the view are these copies. Else the
    adapter is off. The model must not be trained while a view is shown."""

    def __init__(self, model, lagging=False):
        self.model = model
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.copies = {name: p.detach().clone() for name, p in trained} if lagging else {}
        self.device, self.dtype, self.config = model.device, model.dtype, model.config

    def named_parameters(self):
        return self.copies.items()

    def parameters(self):
        return self.copies.values()

    @contextmanager
    def shown(self):
        """While open, the model itself computes what the view is."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        """Give the model the view's adapter, and the view the model's. A second call undoes it."""
        if not self.copies:
            for layer in adapters(self.model).values():
                layer.on = not layer.on
        named = dict(self.model.named_parameters())
        for name, copy in self.copies.items():
            mine, other = dist.local(named[name]), dist.local(copy)
            kept = mine.clone()
            mine.copy_(other)
            other.copy_(kept)
        dist.reshard(self.model)        # what was gathered is of the other adapter

    def token_logps(self, *arguments):
        with self.shown():
            return self.model.token_logps(*arguments)


class ViewSampler(Sampler):
    """Draws by a view of a model."""

    def __init__(self, view, *arguments, **options):
        super().__init__(view.model, *arguments, **options)
        self.view = view

    @contextmanager
    def loaded(self):
        with self.view.shown(), super().loaded():
            yield


# ------------------------------------------------------------------------------------- PEFT's files

def save_adapter(model, folder, base="", write=True):
    """Write the adapter as PEFT does. base: folder or hub id of the model below it.

    Of a model that is sharded over ranks every rank must call this, all but one with write=False.
    Raises ValueError for a model without adapters."""
    layers = adapters(model)
    if not layers:
        raise ValueError("the model has no adapter to save")
    tensors = {}
    for name, layer in layers.items():
        for kind in ("lora_A", "lora_B"):
            tensor = whole(getattr(layer, kind)).detach().float().cpu().contiguous()
            tensors[f"{PREFIX}{name}.{kind}.weight"] = tensor
    if not write:
        return

    folder, first = Path(folder), next(iter(layers.values()))
    rank = first.lora_A.shape[0]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "r": rank, "lora_alpha": first.scale * rank, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "fan_in_fan_out": False, "inference_mode": True})


def load_adapter(model, folder):
    """Read an adapter that PEFT or `save_adapter` wrote; the model gets adapters if it has none.

    Layers that it does not change keep B = 0. Returns the model. Raises ValueError, one line, for
    what is missing, does not fit, or is of a kind that is not computed here."""
    folder = Path(folder)
    settings = read_json(folder / "adapter_config.json")
    refused = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern",
                                 "modules_to_save", "fan_in_fan_out", "lora_bias", "use_qalora",
                                 "alora_invocation_tokens", "layer_replication")
               if settings.get(name)]
    # these draw A otherwise, which is in the file, and leave the base as it is; others change it
    harmless = (None, True, False, "gaussian", "orthogonal", "eva")
    refused += [] if settings.get("init_lora_weights", True) in harmless else ["init_lora_weights"]
    refused += [] if settings.get("bias", "none") == "none" else ["bias"]
    if settings.get("peft_type") != "LORA" or refused:
        raise ValueError(f"{folder}: an adapter with {', '.join(refused) or 'no LoRA'} "
                         "is not supported")

    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or type(alpha) not in (int, float) or rank < 1 or not alpha > 0:
        raise ValueError(f"{folder}: r {rank!r} and lora_alpha {alpha!r} must be numbers above 0")
    if not adapters(model):
        attach(model, rank, alpha)
    reset(model)
    layers = adapters(model)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except Exception as error:      # SafetensorError derives from Exception alone
        raise ValueError(f"{folder}: cannot read adapter_model.safetensors "
                         f"({dist.first_line(error)})") from None

    for key, tensor in tensors.items():
        name, _, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if name not in layers or kind not in ("lora_A", "lora_B"):
            raise ValueError(f"{folder}: {key} belongs to no linear layer of this model")
        target = getattr(layers[name], kind)
        if tensor.shape != target.shape:
            raise ValueError(f"{folder}: {key} has shape {tuple(tensor.shape)}, "
                             f"this model needs {tuple(target.shape)}")
        fill(target, tensor.float())
        layers[name].scale = alpha / rank
    return model
