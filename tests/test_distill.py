"""Distillation: divergences and relations against plain formulas, gradients, runs with a teacher."""
import copy
import json
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import distill
import learner
import sft
import train
from config import Config
from engine import logps
from engine.checkpoint import Progress
from model import Transformer, trainable
from prompts import load_tokenizer
from rollout import Sampler
from test_decode import normal, small_model
from test_model import own_model
from test_train import fast, log_of, same_on_ranks, same_when_resumed, start        # start is a fixture

torch.set_num_threads(1)


# -------------------------------------------------------------------------------- the divergence

def plain(student, teacher, beta):
    """The definition, in probabilities and float64."""
    S, T = student.double().softmax(-1), teacher.double().softmax(-1)
    if beta in (0, 1):
        P, Q = (T, S) if beta == 0 else (S, T)
        return (P * (P / Q).log()).sum(-1)
    M = beta * T + (1 - beta) * S
    return (beta * T * (T / M).log() + (1 - beta) * S * (S / M).log()).sum(-1)


@pytest.mark.parametrize("beta, expected", [
    # S = (1/2, 1/2), T = (1/4, 3/4); M of 0.5 = (3/8, 5/8)
    (1.0, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
    (0.0, 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)),
    (0.5, 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5))
     + 0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)))])
def test_divergences_by_hand(beta, expected):
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
    assert distill.divergence(student, teacher, beta).item() == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 5), st.integers(2, 9), st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), st.integers(0, 99))
def test_divergences_are_the_definition_in_value_and_gradient(M, V, beta, seed):
    student, teacher = normal(M, V, seed=seed, scale=2), normal(M, V, seed=seed + 1, scale=2)
    student.requires_grad_()
    found, expected = distill.divergence(student, teacher, beta), plain(student, teacher, beta)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-4)
    assert (found > -1e-6).all()
    gradients = [torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_the_gradients_of_both_kls_are_the_known_ones():
    """Reverse: p_S (log p_S - log p_T - KL). Forward: p_S - p_T."""
    student, teacher = normal(3, 6, seed=1).requires_grad_(), normal(3, 6, seed=2)
    S, T = student.softmax(-1), teacher.softmax(-1)
    reverse = distill.divergence(student, teacher, 1.0)
    expected = S * (S.log() - T.log() - reverse[:, None])
    torch.testing.assert_close(torch.autograd.grad(reverse.sum(), student)[0], expected, atol=1e-6, rtol=1e-5)
    forward = distill.divergence(student, teacher, 0.0)
    torch.testing.assert_close(torch.autograd.grad(forward.sum(), student)[0], S - T, atol=1e-6, rtol=1e-5)


def test_what_is_impossible_is_no_nan():
    never = torch.tensor([[0.0, -math.inf]])
    assert distill.divergence(never, torch.zeros(1, 2), 1.0).item() == pytest.approx(math.log(2))
    assert distill.divergence(torch.zeros(1, 2), never, 0.0).item() == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="0 to 1"):
        distill.divergence(never, never, 1.5)


# -------------------------------------------------------------------------------- by chunks

def batch_of(models, budget=10 ** 6, **options):
    """A learner of a student, its rollout and rewards; the teacher is given at once."""
    student, teacher = models
    c = Config("distill", group_size=2, prompts_per_step=3, teacher="t", model="m", micro_batch_tokens=budget, **options)
    state = distill.State.__new__(distill.State)
    state.teacher = teacher
    one = learner.Learner(c, distill, student, learner.adamw(student, 1e-4), Progress(), state=state)
    out = Sampler(student, []).generate([[1, 2], [3, 4, 5], [6]], 2, [4, 5, 6, 2, 3, 1], c.temperature)
    return one, out, torch.tensor([[1.0, 0], [0, 0], [1, 1]])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("budget, chunk", [(10 ** 6, 2 ** 24), (1, 50), (12, 150)])
