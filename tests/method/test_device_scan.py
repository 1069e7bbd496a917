"""The compiled loop over groups against the loop on the host: same visits, same numbers, nothing compiled twice."""

import types

import jax
import numpy as np
import pytest

import adapttoken_jax as at
from adapttoken_jax import device_scan, scan
from adapttoken_jax.encoding import encode_video
from adapttoken_jax.model.kernels import XLA
from adapttoken_jax.passes import run_prompts
from adapttoken_jax.pipeline import LOOPS, plan_run
from adapttoken_jax.prompt import build_prompt
from adapttoken_jax.selection import StopRule
from adapttoken_jax.selection.compiled_stopping import REASONS, Stop, device_rule, start_state
from tests import tiny
from tests.method.test_oracle import OPTIONS, random_video, settings

QUESTION = "What is in the video?"
VIDEO = random_video()  # 23 slots; 6 groups of up to 4 slots
QUESTIONS, CHOICES = [QUESTION, "Is it?", "And what of the video is the end?"], [OPTIONS, None, OPTIONS[:2]]


def both(model, questions=QUESTION, options=OPTIONS, method="adapttoken", **given):
    """The results of the device's loop and of the host's."""
    config = settings(model, **given)
    device, host = (
        at.answer(model, VIDEO, questions, options, config, method, trace=True, loop=loop)
        for loop in ("device", "host")
    )
    return zip(device, host, strict=True) if isinstance(device, list) else [(device, host)]


def assert_same(ours, theirs):
    assert ours.stop == theirs.stop and ours.answer == theirs.answer and ours.selected == theirs.selected
    assert [(g.visited, g.answer, g.budget) for g in ours.groups] == [
        (g.visited, g.answer, g.budget) for g in theirs.groups
    ]
    for key in ("group_entropy", "group_relevance", "group_first_logits"):
        # The same operations; fused otherwise in a loop, they may round otherwise: a logit as its largest terms do.
        scale = max(1.0, np.nanmax(np.abs(theirs.trace[key]))) if key == "group_first_logits" else 1.0
        np.testing.assert_allclose(ours.trace[key], theirs.trace[key], rtol=0, atol=1e-5 * scale, err_msg=key)


def test_all_groups_and_several_questions(model):
    for device, host in both(model, QUESTIONS, CHOICES, similarity="reference_layer", group_order="bit_reversed"):
        assert_same(device, host)
        assert device.stop.groups_visited == 6


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"stop_groups": 2}, "certain groups agree"),
        ({"stop_groups": 4, "stop_agreement": False}, "enough certain groups"),
        ({"stop_groups": 1, "stop_entropy": 0.0, "give_up_groups": 1}, "no group more certain for long"),
        ({"stop_groups": 2, "stop_rule": "rerun"}, "certain over the groups so far"),
        ({"stop_groups": 1, "stop_gain": 1e-6, "stop_agreement": False, "give_up_groups": 5}, None),
        ({"stop_entropy": 0.0}, "all groups visited"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [OPTIONS, None], ids=["options", "open"])
def test_every_reason_to_stop(model, given, reason, options):
    [(device, host)] = both(model, options=options, method="lite", **{"stop_entropy": 9.0, **given})
    assert_same(device, host)
    # Random open answers never agree; whether a random model gains by looking is its own affair.
    if reason and (options or reason != "certain groups agree"):
        assert device.stop.reason == reason


def test_each_question_stops_on_its_own_within_one_loop(model):
    visited = []
    for device, host in both(model, QUESTIONS, CHOICES, "lite", stop_groups=2, stop_entropy=9.0):
        assert_same(device, host)
        visited.append(device.stop.groups_visited)
    assert len(set(visited)) > 1


@pytest.fixture
def made(monkeypatch):
    """Every chunk that is put together."""
    chunks, chunk = [], device_scan._chunk
    monkeypatch.setattr(device_scan, "_chunk", lambda *args: chunks.append(chunk(*args)) or chunks[-1])
    return chunks


