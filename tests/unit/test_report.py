"""The page: what it takes from a folder, which words come first, and that nothing that a model said is part of its markup."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import re
import shutil
import urllib.parse

import pytest

from keel.cli import main
from keel.config import RunConfig
from keel.errors import KeelError
from keel.files import append_jsonl
from keel.report import page
from keel.report.command import report
from keel.report.data import LONGEST, chosen_steps, read_run, rollouts, spread
from keel.report.figures import figures, series_of
from keel.report.page import html, payload, shown
from keel.report.skills import skills_table
from keel.report.study import read_study, triple
from keel.report.view import serving
from keel.run_folder import RunFolder

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "{{ 7*7 }}",
    "\u202eabc\u0000\ud800",
    "x" * 150_000,
]
pytest.importorskip("plotly")


def metrics(step, **more):
    told = {
        "step": step,
        "tokens/total": 100.0 * step,
        "reward/mean": 0.1 * step,
        "policy/entropy_nats": 1.0,
        "policy/clip_frac": 0.0,
    }
    return told | more


def rollout(step=1, sample=0, text="A:4", **changes):
    return {
        "step": step, "prompt_id": "p", "sample": sample, "prompt": "2+2=", "completion": text, "answer": "4", "reward": 1.0,
        "correct": True, "finish": "stop", "tokens": 3,
    } | changes  # fmt: skip


def held_out(value, low, high, **more):
    return {"eval/pass@1": value, "eval/pass@1_low": low, "eval/pass@1_high": high} | more


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, rows, rollouts, traces, finished) → a run folder."""

    def make(name="run", rows=(), said=(), traces=(), ended=True, root=tmp_path, **settings):
        folder = RunFolder.create(RunConfig(out=str(root / name), **settings), {"versions": {"torch": "2"}})
        append_jsonl(
            folder.metrics, rows or [metrics(0, **held_out(0.2, 0.1, 0.3)), metrics(1), metrics(2, **held_out(0.5, 0.4, 0.6))]
        )
        folder.rollouts.write_text("".join(json.dumps(row) + "\n" for row in said or [rollout()]))
        folder.tokens.write_text("".join(json.dumps(row) + "\n" for row in traces))
        if ended:
            folder.finish({"skipped_steps": 0, "steps": 2})
        return folder.path

    return make


def data_of(text):
    """What the page's programs get to see."""
    blobs = [re.search(rf'id="blob-{name}"[^>]*>([^<]*)<', text)[1] for name in ("data", "said")]
    first, said = (json.loads(gzip.decompress(base64.b64decode(blob))) for blob in blobs)
    return first | said


def test_the_first_line_is_the_verdict(make_run):
    text = html(shown([make_run()]))
    heading = re.search(r"<h1[^>]*>([^<]*)</h1>", text)[1]
    assert heading == "Held-out pass@1 rose from 0.200 to 0.500 in 2 steps."
    assert text.index("<h1") < text.index("<h2")


@pytest.mark.parametrize(
    ("ends", "words"),
    [((0.5, 0.4, 0.6), "rose from"), ((0.05, 0.0, 0.09), "fell from"), ((0.25, 0.15, 0.35), "did not clearly move:")],
)
def test_a_run_moved_only_where_its_intervals_part(make_run, ends, words):
    rows = [metrics(0, **held_out(0.2, 0.1, 0.3)), metrics(2, **held_out(*ends))]
    assert words in page.head(shown([make_run(rows=rows)]))["headline"]


def test_a_run_that_trains_says_how_far_it_is(make_run):
    rows = [metrics(0, **held_out(0.2, 0.1, 0.3)), metrics(1)]
    assert page.head(shown([make_run(rows=rows, ended=False, steps=9)]))["headline"].startswith("Training: step 1 of 9")
    empty = make_run("empty", rows=[metrics(0)], ended=False)
    assert "no held-out number yet" in page.head(shown([empty]))["headline"]


