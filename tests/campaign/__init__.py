"""Generated inputs and kills for every command: see docs/notes/campaign.md."""
