"""Prompts fit the window, shared parts are shared, and the same seed gives the same words."""

from __future__ import annotations

import pytest

from penstock.loadtest.lengths import Lengths
from penstock.loadtest.plan import Conversation, Filling, Turn, Window, clip_parts, part_tokens
from penstock.loadtest.rendering import WORDS, Renderer
from penstock.loadtest.workloads import ChatShape, chats, random_prompts, shared_prefixes


def single(num_prompt: int, num_output: int) -> Conversation:
    return Conversation((Turn((Filling((0, 1), num_prompt),), num_output),))


def test_what_fits_the_window_is_left_as_it_is() -> None:
    one = single(90, 10)
    fitted = Window(100).fit([one], "w")
    assert fitted.conversations == (one,)
    assert (fitted.num_clipped, fitted.num_left_out) == (0, 0)


def test_too_long_prompt_is_clipped_to_the_window_and_counted() -> None:
    fitted = Window(100).fit([single(500, 10)], "w")
    (turn,) = fitted.conversations[0].turns
    assert (turn.num_prompt_tokens, turn.num_output_tokens) == (90, 10)
    assert fitted.num_clipped == 1


def test_answer_longer_than_the_window_leaves_room_for_a_prompt() -> None:
    (turn,) = Window(100).fit([single(500, 500)], "w").conversations[0].turns
    assert (turn.num_prompt_tokens, turn.num_output_tokens) == (50, 50)


def test_too_long_prompt_is_left_out_where_asked() -> None:
    fitted = Window(100, is_clipping=False).fit([single(500, 10), single(5, 5)], "w")
    assert len(fitted.conversations) == 1
    assert (fitted.num_clipped, fitted.num_left_out) == (0, 1)


def test_reserve_is_kept_free() -> None:
    (turn,) = Window(100, reserve=20).fit([single(100, 10)], "w").conversations[0].turns
    assert turn.num_prompt_tokens == 70


def test_conversation_too_long_loses_history_then_its_last_turns() -> None:
    turns = tuple(Turn((Filling((0, n), 30),), 10) for n in range(4))
    one = Conversation(turns, history=((Filling((1,), 50), Filling((2,), 50)),))
    assert Window(10_000).fit([one], "w").conversations[0] is one
    shorter = Window(170).fit([one], "w").conversations[0]
    assert shorter.history == ()
    assert shorter.turns == turns
    assert Window(100).fit([one], "w").conversations[0].turns == turns[:2]
    assert Window(30).fit([one], "w").conversations == ()


def test_no_known_window_fits_everything() -> None:
    assert Window(None).fit([single(10**6, 10**6)], "w").num_clipped == 0


@pytest.mark.parametrize("room", [1, 7, 10, 25, 100])
def test_clipped_parts_are_never_longer_than_the_room(room: int) -> None:
    parts = (Filling((1,), 10), "some text of about a dozen tokens", Filling((2,), 10))
    clipped = clip_parts(parts, room)
    assert sum(part_tokens(part) for part in clipped) <= room
    assert clip_parts(parts, 1000) == parts


def test_equal_fillings_render_equal_ids_and_other_salts_others() -> None:
    one, other = Filling((1, 2), 100), Filling((1, 3), 100)
    renderer = Renderer()
    assert renderer.ids([one]) == Renderer().ids([one])
    assert renderer.ids([one, other])[:100] == renderer.ids([one])
    assert renderer.ids([one]) != renderer.ids([other])
    assert renderer.ids([one]) != Renderer(salt=1).ids([one])
    assert all(1000 <= token < 30000 for token in renderer.ids([one]))


def test_shorter_filling_of_a_seed_is_a_prefix_of_the_longer() -> None:
    assert Renderer().ids([Filling((4,), 50)]) == Renderer().ids([Filling((4,), 80)])[:50]


def test_text_has_as_many_words_as_tokens_need() -> None:
    filling = Filling((1,), 100)
    assert len(Renderer().text([filling]).split()) == 100
    assert len(Renderer(tokens_per_word=1.25, overhead_tokens=20).text([filling]).split()) == 64
    assert set(Renderer().text([filling]).split()) <= set(WORDS)


def test_salt_stands_before_prescribed_text_and_only_at_its_head() -> None:
    renderer = Renderer(salt=0xAB)
    assert renderer.text(["Why?"]) == "[000000ab] Why?"
    assert renderer.text(["Why?"], is_first=False) == "Why?"
    assert Renderer().text(["Why?"]) == "Why?"
    assert Renderer(salt=3, is_salting_text=False).text(["Why?"]) == "Why?"


def test_text_cannot_be_sent_as_ids() -> None:
    with pytest.raises(TypeError, match="cannot be sent as token ids"):
        Renderer().ids(["text"])


@pytest.mark.parametrize("text", ["0", "5-2", "x", "1-", "99999999999", ""])
def test_bad_lengths_are_refused_with_their_text(text: str) -> None:
    with pytest.raises(ValueError, match="got"):
        Lengths.parse(text)


def test_random_prompts_have_lengths_in_range_and_nothing_in_common() -> None:
    found = random_prompts(200, Lengths.parse("10-20"), Lengths.parse("5"), seed=1)
    sizes = {one.turns[0].num_prompt_tokens for one in found}
    assert sizes == set(range(10, 21))
    assert {one.turns[0].num_output_tokens for one in found} == {5}
    assert len({tuple(Renderer().ids(one.turns[0].parts)[:5]) for one in found}) == 200
    assert found == random_prompts(200, Lengths(10, 20), Lengths(5, 5), seed=1)
    assert found != random_prompts(200, Lengths(10, 20), Lengths(5, 5), seed=2)


def test_shared_prefixes_are_shared_by_group_and_the_rest_is_not() -> None:
    found = shared_prefixes(50, 3, 40, Lengths(10, 10), Lengths(5, 5), seed=1)
    heads = {tuple(Renderer().ids(one.turns[0].parts)[:40]): one.category for one in found}
    assert len(heads) == 3
    assert len({tuple(Renderer().ids(one.turns[0].parts)[40:]) for one in found}) == 50


def test_aged_chats_are_met_in_the_middle_and_fresh_ones_at_their_first_turn() -> None:
    shape = ChatShape(Lengths(4, 4), Lengths(10, 10), Lengths(5, 5))
    aged = chats(100, shape, seed=1)
    assert all(len(one.history) + len(one.turns) == 4 for one in aged)
    assert {len(one.history) for one in aged} == {0, 1, 2, 3}
    fresh = chats(10, ChatShape(Lengths(4, 4), Lengths(10, 10), Lengths(5, 5), is_aged=False), seed=1)
    assert all(not one.history and len(one.turns) == 4 for one in fresh)
