"""Curricula and mixes: shares by hand, streams that resume, runs that log each task and level."""
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import curriculum
import data
import report
import tasks
import train
from config import CURRICULA, Config
from test_train import fast, log_of, same_on_ranks, same_when_resumed, start        # start is a fixture

UNIT = st.floats(0, 1)


# -------------------------------------------------------------------------------- pure functions

@pytest.mark.parametrize("schedule, u, expected", [
    ("uniform", 0.3, [1 / 3, 1 / 3, 1 / 3]),
    ("steps", 0.0, [1, 0, 0]),
    ("steps", 0.34, [0, 1, 0]),
    ("steps", 1.0, [0, 0, 1]),
    ("cosine", 0.0, [3 / 6, 2 / 6, 1 / 6]),
    ("cosine", 0.5, [1 / 3, 1 / 3, 1 / 3]),
    ("cosine", 1.0, [1 / 6, 2 / 6, 3 / 6]),
    # the middle is at level 0.25^0.5 * 2 = 1, and exp(-1 / (2 * 0.25)) = 0.1353
    ("gaussian", 0.25, [0.1353 / 1.2707, 1 / 1.2707, 0.1353 / 1.2707]),
    # at level 0: the others have exp(-2) and exp(-8)
    ("gaussian", 0.0, [1 / 1.13567, 0.13534 / 1.13567, 0.00034 / 1.13567]),
])
def test_shares_of_three_levels_by_hand(schedule, u, expected):
    assert curriculum.weights(schedule, u, 3) == pytest.approx(expected, abs=1e-4)


def test_a_floor_of_gaussian_is_shared_equally():
    """E2H's own floor for three levels is 2 / 12: half of all is shared out, the bell has the rest."""
    bell = curriculum.weights("gaussian", 0.25, 3)
    floored = curriculum.weights("gaussian", 0.25, 3, floor=1 / 6)
    assert floored == pytest.approx([1 / 6 + 0.5 * share for share in bell])
    with pytest.raises(ValueError, match="0 to 0.333"):
        curriculum.weights("gaussian", 0.25, 3, floor=0.34)


def test_a_narrow_bell_between_two_levels_does_not_vanish():
    assert curriculum.weights("gaussian", 0.25, 4, sigma=1e-3) == pytest.approx([0, 0.5, 0.5, 0])


def test_adaptive_follows_the_signal_of_a_group():
    """p (1 - p) of .5, .9 and 0 is .25, .09 and 0."""
    shares = curriculum.weights("adaptive", 0.7, 3, [0.5, 0.9, 0.0], floor=0.0)
    assert shares == pytest.approx([0.25 / 0.34, 0.09 / 0.34, 0])
    assert curriculum.weights("adaptive", 0.1, 3, [0.5, 0.9, 0.0], floor=0.0) == shares     # no clock
    floored = curriculum.weights("adaptive", 0.7, 3, [0.5, 0.9, 0.0])
    assert floored == pytest.approx([0.27 / 0.40, 0.11 / 0.40, 0.02 / 0.40])


def test_a_level_never_seen_is_as_hard_as_its_easier_neighbour():
    seen = curriculum.weights("adaptive", 0, 4, [0.9, None, 0.2, None])
    assert seen == curriculum.weights("adaptive", 0, 4, [0.9, 0.9, 0.2, 0.2])
    assert curriculum.weights("adaptive", 0, 3) == pytest.approx([1 / 3] * 3)
    assert curriculum.weights("adaptive", 0, 2, [1.0, 1.0], floor=0.0) == [0.5, 0.5]    # nothing left


def test_a_level_fades_above_one_bound_and_returns_below_another():
    faded, history = [], []
    for p in (0.8, 0.94, 0.96, 0.92, 0.91, 0.89, 0.92, 0.95):
        faded = curriculum.fade([p, None], faded)
        history.append(faded == [0])
    assert history == [False, False, True, True, True, False, False, True]
    shares = curriculum.weights("adaptive", 0, 2, [0.97, 0.5], faded=[0])
    assert shares == pytest.approx([0.02 / 0.29, 0.27 / 0.29])


