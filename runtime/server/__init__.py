"""A server of OpenAI's API over one engine."""
