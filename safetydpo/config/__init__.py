"""Configuration: frozen pydantic models; loads without torch or ray."""
