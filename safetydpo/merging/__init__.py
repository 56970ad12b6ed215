"""Merging: from many safety experts to one LoRA adapter, exactly and in delta space."""