@pytest.mark.parametrize("method", ["adapttoken", "lite"])
def test_many_chunks_one_after_the_other_are_the_host_loop(model, monkeypatch, made, method):
    """As users get it: slots are encoded as the scan asks for them, and Lite has a chunk for every wave."""
    monkeypatch.setattr(device_scan, "_MOST_WAVES", 2)
    monkeypatch.setattr(device_scan, "_ROWS", 24)  # a group's tokens: none goes side by side
    config = settings(model, stop_groups=4, stop_entropy=4.0, stop_agreement=False)
    device, host = (
        at.answer(model, random_video(106), QUESTIONS, CHOICES, config, method, loop=loop) for loop in LOOPS
    )
    for ours, theirs in zip(device, host, strict=True):
        assert (ours.answer, ours.option, ours.stop, ours.selected) == (
            theirs.answer, theirs.option, theirs.stop, theirs.selected
        )  # fmt: skip
        entropies = [[g.entropy for g in result.groups if g.visited] for result in (ours, theirs)]
        np.testing.assert_allclose(*entropies, rtol=0, atol=1e-5)
    visited = max(result.stop.groups_visited for result in device)
    assert {len(each.real) for each in made} == {1 if method == "lite" else 2}
    assert len(made) == (visited if method == "lite" else 7) and (visited < 14) == (method == "lite")


@pytest.mark.parametrize(
    ("rows", "wave", "stride", "width"),
    [
        (256, 1, 0, 8), (24, 1, 0, 1), (256, 3, 0, 24),  # 32 tokens of 256: eight a device
        (256, 1, 1, 1), (256, 1, 4, 4), (64, 1, 4, 2), (256, 1, 6, 6), (160, 1, 6, 3), (256, 1, 16, 8),
        (256, 2, 4, 4), (256, 2, 1, 2), (256, 2, 3, 2), (256, 4, 4, 4), (24, 2, 8, 2),
    ],
)  # fmt: skip
def test_no_more_go_side_by_side_than_end_where_the_scan_may(monkeypatch, rows, wave, stride, width):
    monkeypatch.setattr(device_scan, "_ROWS", rows)
    assert device_scan.side_by_side(types.SimpleNamespace(wave=wave, mesh=None, kernel=XLA), 32, stride) == width


@pytest.mark.parametrize(("entropy", "visited"), [(9.0, [4]), (0.0, [4, 4, 4, 2])])
def test_groups_that_nothing_can_stop_between_go_side_by_side(model, monkeypatch, made, entropy, visited):
    monkeypatch.setattr(device_scan, "_ROWS", 1000)
    config = settings(model, stop_rule="rerun", stop_groups=4, stop_entropy=entropy)
    device, host = (at.answer(model, random_video(106), QUESTION, OPTIONS, config, "lite", loop=loop) for loop in LOOPS)
    assert (device.answer, device.stop, device.selected) == (host.answer, host.stop, host.selected)
    assert [len(each.groups) for each in made] == visited and {each.real.shape for each in made} == {(1, 4)}
    assert device.stop.groups_visited == sum(visited)


def test_with_a_deadline_no_group_is_put_together_before_its_wave(model, made):
    result = at.answer(model, random_video(106), QUESTION, OPTIONS, settings(model), deadline=0.0)
    assert result.stop.groups_visited == 1 and [each.real.shape for each in made] == [(1, 1)]


@pytest.mark.parametrize("loop", ["device", "host"])
def test_logits_that_are_not_finite_are_refused(tmp_path, loop):
    broken = at.load(tiny.write_checkpoint(tmp_path, tiny.SHAPES["base"]))
    broken.module.text.norm = broken.module.text.norm * np.float32("inf")
    with pytest.raises(at.UserError, match=r"^--dtype: the model's logits are not finite"):
        at.answer(broken, VIDEO, QUESTION, OPTIONS, settings(broken), loop=loop)


# Inside the loop


