"""The library: how privacy-cognizant features are trained, published and measured."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - the base install, which is the edge client, is for Python 3.9 too
    raise ImportError("this part of metamorphosis-ray needs Python 3.11; on Python 3.9 there is the edge client alone")
