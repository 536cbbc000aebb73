"""What the OpenAPI schema says beside what FastAPI reads off the routes: bodies, examples, errors, who may ask."""

from __future__ import annotations

from typing import Any, Final

from starlette.responses import Response

from serve.codec import PRECISIONS, media_type
from serve.problems import MEDIA_TYPE as PROBLEM

DESCRIPTION: Final = (
    "A producer keeps its images and sends a tenant the features of the task that it bought. Bodies of features are "
    "safetensors with the tensors z (N, C, H, W), sequence (N,) and time_ms (N,), and the text task, version, last and "
    "oldest. A head is for one version: compare it, or name it with ?version=."
)
_BINARY: Final = {"type": "string", "format": "binary"}
_PROBLEM_SCHEMA: Final = {
    "type": "object",
    "required": ["status", "title"],
    "additionalProperties": False,
    "properties": {"status": {"type": "integer"}, "title": {"type": "string"}, "detail": {"type": "string"}},
}


def _problem(description: str, title: str, status: int, *, detail: str = "") -> dict[str, Any]:
    example = {"status": status, "title": title, **({"detail": detail} if detail else {})}
    return {"description": description, "content": {PROBLEM: {"schema": _PROBLEM_SCHEMA, "example": example}}}


ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: _problem("A parameter is not right.", "a parameter is not right", 400, detail="limit"),
    401: _problem("No valid token.", "no valid token was given", 401),
    403: _problem("A quota is used up.", "the quota of this task is used up", 403),
    404: _problem("No such task for this token.", "there is no such task for this token", 404),
    405: _problem("No such method.", "there is no such method here", 405),
    429: _problem("Too often; see Retry-After.", "too many requests", 429),
    503: _problem("Too busy; see Retry-After.", "the server is busy", 503),
}
_NOT_ACCEPTABLE: Final = _problem("Nothing that is accepted is here.", "nothing that is accepted is here", 406)
_BODY: Final = {
    "description": "Features of one version.",
    "content": {media_type(precision): {"schema": _BINARY} for precision in PRECISIONS},
    "headers": {
        "X-Feature-Version": {"schema": {"type": "string"}, "example": "1.2-0c4f5e6a7b8d"},
        "X-Features": {"schema": {"type": "string"}, "example": "17-32 of version 1.2-0c4f5e6a7b8d"},
    },
}

FEATURES: Final[dict[str, Any]] = {
    "response_class": Response,
    "responses": {
        **ERRORS,
        200: _BODY,
        406: _NOT_ACCEPTABLE,
        408: _problem("The body was too slow.", "the body was too slow", 408),
        413: _problem("The body is too large.", "the body has more than 8,388,608 bytes", 413),
        415: _problem("No image.", "the body is no image that can be used", 415, detail="it is empty"),
        422: _problem("An image without a feature.", "the image has no finite feature", 422),
    },
}
"""Of a route that takes an image."""
NOTHING_NEW: Final[dict[str, Any]] = {
    "response_class": Response,
    "responses": {**ERRORS, 200: _BODY, 204: {"description": "There is none yet."}, 406: _NOT_ACCEPTABLE},
}
"""Of a route that gives features."""
STREAM: Final[dict[str, Any]] = {
    "response_class": Response,
    "responses": {
        **ERRORS,
        200: {
            "description": "Bodies of features, each after its length in 4 bytes, big-endian; 0 is a sign of life.",
            "content": {f"application/x-safetensors-stream;precision={p}": {"schema": _BINARY} for p in PRECISIONS},
        },
        406: _NOT_ACCEPTABLE,
    },
}
METADATA: Final[dict[str, Any]] = {
    "responses": {
        **ERRORS,
        200: {
            "description": "What the feature is.",
            "content": {
                "application/json": {
                    "schema": {"type": "object"},
                    "example": {
                        "task": "loop",
                        "version": "1.2-0c4f5e6a7b8d",
                        "classes": ["open", "closed"],
                        "feature_shape": [64, 16, 16],
                        "dtype": "float32",
                        "bits_per_feature": None,
                        "epsilon": 8.0,
                        "delta": 1e-05,
                        "guarantee": "The weights of the encoder are differentially private ...",
                        "created": "2026-01-31T12:00:00+00:00",
                        "leakage": {"budget": "full", "targets": 3, "excess": 0.348, "bits": 3.24},
                        "canary": None,
                    },
                }
            },
        },
    }
}
IMAGE: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "description": "One image, as its file is.",
        "content": {f"image/{kind}": {"schema": _BINARY} for kind in ("jpeg", "png", "webp", "bmp", "gif", "tiff")},
    }
}


def with_security(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, with a bearer token on every route, and without FastAPI's own form of errors, which is not used."""
    schema["components"] = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
    schema["security"] = [{"token": []}]
    for methods in schema["paths"].values():
        for operation in methods.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    return schema