def test_a_run_that_was_measured_once_does_not_say_it_twice(make_run):
    once = make_run(rows=[metrics(0, **held_out(0.2, 0.1, 0.3)), metrics(1)], ended=False, steps=9)
    assert page.head(shown([once]))["headline"] == "Training: step 1 of 9; held-out pass@1 was 0.200 at first."


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2.2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_text_can_be_read_on_every_ground():
    """WCAG's 4.5 to 1, light and dark."""
    css = page.asset("page.css")
    for block in re.findall(r"\{ (--ground[^}]*)\}", css):
        colours = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", block))
        for text in ("ink", "soft", "faint", "good", "bad", "open"):
            for ground in ("ground", "card", "wash", "chosen"):
                light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text} on {ground}"


def test_nothing_that_was_said_is_markup(make_run):
    said = [rollout(sample=n, text=text, prompt=text, answer=text, reason=text) for n, text in enumerate(HOSTILE)]
    text = html(shown([make_run(said=said)]))
    assert "alert(1)" not in text and "<img" not in text
    kept = data_of(text)["rollouts"]
    assert kept["text"][:4] == HOSTILE[:4] and len(kept["text"][4]) == LONGEST and kept["more"][4] == 50_000


def test_names_and_settings_are_escaped(make_run):
    text = html(shown([make_run("a<b>&", task="arithmetic:easy", model="<script>alert(1)</script>")]))
    assert "alert(1)</script>" not in text and "&lt;script&gt;" in text and "a&lt;b&gt;&amp;" in text


def test_the_page_asks_no_network_and_is_the_same_twice(make_run):
    what = shown([make_run()])
    text = html(what)
    assert text == html(what)
    shell = re.sub(r'<script type="application/octet-stream".*?</script>', "", text, flags=re.S)
    assert "http" not in shell.replace('http-equiv="Content-Security-Policy"', "")
    assert re.search(r"default-src &#39;none&#39;; script-src &#39;nonce-[0-9a-f]{32}&#39;;.*connect-src &#39;none&#39;", text)
    assert len(re.findall(r"<script nonce=", text)) == 1


def test_tokens_find_their_completion(make_run):
    said = [rollout(1, text="A:4"), rollout(3, text="A:5"), rollout(5, text="B")]
    numbers = {"logp": [-0.5] * 3, "logp_rollout": [-0.5] * 3, "entropy": 0.1, "ratio": 1.0, "advantage": 0.5, "gap": [0.0] * 3}
    traces = [{"step": 4, "prompt_id": "p", "sample": 0, "tokens": ["A", ":", "5"], **numbers}]
    kept = data_of(html(shown([make_run(said=said, traces=traces)])))["rollouts"]
    assert kept["trace"] == [-1, 0, -1]  # of the batch of step 3, in its second update
    assert kept["traces"][0]["tokens"] == ["A", ":", "5"] and kept["traces"][0]["entropy"] == 0.1


def test_answers_verdicts_and_reasons(make_run):
    said = [rollout(text="2+2\n4"), rollout(sample=1, correct=False, reward=0.0, text="A:5", finish="length")]
    said += [rollout(sample=2, reward=None, unscorable="the judge was silent"), rollout(sample=3, parts={"form": 0.5})]
    kept = data_of(html(shown([make_run(said=said)])))["rollouts"]
    assert kept["state"] == [0, 1, 2, 0] and kept["cut"] == [0, 1, 0, 0]
    assert kept["reason"][2] == "the judge was silent" and kept["parts"] == ["", "", "", "form 0.5"] and kept["reward"][2] is None


def test_what_the_grader_took_and_why_it_said_what_it_said(make_run):
    wrong = {"correct": False, "reward": 0.0}
    said = [
        rollout(said="4"),
        rollout(sample=1, said="8/2"),
        rollout(sample=2, text="A:5", said="5", **wrong),
        rollout(sample=3, text="I do not know", reason="no answer found", **wrong),
        rollout(sample=4, text="A:4", finish="length", reason="truncated", **wrong),
    ]
    kept = data_of(html(shown([make_run(said=said)])))["rollouts"]
    assert kept["said"] == ["4", "8/2", "5", "", ""]
    assert kept["reason"] == ["the gold answer", "equals the gold answer", "not the gold answer", "no answer found", "truncated"]


