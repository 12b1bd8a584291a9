"""The demo: its data, its tokenizer and its base model from nothing."""
