"""The demo checkpoints: generated chat tasks, a small tokenizer, and the training of tiny models with transformers."""