def test_the_gradient_is_that_of_whole_logits_for_any_split(beta, budget, chunk, monkeypatch):
    monkeypatch.setattr(logps, "LOGIT_CHUNK", chunk)
    student, teacher = small_model(), small_model("llama").init_weights(5)
    one, out, rewards = batch_of((student, teacher), budget, divergence_beta=beta, temperature=0.8)

    twin = copy.deepcopy(student)
    mask = out.completion_mask()
    before = torch.roll(mask, -1, 1).bool()                     # positions that predict a wanted token
    with torch.no_grad():
        theirs = teacher(out.tokens)[before] / 0.8
    value = plain(twin(out.tokens)[before] / 0.8, theirs, beta).mean()
    value.backward()

    found = {}
    monkeypatch.setattr(one, "descend", lambda loss: found.update(
        loss=loss, grads=[p.grad.clone() for p in trainable(student)]) or 0.0)
    sums, = one.make_pass(one.batch(out, rewards), 3)
    assert found["loss"] == pytest.approx(value.item(), rel=1e-4)
    assert sums["divergence"] / sums["tokens"] == pytest.approx(value.item(), rel=1e-4)
    for got, p in zip(found["grads"], trainable(twin), strict=True):
        torch.testing.assert_close(got, p.grad, atol=2e-5, rtol=1e-3)
    assert sums["ratio_max_dev"] < 1e-3 and sums["entropy"] > 0


def test_the_cheap_form_is_the_reverse_kl_in_expectation():
    """Over all tokens of one position: sum_t p(t) (log S - log T) d log p(t) is the gradient of KL(S || T)."""
    student, teacher = normal(1, 7, seed=3).requires_grad_(), normal(1, 7, seed=4)
    S, T = student.log_softmax(-1), teacher.log_softmax(-1)
    exact, = torch.autograd.grad(distill.divergence(student, teacher, 1.0).sum(), student, retain_graph=True)
    each = (S - T).detach() * S.exp().detach() * S
    cheap, = torch.autograd.grad(each.sum(), student)
    torch.testing.assert_close(cheap, exact, atol=1e-6, rtol=1e-5)


def test_the_cheap_loss_by_hand():
    """Two tokens, log S - log T = 0.5 and -1; on-policy the loss is their mean, the gradient each over 2."""
    logp = torch.tensor([[0.0, -1.0, -2.0]], requires_grad=True)
    batch = distill.Batch(tokens=None, prompt_lengths=None, lengths=None, mask=torch.tensor([[0., 1, 1]]), rewards=None,
                          advantages=None, active=None, old_logp=logp.detach(), ref_logp=torch.tensor([[0., -1.5, -1.0]]))
    value, sums = distill.loss(logp, torch.zeros(1, 3), batch, Config("distill", divergence="token"), 2.0)
    value.backward()
    assert value.item() == pytest.approx(-0.25) and logp.grad.tolist() == [[0, 0.25, -0.5]]
    assert sums["divergence"].item() == pytest.approx(-0.5)


def test_a_larger_vocabulary_of_the_teacher_is_cut():
    hidden, weight, of_teacher = normal(4, 8, seed=1), normal(20, 8, seed=2), normal(26, 8, seed=3)
    short = distill.chunk_logits(slice(0, 4), 1.0, hidden, weight, hidden, of_teacher[:20])
    long = distill.chunk_logits(slice(0, 4), 1.0, hidden, weight, hidden, of_teacher)
    assert long[1].shape == (4, 20) and torch.equal(short[1], long[1])


# ---------------------------------------------------------------------------- what goes on inside

