"""The ``lvlm::`` ops; one file each, found by discovery."""
