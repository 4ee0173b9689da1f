"""From a rollout to optimizer steps: the batch, passes over it, micro-batches, one normaliser, gradients over ranks.

The gradient is that of the whole batch at once: the loss of every micro-batch is divided by the same count, taken over all
micro-batches and ranks before the first backward. A rank without rows has tensors of 0 rows and enters every collective.
"""
import math
from contextlib import nullcontext
from dataclasses import replace

import torch

import dist
import grpo
import gtpo
import offpolicy
from engine.logps import gradients_in_place
from rollout import Rollout, empty_rollout


def adamw(model, lr, weight_decay=0.0):
    """AdamW with its state allocated now: what does not fit is found before the first rollout."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay,
                                  fused=True)       # no temporary of a weight's size
    for p in model.parameters():
        optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=dist.local(p).device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def learn(run, rollout, rewards, sampler_entropy):
    """All optimizer steps of a rollout; what they give for the log."""
    if run.c.algo == "offpolicy":
        updates, more = learn_off_policy(run, rollout, rewards)
    else:
        updates, more = one_pass(run, make_batch(run, rollout, rewards), run.c.prompts_per_step, run.c), {}
    return {**update_metrics(run, updates, sampler_entropy), **more}


def make_batch(run, rollout, rewards):
    """What the loss reads: of the rollout, of the frozen reference, of the first policy."""
    batch = run.algo.prepare(rollout, rewards, run.c)
    if run.c.advantage_scale == "batch":        # the std of all rewards of the step, not of this rank's
        parts = dist.gather_objects(rewards.cpu())
        everyone = grpo.group_advantages(torch.cat(parts), "batch", unbiased=run.c.unbiased_std)
        mine = everyone.split([len(p) for p in parts])[dist.rank()]
        batch["advantages"] = mine.flatten().to(batch["advantages"])
    if run.reference is not None:
        batch["ref_logp"] = score(run.reference, batch, run.c)[0]
    if run.c.algo == "gtpo":
        if run.initial_entropy is None:         # mean over the completions of the first rollout, before any update
            entropy = gtpo.mean_entropy(score(run.model, batch, run.c, range(len(batch["mask"])))[1], batch["mask"])
            rows = (batch["mask"].sum(1) > 0).sum()
            total, count = dist.all_reduce([float(entropy.sum()), float(rows)], run.device)
            run.initial_entropy = total / count if count else None
        batch["initial_entropy"] = torch.full_like(batch["advantages"], run.initial_entropy or 0.0)
    return batch


def one_pass(run, batch, count, config):
    """The updates of --epochs passes over a batch whose groups are this rank's share of `count`; sums for the log.

    Minibatches go by the group's global number: the same on any world size."""
    c, mine = run.c, dist.split(count)
    rows, active = torch.arange(len(batch["tokens"])).view(-1, c.group_size).tolist(), batch["active"].tolist()
    split = 2 if c.variance_every and run.step % c.variance_every == 0 else 1

    def part(k, half):
        return [r for i, group in zip(mine, rows) if i % c.minibatches == k and i // c.minibatches % split == half
                for r in group if active[r]]
    return [update(run, batch, [part(k, half) for half in range(split)], config)
            for _ in range(c.epochs) for k in range(c.minibatches)]


def update_metrics(run, updates, sampler_entropy):
    """Means over the updates of a step. Without any trained token the entropy stays the sampler's estimate, -log mu."""
    count = {unit: sum(u[unit] for u in updates) for unit in ("tokens", "rows")}
    out = {name: sum(u[name] for u in updates) / max(count[unit], 1) for name, unit in run.algo.METRICS.items()}
    if not count["tokens"]:
        out["entropy"] = sampler_entropy
    for name in ("loss", "grad_norm"):
        out[name] = sum(u[name] for u in updates) / len(updates)
    if "grad_variance" in updates[0]:       # nan where one half of a batch was empty
        known = [u["grad_variance"] for u in updates if not math.isnan(u["grad_variance"])]
        out["grad_variance"] = sum(known) / len(known) if known else math.nan
    return {**out, "ratio_max_dev": updates[0]["ratio_max_dev"]}


# ------------------------------------------------------------------------------------------------ one optimizer step

KEYS = 4        # keys that attention reads, for each token of a micro-batch's budget: they are copied, and are narrower


