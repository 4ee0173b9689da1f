"""The page's numbers are the learner's; text stays text; in a browser it works and loads nothing."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

import explain
from config import Common, Config
from model import trainable

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
HOSTILE = ["<script>window.hacked = 1</script>", "</script><img src=x onerror=window.hacked=1>",
           "\"quotes' & `ticks`", "a" * 100_000, "\u202egnp.exe\u202c\u200f", "👩‍👩‍👧 🎉", "\u2028\x00\x1b", "<!--",
           "\ud800", "${alert(1)}", "ж\n\t漢"]


# --------------------------------------------------------------------------------------- a run

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three steps, all saved, by a model that guesses one of three numbers."""
    here = tmp_path_factory.mktemp("explain")
    problems = [{"problem": f"Guess the number behind door {a}.", "answer": str(a % 3 + 1),
                 "solution": f"It may be {a % 3 + 1}.\n#### {a % 3 + 1}"} for a in range(60)]
    (here / "p.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))

    def run(*command):
        done = subprocess.run([sys.executable, *map(str, command), "--data", str(here / "p.jsonl"), "--threads", "1"],
                              cwd=explain.PAGE.parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    run("sft.py", "--steps", 40, "--lr", "5e-3", "--hidden-size", 48, "--layers", 2, "--out", here / "start")
    run("train.py", "--model", here / "start", "--steps", 3, "--save-every", 1, "--keep-checkpoints", 9,
        "--prompts-per-step", 6, "--group-size", 6, "--max-new-tokens", 32, "--eval-problems", 4,
        "--eval-samples", 1, "--format-reward", 0.5, "--out", here / "run")
    return here / "run"


def arguments(folder, *more):
    return explain.parse([str(folder), "--html", str(folder.parent / "page.html"), *more])


@pytest.fixture(scope="module")
def seen(folder):
    """Looked at with a learning rate that moves pi so far that tokens are clipped."""
    return explain.look(arguments(folder, "--step", "1", "--updates", "4", "--lr", "1e-3"))


@pytest.fixture(scope="module")
def html(seen, folder):
    content = explain.describe(seen)
    content["training"] = explain.over_training(arguments(folder, "--steps", "0,1,3"), seen)
    return explain.page(content)


def content_of(html):
    return json.loads(html.partition('id="data">')[2].partition("</script>")[0])


# --------------------------------------------------------------------------------- the numbers

def check_gradient(objective, seen, content, monkeypatch, may_be_zero=False):
    """Sum the page's weights times the gradients of log pi, and compare with what the learner's optimizer gets."""
    column = seen.columns[objective]
    learner, batch, rollout = column.learner, column.batch, seen.rollout
    gradients = {}

    def keep(_):        # in the place of the optimizer's step
        gradients.update({id(p): p.grad.clone() for p in trainable(learner.model)})
        return 0.0

    monkeypatch.setattr(learner, "descend", keep)
    learner.make_pass(batch, learner.config.prompts_per_step)

    rows = [row for group in content["groups"] for row in group["rows"]]
    shown = torch.zeros_like(seen.logps["pi"])
    for row, start, found in zip(range(len(rows)), rollout.prompt_lengths.tolist(), rows):
        assert found["omitted"] is None and found["places"] is None
        weights = found[objective]["weight"]
        shown[row, start:start + len(weights)] = torch.tensor(weights, dtype=torch.float32)
    assert may_be_zero or (shown != 0).sum() > 20

    groups = [row // learner.config.group_size for row in range(len(rows))]
    logp, _ = learner.model.token_logps(rollout.tokens, rollout.completion_mask(),
                                        learner.config.temperature, groups)
    parameters = trainable(learner.model)
    mine = torch.autograd.grad((-shown * logp).sum(), parameters)       # of the loss, -J
    size = torch.cat([gradients[id(p)].flatten() for p in parameters]).norm()
    assert may_be_zero or size > 0
    for p, gradient in zip(parameters, mine):
        assert (gradient - gradients[id(p)]).norm() <= 1e-5 * size


@pytest.mark.parametrize("objective", explain.OBJECTIVES)
def test_shown_weights_times_gradients_of_logp_are_the_learners_gradient(objective, seen, html, monkeypatch):
    check_gradient(objective, seen, content_of(html), monkeypatch)


@pytest.mark.parametrize("settings", [
    {"algo": "grpo", "beta": 0.3, "aggregation": "constant", "advantage_scale": "loo", "kl_kind": "k3_is",
     "mask_truncated": True, "dual_clip": 3.0},
    {"algo": "grpo", "ratio_level": "sequence", "zero_variance": "keep", "temperature": 0.7,
     "clip_low": 0.99, "clip_high": 50.0},
    {"algo": "gtpo", "gtpo_gamma": 0.1, "aggregation": "token"},
    {"algo": "offpolicy", "trust_region": "token", "importance": "masked", "importance_level": "token",
     "importance_normalize": "batch", "beta": 0.1, "sync_every": 2},
    {"algo": "offpolicy", "correction": "bypass", "importance": "none", "aggregation": "sequence"}],
    ids=lambda settings: "-".join(map(str, settings.values())))
def test_so_they_are_with_other_settings_of_the_run(settings, folder, tmp_path, monkeypatch):
    stored = json.loads((folder / "config.json").read_text())
    common = {f.name: stored[f.name] for f in fields(Common)}
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "checkpoints").symlink_to(folder / "checkpoints")
    config = Config(**{**common, **settings})
    (copy / "config.json").write_text(json.dumps(asdict(config)))

    seen = explain.look(arguments(copy, "--step", "1", "--lr", "1e-3", "--groups", "4"))
    content = explain.describe(seen)
    for objective in explain.OBJECTIVES:
        # of the others GTPO's gate may be shut for all
        check_gradient(objective, seen, content, monkeypatch, may_be_zero=objective != settings["algo"])
    own = vars(seen.columns[settings["algo"]].learner.config)
    assert all(own[name] == value for name, value in settings.items())


def test_weights_are_the_formulas_that_the_page_shows(seen, html):
    content = content_of(html)
    settings = content["about"]["settings"]
    clipped = weighed = conflicts = 0
    tokens = sum(row["length"] for group in content["groups"] for row in group["rows"] if row["grpo"]["trained"])
    for group in content["groups"]:
        trained = [row for row in group["rows"] if row["grpo"]["trained"]]
        for row in trained:
            g, o, s = row["gtpo"], row["offpolicy"], row["shared"]
            answers = len(trained) * sum(1 for other in content["groups"] if other["rows"][0]["grpo"]["trained"])
            for t in range(row["length"]):
                ratio = math.exp(s["logp"][t] - s["mu"][t])
                assert row["grpo"]["ratio"][t] == pytest.approx(ratio, rel=1e-4)
                free = 0.0 if row["grpo"]["clip"][t] else 1.0
                assert row["grpo"]["weight"][t] == pytest.approx(
                    free * row["grpo"]["advantage"] * ratio / tokens, rel=1e-3, abs=1e-9)
                expected = g["gate"] * (g["advantage"] - settings["gtpo"]["gtpo_gamma"] * g["mean_entropy"]) * ratio
                assert g["weight"][t] == pytest.approx(
                    expected * g["conflict"][t] / row["length"] / answers, rel=1e-3, abs=1e-9)
                off = math.exp(s["logp"][t] - s["prox"][t])
                free = 0.0 if o["clip"][t] else 1.0
                assert o["weight"][t] == pytest.approx(
                    free * o["importance"][t] * o["advantage"] * off / tokens, rel=1e-3, abs=1e-9)
                clipped += row["grpo"]["clip"][t] != 0
                conflicts += g["conflict"][t] != 1
            sequence = math.exp(sum(s["prox"]) - sum(s["mu"]))
            assert o["importance"][0] == pytest.approx(min(sequence, 2.0), rel=1e-4)
            weighed += abs(sequence - 1) > 1e-3
    assert clipped and weighed and conflicts


def test_the_rollout_is_the_runs_own(folder):
    """The mean reward of all groups is what step 2 of the run has logged."""
    source = explain.find_source(arguments(folder))
    run, reference = explain.make_run(source, 1)
    run.learner.progress.step += 1
    drawn = explain.draw(run)
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    line = next(line for line in logged if line["step"] == 2)
    assert drawn.rewards.mean().item() == pytest.approx(line["reward"], abs=1e-6)
    assert reference is not None


def test_without_updates_nothing_has_moved(folder):
    seen = explain.look(arguments(folder, "--step", "1", "--updates", "0", "--groups", "1"))
    for row in explain.describe(seen)["groups"][0]["rows"]:
        assert all(abs(x - 1) < 1e-4 for o in explain.OBJECTIVES for x in row[o]["ratio"])
        assert not any(row["grpo"]["clip"]) and {1} >= set(row["offpolicy"]["importance"]) - {0}


def test_candidates_are_the_likeliest_tokens(seen):
    ids, chances = seen.candidates
    row, T = 0, int(seen.rollout.lengths[0])
    with torch.no_grad():
        logits = seen.run.learner.model(seen.rollout.tokens[:1, :T])[0]     # (T, V)
    top = logits.softmax(-1).topk(explain.CANDIDATES)
    start = int(seen.rollout.prompt_lengths[0])
    assert torch.allclose(chances[row, start:T], top.values[start - 1:T - 1], atol=1e-5)
    assert (chances[row, :start] == 0).all()


# ------------------------------------------------------------------------------------ bounds, text

def test_a_letter_of_several_tokens_stands_once(seen):
    tokenizer = seen.run.tokenizer
    ids = tokenizer("a 🎉 é", add_special_tokens=False)["input_ids"]
    texts = explain.token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts).replace("·", "") == "a 🎉 é"
    for text in ("a" * 99, "\ud800", "\u202e"):
        assert explain.visible(text, 10) == {"a": "a" * 10 + "… 89 more", "\ud800": "⟨U+D800⟩",
                                             "\u202e": "⟨U+202E⟩"}[text[0]]


@pytest.mark.parametrize("length, most", [(1, 8), (8, 8), (9, 8), (100_000, 333)])
def test_long_completions_are_cut_in_the_middle(length, most):
    places, omitted = explain.kept_places(length, most)
    assert len(places) == min(length, most) and places[0] == 0 and places[-1] == length - 1
    assert (omitted is None) == (length <= most)
    if omitted:
        assert places[omitted[0]] - places[omitted[0] - 1] - 1 == omitted[1] == length - most


def test_a_cut_completion_keeps_the_numbers_of_its_tokens(seen, monkeypatch):
    whole = explain.describe(seen)
    monkeypatch.setattr(explain, "TOKENS", 1)           # the least is 8 tokens a completion
    cut = explain.describe(seen)
    gaps = 0
    for before, after in zip(whole["groups"], cut["groups"]):
        for full, row in zip(before["rows"], after["rows"]):
            places = row["places"] or list(range(len(row["tokens"])))
            assert len(places) == len(row["tokens"]) == min(8, full["length"]) and row["length"] == full["length"]
            for name in ("grpo", "gtpo", "offpolicy"):
                assert row[name]["weight"] == [full[name]["weight"][t] for t in places]
            assert [cut["words"][i] for i in row["tokens"]] == [whole["words"][full["tokens"][t]] for t in places]
            gaps += row["omitted"] is not None
    assert gaps


def repeated(x, times):
    """A row of the page, as if its first token had been drawn so often."""
    if isinstance(x, dict):
        return {key: repeated(value, times) for key, value in x.items()}
    return x[:1] * times if isinstance(x, list) else x


def hostile(html):
    """The page of a run whose tokens, problem and answers are hostile texts."""
    content = content_of(html)
    texts = [explain.visible(text) for text in HOSTILE]
    for i in range(len(content["words"])):
        content["words"][i] = texts[i % len(texts)]
    group = content["groups"][0]
    group["problem"] = group["answer"] = explain.visible("".join(HOSTILE), explain.LONGEST)
    shown, length = 6000, 100_000                       # one token, again and again
    row = group["rows"][1] = repeated(group["rows"][1], shown)
    row["length"], row["omitted"] = length, [4500, length - shown]
    row["places"] = [*range(4500), *range(length - 1500, length)]
    content["training"][0]["answers"][0]["text"] = group["problem"]
    content["about"]["run"] = content["about"]["data"] = texts[1]
    return explain.page(content)


def test_no_text_of_a_model_leaves_the_json(html):
    whole = hostile(html)
    data = whole.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data) and not set("<>&") & set(data) and data.isascii()
    assert whole.count("<script") == 2 and whole.count("</script>") == 2 and whole.count("<img") == 0
    assert len(whole) < 2_000_000


