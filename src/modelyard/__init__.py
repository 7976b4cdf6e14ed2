"""Modelyard: from labelled data to a compressed, right-sized inference service, with the measurements that prove it."""

__version__ = "0.1.0"