def micro_batches(rows, lengths, prompt_lengths, group_size, budget):
    """Cut rows (indices) into parts of at most `budget` tokens; one row is the least. Groups of like length are together,
    and a group's prompt counts once a part.

    lengths and prompt_lengths: of every row of the batch; row r is of group r // group_size. Attention still reads a prompt's
    keys for each completion: a part has at most KEYS times the budget of them."""
    longest = {}
    for r in rows:
        longest[r // group_size] = max(lengths[r], longest.get(r // group_size, 0))
    parts, size, keys = [], 0, 0
    for r in sorted(rows, key=lambda r: (longest[r // group_size], r // group_size, lengths[r])):
        shares = parts and parts[-1][-1] // group_size == r // group_size
        more = lengths[r] - (prompt_lengths[r] if shares else 0)
        if parts and size + more <= budget and keys + lengths[r] <= KEYS * budget:
            parts[-1].append(r)
            size, keys = size + more, keys + lengths[r]
        else:
            parts.append([r])
            size = keys = lengths[r]
    return parts


def parts_of(batch, rows, config):
    """[(rows, the batch of these rows alone)] for each of the micro_batches of a batch, as many on every rank: each pass
    through a sharded model is a collective, so a rank that has fewer ends with parts of no rows."""
    lengths, prompts = batch["lengths"].tolist(), batch["prompt_lengths"].tolist()
    parts = micro_batches(rows, lengths, prompts, config.group_size, config.micro_batch_tokens)
    most = int(dist.all_reduce([len(parts)], batch["mask"].device, "max")[0])
    return [(part, rows_of(batch, part)) for part in parts + [[]] * (most - len(parts))]


def forward(model, micro, rows, config):
    """token_logps of a micro-batch: two (B, T)."""
    groups = [r // config.group_size for r in rows]
    return model.token_logps(micro["tokens"], micro["mask"], config.temperature, groups)


def rows_of(batch, rows):
    """The given rows of every tensor of the batch, cut to their longest."""
    rows = torch.as_tensor(rows, dtype=torch.int64, device=batch["tokens"].device)
    T = int(batch["lengths"][rows].max()) if len(rows) else 1
    return {k: v[rows][:, :T] if v.ndim == 2 else v[rows] for k, v in batch.items()}


@torch.no_grad()
def score(model, batch, config, rows=None):
    """Log-probs and entropies of the batch's tokens under `model`: two (B, T), 0 off the mask.

    rows: those that are wanted; the active ones if not given."""
    rows = batch["active"].nonzero()[:, 0].tolist() if rows is None else rows
    out = torch.zeros(2, *batch["mask"].shape, device=batch["mask"].device)
    for some, part in parts_of(batch, rows, config):
        dist.detail("scoring")
        both = torch.stack(forward(model, part, some, config))
        out[:, some, :both.shape[2]] = both * part["mask"]
    dist.reshard(model)
    dist.detail("")
    return out


def update(run, batch, halves, config):
    """One optimizer step on the given rows of this rank's batch; sums for the log, already reduced over ranks.

    halves: lists of rows, together the batch of this step; two of them give grad_variance as well. config: the settings
    of the loss. Where batch has "pi_logp" (B, T), the log-probs met on the way are left there."""
    unit = "tokens" if config.aggregation == "token" else "rows"
    counts = [float(batch["mask"][rows].sum() if unit == "tokens" else len(rows)) if rows else 0.0 for rows in halves]
    counts = dist.all_reduce(counts, run.device)
    normalizer = sum(counts)            # fixed before any backward, over all ranks
    total = dict.fromkeys(("loss", "tokens", "rows", *run.algo.METRICS), 0.0)
    deviation, first = 0.0, None
    params = list(run.model.parameters())
    with nullcontext() if dist.sharded(run.model) else gradients_in_place(run.model.lm_head.weight):
        for k, half in enumerate(halves):
            if k == 1:
                first = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
            parts = parts_of(batch, half, config)
            for i, (rows, micro) in enumerate(parts):
                dist.detail(f"micro-batch {i + 1} of {len(parts)}")
                dist.reduce_over_copies(run.model, now=i == len(parts) - 1)
                sums = backward(run, batch, rows, micro, config, normalizer)
                deviation = max(deviation, sums.pop("ratio_max_dev"))
                for name, value in sums.items():
                    total[name] += value
    out = dict(zip(total, dist.all_reduce(list(total.values()), run.device)))
    out["ratio_max_dev"] = dist.all_reduce([deviation], run.device, "max")[0]
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if first is not None:
        out["grad_variance"] = gradient_variance(params, first, counts)
    out["grad_norm"] = descend(run, out["loss"]) if normalizer > 0 else 0.0     # no signal anywhere: no step
    run.optimizer.zero_grad(set_to_none=True)       # now, so that the next rollout has their memory
    return out


def backward(run, batch, rows, micro, config, normalizer):
    """Forward and backward of one micro-batch; its sums as numbers."""
    logp, entropy = forward(run.model, micro, rows, config)
    if not rows:                # for the other ranks' sake
        logp.sum().backward()
        return {"ratio_max_dev": 0.0}
    loss, sums = run.algo.loss(logp, entropy, micro, config, normalizer)
    loss.backward()
    if "pi_logp" in batch:
        batch["pi_logp"][rows, :logp.shape[1]] = logp.detach()
    sums = {"loss": loss.detach(), **sums}
    return dict(zip(sums, torch.stack([value.float() for value in sums.values()]).tolist()))     # one wait for the device


def gradient_variance(params, first, counts):
    """Variance of the batch gradient (trace of its covariance), estimated from its two halves: |g_1 - g_2|^2 n_1 n_2 / n^2.

    params hold the whole sum, first that of the first half; counts: the normalizer's two parts. The same as
    the two-batch estimator of McCandlish et al. (arXiv 1812.06162, appendix A), with both halves averaged."""
    if min(counts) == 0:
        return math.nan
    one, two = sum(counts) / counts[0], sum(counts) / counts[1]
    return sum(dist.total((g * one - (p.grad - g) * two).square().sum()) for p, g in zip(params, first)) / (one * two)


def descend(run, loss):
    """Clip and step; the gradient norm. A non-finite one is skipped and counted, five in a row end the run."""
    norm = dist.total(torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.c.grad_clip))
    if math.isfinite(norm) and math.isfinite(loss):
        run.bad_steps = 0
        run.updates += 1
        run.optimizer.step()
        return norm
    run.bad_steps += 1
    run.say(f"step {run.step}: loss {loss} and gradient norm {norm}: update skipped ({run.bad_steps} in a row)")
    if run.bad_steps >= 5:
        raise ValueError(f"five non-finite updates in a row at step {run.step}: lower --lr, or resume from a checkpoint")
    return norm


# ------------------------------------------------------------------------------------------- off-policy (offpolicy.py)

def learn_off_policy(run, rollout, rewards):
    """A pass over the fresh groups, then passes over the buffer while pi stays near enough: updates, more for the log."""
    c = run.c
    config = c if not c.adaptive_clip else replace(c, clip_low=run.clip, clip_high=run.clip * c.clip_high / c.clip_low)
    versions = torch.full_like(rollout.lengths, run.behaviour.version)
    batch = off_policy_batch(run, rollout, rewards, versions, on_policy=run.behaviour.version == run.updates)
    updates = one_pass(run, batch, c.prompts_per_step, config)
    last = measure(run, batch)
    drifts = [last]
    if c.replay_ratio > 1:              # after their own pass, so that the first draw may hold them
        fresh = offpolicy.pack(rollout, rewards, run.model.config.vocab_size, batch["active"])
        run.buffer.add([g for part in dist.gather_objects(fresh) for g in part], run.updates)
    while len(drifts) < int(run.replay_ratio) and not too_far(c, last):
        run.buffer.evict(run.updates)
        groups, weights = run.buffer.sample(c.prompts_per_step, annealed_beta(run))
        if not groups:
            break
        batch = off_policy_batch(run, *replayed(run, groups, weights))
        known = "prox_logp" in batch    # then a pass that would start too far away is not made at all
        last = measure(run, batch, groups) if known else None
        if known and too_far(c, last):
            break
        updates += one_pass(run, batch, len(groups), config)
        last = last or measure(run, batch, groups)
        drifts.append(last)
    run.buffer.evict(run.updates)
    adapt(run, last)
    return updates, {**off_policy_metrics(run, drifts), "clip": config.clip_low}


def adapt(run, last):
    """The replay ratio and the clip of the next step, from the drift that the last pass met."""
    c, (sums, (_, oldest)) = run.c, last
    if c.adaptive_replay and sums[3] > 0:           # some token was trained
        run.replay_ratio = offpolicy.adapt_replay(run.replay_ratio, too_far(c, last), c.replay_ratio)
    if c.adaptive_clip and oldest > 0:              # by samples that pi did not draw
        kl = offpolicy.drift_metrics(sums)["kl_pi_mu"]
        run.clip = offpolicy.adapt_clip(run.clip, kl, c.kl_limit, c.clip_low / 4, c.clip_low * 2)


def too_far(c, drift):
    """Whether pi is so far from mu that reuse should end: by --kl-limit, or by ESS with --adaptive-replay."""
    drift = offpolicy.drift_metrics(drift[0])
    return bool(c.kl_limit and drift["kl_pi_mu"] > c.kl_limit or c.adaptive_replay and drift["ess"] < 0.5)


def off_policy_metrics(run, drifts):
    """All passes of the step together, each as pi was when it met them; and the last one alone."""
    sums = [sum(column) for column in zip(*(d[0] for d in drifts))]
    weight, lag = [max(column) for column in zip(*(d[1] for d in drifts))]
    last = offpolicy.drift_metrics(drifts[-1][0])
    return {**offpolicy.drift_metrics(sums), "ess_last": last["ess"], "kl_last": last["kl_pi_mu"],
            "is_weight_max": weight, "staleness": sums[5] / max(sums[0], 1),
            "staleness_max": lag, "replay_ratio": len(drifts), "buffer_groups": len(run.buffer),
            "buffer_mb": run.buffer.nbytes / 2 ** 20}


def annealed_beta(run):
    """The bias correction of prioritized replay: from --priority-beta to 1 over the run."""
    return run.c.priority_beta + (1 - run.c.priority_beta) * run.step / run.c.steps


def replayed(run, groups, weights):
    """This rank's share of the drawn groups, as if just rolled out; and their rows' weights (B,)."""
    mine = dist.split(len(groups))
    if not len(mine):
        empty = empty_rollout(run.device)
        return empty, torch.zeros(0, run.c.group_size, device=run.device), empty.lengths, empty.lengths.float()
    tensors, rewards, versions = offpolicy.unpack([groups[i] for i in mine], run.device)
    weights = torch.from_numpy(weights[mine.start:mine.stop]).to(run.device)
    return Rollout(**tensors), rewards, versions, weights.repeat_interleave(run.c.group_size)


def off_policy_batch(run, rollout, rewards, versions, weights=None, on_policy=False):
    """make_batch, with the age of each row, pi at the start of the pass where it is needed, and the weights.

    on_policy: pi drew the batch; there is nothing to correct, and prox is mu."""
    c, batch = run.c, make_batch(run, rollout, rewards)
    batch["lag"] = run.updates - versions.float()
    if not on_policy and (c.correction == "decoupled" or c.trust_region == "second_moment"):
        batch["prox_logp"] = score(run.model, batch, c)[0]
    else:
        batch["pi_logp"] = batch["old_logp"].clone()        # update() leaves what it meets here, at no second forward
    offpolicy.correct(batch, c, weights, lambda sums: dist.all_reduce(sums, run.device),
                      lambda x: torch.cat(dist.gather_objects(x.cpu())))
    return batch


def measure(run, batch, groups=()):
    """The pass's drift: offpolicy.drift and the ages, over all ranks; replayed groups learn their effective sample size."""
    pi = batch["prox_logp"] if "prox_logp" in batch else batch["pi_logp"]
    mask = batch["mask"] * batch["active"][:, None]
    log_ratio = torch.where(mask.bool(), pi - batch["old_logp"], 0.0)
    sums, maxima = offpolicy.drift(log_ratio, mask)
    lag = batch["lag"][batch["active"]]
    sums, maxima = sums + [lag.sum().item()], maxima + [lag.max().item() if len(lag) else 0.0]
    if groups:
        trained = batch["active"].view(-1, run.c.group_size)
        weights = offpolicy.level_ratio(log_ratio, mask, "sequence")[:, 0].view_as(trained)
        shares = [offpolicy.effective_sample_size(w[t]) / max(int(t.sum()), 1) for w, t in zip(weights, trained)]
        for group, share in zip(groups, [s for part in dist.gather_objects(shares) for s in part]):
            group.ess = share
    return dist.all_reduce(sums, run.device), dist.all_reduce(maxima, run.device, "max")