@pytest.mark.parametrize(
    ("task", "text", "taken"),
    [
        ("arithmetic:medium", "1+1=2\nA:4", "4"),
        ("sums:2digit", "It is 4.", "4"),
        ("jsonl:rows.jsonl?grader=answer", "\\boxed{4}", "4"),
        ("jsonl:rows.jsonl?grader=judge", "4", ""),
    ],
)
def test_older_runs_did_not_keep_what_was_taken(make_run, task, text, taken):
    kept = data_of(html(shown([make_run(said=[rollout(text=text)], task=task)])))["rollouts"]
    assert kept["said"] == [taken] and kept["reason"] == [""]


def test_whole_batches_are_kept_first_last_and_traced_ones_before_others():
    sizes = dict.fromkeys(range(1, 101), 10)
    assert chosen_steps(sizes, [], 1000) == set(sizes)
    few = chosen_steps(sizes, [40, 50], 60)
    assert {1, 100, 40, 50} <= few and len(few) == 6
    assert sorted(spread(range(7))) == list(range(7)) and list(spread(range(7)))[0] == 3


def test_a_page_holds_no_more_than_asked_for(make_run):
    said = [rollout(step, sample) for step in range(1, 11) for sample in range(5)]
    kept = rollouts([read_run(make_run(said=said))], 12)
    assert kept["total"] == 50 and kept["kept"] == 10 == len(kept["text"]) and set(kept["step"]) == {1, 10}
    assert rollouts([read_run(make_run("other", said=said))], 3)["kept"] == 3


def test_figures_are_figures_of_plotly(make_run):
    from plotly.graph_objects import Figure

    panel = {f"eval/skills:sort/pass@1{end}": value for end, value in (("", 0.8), ("_low", 0.7), ("_high", 0.9))}
    more = {
        "eval/pass@2": 0.6,
        "gap/max_abs_nats": 1e-5,
        "length/right_mean": 5.0,
        "length/wrong_mean": 6.0,
        "length/truncated_frac": 0.0,
    }
    rows = [metrics(step, **held_out(0.2, 0.1, 0.3), **more, **panel) for step in range(100)]
    drawn = figures([read_run(make_run("one", rows=rows)), read_run(make_run("two", rows=rows))])
    for figure in drawn:
        Figure(data=[{k: v for k, v in trace.items()} for trace in figure["data"]], layout=figure["layout"])
    titles = [figure["title"] for figure in drawn]
    assert titles[:3] == ["Held-out pass@1", "pass@k", "Other skills"] and "Cut off" not in titles
    assert next(figure for figure in drawn if figure["title"] == "Clip")["flat"] == "0 at every step"


def skill(name, mean, half=0.05):
    return {f"eval/{name}/pass@1": mean, f"eval/{name}/pass@1_low": mean - half, f"eval/{name}/pass@1_high": mean + half}


def test_the_table_of_skills_says_what_moved(make_run):
    rows = [
        metrics(0, **held_out(0.2, 0.1, 0.3), **skill("skills:sort", 0.8), **skill("skills:max", 0.5)),
        metrics(2, **held_out(0.5, 0.4, 0.6), **skill("skills:sort", 0.6), **skill("skills:max", 0.54), **skill("sampler", 0.5)),
    ]
    what = shown([make_run(rows=rows, task="arithmetic:medium")])
    told = data_of(html(what))["skills"]
    assert [(row["name"], row["trained"]) for row in told["rows"]] == [
        ("arithmetic:medium", True), ("skills:sort", False), ("skills:max", False)
    ]  # fmt: skip
    cells = [row["cells"][0] for row in told["rows"]]
    assert [cell["verdict"] for cell in cells] == ["rose", "fell", "within its interval"]
    assert (cells[1]["before"], cells[1]["after"], cells[1]["change"]) == ("0.800", "0.600", "−0.200 (−0.271 to −0.129)")
    assert "Other skills: skills:sort fell; skills:max stayed where it was, within intervals." in page.head(what)["notes"]