def test_success_forgets_over_sixteen_groups():
    assert curriculum.followed(None, 0.3, 5) == 0.3
    assert curriculum.followed(0.0, 1.0, 16) == pytest.approx(1 - (15 / 16) ** 16)
    once = curriculum.followed(curriculum.followed(0.2, 0.9, 3), 0.9, 4)
    assert once == pytest.approx(curriculum.followed(0.2, 0.9, 7))


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(CURRICULA), UNIT, st.integers(1, 9), st.data())
def test_shares_are_shares(schedule, u, n, given_data):
    success = given_data.draw(st.lists(st.one_of(st.none(), UNIT), min_size=n, max_size=n))
    shares = curriculum.weights(schedule, u, n, success)
    assert len(shares) == n and math.isclose(sum(shares), 1) and min(shares) >= 0


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["cosine", "gaussian", "steps"]), UNIT, UNIT, st.integers(2, 8))
def test_the_clock_moves_the_mean_level_upward(schedule, u, v, n):
    def mean_level(progress):
        return sum(i * share for i, share in enumerate(curriculum.weights(schedule, progress, n)))
    u, v = sorted((u, v))
    assert mean_level(u) <= mean_level(v) + 1e-9


@pytest.mark.parametrize("arguments", [
    ("easy", 0.5, 3), ("uniform", 0.5, 0), ("cosine", 1.5, 3), ("cosine", math.nan, 3),
    ("adaptive", 0.5, 3, [0.5])])
def test_wrong_arguments_are_one_line(arguments):
    with pytest.raises(ValueError) as error:
        curriculum.weights(*arguments)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- the stream

def problems_of(kinds, each=20):
    return [{"problem": f"{task} {level} {i}", "answer": "1", "task": task, "level": level}
            for task, level in kinds for i in range(each)]


KINDS = [("a", 1), ("a", 2), ("a", 10), ("b", None)]


def mixed(schedule="uniform", weights=None, seed=0, **settings):
    parts = ",".join(f"{task}@{weight}" for task, weight in (weights or {"a": 1.0, "b": 1.0}).items())
    config = Config(prompts_per_step=8, data=parts, curriculum=schedule, seed=seed, **settings)
    return data.stream_of(config, problems_of(KINDS))


def test_kinds_stand_in_the_order_of_their_levels():
    assert list(data.kinds_of(problems_of(KINDS[::-1]))) == ["a:1", "a:2", "a:10", "b"]
    assert report.names_of(data.kinds_of(problems_of(KINDS))) == {
        "a:1": {"a:1"}, "a:2": {"a:2"}, "a:10": {"a:10"}, "b": {"b"}, "a": {"a:1", "a:2", "a:10"}}
    assert report.names_of({"gsm8k": "gsm8k"}) == {}
    many = {f"a:{level}": "a" for level in range(41)}
    assert report.names_of(many) == {} and set(report.names_of({**many, "b": "b"})) == {"a", "b"}


def test_tasks_have_their_weights_and_levels_their_schedule():
    stream = mixed("cosine", {"a": 3.0, "b": 1.0})
    expected = {"a:1": 0.75 * 3 / 6, "a:2": 0.75 * 2 / 6, "a:10": 0.75 / 6, "b": 0.25}
    assert stream.shares(0.0) == pytest.approx(expected)
    taken = [data.kind_of(p) for p in stream.next(4000, 0.0)]
    for kind, share in expected.items():
        assert taken.count(kind) / 4000 == pytest.approx(share, abs=4 * math.sqrt(share / 4000))


def test_every_problem_of_a_kind_comes_before_one_comes_twice():
    stream = mixed()
    texts = [p["problem"] for p in stream.next(800) if p["task"] == "b"]
    for start_of_epoch in range(0, len(texts) - 20, 20):
        assert len(set(texts[start_of_epoch:start_of_epoch + 20])) == 20


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(CURRICULA), st.integers(0, 9),
       st.lists(st.tuples(st.integers(1, 9), UNIT), min_size=1, max_size=6))
