"""What the end-to-end tests compare: requests by prompt, and when two clusters' answers are equal."""

from __future__ import annotations

from penstock.protocol.messages import SampledToken
from penstock.protocol.sampling import SamplingParams
from penstock.router.interface import GenerateRequest
from penstock.testing.inprocess import Result
from penstock.testing.parity import LOGPROB_TOLERANCE


def requests_of(prompts: list[list[int]], params: SamplingParams) -> list[GenerateRequest]:
    return [GenerateRequest(f"r{i}", prompt, params, 300.0) for i, prompt in enumerate(prompts)]


def assert_equal(found: dict[str, Result], expected: dict[str, Result], *, same_alternatives: bool = False) -> None:
    """Equal tokens and finish reasons, and logprobs within LOGPROB_TOLERANCE, for every choice of each request.

    `same_alternatives`: the most likely tokens too. Between batches of other shapes they may differ where two are
    equally likely; their values may not.
    """
    for request_id, result in expected.items():
        assert result.error is None
        assert found[request_id].error is None
        for ours, theirs in zip(found[request_id].answers, result.answers, strict=True):
            assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
            for a, b in zip(ours.tokens, theirs.tokens, strict=True):
                _assert_same_logprobs(a, b, same_alternatives)


def _assert_same_logprobs(a: SampledToken, b: SampledToken, same_alternatives: bool) -> None:
    assert a.logprob is not None
    assert b.logprob is not None
    assert abs(a.logprob.logprob - b.logprob.logprob) < LOGPROB_TOLERANCE
    if same_alternatives:
        assert [token_id for token_id, _ in a.logprob.top] == [token_id for token_id, _ in b.logprob.top]
    for (_, ours), (_, theirs) in zip(a.logprob.top, b.logprob.top, strict=True):
        assert abs(ours - theirs) < LOGPROB_TOLERANCE