@pytest.fixture(scope="module")
def chunk(model):
    """One chunk with all six groups, and what a pass holds."""
    config = settings(model)
    video = encode_video(model, plan_run(model.config, VIDEO, config, "adapttoken").clip)
    prompts = [build_prompt(model.tokenizer, q, o) for q, o in zip(QUESTIONS, CHOICES, strict=True)]
    log = scan.ScanLog.start(video, prompts, config, None)
    [chunk] = device_scan._chunks(model, video, log.groups, prompts, config, width=1)
    return chunk, scan.group_spec(model, prompts, config)


def test_a_chunk_of_one_wave_holds_no_room_for_more(model):
    """As a scan gets them that may stop early and decodes on demand."""
    config = settings(model)
    video = encode_video(model, plan_run(model.config, VIDEO, config, "adapttoken").clip)
    prompts = [build_prompt(model.tokenizer, QUESTIONS[0], CHOICES[0])]
    groups = scan.ScanLog.start(video, prompts, config, None).groups
    chunks = list(device_scan._chunks(model, video, groups, prompts, config, width=1, waves=1))
    assert [chunk.real.shape for chunk in chunks] == [(1, 1)] * len(groups)
    assert {chunk.batch.visual.shape[:2] for chunk in chunks} == {(1, 1)}


def loop(model, chunk, rule, first=0, last=None, state=None):
    held, spec = chunk
    state = state or start_state(len(QUESTIONS), held.batch.option_ids.shape[1])
    return device_scan.run_waves(
        model.module.text, held.batch, held.real, np.asarray([first, held.waves if last is None else last], np.int32),
        device_rule(rule, [None] * len(QUESTIONS)), state, spec, 0.1,
    )  # fmt: skip


def test_the_device_itself_ends_the_loop(model, chunk):
    ended = loop(model, chunk, StopRule("groups", 3, 9.0, False))
    reasons = [REASONS[Stop(int(stop))] for stop in ended.stopping.stop]
    assert int(ended.wave) == 3 and reasons == ["enough certain groups"] * 3
    assert np.asarray(ended.said["relevance"][:3]).any() and not np.asarray(ended.said["relevance"][3:]).any()
    whole = loop(model, chunk, None)
    assert int(whole.wave) == 6 and (np.asarray(whole.stopping.visited) == 6).all()


