"""A job becomes an HTTP answer: one body, or a stream of chunks."""

from __future__ import annotations

import logging

import msgspec
from aiohttp import web

from ..core.errors import InternalError, ServeError
from .call import REQUEST_ID_HEADER, current_call
from .choice import ChoiceDelta
from .context import Gateway
from .errors import error_body
from .generation import Generation
from .responses import FinishedChoice, Shape, with_usage
from .stream import DONE, SseWriter

logger = logging.getLogger(__name__)


async def answer(request: web.Request, gateway: Gateway, generation: Generation, shape: Shape) -> web.StreamResponse:
    if generation.job.options.is_stream:
        return await _answer_stream(request, gateway, generation, shape)
    return await _answer_whole(generation, shape)


async def _answer_whole(generation: Generation, shape: Shape) -> web.Response:
    choices = [FinishedChoice(choice.index) for choice in generation.choices]

    async def collect(delta: ChoiceDelta) -> None:
        choices[delta.index].add(delta)

    await generation.run(collect)
    body = with_usage(shape.body(choices), generation.usage(), generation.report())
    return web.Response(body=body, content_type="application/json")


async def _answer_stream(
    request: web.Request, gateway: Gateway, generation: Generation, shape: Shape
) -> web.StreamResponse:
    headers = {REQUEST_ID_HEADER: current_call().request_id}
    writer = SseWriter(request, headers, gateway.config.ping_interval_s)
    async with writer.pinging():
        try:
            await _stream_choices(writer, generation, shape)
        except ServeError as err:
            if not writer.is_started:
                raise
            await _end_with_error(writer, err)
        except ConnectionError:
            raise  # nobody to tell
        except Exception:
            logger.exception("stream failed unexpectedly request_id=%s", current_call().request_id)
            if not writer.is_started:
                raise
            await _end_with_error(writer, InternalError("unexpected"))
    return writer.response


async def _stream_choices(writer: SseWriter, generation: Generation, shape: Shape) -> None:
    options = generation.job.options
    opened: set[int] = set()

    async def send(delta: ChoiceDelta) -> None:
        if delta.index not in opened:
            opened.add(delta.index)
            opening = shape.opening(delta.index)
            if opening is not None:
                await writer.send(_encode(opening))
        await writer.send(_encode(shape.chunk(delta)))
        generation.mark_written(delta.index)

    def _encode(document: dict[str, object]) -> bytes:
        if options.has_usage:
            return with_usage(document, generation.usage() if options.has_continuous_usage else None)
        return msgspec.json.encode(document)

    await generation.run(send)
    if options.has_usage:
        await writer.send(with_usage(shape.choiceless_chunk(), generation.usage(), generation.report()))
    await writer.write(DONE)
    await writer.close()


async def _end_with_error(writer: SseWriter, error: ServeError) -> None:
    """One error event and the end of the connection; no [DONE], so nobody takes the answer for whole."""
    await writer.send(msgspec.json.encode(error_body(error)))
    await writer.close(keep_alive=False)