def test_a_page_beyond_the_limit_is_refused(html):
    content = content_of(html)
    content["words"] = ["x" * explain.LARGEST]
    with pytest.raises(ValueError, match="show fewer --groups"):
        explain.page(content)


def test_the_largest_page_is_below_three_megabytes(html):
    """TOKENS tokens, with all their numbers as long as numbers get."""
    content = content_of(html)
    row = content["groups"][0]["rows"][0]
    long = -1.234567e-12

    def stretched(x):
        if isinstance(x, dict):
            return {key: stretched(value) for key, value in x.items()}
        return [long] * 100 if isinstance(x, list) and x and not isinstance(x[0], list) else x

    row = stretched(row)
    row["tokens"], row["candidates"], row["chances"] = [99999] * 100, [[99999] * 5] * 100, [[0.1234] * 5] * 100
    content["groups"] = [{"problem": "", "answer": "", "rows": [row] * (explain.TOKENS // 100)}]
    content["words"] = ["x" * 12] * 20_000
    assert len(explain.page(content)) < explain.LARGEST


# ----------------------------------------------------------------------------------- wrong input

@pytest.mark.parametrize("more, message", [
    (["--step", "9"], "has the weights of steps 0, 1, 2, 3"), (["--steps", "0,x"], "give steps of the run"),
    (["--steps", "0,7"], "--steps 7: "), (["--groups", "0"], "--groups 0: must be from 1"),
    (["--updates", "-1"], "--updates -1: must be from 0"), (["--lr", "nan"], "--lr nan: must be from 0"),
    (["--data", "truth"], "--data and --seed are for a model folder"), (["--nonsense"], "unrecognized")])
def test_wrong_input_is_one_line(more, message, folder, tmp_path):
    with pytest.raises(SystemExit, match=re.escape(message)):
        explain.main([str(folder), "--html", str(tmp_path / "x.html"), *more])
    assert not list(tmp_path.iterdir())


def test_no_run_and_no_folder_are_one_line(folder, tmp_path):
    with pytest.raises(SystemExit, match="neither a run of train.py nor a model"):
        explain.main([str(tmp_path), "--html", str(tmp_path / "x.html")])
    with pytest.raises(SystemExit, match="its folder does not exist"):
        explain.main([str(folder), "--html", str(tmp_path / "no" / "x.html")])


# -------------------------------------------------------------------------------------- a browser

class Browser:
    """Chromium, spoken to over two pipes (--remote-debugging-pipe): JSON messages that end in 0."""

    def __init__(self, program, profile):
        read_ours, write_theirs = os.pipe()
        read_theirs, write_ours = os.pipe()
        command = (f'exec "$0" --headless --no-sandbox --disable-gpu --no-first-run --user-data-dir="$1" '
                   f"--remote-debugging-pipe about:blank 3<&{read_theirs} 4>&{write_theirs}")
        self.process = subprocess.Popen(["bash", "-c", command, program, str(profile)], stderr=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, pass_fds=(read_theirs, write_theirs))
        os.close(read_theirs)
        os.close(write_theirs)
        self.incoming, self.outgoing = os.fdopen(read_ours, "rb"), os.fdopen(write_ours, "wb")
        self.number, self.events, self.session, self.rest = 0, [], None, b""

        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.outgoing.write(json.dumps(message).encode() + b"\0")
        self.outgoing.flush()
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def read(self):
        while b"\0" not in self.rest:
            more = self.incoming.read1(2 ** 16)
            assert more, "the browser has ended"
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, file, width=1400, dark=False):
        self.events = []
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=Path(file).as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def run(self, code):
        answer = self.call("Runtime.evaluate", expression=f"(() => {{ {code} }})()", returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def point_at(self, x, y):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def key(self, name, code=0):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def faults(self):
        """Errors of scripts, and of the console."""
        self.run("return 0")
        bad = [event for event in self.events if event["method"] == "Runtime.exceptionThrown"]
        bad += [event for event in self.events if event["method"] == "Log.entryAdded"
                and event["params"]["entry"]["level"] == "error"]
        return bad

    def requests(self):
        return [event["params"]["request"]["url"] for event in self.events
                if event["method"] == "Network.requestWillBeSent"]

    def picture(self, file, whole=False):
        import base64
        got = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(file).write_bytes(base64.b64decode(got["data"]))

    def close(self):
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium-headless-shell)")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def opened(browser, html, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(html, encoding="utf-8")
    browser.open(file)
    return browser


COLOURS = "return [...document.querySelectorAll('.tok')].map(x => getComputedStyle(x).backgroundColor + x.className);"


@pytest.mark.slow
def test_the_page_loads_without_errors_and_requests_nothing(opened):
    assert opened.run("return document.querySelectorAll('.tok').length") > 100
    for view in ("gtpo", "offpolicy", "three", "grpo"):
        for quantity in opened.run("return Object.keys(QUANTITIES)"):
            opened.run(f"document.querySelector('[name=view][value={view}]').click();"
                       f"document.querySelector('[name=quantity][value={quantity}]').click();"
                       "tokens[3].element.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))")
    assert not opened.faults()
    assert [url for url in opened.requests() if not url.startswith("data:")] == [opened.requests()[0]]
    assert opened.requests()[0].startswith("file:")


@pytest.mark.slow
def test_every_quantity_has_its_own_colours_and_formula(opened):
    looks, lit = [], {}
    opened.run("document.querySelector('[name=view][value=three]').click()")
    for quantity in opened.run("return Object.keys(QUANTITIES)"):
        opened.run(f"document.querySelector('[name=quantity][value={quantity}]').click()")
        looks.append(tuple(opened.run(COLOURS)))
        lit[quantity] = set(opened.run("return [...document.querySelectorAll('.term.lit')].map(x => x.dataset.term)"))
    assert len(set(looks)) >= 9                     # an open gate may look like a gate that is not there
    for quantity, terms in lit.items():
        assert terms == {quantity}, quantity


@pytest.mark.slow
def test_hovering_shows_the_numbers_and_candidates(opened):
    place = opened.run("const r = tokens[5].element.getBoundingClientRect();"
                       "return {x: r.x + 3, y: r.y + r.height / 2}")
    opened.run(f"window.scrollTo(0, {place['y']} - 300)")
    place = opened.run("const r = tokens[5].element.getClientRects()[0];"
                       "return {x: r.x + r.width / 2, y: r.y + r.height / 2}")
    opened.point_at(place["x"], place["y"])
    said = opened.run("return document.getElementById('panel').textContent")
    expected = opened.run("const {row, t} = tokens[5]; return [show(row.grpo.weight[t]), show(row.grpo.ratio[t]), "
                          "show(row.shared.entropy[t]), quoted(DATA.words[row.candidates[t][0]])]")
    assert all(number in said for number in expected), (expected, said)
    assert opened.run("return document.querySelectorAll('.term .val').length") >= 4


@pytest.mark.slow
def test_the_keyboard_alone_is_enough(opened):
    """Tab reaches everything; arrows change the quantity, and walk over tokens."""
    opened.run("document.querySelector('[name=quantity]:checked').focus()")
    before = opened.run(COLOURS)
    opened.key("ArrowRight", 39)
    assert opened.run("return state.quantity") == "weight" and opened.run(COLOURS) != before
    for _ in range(12):
        opened.key("Tab", 9)
        if opened.run("return document.activeElement.classList.contains('tok')"):
            break
    walked = []
    for key, code in (("ArrowRight", 39), ("End", 35), ("Home", 36), ("ArrowDown", 40), ("ArrowUp", 38)):
        opened.key(key, code)
        walked.append(opened.run("return tokens.indexOf(state.token)"))
    last, next_row = opened.run("const n = tokens[0].row.tokens.length; return [n - 1, n]")
    assert walked == [1, last, 0, next_row, 0]
    assert opened.run("return tokens.filter(x => x.element.tabIndex === 0).length") == 1


@pytest.mark.slow
def test_a_quantity_that_an_objective_lacks_brings_one_that_has_it_and_finds_its_tokens(opened):
    for quantity, view, sign in (("conflict", "gtpo", "×"), ("clip", "grpo", None)):
        opened.run("document.querySelector('[name=view][value=grpo]').click()")
        opened.run(f"document.querySelector('[name=quantity][value={quantity}]').click()")
        assert opened.run("return state.view") == view
        opened.run("document.querySelector('#legend button').click()")
        mark = opened.run("return document.querySelector('.tok.chosen').dataset.mark")
        assert mark and (sign is None or sign in mark)
        assert opened.run("return document.activeElement.dataset.mark") == mark


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_no_width_scrolls_sideways_and_text_has_contrast(opened, html, tmp_path, width, dark):
    opened.open(tmp_path / "page.html", width, dark)
    opened.run("document.querySelector('[name=view][value=three]').click()")
    assert opened.run("return document.documentElement.scrollWidth <= window.innerWidth + 1")
    assert opened.run("return document.documentElement.dataset.theme") == ("dark" if dark else "light")
    for quantity in ("weight", "entropy", "conflict"):
        opened.run(f"document.querySelector('[name=quantity][value={quantity}]').click()")
        assert opened.run(CONTRAST) >= 4.5


CONTRAST = """
const parse = s => s.match(/[\\d.]+/g).map(Number);
const light = c => [0, 1, 2].map(i => c[i] / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
let least = 99;
for (const element of document.querySelectorAll('.tok')) {
  const style = getComputedStyle(element), card = parse(getComputedStyle(element.closest('.row')).backgroundColor);
  const [r, g, b, a = 1] = parse(style.backgroundColor);
  const under = [r, g, b].map((x, i) => a * x + (1 - a) * card[i]);
  const pair = [light(under), light(parse(style.color))].sort((x, y) => y - x);
  least = Math.min(least, (pair[0] + 0.05) / (pair[1] + 0.05));
}
return least;"""


@pytest.mark.slow
def test_hostile_text_is_text(browser, html, tmp_path):
    file = tmp_path / "hostile.html"
    file.write_text(hostile(html), encoding="utf-8")
    browser.open(file)
    for i in range(30):
        browser.run(f"tokens[{i}].element.dispatchEvent(new MouseEvent('mouseover', {{bubbles: true}}))")
    assert browser.run("return window.hacked === undefined && document.images.length === 0")
    shown = browser.run("return document.body.innerText")
    assert "<script>window.hacked = 1</script>" in shown and "onerror=window.hacked=1" in shown and "👩" in shown
    assert "94000 tokens are not shown" in shown
    assert "⟨U+202E⟩" in shown and "\u202e" not in shown
    assert browser.run("return document.scripts.length") == 2
    assert not browser.faults() and len([u for u in browser.requests() if not u.startswith("data:")]) == 1
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth + 1")


@pytest.mark.slow
def test_a_script_that_gets_in_all_the_same_does_not_run(browser, html, tmp_path):
    """The Content-Security-Policy: another script, an event handler, a request."""
    file = tmp_path / "injected.html"
    bad = "<script>window.hacked = 1</script><img src=x onerror='window.hacked=1'><img src=https://example.com/y>"
    file.write_text(html.replace("</body>", f"{bad}</body>"), encoding="utf-8")
    browser.open(file)
    assert browser.run("return window.hacked") is None
    assert browser.run("return document.querySelectorAll('.tok').length") > 100


@pytest.mark.slow
def test_answers_over_training_stand_side_by_side(opened):
    assert opened.run("return [...document.querySelectorAll('.time h3')].map(x => x.textContent)") == [
        "step 0", "step 1", "step 3"]
    assert opened.run("return document.querySelectorAll('.time .answer').length") == 12
    assert opened.run("return document.querySelectorAll('#curves svg').length") == 3
