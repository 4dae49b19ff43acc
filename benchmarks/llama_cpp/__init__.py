"""Decode throughput beside llama.cpp."""
