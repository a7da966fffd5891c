"""Prompts in order, groups by id, dynamic sampling by accuracy, and clear ends."""

import pytest
import torch

from keel.errors import KeelError
from keel.training.buffer import CurriculumStream, PromptStream, collect, score_group
from keel.types import Completion, Prompt, Score


def prompts(count):
    return [Prompt(id=f"p{i}", text=str(i), answer=str(i)) for i in range(count)]


def say(prompt, text, sample, finish="stop"):
    one = torch.ones(1, dtype=torch.long)
    return Completion(
        prompt_id=prompt.id, sample=sample, token_ids=one, logp_rollout=-torch.ones(1), finish=finish, text=text, versions=one * 0,
        sampled=one.bool(), error="broken" if finish == "error" else "",
    )  # fmt: skip


def engine(text_of):
    """generate() that answers every prompt four times, shuffled, so that only ids can pair them."""

    def generate(asked):
        out = [say(prompt, text_of(prompt, sample), sample) for sample in range(4) for prompt in asked]
        return list(asked), out[::-1]

    return generate


def exact(prompt, text, finish):
    return Score(float(text == prompt.answer), correct=text == prompt.answer)


def test_every_prompt_once_an_epoch_and_another_order_in_the_next():
    stream = PromptStream(prompts(7), seed=3)
    first, second = stream.take(7), stream.take(7)
    assert sorted(p.id for p in first) == [f"p{i}" for i in range(7)]
    assert sorted(p.id for p in second) == [f"p{i}@1" for i in range(7)]
    assert [p.text for p in first] != [p.text for p in second]


@pytest.mark.parametrize("taken", [0, 3, 6, 7, 8, 14])
def test_a_stream_goes_on_where_it_was_left(taken):
    whole = PromptStream(prompts(7), seed=3)
    everything = [p.id for p in whole.take(21)]
    rest = PromptStream(prompts(7), seed=3, taken=taken)
    assert [p.id for p in rest.take(21 - taken)] == everything[taken:]


def test_the_echo_task_pairs_every_completion_with_its_own_prompt():
    collected = collect(engine(lambda prompt, sample: prompt.text), PromptStream(prompts(20), 0), exact, prompts=20)
    assert all(score.correct for group in collected.groups for score in group.scores)


def test_dynamic_sampling_keeps_live_groups_and_fills_the_batch():
    def text_of(prompt, sample):  # every third prompt has right and wrong answers
        return prompt.text if int(prompt.text) % 3 or sample % 2 else "wrong"

    stream = PromptStream(prompts(60), 0)
    collected = collect(engine(text_of), stream, exact, prompts=8, live_only=True)
    assert len(collected.groups) == 8
    assert all(group.live for group in collected.groups)
    assert collected.dropped == stream.taken - 8


def test_dynamic_sampling_judges_accuracy_and_not_the_shaped_reward():
    def shaped(prompt, text, finish):  # all right, but the reward differs
        return Score(float(text[-1]), correct=True)

    with pytest.raises(KeelError, match="found 0 live groups"):
        collect(engine(lambda p, s: f"{p.text} {s}"), PromptStream(prompts(9), 0), shaped, prompts=4, live_only=True, max_rounds=3)


def test_it_gives_up_with_the_numbers():
    with pytest.raises(KeelError, match=r"found 0 live groups .* among 12 prompts, and 4 are needed"):
        collect(engine(lambda p, s: p.text), PromptStream(prompts(9), 0), exact, prompts=4, live_only=True, max_rounds=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_unscorable_and_counted(value):
    group = score_group(prompts(1)[0], [say(prompts(1)[0], "x", 0)], lambda *_: Score(value))
    assert not group.scores[0].scorable
    assert "not a finite number" in group.scores[0].reason


def test_an_engine_failure_is_unscorable_with_its_reason():
    asked = prompts(1)[0]
    group = score_group(asked, [say(asked, "", 0, finish="error"), say(asked, "0", 1)], exact)
    assert group.scores[0].reason == "engine: broken"
    assert group.scores[1].correct


def test_when_nothing_can_be_scored_it_says_why():
    with pytest.raises(KeelError, match="None of 16 completions could be scored.*verifier died"):
        collect(engine(lambda p, s: ""), PromptStream(prompts(4), 0), lambda *_: Score(None, reason="verifier died"), prompts=4)


def test_no_prompts_is_refused():
    with pytest.raises(KeelError, match="no training prompts"):
        PromptStream([], 0)


# ---- a curriculum ----------------------------------------------------------------------------------------------------


def rounds(stream, count, rightness):
    """How often each prompt is asked in so many rounds of 4, when prompt i is right in `rightness(i)` of 4 samples."""
    asked = []
    generate = engine(lambda prompt, sample: prompt.answer if sample < rightness(int(prompt.answer)) else "no")
    for _ in range(count):
        collected = collect(generate, stream, exact, prompts=4)
        asked += [int(group.prompt.answer) for group in collected.groups]
    return asked


def test_a_curriculum_asks_what_can_be_learned_from():
    stream = CurriculumStream(prompts(30), seed=1)
    asked = rounds(stream, 400, lambda i: (0, 2, 4)[i % 3])[600:]
    share = [sum(i % 3 == kind for i in asked) / len(asked) for kind in range(3)]
    assert share[1] > 1.5 * max(share[0], share[2]) and min(share) > 0.08  # none is given up
    assert len({stream.take(4)[0].id for _ in range(20)}) == 20  # each time another instance


def test_a_round_asks_no_prompt_twice_and_the_same_seed_asks_the_same():
    first, second = (rounds(CurriculumStream(prompts(9), seed=2), 20, lambda i: i % 5) for _ in range(2))
    assert first == second != rounds(CurriculumStream(prompts(9), seed=3), 20, lambda i: i % 5)
    assert all(len(set(first[i : i + 4])) == 4 for i in range(0, 80, 4))


def test_a_curriculum_goes_on_from_its_state():
    whole, cut = CurriculumStream(prompts(30), seed=1), CurriculumStream(prompts(30), seed=1)
    expected = rounds(whole, 40, lambda i: i % 5)
    half = rounds(cut, 20, lambda i: i % 5)
    later = CurriculumStream(prompts(30), seed=1, taken=cut.taken)
    later.restore(cut.state())
    assert half + rounds(later, 20, lambda i: i % 5) == expected


def test_unscorable_completions_say_nothing_of_a_prompt():
    stream = CurriculumStream(prompts(4), seed=0)
    asked = stream.take(2)
    stream.learn([score_group(p, [say(p, "x", s) for s in range(2)], lambda *a: Score(None, reason="?")) for p in asked])
    assert stream.record.tries.sum() == 0


def test_plain_streams_have_no_state():
    assert PromptStream(prompts(3), 0).state() == {}