def test_relations_of_equal_models_of_another_head_split_are_equal():
    """The same 24 numbers a position as 2 heads of 12, or 4 of 6."""
    x = normal(2, 5, 24, seed=1)
    two, four = (x.view(2, 5, heads, -1).transpose(1, 2) for heads in (2, 4))
    mask = torch.tensor([[1., 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert distill.relation_loss(two, four, mask, 3).item() == pytest.approx(0, abs=1e-6)
    assert distill.relation_loss(two, 2 * four, mask, 3) > 0.1


def test_a_relation_by_hand():
    """One head of one number: positions 1, 2, 3. Row 2 of the student is softmax(2, 4), of the teacher (x = 0) uniform."""
    student, teacher = torch.tensor([1., 2, 3]).view(1, 1, 3, 1), torch.zeros(1, 1, 3, 1)
    mask = torch.tensor([[1., 1, 0]])
    p = 1 / (1 + math.exp(2))
    expected = 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))          # row 1 is alone: 0
    assert distill.relation_loss(student, teacher, mask, 1).item() == pytest.approx(expected / 2, rel=1e-5)


def test_positions_off_the_mask_change_nothing():
    x, y, mask = normal(1, 2, 4, 6, seed=1), normal(1, 2, 4, 6, seed=2), torch.tensor([[1., 1, 1, 0]])
    z = x.clone()
    z[:, :, 3] = 9.0
    assert torch.equal(distill.relation_loss(x, y, mask, 2), distill.relation_loss(z, y, mask, 2))
    with pytest.raises(ValueError, match="cannot be split"):
        distill.relation_loss(x, y, mask, 5)


@pytest.mark.parametrize("m, student, teacher, expected", [(1, 4, 12, 3), (4, 4, 12, 12), (2, 4, 2, 1), (1, 8, 2, 1)])
def test_the_teachers_layer(m, student, teacher, expected):
    assert distill.layer_of_teacher(m, student, teacher) == expected


@pytest.mark.parametrize("budget", [10 ** 6, 8])
def test_the_inner_terms_add_up_over_micro_batches(budget):
    student, teacher = small_model(), small_model("llama").init_weights(5)
    config = sft.SFTConfig(teacher="t", relations=0.5, features=0.3, relation_heads=2, micro_batch_tokens=budget)
    objective = distill.CorpusDistillation(student, teacher, config)
    torch.manual_seed(0)
    torch.nn.init.normal_(student.projection.weight)
    pairs = [([1, 2], [3, 4, 5]), ([6], [7, 8]), ([9, 10, 11], [12])]
    config.batch_tokens = 6.0
    one = learner.Learner(config, objective, student, None, Progress())
    one.descend = lambda loss: 0.0
    one.optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    sums = one.update(sft.collate(pairs, torch.device("cpu")), [0, 1, 2])

    # by hand: every row alone
    expected = 0.0
    for pair in pairs:
        batch = sft.collate([pair], torch.device("cpu"))
        ours, theirs = distill.look_inside(student, batch.tokens), distill.look_inside(teacher, batch.tokens)
        ones = torch.ones(batch.tokens.shape)
        inner = 0.5 * sum(distill.relation_loss(ours[n], theirs[n], ones, 2) for n in "qkv")
        for m in (1, 2):
            gap = student.projection(ours["hidden"][m - 1]) - theirs["hidden"][m - 1]
            inner = inner + 0.15 * gap.square().mean()
        expected += inner.item() * len(pair[1])
    divergences = sums["divergence"]
    assert sums["loss"] == pytest.approx((divergences + expected) / 6, rel=1e-4)
    objective.remove(student)
    assert not hasattr(student, "projection")


# ----------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def teacher(start, tmp_path_factory):
    """A teacher of another width and depth that knows the answers, with the tokenizer of the student."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    rows = [{"problem": f"Which one, {i}?", "answer": str(i % 3), "solution": f"#### {1}"} for i in range(200)]
    data = folder.parent / "ones.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    config = sft.SFTConfig(device="cpu", data=str(start.parent / "problems.jsonl"), out=str(folder), steps=1,
                           hidden_size=48, layers=2, heads=4, vocab_size=280, lr=8e-3)
    sft.warm_start(config, progress=False)
    config = sft.SFTConfig(device="cpu", data=str(data), model=str(folder), out=str(folder.parent / "one"), steps=60, lr=8e-3)
    sft.warm_start(config, progress=False)
    return folder.parent / "one"


@pytest.mark.parametrize("form", ["full", "token"])
def test_a_run_comes_nearer_to_its_teacher_and_resumes(start, teacher, tmp_path, form):
    options = ["--algo", "distill", "--teacher", str(teacher), "--divergence", form, "--lr", "3e-3", "--warmup-steps", "0"]
    if form == "full":
        lines = same_when_resumed(start, tmp_path, *options, steps=6)[1:]
    else:
        train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), *options, "--steps", "6"])
        lines = log_of(tmp_path / "run")[1:]
    assert lines[-1]["divergence"] < 0.7 * lines[0]["divergence"] and lines[0]["ratio_max_dev"] < 1e-3


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_numbers(start, teacher, tmp_path):
    same_on_ranks([2, 5], start, tmp_path, "--algo", "distill", "--teacher", str(teacher))


@pytest.mark.parametrize("extra", [[], ["--relations", "0.1", "--features", "0.1", "--divergence-beta", "0.5"]])
def test_a_corpus_with_a_teacher(start, teacher, tmp_path, extra, capsys):
    sft.main(["--data", str(start.parent / "problems.jsonl"), "--model", str(start), "--teacher", str(teacher), "--steps", "20",
              "--out", str(tmp_path / "out"), "--device", "cpu", "--threads", "1", "--lr", "3e-3", *extra])
    student, before, theirs = (Transformer.from_pretrained(folder) for folder in (tmp_path / "out", start, teacher))
    tokenizer = load_tokenizer(start)
    tokens = torch.tensor(tokenizer("Which one, 7?\n#### 1")["input_ids"])[None]
    gaps = [distill.divergence(model(tokens)[0, -4:], theirs(tokens)[0, -4:], 0.0).mean() for model in (before, student)]
    assert gaps[1] < 0.8 * gaps[0]
    assert not any("projection" in name for name in student.state_dict())


@pytest.mark.parametrize("options, message", [
    ([], "needs --teacher"), (["--teacher", "T", "--refill", "2"], "--refill throws groups away"), (["--teacher", "T", "--divergence", "token", "--divergence-beta", "0.5"], "is the reverse KL"),
    (["--teacher", "T", "--model", "S", "--divergence", "token", "--epochs", "2"], "each batch is used once"),
    (["--teacher", "OTHER"], "its tokenizer is not that of the student")])
def test_a_wrong_teacher_is_one_line_and_nothing_is_written(start, teacher, tmp_path, options, message):
    other = tmp_path / "other"
    if "OTHER" in options:
        config = sft.SFTConfig(device="cpu", data="arithmetic", problems=50, out=str(other), steps=1, hidden_size=32, layers=1,
                               heads=2, vocab_size=300)
        sft.warm_start(config, progress=False)
    options = [{"T": str(teacher), "OTHER": str(other)}.get(word, word) for word in options]
    with pytest.raises(SystemExit, match=message):
        train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), "--algo", "distill", *options])
    assert not (tmp_path / "run").exists()


def test_another_teacher_is_no_way_to_go_on_and_the_students_folder_is_not_needed(start, teacher, tmp_path):
    student, theirs, run = tmp_path / "student", tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(start, student)
    shutil.copytree(teacher, theirs)
    train.main(["--model", str(student), "--out", str(run), *fast(start), "--algo", "distill", "--teacher", str(theirs),
                "--save-every", "1", "--steps", "1"])
    shutil.rmtree(student)
    shutil.move(theirs / "model.safetensors", tmp_path / "kept")
    tensors = load_file(tmp_path / "kept")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, theirs / "model.safetensors")
    with pytest.raises(SystemExit, match="the teacher .* has changed since the run began"):
        train.main(["--resume", "--out", str(run), "--steps", "2"])
    shutil.move(tmp_path / "kept", theirs / "model.safetensors")
    train.main(["--resume", "--out", str(run), "--steps", "2"])
    assert log_of(run)[-1]["step"] == 2


def test_the_projection_follows_from_the_seed():
    student, teacher = own_model(), own_model(hidden_size=48)
    one, same, other = (distill.projection(student, teacher, seed).weight.detach() for seed in (3, 3, 4))
    assert one.shape == (48, 32) and torch.equal(one, same) and not torch.equal(one, other)
    assert one.abs().max() <= 32 ** -0.5 and one.std() == pytest.approx((3 * 32) ** -0.5, rel=0.1)


def test_settings_of_a_teacher_without_one_are_one_line(start, tmp_path):
    with pytest.raises(SystemExit, match="--relations needs --teacher"):
        sft.main(["--data", str(start.parent / "problems.jsonl"), "--relations", "1", "--out", str(tmp_path / "x")])
