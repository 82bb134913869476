"""Images of things and questions about them: what tiny-llava was trained on."""