def test_a_stream_goes_on_from_its_state(schedule, seed, steps):
    """Its state as JSON, put into a new stream after every step, gives the same problems."""
    whole, pieces = mixed(schedule, seed=seed), mixed(schedule, seed=seed)
    for i, (count, success) in enumerate(steps):
        line = {"share/a:1": 0.5, "pass@1/a:1": success, "share/a:2": 0.0, "share/b": 0.5, "pass@1/b": success}
        again = mixed(schedule, seed=seed)
        again.state = json.loads(json.dumps(pieces.state))
        assert whole.next(count, i / 6) == again.next(count, i / 6)
        whole.feedback(line)
        again.feedback(line)
        pieces = again
    assert whole.state == pieces.state


def test_feedback_moves_the_shares_of_an_adaptive_stream():
    stream = mixed("adaptive")
    assert stream.shares(0)["a:1"] == pytest.approx(0.5 / 3)
    for _ in range(9):
        stream.feedback({"share/a:1": 0.5, "pass@1/a:1": 1.0, "share/a:2": 0.5, "pass@1/a:2": 0.5,
                         "share/a:10": 0.0, "share/b": 0.0})
    assert stream.faded == ["a:1"] and "a:10" not in stream.success
    shares = stream.shares(0)
    assert shares["a:1"] == pytest.approx(0.5 * 0.02 / 0.56) and shares["a:2"] == shares["a:10"]
    stream.feedback({"share/a:1": 1.0, "pass@1/a:1": 0.0, "refill_rounds": 3})
    assert stream.faded == [] and stream.success["a:1"] < 0.2       # 32 groups


# ------------------------------------------------------------------------------------------ mixes

def test_a_mix_is_read_into_its_parts():
    parts = data.parts_of("arithmetic:2-4@2, gsm8k,math@.5", (1, 9))
    assert [(p.source, p.levels, p.weight) for p in parts] == [
        ("arithmetic", (2, 4), 2.0), ("gsm8k", None, 1.0), ("math", None, 0.5)]
    assert data.parts_of("arithmetic", (1, 9))[0].levels == (1, 9)
    assert data.parts_of("arithmetic:3")[0].levels == (3, 3)
    assert data.parts_of("gym:knights_knaves@2", (1, 9)) == [data.Part("gym:knights_knaves", None, 2.0)]


def test_a_file_is_itself_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b:2-3@2").write_text('{"problem": "1?", "answer": "1"}')
    assert data.parts_of("a,b:2-3@2") == [data.Part("a,b:2-3@2")]


@pytest.mark.parametrize("text, message", [
    ("gsm8k:2-4,math", "gsm8k has no levels"), ("arithmetic:4-2", "easiest-hardest"),
    ("arithmetic@0,gsm8k", "has no weight"), ("arithmetic:1-2,arithmetic:3", "two parts are called arithmetic"),
    ("a/x.jsonl,b/x.jsonl@9", "two parts are called x.jsonl"), ("x.jsonl,./x.jsonl", "two parts are called x.jsonl"),
    ("arithmetic,,math", "is no source"), ("gym:x:2", "has no levels")])
def test_a_wrong_mix_is_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        data.parts_of(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["arithmetic:2-3", "gym:double", "FILE"])
def test_levels_that_nothing_takes_are_refused(source, start):
    source = source.replace("FILE", str(start.parent / "problems.jsonl"))
    with pytest.raises(ValueError, match="--levels 2-3 does nothing for .*: it is for built-in tasks"):
        data.load_problems(source, levels=(2, 3), count=5)


def test_a_long_mix_is_no_file():
    mix = ",".join(f"gym:{'x' * 30}{i}" for i in range(20))
    assert len(data.parts_of(mix)) == 20
    with pytest.raises(FileNotFoundError, match="no such file; give arithmetic"):
        data.load_problems("y" * 300)


def test_a_file_called_like_a_task_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "truth").write_text('{"problem": "1?", "answer": "1"}')
    with pytest.raises(ValueError, match="must not be called like a built-in task"):
        data.load_problems("./truth")


def test_a_mix_of_held_out_problems_is_shared_by_weight(start):
    """A file of 200 is one of two parts with 20 problems in all: it gives ten of them."""
    file = start.parent / "problems.jsonl"
    _, held_out = data.load_split(Config(data="arithmetic:2-3", eval_data=f"{file},arithmetic:2-3",
                                         eval_problems=20, problems=50))
    assert [p["task"] for p in held_out].count("problems.jsonl") == 10 == len(held_out) // 2


