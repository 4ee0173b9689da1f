"""The policies of a run, as models: pi is trained, pi_ref is what it began as, mu draws.

    full weights    pi_ref and mu are further copies of all weights, frozen
    LoRA            all three are one model: pi_ref has no adapter, mu an older one (lora.py)

pi_ref is loaded with --beta, mu is another than pi with --sync-every above 1. A run that goes on
has the weights of pi and mu in its checkpoint, and its tokenizer and shapes in its own folder. From
the starting model it then needs nothing, but with --beta and LoRA, whose checkpoints hold the
adapter alone.
"""
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import dist
from model import Transformer
from rollout import Sampler


@dataclass
class Policies:
    pi: Transformer
    reference: object = None        # pi_ref, or None
    behaviour: object = None        # mu, or None where it is pi
    lora: bool = False

    def sampler_of_mu(self, *arguments, **options):
        """A Sampler that draws by mu."""
        if not self.lora:
            return Sampler(self.behaviour, *arguments, **options)
        from lora import ViewSampler
        return ViewSampler(self.behaviour, *arguments, **options)


def needs_source(c):
    """Whether also a run that goes on needs the weights that it was started from."""
    return getattr(c, "beta", 0) > 0 or c.lora_rank > 0


def place_of(c, device):
    """Where the run's models lie, and in which type they compute."""
    dtype = getattr(torch, c.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    return dist.Sharding(device, dtype, c.shard, c.offload, c.collective_timeout)


def is_merged(model):
    """Whether a change by LoRA is part of these weights: its adapter/ lies beside or below them.

    bfloat16 would round much of a small change away."""
    model = Path(model).resolve()
    beside = model.parent / "adapter" / "adapter_config.json"           # train.py's folder
    below = model / "adapter" / "adapter_config.json"                   # sft.py's
    of_run = re.fullmatch(r"model(-at-\d+)?", model.name)
    return below.exists() or bool(of_run) and beside.exists()


def load_policies(c, device, source, begins_at):
    """Load what the run needs. source: the starting model; begins_at: it, or the run's own folder
    of shapes and tokenizer when a checkpoint will bring the weights."""
    if c.graph == "on" and device.type == "cpu":
        raise ValueError("--graph on: device graphs need an accelerator; leave it out on the CPU")
    place = place_of(c, device)
    dtype = place.dtype
    with_reference = getattr(c, "beta", 0) > 0
    with_mu = getattr(c, "sync_every", 1) > 1
    goes_on = begins_at != source

    if c.lora_rank:
        import lora
        if dtype != torch.float32 and is_merged(source) and dist.rank() == 0:
            tqdm.write(f"{source} holds a LoRA change in its weights, which are frozen now and "
                       "rounded to bfloat16: much of a small change is lost; --dtype float32 "
                       "keeps it", file=sys.stderr)
        pi = Transformer.from_pretrained(
            source, place.home, shard=place,
            adapt=lambda model: lora.attach(model, c.lora_rank, c.lora_alpha, dtype=dtype))
        lora.reset(pi, c.seed)
        policies = Policies(
            pi, lora=True,
            reference=lora.View(pi) if with_reference else None,
            behaviour=lora.View(pi, lagging=True) if with_mu else None)
    else:
        def frozen(folder):
            weights = folder == source
            model = Transformer.from_pretrained(folder, place.home, dtype, place, weights)
            return model.requires_grad_(False)

        pi = Transformer.from_pretrained(begins_at, place.home, shard=place, weights=not goes_on)
        policies = Policies(
            pi, reference=frozen(source) if with_reference else None,
            behaviour=frozen(begins_at) if with_mu else None)

    pi.activation_checkpointing = c.activation_checkpointing
    return policies


def write_weights(c, model, folder, adapter, source):
    """Write a model's folder in HF's layout; with LoRA merged, and the change alone in PEFT's.

    Every rank enters. source: what the adapter belongs to. The merged weights are float32, because
    bfloat16 would round a small change away."""
    write = dist.rank() == 0
    if c.lora_rank:
        import lora
        if Path(source).is_dir():       # to be found from another folder too
            source = Path(source).resolve()
        lora.save_adapter(model, adapter, str(source), write)
        model.save_pretrained(folder, torch.float32, write, lora.merged_tensors(model))
    else:
        model.save_pretrained(folder, write=write)


def save_model(c, model, folder, source):
    """Write folder/model and, with LoRA, folder/adapter.

    Every rank enters. model/ appears when it is whole, so that where it is, the run has ended."""
    part = folder / ".model"
    write_weights(c, model, part, folder / "adapter", source)

    if dist.rank() == 0:
        shutil.rmtree(folder / "model", ignore_errors=True)
        part.rename(folder / "model")
