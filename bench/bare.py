"""Starlette, uvicorn and httpx, and one route: what starting and idling cost before a program does anything.

python bench/bare.py PORT
"""

import sys

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


async def health(request: Request) -> JSONResponse:
    return JSONResponse({"status": "ok", "httpx": httpx.__version__})


app = Starlette(routes=[Route("/api/v1/health", health)])

if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
