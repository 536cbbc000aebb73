"""The published task behind LitServe. A module of its own: LitServe's worker processes import it by name.

LitServe reads the annotations, so they are not postponed.
"""

from typing import Annotated, Any

import litserve
from _servers import answer, open_model
from fastapi import Depends, Request, Response


async def body_of(request: Request) -> bytes:
    """As it is: LitServe itself takes JSON and forms."""
    return await request.body()


class Api(litserve.LitAPI):
    """As LitServe's documentation has it."""

    def __init__(self, home: str) -> None:
        super().__init__(api_path="/features")
        self.home = home

    def setup(self, device: str) -> None:
        self.model = open_model(self.home)

    def decode_request(self, request: Annotated[bytes, Depends(body_of)], **_: Any) -> bytes:
        return request

    def predict(self, image: bytes, **_: Any) -> bytes:
        return answer(self.model, image)

    def encode_response(self, output: bytes, **_: Any) -> Response:
        return Response(output, media_type="application/x-safetensors")