def test_a_loop_in_parts_is_the_loop_in_one(model, chunk):
    rule = StopRule("groups", 5, 9.0, False)
    whole, part = loop(model, chunk, rule), loop(model, chunk, rule, last=2)
    rest = loop(model, chunk, rule, 2, state=part.stopping)
    for ours, theirs in zip(rest.stopping, whole.stopping, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for name, value in whole.said.items():
        np.testing.assert_array_equal(np.concatenate([part.said[name][:2], rest.said[name][2:]]), value)


def test_a_visit_keeps_nothing_but_its_own(model):
    config = settings(model, similarity="reference_layer")
    video = encode_video(model, plan_run(model.config, VIDEO, config, "adapttoken").clip)
    prompts = [build_prompt(model.tokenizer, *each) for each in zip(QUESTIONS, CHOICES, strict=True)]
    for visits in (each.visits for each in device_scan.visit_groups(model, video, prompts, config)):
        assert len(visits) == 6
        for visit in visits:
            assert all(each.base is None for each in (visit.relevance, visit.hidden, visit.reply.option_logits))
            assert visit.reply.first_logits is None  # of a vocabulary of 152 064, 0.6 MB for a group and a question


def test_only_the_last_position_reaches_the_head(model, chunk):
    held, spec = chunk
    batch = device_scan._wave_of(held.batch, 0)
    jaxpr = jax.make_jaxpr(lambda text: run_prompts(text, batch, spec))(model.module.text)
    vocab = model.config.text.vocab
    head = {(vocab, model.config.text.width), (model.config.text.width, vocab)}
    logits = [result for *factors, result in _shapes(jaxpr.jaxpr, "dot_general") if head & set(factors)]
    assert logits and all(np.prod(shape) == len(QUESTIONS) * vocab for shape in logits)


def _shapes(jaxpr, primitive):
    """Shapes of what a primitive takes and gives, in a jaxpr and in all that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            yield [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner, primitive)


@pytest.fixture
def lowered():
    """A list that gets an entry for whatever is lowered from now on."""
    found = []
    listen = lambda event, _, **__: found.append(event) if "jaxpr_to_mlir" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("mesh", [None, "data=8,model=1"])
def test_no_video_of_the_same_frame_size_compiles_again(tmp_path, lowered, mesh):
    """Whether it is shorter than what one call of the vision tower takes, or longer, and however the devices share."""
    model = at.load(tiny.write_checkpoint(tmp_path, tiny.SHAPES["tied"]), mesh=mesh)
    for frames, slots in ((140, 70), (42, 21), (332, 166), (60, 30)):
        for method in ("adapttoken", "lite"):
            config = settings(model, stop_groups=2, stop_entropy=9.0)
            result = at.answer(model, random_video(frames), QUESTION, OPTIONS, config, method)
            assert result.video.slots == slots and result.stop.early == (method == "lite")
        if frames == 140:
            first = len(lowered)
    assert len(lowered) == first > 0


def test_scans_that_end_sooner_or_later_share_the_final_pass(tmp_path, lowered):
    """Two groups of 24 tokens and four need rooms of 64 and 128; the budget's is the latter."""
    model, counts = at.load(tiny.write_checkpoint(tmp_path, tiny.SHAPES["tied"])), []
    for groups in (4, 2):
        config = settings(model, budget=100, stop_groups=groups, stop_entropy=9.0, stop_agreement=False)
        result = at.answer(model, random_video(140), QUESTION, OPTIONS, config, "lite")
        assert len(result.selected.slots) == groups * 24
        counts.append(len(lowered))
    assert counts[0] == counts[1] > 0


def test_long_questions_share_programs(tmp_path, lowered):
    """As subtitles make them: no two are equally long, and each length of its own would compile two programs."""
    model = at.load(tiny.write_checkpoint(tmp_path, tiny.SHAPES["tied"]))
    shorter, longer = QUESTION * 60, QUESTION * 62
    assert [len(build_prompt(model.tokenizer, each, OPTIONS).suffix_ids) for each in (shorter, longer)] == [706, 726]
    at.answer(model, random_video(42), shorter, OPTIONS, settings(model))
    first = len(lowered)
    at.answer(model, random_video(42), longer, OPTIONS, settings(model))
    assert len(lowered) == first > 0


def test_numbers_of_questions_share_programs(tmp_path, lowered):
    """Benchmarks ask some videos five questions and others thirty; each number of its own would compile a program."""
    model = at.load(tiny.write_checkpoint(tmp_path, tiny.SHAPES["tied"]))
    questions, choices = [*QUESTIONS, "Why?", "Who is it?", "Where?"], [*CHOICES, OPTIONS, None, OPTIONS]
    six = at.answer(model, VIDEO, questions, choices, settings(model))
    first = len(lowered)
    five = at.answer(model, VIDEO, questions[:5], choices[:5], settings(model))
    assert len(lowered) == first > 0
    assert len(five) == 5
    for ours, theirs in zip(five, six, strict=False):
        assert (ours.answer, ours.selected) == (theirs.answer, theirs.selected)
        entropies = [[group.entropy for group in result.groups] for result in (ours, theirs)]
        np.testing.assert_allclose(*entropies, rtol=0, atol=1e-6)


def test_rows_without_a_question_never_keep_the_loop_going():
    log = scan.ScanLog([], None, [[]] * 5, ["", "deadline reached", "", "", ""])
    assert device_scan._ended(log).tolist() == [Stop.GOING, Stop.ENDED, *[Stop.GOING] * 3, Stop.ENDED]
