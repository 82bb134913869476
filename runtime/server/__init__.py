"""An OpenAI-compatible server over engines: ``lvlm-serve``; needs the extra ``serve``."""