def test_supervised_problems_of_a_mix_are_as_many_as_their_weights_say(start):
    """sft.py reads a mix so: a file of 200 problems is repeated three times beside three times as many others."""
    file = start.parent / "problems.jsonl"
    mixed = data.load_problems(f"arithmetic:2-3@1,{file}@3", count=800, fill=True)
    tasks_of = [p["task"] for p in mixed]
    assert tasks_of.count("arithmetic") == 200 and tasks_of.count("problems.jsonl") == 600
    assert len({p["id"] for p in mixed if p["task"] == "problems.jsonl"}) == 200
    few = data.load_problems(f"arithmetic:2-3@3,{file}@1", count=40, fill=True)        # none of the file's is lost
    assert [p["task"] for p in few].count("problems.jsonl") == 200


def test_what_a_run_holds_out_of_a_file_is_in_no_corpus(start):
    """rejection.py and judge.py --revise draw solutions of a file's problems: not of those a run is tested on."""
    file = str(start.parent / "problems.jsonl")
    _, held_out = data.load_split(Config(data=file, eval_problems=15))
    drawn = data.load_problems(file, "train", whole=False, count=1000, spare=200)
    assert len(drawn) == 180 and not {p["problem"] for p in held_out} & {p["problem"] for p in drawn}
    assert len(data.load_problems(file, "test", count=1000)) == 200


def test_levels_stand_in_the_order_of_their_numbers():
    def order(*levels):
        return [kind[2:] for kind in data.kinds_of([{"task": "f", "level": level} for level in levels])]
    assert order(10, 9, 2) == ["2", "9", "10"] and order(-1, 1, 0, -2) == ["-2", "-1", "0", "1"]
    assert order(.5, .125, 1.0, .25) == ["0.125", "0.25", "0.5", "1.0"] and order(.1, 1e-5) == ["1e-05", "0.1"]
    assert order("Level 5", "Level ?", "Level 12") == ["Level 5", "Level 12", "Level ?"]
    assert order("grade-2", "grade-10") == ["grade-2", "grade-10"] and order("5²", "4") == ["4", "5²"]


def test_levels_without_an_order_are_one_line(tmp_path):
    file = tmp_path / "words.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{i}?", "answer": "1", "level": ["easy", "medium", "hard"][i % 3]}) + "\n"
                            for i in range(60)))
    assert data.load_split(Config(data=str(file), eval_problems=5))
    with pytest.raises(ValueError, match="of words.jsonl are no numbers: easy, hard, medium"):
        data.load_split(Config(data=str(file), eval_problems=5, curriculum="steps"))


def test_a_floor_that_is_too_high_is_refused_before_anything_is_drawn():
    with pytest.raises(ValueError, match="the floor of 5 levels must be 0 to 0.2, not 0.5"):
        data.load_split(Config(data="arithmetic:2-6", problems=50, curriculum="gaussian", curriculum_floor=0.5))


@pytest.mark.parametrize("more", [{"success": [1.2, .5, .5]}, {"success": [math.nan, .2, .5]}, {"floor": -.1},
                                  {"floor": math.inf}, {"sigma": 0}, {"sigma": math.nan}, {"beta": -1}])
def test_weights_out_of_range_are_one_line(more):
    for schedule in ("adaptive", "gaussian"):
        if schedule == "gaussian" and "success" in more:
            continue
        with pytest.raises(ValueError, match="not "):
            curriculum.weights(schedule, 0.0, 3, **more)


def test_a_lucky_group_does_not_fade_a_level():
    """All right in one group, and then in fifteen more: only sixteen groups say that a level is solved."""
    stream = curriculum.Mixed({}, {"a:1": "a", "a:2": "a"}, {"a": 1.0}, Config(data="arithmetic", prompts_per_step=16))
    stream.feedback({"share/a:1": 1 / 16, "pass@1/a:1": 1.0})
    assert stream.success == {"a:1": 1.0} and stream.faded == []
    stream.feedback({"share/a:1": 14 / 16, "pass@1/a:1": 1.0})
    assert stream.faded == []
    stream.feedback({"share/a:1": 1 / 16, "pass@1/a:1": 1.0})
    assert stream.faded == ["a:1"]


