"""The tenant's side of serving, for small devices: numpy, httpx, onnxruntime, safetensors, and Python 3.9 or newer.

`serve.edge.train` alone needs torch and Python 3.11: it trains a head against a producer's session.
"""

from serve.edge.client import EdgeClient, Features, MapPrediction, Prediction
from serve.edge.head import Answer, Head

__all__ = ["Answer", "EdgeClient", "Features", "Head", "MapPrediction", "Prediction"]
