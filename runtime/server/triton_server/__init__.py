"""NVIDIA's Triton Inference Server: a model repository, and the model that its Python backend runs
over an Engine. Nothing here needs FastAPI."""