def test_levels_that_a_task_does_not_have_are_one_line():
    with pytest.raises(ValueError, match=r"arithmetic has levels from 1 \(steps\), not 0-3"):
        tasks.problems("arithmetic", 1, level=(0, 3))


def test_a_mix_shares_its_problems_by_weight_and_names_the_task_of_each(start):
    file = start.parent / "problems.jsonl"
    problems = data.load_problems(f"arithmetic:2-3@3,{file}", count=40)
    assert [p["task"] for p in problems].count("arithmetic") == 30
    assert [p["task"] for p in problems].count("problems.jsonl") == 200
    few = data.load_problems(f"arithmetic:2-3@3,{file}", count=40, whole=False)
    assert [p["task"] for p in few].count("problems.jsonl") == 10

    train_set, held_out = data.load_split(Config(data=f"arithmetic:2-3,{file}", eval_problems=20))
    assert len(held_out) == 20 and {p["task"] for p in held_out} == {"arithmetic", "problems.jsonl"}
    assert not {p["problem"] for p in train_set} & {p["problem"] for p in held_out}


# ------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def levels(start):
    """The problems of `start` in three levels, as a file."""
    file = start.parent / "levels.jsonl"
    rows = [{"problem": f"Which one, {i}?", "answer": str(i % 3), "level": 1 + i % 3} for i in range(200)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_each_level_is_in_the_log_and_sums_to_the_whole(start, levels, tmp_path):
    train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), "--data", levels,
                "--steps", "2", "--curriculum", "cosine"])
    lines = log_of(tmp_path / "run")
    kinds = [f"levels.jsonl:{level}" for level in (1, 2, 3)]
    for line in lines[1:]:
        present = [kind for kind in kinds if line[f"share/{kind}"] > 0]
        assert sum(line[f"share/{kind}"] for kind in kinds) == pytest.approx(1)
        for what, key in (("reward", "reward"), ("pass@1", "rewards/correct"), ("length", "completion_length")):
            mean = sum(line[f"share/{kind}"] * line[f"{what}/{kind}"] for kind in present)
            assert mean == pytest.approx(line[key], abs=1e-6)
    assert all(f"eval_pass@1/{kind}" in lines[0] for kind in kinds)
    assert (tmp_path / "run" / "curve.png").exists()


def test_an_adaptive_run_resumes_bit_for_bit(start, levels, tmp_path):
    same_when_resumed(start, tmp_path, "--data", levels, "--curriculum", "adaptive")


@pytest.mark.slow
def test_a_mix_with_an_adaptive_curriculum_on_any_number_of_ranks(start, levels, tmp_path):
    lines = same_on_ranks([2, 3], start, tmp_path, "--data", f"{levels}@2,{start.parent / 'problems.jsonl'}",
                          "--curriculum", "adaptive")
    assert all("share/problems.jsonl" in line for line in lines[1:])


@pytest.mark.parametrize("options, message", [
    (["--curriculum", "cosine"], "needs problems of several levels"),
    (["--curriculum", "easy"], "choose uniform, steps, cosine, gaussian, adaptive"),
    (["--curriculum", "cosine", "--curriculum-floor", ".1"], "needs --curriculum gaussian or adaptive"),
    (["--data", "MANY", "--curriculum", "adaptive"], "follows at most 40 tasks and levels, and these problems have 50"),
    (["--data", "arithmetic:9-2"], "must be easiest-hardest")])
def test_a_wrong_curriculum_is_one_line_and_nothing_is_written(start, tmp_path, options, message):
    many = tmp_path / "many.jsonl"
    many.write_text("\n".join(json.dumps({"problem": f"Which, {i}?", "answer": "1", "level": i / 7}) for i in range(50)))
    options = [str(many) if word == "MANY" else word for word in options]
    with pytest.raises(SystemExit, match=message):
        train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), *options])
    assert not (tmp_path / "run").exists()
