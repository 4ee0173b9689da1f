"""Accuracy on held-out problems during a run: greedy, and of some draws. evaluate.py does more."""
import dist
import report
import reward
from data import kinds_of
from rollout import draw_groups


def evaluate(sampler, tokenizer, held_out, config):
    """Held-out accuracy: greedy, and pass@1 of eval_samples draws; with their mean length.

    Every rank enters."""
    dist.phase("evaluation")
    with sampler.loaded():
        greedy = evaluated(sampler, tokenizer, held_out, config, 1, 0.0)
        drawn = evaluated(sampler, tokenizer, held_out, config, config.eval_samples,
                          config.temperature)
    by_kind = {f"eval_pass@1/{name}": drawn[f"right/{name}"] / drawn[f"rows/{name}"]
               for name in report.names_of(kinds_of(held_out))}
    return {"eval_pass@1": drawn["right"] / drawn["rows"],
            "eval_greedy": greedy["right"] / greedy["rows"],
            "eval_length": drawn["tokens"] / drawn["rows"],
            **by_kind}


def evaluated(sampler, tokenizer, held_out, config, samples, temperature):
    """Counts of right completions, of all, and of their tokens, over all ranks."""
    mine = dist.split(len(held_out))
    problems = [held_out[i] for i in mine]
    rollout, groups = draw_groups(sampler, tokenizer, problems, samples, config.max_new_tokens,
                                  temperature, [(0, i) for i in mine])
    right = reward.correct(problems, groups)

    of_kind = {}
    for name, chosen in report.indices_by_kind(problems, kinds_of(held_out)).items():
        of_kind[f"right/{name}"] = sum(sum(right[i]) for i in chosen)
        of_kind[f"rows/{name}"] = samples * len(chosen)
    return dist.all_reduce({
        **of_kind,
        "right": sum(map(sum, right)),
        "rows": len(rollout.lengths),
        "tokens": (rollout.lengths - rollout.prompt_lengths).sum()}, sampler.model.device)


def evaluate_run(run):
    """The same of a run of train.py."""
    return evaluate(run.sampler, run.tokenizer, run.held_out, run.learner.config)
