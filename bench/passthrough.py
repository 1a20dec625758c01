"""The streaming proxy that anyone would write: Starlette in front, httpx behind, nothing kept.

    python bench/passthrough.py PORT PROVIDER_BASE_URL            uvicorn as `pip install uvicorn` brings it
    python bench/passthrough.py PORT PROVIDER_BASE_URL --tuned    on uvloop and httptools, as llmchat is

It parses nothing, stores nothing and cannot resume: the yardstick for what Starlette and httpx cost by themselves.
httpx's cap of 100 connections is lifted, which not everyone would think of.
"""

import sys

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

client = httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None, max_keepalive_connections=100))


async def health(request: Request) -> JSONResponse:
    return JSONResponse({"status": "ok"})


async def chat(request: Request) -> StreamingResponse:
    body = await request.body()

    async def relay():
        url = f"{sys.argv[2]}/chat/completions"
        async with client.stream("POST", url, content=body, headers={"Content-Type": "application/json"}) as response:
            async for piece in response.aiter_bytes():
                yield piece

    return StreamingResponse(relay(), media_type="text/event-stream")


app = Starlette(routes=[Route("/api/v1/health", health), Route("/v1/chat/completions", chat, methods=["POST"])])

if __name__ == "__main__":
    loop, parser = ("uvloop", "httptools") if sys.argv[3:] == ["--tuned"] else ("asyncio", "h11")
    uvicorn.run(app, port=int(sys.argv[1]), loop=loop, http=parser, log_level="warning", access_log=False)