def test_without_other_skills_there_is_no_table(make_run):
    assert data_of(html(shown([make_run()])))["skills"] is None


def test_skills_of_an_arm_change_seed_by_seed(study_folder):
    for arm, moves in (("a", (0.1, 0.1)), ("b-c", (0.1, 0.3))):
        for seed, move in enumerate(moves):
            rows = [
                metrics(0, **held_out(0.2, 0.1, 0.3), **skill("sort", 0.5)),
                metrics(2, **held_out(0.3, 0.2, 0.4), **skill("sort", 0.5 + move)),
            ]
            (study_folder / arm / str(seed) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = skills_table(series_of(read_study(study_folder).runs))
    assert told["columns"] == ["a", "b · c"]
    one, other = told["rows"][1]["cells"]
    assert one["change"] == "+0.100 (+0.100 to +0.100)" and one["tone"] == "good"
    assert other["change"] == "+0.200 (−1.071 to +1.471)" and other["tone"] == "" and other["after"] == "0.700"


def test_seeds_that_miss_different_steps_are_still_averaged_step_by_step(study_folder):
    """No answer was wrong in some batch of some seed: the rest of the curve is not lost, and steps are not mixed up."""
    for seed in (0, 1):
        rows = [metrics(n) | ({} if n % 50 == 7 * seed else {"length/wrong_mean": float(n)}) for n in range(1, 201)]
        (study_folder / "a" / str(seed) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = next(f for f in figures([run for run in read_study(study_folder).runs if run.arm == "a"]) if f["title"] == "Length")
    line = next(trace for trace in drawn["data"] if trace.get("meta") != "band" and trace["line"]["dash"] == "dash")
    assert len(line["y"]) == 60 and line["text"][-1] == "step 200"
    assert all(abs(y - x / 100) < 4 for x, y in zip(line["x"], line["y"], strict=True))  # 100 tokens a step


# ── studies ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def study_folder(tmp_path, make_run):
    """Two arms of two seeds; one run failed."""
    place = tmp_path / "study"
    plan = {"study": {"name": "ladder", "question": "Is <b> better?", "predictions": [{"says": "b ends above a", "arm": "b"}]}}
    place.mkdir()
    (place / "study.json").write_text(json.dumps(plan | {"arms": {"a": {}, "b · c": {"train": {"lr": 0.1}}}, "runs": 4}))
    for arm, end in (("a", 0.3), ("b-c", 0.5)):
        for seed in (0, 1):
            rows = [metrics(0, **held_out(0.2, 0.1, 0.3)), metrics(2, **held_out(end + 0.01 * seed, 0, 1))]
            make_run(str(seed), rows=rows, root=place / arm, seed=seed, said=[rollout(text=f"{arm} {seed}")])
    return place


def test_a_study_that_runs_says_so(study_folder):
    study = read_study(study_folder)
    assert page.head(shown([study_folder]))["headline"] == "Still running: 4 of 4 runs have ended."
    assert [(each.says, each.verdict) for each in study.predictions] == [("b ends above a", "not judged yet")]
    (study_folder / "a" / "2.failed.txt").write_text("Traceback …\nout of memory\n")
    assert "Failed: a, seed 2: out of memory" in page.head(shown([study_folder]))["notes"]


def results(place, **told):
    arms = [
        {"arm": "a", "runs": 2, "collapsed": 0, "pass@1": [0.3, 0.2, 0.4], "difference": [0.0, 0.0, 0.0]},
        {"arm": "b · c", "runs": 2, "collapsed": 1, "pass@1": [0.5, None, None], "difference": [0.2, 0.1, 0.3]},
    ]
    (place / "results.json").write_text(json.dumps({"study": "ladder", "seeds": 2, "arms": arms} | told))


def test_verdicts_come_first_in_a_study(study_folder):
    results(study_folder)
    assert page.head(shown([study_folder]))["headline"] == "“b · c” ends above “a”."
    results(study_folder, predictions=[{"says": "b ends above a.", "verdict": "supported", "words": "+0.2 (0.1 to 0.3)"}])
    text = html(shown([study_folder]))
    assert re.search(r"<h1[^>]*>([^<]*)</h1>", text)[1] == "Supported: b ends above a."
    assert "Is &lt;b&gt; better?" in text and '<li class="good">' in text and "+0.2 (0.1 to 0.3)" in text
    few = [{"says": f"{each} one.", "verdict": each} for each in ("refuted", "too small to tell", "too small to tell")]
    results(study_folder, predictions=few)
    assert page.head(shown([study_folder]))["headline"] == "Refuted: refuted one. The other 2 are too small to tell."
    results(study_folder, predictions=[*few[:2], {"says": "y", "verdict": "points to it"}])
    assert page.head(shown([study_folder]))["headline"].endswith("Of the other 2: 1 with a hint for it, 1 too small to tell.")
    several = [{"says": "x", "verdict": each} for each in ("supported", "refuted", "too small to tell", "supported")]
    results(study_folder, predictions=several)
    assert page.head(shown([study_folder]))["headline"] == "Of 4 predictions: 2 supported, 1 refuted, 1 too small to tell."


def test_several_studies_get_a_page_each(study_folder, tmp_path, capsys):
    shutil.copytree(study_folder, tmp_path / "second")
    places = [str(study_folder), str(tmp_path / "second")]
    assert main(["report", *places]) == 0
    assert all((place / "report.html").stat().st_size > 1e6 for place in (study_folder, tmp_path / "second"))
    assert main(["report", *places, "--out", "x.html"]) == 2 and "a page each" in capsys.readouterr().err


def test_one_seed_is_no_evidence(study_folder):
    results(study_folder)
    told = json.loads((study_folder / "results.json").read_text())
    told["arms"][1]["difference"] = [0.2, None, None]
    (study_folder / "results.json").write_text(json.dumps(told))
    assert "One seed an arm" in page.head(shown([study_folder]))["headline"]


def test_arms_are_means_over_seeds_with_intervals(study_folder):
    told = payload(shown([study_folder]))
    assert [line["name"] for line in told["series"]] == ["a", "b · c"]
    lines = [trace for trace in told["figures"][0]["data"] if trace.get("meta") != "band"]
    assert lines[1]["y"] == pytest.approx([0.2, 0.505]) and lines[1]["x"] == [0.0, 200.0]
    bands = [trace for trace in told["figures"][0]["data"] if trace.get("meta") == "band"]
    assert [band["legendgroup"] for band in bands] == ["a", "b · c"]
    half = 12.7062 * 0.01 / 2  # t of one degree of freedom, and the standard error of two values .01 apart
    assert bands[1]["y"] == pytest.approx([0.2, 0.505 + half, 0.505 - half, 0.2], rel=1e-4)
    assert [run["seed"] for run in told["runs"]] == [0, 0] and told["rollouts"]["text"] == ["a 0", "b-c 0"]


def test_numbers_of_results_in_any_writing():
    assert triple([1, 0, 2]) == (1.0, 0.0, 2.0) and triple({"mean": 1, "low": 0, "high": 2}) == (1.0, 0.0, 2.0)
    assert triple(None) is None is triple([None, None, None]) and triple("abc") is None and triple(0.5)[0] == 0.5


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_no_run_is_refused(tmp_path, make_run, study_folder, monkeypatch):
    with pytest.raises(KeelError, match="does not exist"):
        report([str(tmp_path / "none")])
    with pytest.raises(KeelError, match="has no config.toml"):
        report([str(tmp_path)])
    with pytest.raises(KeelError, match="is a study, and 2 folders"):
        report([str(study_folder), str(make_run("x"))])
    with pytest.raises(KeelError, match="at least 1"):
        report([str(make_run("y"))], most=0)
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    with pytest.raises(KeelError, match=r"needs jinja2.*keel-rl\[report\]"):
        report([str(make_run("z"))])


def test_a_line_that_cannot_be_read_is_named(make_run, tmp_path):
    path = make_run(said=[rollout(), rollout(2)])
    (path / "rollouts.jsonl").write_bytes(b'{"step": 1, "completion": "\xff"}\n[1, 2]\n')
    with pytest.raises(KeelError, match=r"rollouts.jsonl has a line that is no JSON object"):
        report([str(path)])
    (path / "rollouts.jsonl").write_bytes(json.dumps(rollout()).encode() + b'\n{"step": 2, "comple')  # being written
    assert data_of(html(shown([path])))["rollouts"]["kept"] == 1
    (path / "config.toml").write_text("recipe = ")
    make_run("sound")
    with serving(tmp_path) as server:
        status, _, body = get(server, server.base)
        assert status == 200 and b"is not TOML" in body and b"sound" in body


def test_a_study_without_runs_is_a_page(tmp_path):
    (tmp_path / "study.json").write_text('{"study": {"name": "new"}, "arms": {"a": {}}, "runs": 3}')
    text = html(shown([tmp_path]))
    assert "Still running: 0 of 3 runs have ended." in text and data_of(text)["rollouts"] is None


def test_a_folder_of_another_version_is_still_shown(make_run):
    path = make_run()
    with open(path / "config.toml", "a") as file:
        file.write("\n[later]\nnew_setting = 3\n")
    (path / "manifest.json").unlink()
    assert "later.new_setting" in html(shown([path]))


def test_two_runs_have_names_that_differ(make_run, tmp_path):
    one, two = make_run("x/run"), make_run("y/run", seed=4)
    what = shown([one, two])
    assert [run.name for run in what.runs] == ["x/run", "y/run"]
    assert page.head(what)["headline"] == "Held-out pass@1 at the end: x/run 0.500, y/run 0.500."
    assert report([str(one), str(two)], out=str(tmp_path / "new" / "two.html")).stat().st_size > 1e6


# ── served ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def get(server, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_only_who_has_the_address_is_answered(make_run, tmp_path):
    make_run("<i>run")
    with serving(tmp_path) as server:
        assert urllib.parse.urlsplit(server.url).hostname == "127.0.0.1" and len(server.token) >= 30
        status, headers, body = get(server, server.base)
        assert status == 200 and b"&lt;i&gt;run" in body and b"<i>run" not in body
        assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
        assert get(server, "/")[0] == 404 == get(server, f"/{'x' * len(server.token)}/")[0]
        assert get(server, server.base, Host="evil.example:80")[0] == 403
        assert get(server, server.base, Host=f"localhost:{server.port}")[0] == 200
        assert get(server, f"{server.base}../../etc/passwd")[0] == 404 == get(server, f"{server.base}nothing/data")[0]


def test_a_page_follows_its_run(make_run):
    path = make_run(ended=False)
    with serving(path) as server:
        place = urllib.parse.urlsplit(server.url).path
        status, _, body = get(server, place)
        assert status == 200 and b"connect-src &#39;self&#39;" in body and b"blob-data" not in body
        status, headers, body = get(server, f"{place}data")
        assert status == 200 and headers["Content-Encoding"] == "gzip"
        assert json.loads(gzip.decompress(body))["head"]["headline"].startswith("Training: step 2")
        assert get(server, f"{place}data", **{"If-None-Match": headers["ETag"]})[0] == 304
        append_jsonl(path / "metrics.jsonl", [metrics(3)])
        server.shelf.held[next(iter(server.shelf.held))].rests_until = 0.0
        status, _, body = get(server, f"{place}data", **{"If-None-Match": headers["ETag"]})
        assert json.loads(gzip.decompress(body))["head"]["headline"].startswith("Training: step 3")
        assert gzip.decompress(get(server, f"{place}plotly")[2])[:4] == b"/**\n"


def test_a_port_that_is_taken_and_a_folder_that_is_not_there(make_run, tmp_path):
    with serving(make_run()) as server, pytest.raises(KeelError, match="cannot be served"), serving(tmp_path, port=server.port):
        pass
    with pytest.raises(KeelError, match="There is no folder"), serving(tmp_path / "none"):
        pass
