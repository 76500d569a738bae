from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock.core.errors import Unavailable


def test_completion_plain_text_has_openai_shape(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            answer = await served.completion(max_tokens=9)
        (choice,) = answer["choices"]
        assert choice == {"index": 0, "text": "The quick", "logprobs": None, "finish_reason": "length"}
        assert answer["object"] == "text_completion"
        assert answer["created"] == 1_700_000_000
        assert answer["usage"] == {
            "prompt_tokens": 2,
            "completion_tokens": 9,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
                "resumed": 0,
            },
        }

    asyncio.run(run())


def test_completion_without_max_tokens_has_sixteen(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            assert (await served.completion())["usage"]["completion_tokens"] == 16

    asyncio.run(run())


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
def test_completion_every_form_of_prompt_reaches_router(serve: Any, prompt: Any, ids: list[list[int]]) -> None:
    async def run() -> None:
        async with serve() as served:
            answer = await served.completion(prompt=prompt, max_tokens=3)
            assert [stream.request.prompt_ids for stream in served.router.streams] == ids
            assert [choice["text"] for choice in answer["choices"]] == ["The"] * len(ids)
            assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))

    asyncio.run(run())


def test_completion_index_runs_over_prompts_times_n(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            answer = await served.completion(prompt=["a", "b"], n=3, max_tokens=2)
            assert [choice["index"] for choice in answer["choices"]] == list(range(6))
            assert answer["usage"]["completion_tokens"] == 12
            assert len(answer["penstock"]["prompts"]) == 2
            seeds = [stream.request.params.seed for stream in served.router.streams]
            assert len(set(seeds)) == 2

    asyncio.run(run())


def test_completion_seed_given_is_the_same_for_each_prompt(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            await served.completion(prompt=["a", "b"], seed=-5)
            seeds = [stream.request.params.seed for stream in served.router.streams]
            assert seeds == [(-5) & (2**63 - 1)] * 2

    asyncio.run(run())


def test_completion_every_sampling_field_reaches_router(serve: Any) -> None:
    wanted = {
        "max_tokens": 7,
        "min_tokens": 2,
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1.5,
        "frequency_penalty": 1.5,
        "seed": 11,
        "ignore_eos": True,
    }

    async def run() -> None:
        async with serve() as served:
            await served.completion(
                **wanted, logit_bias={"97": -100, "5": 3}, stop_token_ids=[3, 3, 4], logprobs=2, top=1
            )
            params = served.router.only.request.params
            assert {name: getattr(params, name) for name in wanted} == wanted
            assert params.logit_bias == {97: -100.0, 5: 3.0}
            assert params.stop_token_ids == (3, 4)
            assert params.logprobs == 2

    asyncio.run(run())


def test_completion_top_k_minus_one_is_off(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            await served.completion(top_k=-1)
            assert served.router.only.request.params.top_k == 0

    asyncio.run(run())


def test_completion_harmless_and_unknown_fields_are_ignored(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            await served.completion(
                user="u",
                best_of=1,
                echo=False,
                suffix=None,
                store=True,
                metadata={"a": "b"},
                service_tier="auto",
                zebra=[1],
            )

    asyncio.run(run())


def test_completion_nulls_mean_defaults(serve: Any) -> None:
    fields = ["max_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "stream_options", "logprobs"]
    fields += ["logit_bias", "top_k", "min_p", "ignore_eos"]

    async def run() -> None:
        async with serve() as served:
            await served.completion(**dict.fromkeys(fields))
            assert served.router.only.request.params.temperature == 1.0

    asyncio.run(run())


def test_completion_stop_string_cuts_text_and_usage_and_cancels(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            answer = await served.completion(max_tokens=40, stop=["brown"])
            (choice,) = answer["choices"]
            assert choice["text"] == "The quick "
            assert choice["finish_reason"] == "stop"
            assert answer["usage"]["completion_tokens"] == len("The quick brown")
            assert served.router.only.cancelled
            assert served.router.only.sent == len("The quick brown")

    asyncio.run(run())


def test_completion_stop_string_can_stay_in_text(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            answer = await served.completion(max_tokens=40, stop="brown", include_stop_str_in_output=True)
            assert answer["choices"][0]["text"] == "The quick brown"

    asyncio.run(run())


def test_completion_stop_in_one_choice_lets_the_others_go_on(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            served.router.script = lambda request, choice: list((b"abSTOPcd", b"abcdefgh")[choice])
            answer = await served.completion(max_tokens=8, n=2, stop="STOP")
            assert [choice["text"] for choice in answer["choices"]] == ["ab", "abcdefgh"]
            assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length"]
            assert served.router.only.cancelled_choices == {0}

    asyncio.run(run())


def test_completion_eos_finishes_with_stop(serve: Any) -> None:
    async def run() -> None:
        async with serve(reply="bye", ends=True) as served:
            answer = await served.completion()
            assert answer["choices"][0]["text"] == "bye"
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["usage"]["completion_tokens"] == 3

    asyncio.run(run())


def test_completion_stop_token_is_shown_on_request_only(serve: Any) -> None:
    async def run() -> None:
        async with serve(reply="abc") as served:
            hidden = await served.completion(stop_token_ids=[99])
            shown = await served.completion(stop_token_ids=[99], include_stop_str_in_output=True)
        assert [answer["choices"][0]["text"] for answer in (hidden, shown)] == ["ab", "abc"]

    asyncio.run(run())


def test_completion_special_tokens_are_text_on_request_only(serve: Any) -> None:
    async def run() -> None:
        async with serve(reply="ab", ends=True) as served:
            hidden = await served.completion(ignore_eos=True)
            shown = await served.completion(ignore_eos=True, skip_special_tokens=False)
        assert [answer["choices"][0]["text"] for answer in (hidden, shown)] == ["ab", "ab<|eos|>"]

    asyncio.run(run())


def test_completion_logprobs_align_with_text(serve: Any) -> None:
    async def run() -> None:
        async with serve(reply="aé€") as served:
            answer = await served.completion(max_tokens=6, logprobs=1)
        logprobs = answer["choices"][0]["logprobs"]
        assert answer["choices"][0]["text"] == "aé€"
        assert logprobs["tokens"] == ["a", *(f"bytes:\\x{b:02x}" for b in "é€".encode())]
        assert logprobs["text_offset"] == [0, 1, 1, 2, 2, 2]
        assert logprobs["token_logprobs"] == [-0.5] * 6
        assert all(top[token] == -0.5 for top, token in zip(logprobs["top_logprobs"], logprobs["tokens"], strict=True))

    asyncio.run(run())


def test_completion_logprobs_end_before_the_stop_string(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            answer = await served.completion(max_tokens=40, stop="brown", logprobs=0)
        choice = answer["choices"][0]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"] == "The quick "

    asyncio.run(run())


def test_completion_prompt_and_output_fill_window_exactly(serve: Any) -> None:
    async def run() -> None:
        async with serve(config={"max_model_len": 12}) as served:
            assert (await served.completion(prompt="x" * 10, max_tokens=2))["usage"]["total_tokens"] == 12
            status, body = await served.post("/v1/completions", {"model": "toy", "prompt": "x" * 10, "max_tokens": 3})
            assert status == 400
            assert body["error"]["code"] == "context_length_exceeded"
            assert body["error"]["param"] == "max_tokens"
            status, body = await served.post("/v1/completions", {"model": "toy", "prompt": "x" * 12})
            assert body["error"]["param"] == "prompt"

    asyncio.run(run())


@pytest.mark.parametrize("prompt", [[1] * 4097, ["x"] * 65, [[1]] * 65, [[1] * 4097], "x" * (4096 * 128 + 1)])
def test_completion_prompt_beyond_any_use_is_refused_unread(serve: Any, prompt: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            status, body = await served.post("/v1/completions", {"model": "toy", "prompt": prompt})
            assert status == 400
            assert body["error"]["param"] == "prompt"

    asyncio.run(run())


def test_completion_vendor_phases_add_up_to_ttft(serve: Any) -> None:
    async def run() -> None:
        async with serve(attempts=2) as served:
            report = (await served.completion())["penstock"]
        parts = ("gateway_ms", "route_ms", "queue_ms", "prefill_ms", "transfer_ms", "other_ms")
        # The fake router claims 6 ms for the worker, whatever time has really passed.
        assert sum(report[part] for part in parts) == pytest.approx(
            max(report["ttft_ms"], 6 + report["gateway_ms"]), abs=0.01
        )
        assert report["attempts"] == 2
        assert report["resumed"] == 0, "another attempt before the first token resumes nothing"

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_counts_how_often_the_answer_was_resumed(serve: Any, path: str) -> None:
    async def run() -> None:
        async with serve(attempts=4, resumed=2) as served:
            whole = await (served.chat() if "chat" in path else served.completion())
            *_, last, _ = await served.events(path, stream_options={"include_usage": True})
            async with served.http.get(served.url + "/metrics") as response:
                metrics = (await response.text()).splitlines()
        for answer in (whole, last):
            assert answer["usage"]["completion_tokens_details"]["resumed"] == 2
            assert answer["penstock"]["resumed"] == 2
        assert "penstock_resumed_streams_total 4.0" in metrics

    asyncio.run(run())


def test_usage_of_several_prompts_adds_their_resumptions(serve: Any) -> None:
    async def run() -> None:
        async with serve(attempts=2, resumed=1) as served:
            answer = await served.completion(prompt=["a", "b", "c"], max_tokens=2)
        assert answer["usage"]["completion_tokens_details"]["resumed"] == 3
        assert [report["resumed"] for report in answer["penstock"]["prompts"]] == [1, 1, 1]

    asyncio.run(run())


def test_request_that_never_found_a_worker_counts_no_retry(serve: Any) -> None:
    async def run() -> None:
        async with serve(attempts=0, fail_before=0, error=Unavailable("nobody is there")) as served:
            status, body = await served.post("/v1/completions", {"model": "toy", "prompt": "x"})
            async with served.http.get(served.url + "/metrics") as response:
                metrics = (await response.text()).splitlines()
        assert status == 503, body
        assert "penstock_request_retries_total 0.0" in metrics

    asyncio.run(run())
